"""The vLLM plugin on vLLM's own DeepSeek-V3.2 for CUDA, on 2 and 4 ranks of the CPU: `make test-vllm`."""

import json
import logging
import os
import re
import types

import pytest
import ranks
import torch
import vllm_sparse
from vllm_sparse import CONFIG, ENGINE, MAX_TOKENS, NUM_LAYERS

from tp_fused.integrations import vllm as plugged

PER_FORWARD = {"rs_rmsnorm": NUM_LAYERS, "qkv_a_proj_ag": NUM_LAYERS}
OFFLOADING = types.SimpleNamespace(
    uva=types.SimpleNamespace(cpu_offload_gb=1), prefetch=types.SimpleNamespace(offload_group_size=0)
)
QUANTISED = {"rs_rmsnorm": NUM_LAYERS, "all_gather_rows": NUM_LAYERS}

pytestmark = [
    pytest.mark.skipif(not ENGINE.is_dir(), reason="vllm is not in build/engines: make test-vllm"),
    pytest.mark.filterwarnings("ignore"),
    pytest.mark.timeout(600),
]


def close(got, expected, tolerance: float = 2e-5) -> bool:
    return got.shape == expected.shape and torch.allclose(got, expected, rtol=tolerance, atol=tolerance)


# ---- on the ranks ----

_engine = None  # this process's
_built = {}  # the model of vLLM's own and the plugin's


def begin(folder: str, data: int):
    global _engine
    if _engine is None:
        _engine = vllm_sparse.Engine(folder)
        os.environ["TP_FUSED_VLLM"] = "1"
        plugged.plugin()
    _engine.divide(data)
    _built.clear()
    _built.update(own=_engine.build(), plugin=_engine.build(plugin_class()))
    return [{type(layer).__name__ for layer in _built[name].model.layers} for name in ("own", "plugin")]


def plugin_class(name: str = "DeepseekV32ForCausalLM"):
    """As vLLM finds it."""
    from vllm import ModelRegistry

    return ModelRegistry.models[name].load_model_cls()


def counted(function, *arguments):
    """(result, which ops were called, rows of the experts' shares)"""
    from tp_fused.integrations.vllm import workspace

    workspace.calls.clear()
    return function(*arguments), dict(workspace.calls)


def shares(model):
    """Rows that the experts of each layer had in each call, and forgets them."""
    sizes = [list(layer.mlp.experts.sizes) for layer in model.model.layers if hasattr(layer.mlp, "experts")]
    for layer in model.model.layers[CONFIG["first_k_dense_replace"] :]:
        layer.mlp.experts.sizes.clear()
    return sizes


def forwards(sizes):
    """Replicas have other batches at the same time. [(got, what was called, expected, shares, shares expected)]"""
    sizes = sizes[_engine.replica :] + sizes[: _engine.replica]
    results = []
    for size in sizes:
        got, calls = counted(_engine.forward, _built["plugin"], size)
        expected = _engine.forward(_built["own"], size)
        results.append((got, calls, expected, shares(_built["plugin"]), shares(_built["own"])))
    return results


def against_vllm_s(plugin, num_tokens: int, inputs_embeds=None, own=None):
    """(got, what was called, expected)"""
    got, calls = counted(_engine.forward, plugin, num_tokens, inputs_embeds)
    return got, calls, _engine.forward(own or _built["own"], num_tokens, inputs_embeds)


def of_embeddings(num_tokens):
    rows = torch.randn(num_tokens, CONFIG["hidden_size"], generator=torch.Generator().manual_seed(5))
    return against_vllm_s(_built["plugin"], num_tokens, rows)


def of_a_replicated_embedding(num_tokens):
    """vLLM hands the first layer its normed input."""
    os.environ["VLLM_REPLICATE_EMBED"] = "1"
    try:
        own, plugin = _engine.build(), _engine.build(plugin_class())
    finally:
        del os.environ["VLLM_REPLICATE_EMBED"]
    assert own.model.replicated_embed and plugin.model.replicated_embed
    return against_vllm_s(plugin, num_tokens, own=own)


def of_states_between_layers(num_tokens):
    """What EAGLE3 reads."""
    for model in _built.values():
        model.set_aux_hidden_state_layers((1, 3))
    try:
        (got, got_aux), calls, (expected, expected_aux) = against_vllm_s(_built["plugin"], num_tokens)
    finally:
        for model in _built.values():
            model.set_aux_hidden_state_layers(())
    return torch.cat([got, *got_aux]), calls, torch.cat([expected, *expected_aux])


def of_quantised_projections(num_tokens):
    """A stand-in for a quantised linear: vLLM's own kernel has to run it."""

    def prepare(made, config):
        from vllm.model_executor.layers.linear import UnquantizedLinearMethod

        from tp_fused.integrations.vllm import sequence_parallel

        class Quantised(UnquantizedLinearMethod):
            pass

        for layer in made.model.layers:
            layer.self_attn.fused_qkv_a_proj.quant_method = Quantised()
        sequence_parallel.replace_layers(made.model, config)

    return against_vllm_s(_engine.build(prepare=prepare), num_tokens)


def of_weights_replaced(num_tokens):
    """Of one layer, after they were loaded; it gets others, of which vLLM's own model has the same."""
    own, plugin = _engine.build(), _engine.build(plugin_class())
    for model in (own, plugin):
        weight = model.model.layers[1].self_attn.fused_qkv_a_proj.weight
        weight.data = weight.data.flip(0).contiguous()
    return against_vllm_s(plugin, num_tokens, own=own)


def of_glm(num_tokens):
    return against_vllm_s(_engine.build(plugin_class("GlmMoeDsaForCausalLM")), num_tokens)


def of_a_broken(what, num_tokens):
    """The negative controls: something is wrong in the first layer."""
    plugin = _engine.build(plugin_class())
    layer = plugin.model.layers[0]
    if what == "reduction" and torch.distributed.get_rank() % 2:
        layer.self_attn.o_proj.register_forward_hook(lambda _module, _inputs, output: (output[0] * 0, None))
    if what == "indexer":
        layer.self_attn.indexer.wk_weights_proj.columns = slice(0, CONFIG["index_head_dim"] + CONFIG["index_n_heads"])
    return against_vllm_s(plugin, num_tokens)


def refused(changes, environment, patch, num_tokens):
    """What is said when a model is built, the classes of its layers, and a forward of it."""
    heard = []
    handler = logging.Handler()
    handler.emit = lambda record: heard.append(record.getMessage())
    logger = logging.getLogger("tp_fused.integrations.vllm.workspace")
    logger.addHandler(handler)
    os.environ |= environment
    undo = patch()
    try:
        made = _engine.build(plugin_class(), **changes)
    finally:
        undo()
        for name in environment:
            del os.environ[name]
        logger.removeHandler(handler)
    layers = {type(layer).__name__ for layer in made.model.layers}
    return heard, layers, *against_vllm_s(made, num_tokens)


def _patched(owner, name, value):
    before = getattr(owner, name)
    setattr(owner, name, value)
    return lambda: setattr(owner, name, before)


def nothing():
    return lambda: None


def make_init_fail():
    from tp_fused.integrations.vllm import workspace

    def init(*_, **__):
        raise ValueError("rank 1 has other sizes")

    return _patched(workspace, "init", init)


def change_a_norm():
    """The layers of another release, say."""
    from vllm.model_executor.layers.layernorm import RMSNorm

    class Norm(RMSNorm):
        pass

    return _patched(_engine.model, "RMSNorm", Norm)


def wrap_layers():
    """As vLLM's offloader does."""
    made = _engine.model.make_layers

    def make_layers(*arguments, **options):
        start, end, layers = made(*arguments, **options)
        for layer in layers:
            layer.forward = layer.forward
        return start, end, layers

    return _patched(_engine.model, "make_layers", make_layers)


# ---- the tests ----


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    made = tmp_path_factory.mktemp("deepseek_v32")
    (made / "config.json").write_text(json.dumps(CONFIG))
    return str(made)


@pytest.fixture(scope="module")
def pools_with_vllm():
    made = {}

    def get(world_size: int) -> ranks.Pool:
        if world_size not in made or not made[world_size].alive:
            made[world_size] = ranks.Pool(world_size)
        return made[world_size]

    yield get
    for pool in made.values():
        pool.close()


on_two_ranks = pytest.mark.parametrize("engine", [(2, 1)], indirect=True, ids=["tp2"])


@pytest.fixture(scope="module", params=[(2, 1), (4, 1), (4, 2)], ids=["tp2", "tp4", "dp2-tp2"])
def engine(request, folder, pools_with_vllm):
    """(pool of ranks, of how many a replica is)"""
    world_size, data = request.param
    pool = pools_with_vllm(world_size)
    for own, plugin in pool.run(begin, folder, data, timeout_s=280.0):
        assert own == {"DeepseekV32DecoderLayer"} and plugin == {"_ScatteredLayer"}
    return pool, world_size // data


def test_the_same_at_any_token_count(engine):
    pool, tensor = engine
    sizes = [0, 1, 2, 3, 4, 5, 2 * tensor + 1, 0, 31, MAX_TOKENS]
    by_rank = pool.run(forwards, sizes)
    for results in by_rank:
        for got, calls, expected, rows, rows_expected in results:
            assert close(got, expected), len(got)
            assert calls == PER_FORWARD, len(got)
            assert rows == rows_expected == [[-(-len(got) // tensor)]] * (NUM_LAYERS - 1)
    for rank, results in enumerate(by_rank):
        first_of_replica = by_rank[rank // tensor * tensor]
        assert all(torch.equal(one[0], other[0]) for one, other in zip(results, first_of_replica, strict=True))


@on_two_ranks
def test_pipelines_are_refused(engine):
    """Without a look at numbers: vLLM's experts are then sequence-parallel, and its layers are not."""
    pool, _ = engine
    for heard, layers, _, calls, _ in pool.run(refused, {"pipeline_parallel_size": 2}, {}, nothing, 7):
        assert layers == {"DeepseekV32DecoderLayer"} and calls == {}
        assert heard == ["tp_fused leaves vLLM's model as it is: pipeline parallelism"]


@pytest.mark.parametrize("what", ["reduction", "indexer"])
def test_what_is_wrong_is_seen(engine, what):
    """What all other tests rely on: they would notice it."""
    pool, _ = engine
    for got, _, expected in pool.run(of_a_broken, what, 13):
        assert got.shape == expected.shape and not close(got, expected, 1e-2)


@pytest.mark.parametrize("of", [of_embeddings, of_a_replicated_embedding, of_states_between_layers, of_glm])
def test_what_enters_and_is_read_between_layers(engine, of):
    pool, tensor = engine
    for got, calls, expected in pool.run(of, 2 * tensor + 1):
        assert close(got, expected) and calls == PER_FORWARD


def test_quantised_projections_are_vllm_s_own(engine):
    pool, tensor = engine
    for size in (1, 2 * tensor + 1):
        for got, calls, expected in pool.run(of_quantised_projections, size):
            assert close(got, expected) and calls == QUANTISED


def test_weights_that_are_replaced_after_loading(engine):
    pool, tensor = engine
    for got, calls, expected in pool.run(of_weights_replaced, 2 * tensor + 1):
        assert close(got, expected)
        assert calls == {**PER_FORWARD, "qkv_a_proj_ag": NUM_LAYERS - 1, "all_gather_rows": 1}


@on_two_ranks
@pytest.mark.parametrize(
    "changes, environment, patch, said",
    [
        ({"enable_expert_parallel": False}, {}, nothing, "a residual that is not scattered"),
        ({"data_parallel_size": 1}, {}, nothing, "a residual that is not scattered"),
        ({"lora_config": True}, {}, nothing, "LoRA"),
        ({"enable_dbo": True}, {}, nothing, "batches in two halves"),
        ({"enable_elastic_ep": True}, {}, nothing, "elastic expert parallelism"),
        ({"decode_context_parallel_size": 2}, {}, nothing, "context parallelism"),
        ({"mode": 1}, {}, nothing, "torch.compile"),
        ({}, {"VLLM_BATCH_INVARIANT": "1"}, nothing, "batch invariance"),
        ({}, {}, change_a_norm, "an unknown kind of layer"),
        ({}, {}, wrap_layers, "an unknown kind of layer"),
        ({"offload_config": OFFLOADING}, {}, nothing, "weights that are offloaded"),
        ({}, {}, make_init_fail, "tp_fused.init: rank 1 has other sizes"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else getattr(value, "__name__", None),
)
def test_what_is_refused(engine, changes, environment, patch, said):
    """One line says so, and vLLM goes its own way."""
    pool, _ = engine
    for heard, layers, got, calls, expected in pool.run(refused, changes, environment, patch, 7):
        assert layers == {"DeepseekV32DecoderLayer"} and calls == {} and close(got, expected)
        assert len(heard) == 1 and re.match(f"tp_fused leaves vLLM's model as it is: {said}", heard[0])
