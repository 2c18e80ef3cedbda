"""Ranks that bring different models to `parallelize` or `load_parallel`: told on every rank, and nothing is changed."""

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

pytest.importorskip("transformers", reason="needs transformers (the test extra)")

import fp8_models
from tiny_models import make_both, make_ids, make_model
from transformers import GPT2Config, GPT2LMHeadModel, LlamaForCausalLM

import tp_fused
from tp_fused.faults import CollectiveFault
from tp_fused.integrations.transformers import load_parallel, parallelize
from tp_fused.integrations.transformers.same_model import describe_tensors


def is_odd() -> bool:
    return dist.get_rank() == dist.get_world_size() - 1


def bring(case: str, device: str) -> tuple[str, bool]:
    """Runs on a rank: what is said of the last rank's model, and whether this one is still as it was."""
    kind, changes, arguments = "llama", {}, {}
    if case == "class" and is_odd():
        kind = "qwen2"
    if case.startswith("mla") or case == "buffer":
        kind = "v3"
    if case == "heads" and is_odd():
        changes = dict(num_attention_heads=14, head_dim=8)
    if case in ("layers", "mla layers") and is_odd():
        changes = dict(num_hidden_layers=2)
    if case == "rope" and is_odd():
        changes = dict(rope_parameters=dict(rope_type="default", rope_theta=5e5))
    if case == "argument" and is_odd():
        arguments = dict(way="transport")
    model = fp8_models.make_whole(device) if case == "fp8" else make_model(kind, device, **changes)
    with torch.no_grad():
        if case == "dtype" and is_odd():
            model.bfloat16()
        if case in ("values", "mla values", "fp8") and is_odd():
            for parameter in model.model.layers[1].self_attn.o_proj.parameters():
                parameter.copy_(parameter.float().flip(0))
        if case == "buffer" and is_odd():
            model.model.layers[1].mlp.gate.e_score_correction_bias += 1
    before = describe_tensors(model)
    try:
        parallelize(model, max_num_tokens=32, timeout_s=20.0, **arguments)
    except ValueError as error:
        return str(error), describe_tensors(model) == before and model.model.embed_tokens.num_embeddings == 61
    return "", False


ODD = r"\(ranks 0, 1: {}; rank 2: {}\)"


@pytest.mark.parametrize(
    ("case", "said"),
    [
        ("class", r"model: class " + ODD.format("LlamaForCausalLM", "Qwen2ForCausalLM")),
        ("heads", r"config: .*num_attention_heads " + ODD.format(7, 14)),
        ("layers", r"config: num_hidden_layers " + ODD.format(3, 2)),
        ("mla layers", r"config: .*num_hidden_layers " + ODD.format(3, 2)),
        ("rope", r"config: rope_parameters.rope_theta " + ODD.format("10000.0", "500000.0")),
        ("argument", r"arguments: way " + ODD.format("fused", "transport")),
        ("dtype", r"tensors: .*model.embed_tokens.weight \(ranks 0, 1: torch.float32 .*; rank 2: torch.bfloat16 "),
        (
            "values",
            r"values: model.layers.1.self_attn.o_proj.\w+ " + ODD.format(r"checksum (\w+)", r"checksum (?!\1)\w+"),
        ),
        ("buffer", r"values: model.layers.1.mlp.gate.e_score_correction_bias \(ranks 0, 1: "),
        ("mla values", r"values: model.layers.1.self_attn.o_proj.weight \(ranks 0, 1: .*; rank 2: "),
        ("fp8", r"values: model.layers.1.self_attn.o_proj.weight \(ranks 0, 1: .*; rank 2: "),
    ],
)
@pytest.mark.parametrize("world_size", [3])
def test_different_models_are_told_on_every_rank(pool, device, case, said):
    outcomes = pool.run(bring, case, device)
    assert len({message for message, _ in outcomes}) == 1
    for message, unchanged in outcomes:
        assert "parallelize: the ranks differ in " in message
        assert re.search(said, message), message
        assert unchanged


@pytest.mark.parametrize(("rows", "columns"), [(128, 64), (64, 256), (7, 96), (1, 1)])
def test_a_sample_is_of_all_columns(rows, columns):
    """An even step would stay in one column of rows whose length it divides."""
    linear = torch.nn.Linear(columns, rows)
    before = describe_tensors(linear)
    with torch.no_grad():
        linear.weight[:, 0 if columns == 1 else 1 :] *= 3
    assert describe_tensors(linear)["values"]["weight"] != before["values"]["weight"]


def saved_on_one_rank(device: str, folder: str) -> None:
    """Runs on a rank: saving adds to the config what the other ranks' does not have."""
    whole, model, _ = make_both("llama", None, device)
    model = make_model("llama", device)
    if is_odd():
        model.save_pretrained(folder)
    parallelize(model, max_num_tokens=32)
    ids = make_ids((1, 9), device)
    torch.testing.assert_close(model(ids).logits, whole(ids).logits, atol=1e-4, rtol=0)


@pytest.mark.parametrize("world_size", [2])
def test_a_rank_may_have_saved_its_model(pool, device, tmp_path):
    pool.run(saved_on_one_rank, device, str(tmp_path))


def small(device: str) -> list[str]:
    """Runs on a rank: rows of a few bytes and one token, which are less than what the ranks compare."""
    said = []
    narrow = dict(hidden_size=16, num_attention_heads=2, num_key_value_heads=2, intermediate_size=16)
    model = make_model("llama", device, **narrow).bfloat16()
    parallelize(model, max_num_tokens=1)
    ids = make_ids((1, 1), device)
    assert model(ids).logits.isfinite().all()
    for call in (lambda: model(make_ids((1, 2), device)), lambda: parallelize(make_model("llama", device))):
        try:
            call()
        except ValueError as error:
            said.append(str(error))
        tp_fused.init(max_num_tokens=1, hidden_size=16, dtype=torch.bfloat16, device=device).close()
    with (
        tp_fused.init(max_num_tokens=1, hidden_size=16, dtype=torch.bfloat16, device=device),
        pytest.raises(ValueError, match="takes 1 rows of 32 bytes; a model wants 2 of 64 at least"),
    ):
        parallelize(make_model("llama", device))
    return said


@pytest.mark.parametrize("world_size", [2])
def test_small_workspaces(pool, device):
    for limit, closed in pool.run(small, device):
        assert limit.startswith("a forward of 2 tokens (1, 2) is over max_num_tokens=1")
        assert closed.endswith(", or pass max_num_tokens")


def own_seed(device: str) -> str:
    """Runs on a rank: weights of a seed of its own, and then of a common one."""
    model = make_model("v3", device)
    generator = torch.Generator().manual_seed(dist.get_rank())
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    with pytest.raises(
        ValueError, match=r"values: model.embed_tokens.weight \(rank 0: .*; rank 1: .*\), .* and \d+ more"
    ):
        parallelize(model, max_num_tokens=32)
    whole, model, _ = make_both("v3", None, device)
    ids = make_ids((1, 9), device)
    torch.testing.assert_close(model(ids).logits, whole(ids).logits, atol=1e-4, rtol=0)


@pytest.mark.parametrize("world_size", [2])
def test_other_seeds_are_told_and_a_later_call_works(pool, device):
    pool.run(own_seed, device)


def refused_by_one(device: str) -> None:
    """Runs on a rank: only the last one's model is refused."""
    if is_odd():
        parallelize(GPT2LMHeadModel(GPT2Config(n_layer=1, n_embd=16, n_head=2, vocab_size=8)), max_num_tokens=8)
    parallelize(make_model("llama", device), max_num_tokens=8)


@pytest.mark.parametrize("world_size", [3])
def test_a_model_that_one_rank_refuses_is_told_to_the_others(pool, device):
    *others, own = pool.outcomes(refused_by_one, device)
    assert isinstance(own, ValueError) and "got <class" in str(own)
    for fault in others:
        assert isinstance(fault, CollectiveFault) and "rank 2 gave up: ValueError: parallelize takes a" in str(fault)


def allowed(folder: str, device: str) -> None:
    """Runs on a rank: folders of other names with the same content."""
    own = Path(folder) / str(dist.get_rank())
    parallelize(LlamaForCausalLM.from_pretrained(own).to(device), max_num_tokens=8, timeout_s=20.0)
    load_parallel(own, max_num_tokens=8, timeout_s=20.0, device=device)


@pytest.mark.parametrize("world_size", [2])
def test_folders_may_have_other_names(pool, device, tmp_path):
    for rank in "01":
        make_model("llama").save_pretrained(tmp_path / rank)
    pool.run(allowed, str(tmp_path), device)


def load_own(folder: str, device: str) -> None:
    """Runs on a rank: rank 0 loads one folder, the others another."""
    folders = sorted(Path(folder).iterdir())
    load_parallel(folders[min(dist.get_rank(), 1)], max_num_tokens=16, timeout_s=20.0, device=device)


@pytest.mark.parametrize(
    ("case", "said"),
    [
        ("class", r"model: class \(rank 0: LlamaForCausalLM; rank 1: Qwen2ForCausalLM\)"),
        ("config", r"config: rms_norm_eps \(rank 0: 1e-06; rank 1: 0.001\)"),
        ("stored", r"tensors: model.norm.weight \(rank 0: F32 \[56\]; rank 1: BF16 \[56\]\)"),
        ("values", r"values: model.layers.2.mlp.up_proj.weight \(rank 0: checksum \w{8}; rank 1: checksum \w{8}\)$"),
    ],
)
@pytest.mark.parametrize("world_size", [2])
def test_different_folders_are_told_on_every_rank(pool, device, tmp_path, case, said):
    make_model("llama").save_pretrained(tmp_path / "a")
    other = make_model("qwen2" if case == "class" else "llama")
    with torch.no_grad():
        if case == "stored":
            other.model.norm.bfloat16()
        if case == "values":
            other.model.layers[2].mlp.up_proj.weight.neg_()
    other.save_pretrained(tmp_path / "b")
    if case == "config":
        config = json.loads((tmp_path / "b" / "config.json").read_text())
        (tmp_path / "b" / "config.json").write_text(json.dumps({**config, "rms_norm_eps": 1e-3}))
    if case == "stored":
        shutil.copy(tmp_path / "a" / "config.json", tmp_path / "b")
    for outcome in pool.outcomes(load_own, str(tmp_path), device):
        with pytest.raises(ValueError, match="load_parallel: the ranks differ in " + said):
            raise outcome


def no_folder(folder: str, device: str) -> None:
    """Runs on a rank: rank 1 lacks the folder."""
    load_parallel(Path(folder) / str(dist.get_rank()), max_num_tokens=8, device=device)


@pytest.mark.parametrize("world_size", [2])
def test_a_rank_without_the_folder_is_told_at_once(pool, device, tmp_path):
    make_model("llama").save_pretrained(tmp_path / "0")
    first, second = pool.outcomes(no_folder, str(tmp_path), device)
    assert isinstance(second, ValueError) and "has no config.json" in str(second)
    assert isinstance(first, CollectiveFault) and "rank 1 gave up: ValueError: " in str(first)


# ---- arguments ----


def give(loads: bool, folder: str, device: str, arguments: dict) -> bool:
    """Runs on a rank: raises what is said of an argument; False where the model was changed before."""
    model = make_model("v3", device)
    before = describe_tensors(model)
    try:
        if loads:
            load_parallel(folder, device=device, **{"max_num_tokens": 8, **arguments})
        else:
            parallelize(model, **{"max_num_tokens": 8, **arguments})
    except (TypeError, ValueError):
        if describe_tensors(model) != before:
            return False
        raise
    return False


@pytest.mark.parametrize("loads", [False, True], ids=["parallelize", "load_parallel"])
@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (dict(max_num_tokens=0), ValueError, "max_num_tokens must be positive, got 0"),
        (dict(max_num_tokens=-1), ValueError, "max_num_tokens must be positive, got -1"),
        (dict(max_num_tokens=1.5), TypeError, "max_num_tokens must be an integer, got 1.5"),
        (dict(max_num_tokens=True), TypeError, "max_num_tokens must be an integer, got True"),
        (dict(max_num_tokens="8"), TypeError, "max_num_tokens must be an integer, got '8'"),
        (dict(check_tokens=None), ValueError, "check_tokens must be one of first, always, never, got None"),
        (dict(group="0"), TypeError, "group must be a process group, got '0'"),
        (dict(group=3), TypeError, "group must be a process group, got 3"),
        (dict(group=dist.GroupMember.NON_GROUP_MEMBER), ValueError, "this rank is not in the group"),
    ],
)
@pytest.mark.parametrize("world_size", [2])
def test_an_argument_that_is_none_is_told_on_every_rank(pool, device, tmp_path, loads, arguments, error, message):
    make_model("v3").save_pretrained(tmp_path)
    for outcome in pool.outcomes(give, loads, str(tmp_path), device, arguments):
        with pytest.raises(error, match=message):
            raise outcome
