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


INDEX = "model.safetensors.index.json"
BROKEN = {  # by case: a file, or the last of the weights; what is written to it; what is said
    "config is cut off": ("config.json", "{", r"config.json is no JSON: "),
    "config is a list": ("config.json", "[]", r"config.json is no JSON object, but '\[\]'"),
    "config is no text": ("config.json", b"\xff\xfe\x00", r"config.json is no JSON: "),
    "class is a string": ("config.json", dict(architectures="LlamaForCausalLM"), r"config.json names LlamaForCausalLM"),
    "unknown dtype": ("config.json", dict(dtype="foo"), r"config.json: .*foo"),
    "wide dtype": ("config.json", dict(dtype="float64"), r"config.json: dtype torch.float64 is none of torch.bfloat16"),
    "unknown activation": ("config.json", dict(hidden_act="foo"), r"config.json: .*foo"),
    "index is empty": (INDEX, "{}", r"index.json has no weight_map from names to files"),
    "index is cut off": (INDEX, '{"weight_map"', r"index.json is no JSON: "),
    "index maps to numbers": (INDEX, '{"weight_map": {"lm_head.weight": 3}}', r"index.json has no weight_map"),
    "wrong file in the index": (INDEX, None, r"/model-\d+-of-\d+.safetensors has no lm_head.weight, which .* says"),
    "a file is missing": ("last", None, r"lacks model-\d+-of-\d+.safetensors, which .*index.json names"),
    "a file is empty": ("last", b"", r"/model-\d+-of-\d+.safetensors cannot be read as safetensors: "),
    "a file is garbage": ("last", b"x" * 100, r"/model-\d+-of-\d+.safetensors cannot be read as safetensors: "),
    "a file is cut off": ("last", -9, r"/model-\d+-of-\d+.safetensors cannot be read as safetensors: "),
    "generation config": ("generation_config.json", "[", r"generation_config.json"),
}


def damage(folder, file: str, content) -> None:
    path = max(folder.glob("*.safetensors")) if file == "last" else folder / file
    if isinstance(content, dict):
        content = json.dumps({**json.loads(path.read_text()), **content})
    if isinstance(content, int):
        content = path.read_bytes()[:content]
    if content is not None:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    elif file == "last":
        path.unlink()
    else:
        index = json.loads(path.read_text())
        index["weight_map"]["lm_head.weight"] = index["weight_map"]["model.layers.0.mlp.up_proj.weight"]
        path.write_text(json.dumps(index))


@pytest.mark.parametrize("kind", ["llama", "v3"])
@pytest.mark.parametrize("case", BROKEN)
@pytest.mark.parametrize("world_size", [2])
def test_a_broken_folder_is_told_by_the_file(pool, device, folders, tmp_path, kind, case):
    file, content, message = BROKEN[case]
    folder = tmp_path / "model"
    shutil.copytree(folders[kind], folder)
    damage(folder, file, content)
    for outcome in pool.outcomes(load, str(folder), device):
        with pytest.raises(ValueError, match=message):
            raise outcome


def load_as(folder: str, arguments: dict) -> torch.dtype:
    """Runs on a rank."""
    return load_parallel(**{"folder": folder, "max_num_tokens": 16, "device": "cpu", **arguments})[0].dtype


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(dtype="auto"), r"dtype must be one of torch.bfloat16, .*, or None .*; got 'auto'"),
        (dict(dtype=torch.int32), r"dtype must be one of .*; got torch.int32"),
        (dict(dtype=torch.float8_e4m3fn), r"dtype must be one of .*; got torch.float8_e4m3fn"),
        (dict(device="meta"), r"device must be on cpu or cuda, got meta"),
        (dict(device="cuda:99"), r"device cuda:99 is asked for, and torch sees \d+ CUDA devices"),
        (dict(device="foo"), r"device 'foo' cannot be used: "),
        (dict(folder=None), r"folder must be a path, got None"),
    ],
)
@pytest.mark.parametrize("world_size", [2])
def test_an_argument_that_cannot_be_is_told(pool, folders, arguments, message):
    for outcome in pool.outcomes(load_as, str(folders["llama"]), arguments):
        with pytest.raises((TypeError, ValueError), match=message):
            raise outcome


@pytest.mark.parametrize("world_size", [2])
def test_a_dtype_may_be_named(pool, folders):
    assert pool.run(load_as, str(folders["llama"]), dict(dtype="bfloat16")) == [torch.bfloat16] * 2


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
