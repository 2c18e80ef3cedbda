"""`load_parallel`: models of transformers whose weights each rank reads its part of."""

import json
import os
import shutil

import pytest
import torch
import torch.distributed as dist

pytest.importorskip("transformers", reason="needs transformers (the test extra)")

import safetensors.torch
from tiny_models import make_ids, make_model
from transformers import AutoModelForCausalLM

from tp_fused.integrations.transformers import load_parallel, loading, parallelize

# Expert columns that two ranks need not pad, so that what is read and what is held are the same bytes.
CHANGES = {"v3": dict(moe_intermediate_size=32), "glm_moe_dsa": dict(moe_intermediate_size=32)}
KINDS = ["v3", "v3_bias", "v2_lite", "glm_moe_dsa", "llama", "qwen3"]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Of every kind: what save_pretrained writes, in several files."""
    made = {}
    for kind in KINDS:
        made[kind] = tmp_path_factory.mktemp(kind)
        make_model(kind, **CHANGES.get(kind, {})).save_pretrained(made[kind], max_shard_size="40KB")
        assert (made[kind] / "model.safetensors.index.json").is_file()
    return made


def both(folder: str, device: str, dtype: torch.dtype | None = None):
    """On a rank: loaded whole and sharded, and loaded by parts, and how many bytes of weights these were."""
    os.environ.pop("TP_FUSED_BACKEND", None)
    arguments = {} if dtype is None else {"dtype": dtype}
    whole = AutoModelForCausalLM.from_pretrained(folder, **arguments).to(device)
    parallelize(whole, max_num_tokens=64, timeout_s=20.0)
    num_bytes, read = 0, loading.Checkpoint.read

    def counted(self, *args):
        nonlocal num_bytes
        part = read(self, *args)
        num_bytes += part.nbytes
        return part

    loading.Checkpoint.read = counted
    try:
        model, _ = load_parallel(folder, max_num_tokens=64, timeout_s=20.0, device=device, **arguments)
    finally:
        loading.Checkpoint.read = read
    return whole, model, num_bytes


def compare(folder: str, device: str) -> tuple[int, int]:
    """Runs on a rank: the same logits and tokens; (bytes read, bytes held)."""
    whole, model, num_bytes = both(folder, device)
    ids = make_ids((2, 9), device)
    assert torch.equal(model(ids).logits, whole(ids).logits)
    arguments = dict(max_new_tokens=5, do_sample=False, pad_token_id=0)
    assert torch.equal(model.generate(ids, **arguments), whole.generate(ids, **arguments))
    return num_bytes, sum(tensor.nbytes for tensor in model.state_dict().values())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("world_size", [2])
def test_loaded_by_parts_it_is_the_same_model(pool, device, folders, kind):
    in_files = sum(path.stat().st_size for path in folders[kind].glob("*.safetensors"))
    for num_bytes, held in pool.run(compare, str(folders[kind]), device):
        if kind not in ("v3_bias", "v2_lite"):  # whose experts are padded
            assert num_bytes == held
        assert 0.3 * in_files < num_bytes < 0.75 * in_files


def tensors(folder: str, device: str) -> None:
    """Runs on a rank: in bf16, all weights and buffers have the same names, dtypes and bits."""
    whole, model, _ = both(folder, device, torch.bfloat16)
    for named in ("named_parameters", "named_buffers"):
        expected, found = dict(getattr(whole, named)()), dict(getattr(model, named)())
        assert expected.keys() == found.keys()
        for name, tensor in expected.items():
            assert (found[name].dtype, found[name].device) == (tensor.dtype, tensor.device), name
            assert torch.equal(found[name], tensor), name
            assert not found[name].requires_grad
    assert not model.training and model.dtype == torch.bfloat16


@pytest.mark.parametrize("kind", ["v3", "glm_moe_dsa", "qwen3"])
@pytest.mark.parametrize("world_size", [3])
def test_tensors_are_those_of_from_pretrained(pool, device, folders, kind):
    pool.run(tensors, str(folders[kind]), device)


@pytest.mark.parametrize("world_size", [2])
def test_one_file_with_the_experts_of_a_layer_in_one_tensor(pool, device, folders, tmp_path):
    """As the model itself has them."""
    shutil.copy(folders["v3"] / "config.json", tmp_path)
    state = make_model("v3", **CHANGES["v3"]).state_dict()
    safetensors.torch.save_file(state, tmp_path / "model.safetensors")
    assert any(name.endswith("experts.gate_up_proj") for name in state)
    pool.run(compare, str(tmp_path), device)


def kimi(folder: str, device: str) -> None:
    """Runs on a rank."""
    whole = make_model("kimi_k2", device)
    model, _ = load_parallel(folder, max_num_tokens=64, timeout_s=20.0, device=device)
    ids = make_ids((1, 9), device)
    torch.testing.assert_close(model(ids).logits, whole(ids).logits, atol=1e-4, rtol=0)


@pytest.mark.parametrize("world_size", [2])
def test_the_class_is_what_config_json_names(pool, device, tmp_path):
    """Kimi-K2 has a type that transformers does not know, and the class of DeepSeek-V3."""
    make_model("kimi_k2").save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "model_type": "kimi_k2"}))
    pool.run(kimi, str(tmp_path), device)


# ---- what is refused ----


def load(folder: str, device: str) -> None:
    """Runs on a rank."""
    model, _ = load_parallel(folder, max_num_tokens=16, timeout_s=20.0, device=device)
    model(make_ids((1, 5), device))
    dist.barrier()


@pytest.mark.parametrize(
    ("case", "message"),
    [
        ("no files", r"has neither model.safetensors.index.json nor model.safetensors"),
        ("no weight", r"lacks model.layers.0.mlp.up_proj.weight, model.norm.weight, which LlamaForCausalLM has"),
        ("shape", r"model.norm.weight is \(55,\) in .*, expected \(56,\)"),
        ("class", r"takes a DeepseekV2ForCausalLM, .*config.json names \['GPT2LMHeadModel'\]"),
        ("no config", r"has no config.json"),
        ("fp8", r"model.layers.2.mlp.up_proj.weight is F8_E4M3 in .*, expected one of F64, F32, F16, BF16"),
        ("quantised", "takes unquantised weights"),
    ],
)
@pytest.mark.parametrize("world_size", [2])
def test_what_cannot_be_loaded_raises_on_every_rank(pool, device, folders, tmp_path, case, message):
    config = json.loads((folders["llama"] / "config.json").read_text())
    state = make_model("llama").state_dict()
    if case == "no weight":
        del state["model.norm.weight"], state["model.layers.0.mlp.up_proj.weight"]
    if case == "shape":
        state["model.norm.weight"] = state["model.norm.weight"][:55].clone()
    if case == "fp8":
        name = "model.layers.2.mlp.up_proj.weight"
        state[name] = state[name].to(torch.float8_e4m3fn)
    if case == "class":
        config["architectures"] = ["GPT2LMHeadModel"]
    if case == "quantised":
        config["quantization_config"] = {"quant_method": "gptq"}
    if case != "no config":
        (tmp_path / "config.json").write_text(json.dumps(config))
    if case != "no files":
        safetensors.torch.save_file(state, tmp_path / "model.safetensors")
    for outcome in pool.outcomes(load, str(tmp_path), device):
        with pytest.raises(ValueError, match=message):
            raise outcome


def warned(folder: str, device: str) -> None:
    """Runs on a rank."""
    with pytest.warns(UserWarning, match="LlamaForCausalLM has no place for model.layers.7.mlp.up_proj.weight: left"):
        load(folder, device)


@pytest.mark.parametrize("world_size", [2])
def test_a_weight_without_a_place_is_told(pool, device, folders, tmp_path):
    shutil.copy(folders["llama"] / "config.json", tmp_path)
    state = make_model("llama").state_dict()
    state["model.layers.7.mlp.up_proj.weight"] = state["model.layers.0.mlp.up_proj.weight"].clone()
    safetensors.torch.save_file(state, tmp_path / "model.safetensors")
    pool.run(warned, str(tmp_path), device)
