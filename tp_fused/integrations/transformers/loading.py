"""`load_parallel`: from a folder of safetensors, of which each rank reads its part."""

import contextlib
import os
import re
import warnings
from pathlib import Path

import torch
import torch.distributed as dist
import transformers
from torch import nn
from transformers import AutoModelForCausalLM, GenerationConfig, PreTrainedConfig, PreTrainedModel
from transformers.quantizers import AutoHfQuantizer

from ... import checks
from ...groups import type_of
from ...rendezvous import Meeting
from .checkpoint import Checkpoint, read_json
from .core import FAMILIES, check_arguments, check_model, convert, describe, require_workspace, resolve_group
from .fp8 import check_config
from .same_model import require_same, some
from .sharding import Shards
from .tensor_parallel import TensorParallel


def load_parallel(
    folder: str | Path,
    group: dist.ProcessGroup | None = None,
    *,
    max_num_tokens: int | None = None,
    dtype: torch.dtype | None = None,
    device: str | torch.device | None = None,
    way: str = "fused",
    timeout_s: float = 30.0,
    check_tokens: str = "always",
) -> tuple[PreTrainedModel, TensorParallel]:
    """`parallelize(AutoModelForCausalLM.from_pretrained(folder))`, but no rank ever holds the whole model.

    Each rank reads from the folder's safetensors what `parallelize` would leave it, and nothing else, so that the
    model may be larger than a rank's memory. Returns the model and what `parallelize` returns.

    folder: what `save_pretrained` writes, or a snapshot of a model hub's repository: config.json, and
    model.safetensors or several files with their index. dtype: of the weights, bfloat16, float16 or float32 (default:
    as config.json says). device: cpu or cuda, where they go (default: cuda where torch sees one, its current device).
    Other arguments: see `parallelize`.

    Raises ValueError, and names the file or the argument, where the folder lacks a file or a weight, config.json, the
    index or a safetensors file cannot be read, a weight is not in the file that the index names or has another shape
    than config.json says, dtype or device is not one of these, and where `parallelize` would. Of the ranks' folders it
    compares the config, the tensors' names, shapes and dtypes, and one row of each tensor but the experts'. Weights
    that the model has no place for are left, with one warning.
    """
    group = resolve_group(group)
    with Meeting.of(group, "tp_fused.integrations.transformers.load_parallel") as meeting:
        arguments = check_arguments(max_num_tokens, way, timeout_s, check_tokens)
        device = _device(device)
        if not isinstance(folder, (str, os.PathLike)):
            raise TypeError(f"folder must be a path, got {checks.described(folder)}")
        folder = Path(folder)
        config = _config(folder)
        checkpoint = Checkpoint(folder)
        model = _on_meta(config, _dtype(dtype, config, folder / "config.json"), folder)
        check_model(model, group.size())
        weights = _Weights(model, checkpoint, device)
        arguments["dtype"] = str(model.dtype)
        require_workspace(group, device, max_num_tokens)
        members = dist.get_process_group_ranks(group)
        require_same(meeting, members, describe(model, device, arguments) | checkpoint.describe(weights.taken))
    # Its tables are computed, not stored.
    model.model.rotary_emb = type(model.model.rotary_emb)(config=model.config).to(device)
    shards = Shards(group.rank(), group.size(), weights.read)
    tp = convert(
        model,
        shards,
        group,
        device,
        max_num_tokens=max_num_tokens,
        way=way,
        timeout_s=timeout_s,
        check_tokens=check_tokens,
    )
    weights.fill(model)
    return model, tp


def _config(folder: Path) -> PreTrainedConfig:
    """By the model's class: Kimi-K2's config.json names a type of its own, and DeepSeek-V3's class."""
    if not (folder / "config.json").is_file():
        raise ValueError(f"{folder} has no config.json")
    named = read_json(folder / "config.json").get("architectures")
    names = named if isinstance(named, list) else []
    name = next((name for name in names if isinstance(name, str) and name in FAMILIES), None)
    if name is None:
        raise ValueError(f"load_parallel takes a {', '.join(FAMILIES)}, and {folder / 'config.json'} names {named}")
    if not hasattr(transformers, name):
        raise ValueError(f"transformers {transformers.__version__} has no {name}, which {folder / 'config.json'} names")
    with _naming(folder / "config.json"):
        return getattr(transformers, name).config_class.from_pretrained(folder)


def _on_meta(config: PreTrainedConfig, dtype: torch.dtype, folder: Path) -> PreTrainedModel:
    """The model without weights."""
    with _naming(folder / "config.json"), torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    _quantise(model)
    if (folder / "generation_config.json").is_file():
        with _naming(folder / "generation_config.json"):
            model.generation_config = GenerationConfig.from_pretrained(folder)
    return model


@contextlib.contextmanager
def _naming(path: Path):
    """Of a broken file transformers raises errors of any kind: they become a ValueError with its path."""
    try:
        yield
    except Exception as error:
        raise ValueError(f"{path}: {type(error).__name__}: {error}") from error


def _quantise(model: PreTrainedModel) -> None:
    """Puts transformers' fp8 modules in, where config.json says so, as `from_pretrained` does on a GPU."""
    check_config(model.config)
    quantised = getattr(model.config, "quantization_config", None)
    if quantised is not None:
        quantizer = AutoHfQuantizer.from_config(quantised, pre_quantized=True)
        default = torch.get_default_dtype()
        torch.set_default_dtype(model.dtype)  # of the biases that it makes
        try:
            quantizer.preprocess_model(model)
        finally:
            torch.set_default_dtype(default)
        model.config.quantization_config = quantizer.quantization_config


def _dtype(asked, config: PreTrainedConfig, path: Path) -> torch.dtype:
    dtype = asked if asked is not None else config.dtype or torch.get_default_dtype()
    if isinstance(dtype, str):
        dtype = {str(float_).removeprefix("torch."): float_ for float_ in checks.FLOATS}.get(dtype, dtype)
    if dtype not in checks.FLOATS:
        floats = ", ".join(map(str, checks.FLOATS))
        if asked is None:
            raise ValueError(f"{path}: dtype {dtype} is none of {floats}; load_parallel takes one by dtype=")
        raise ValueError(f"dtype must be one of {floats}, or None for what config.json says; got {dtype!r}")
    return dtype


def _device(asked) -> torch.device:
    device = type_of(None) if asked is None else checks.device(asked)
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"device must be on cpu or cuda, got {device}")
    count = torch.cuda.device_count()
    if device.type == "cuda" and (device.index or 0) >= count:
        raise ValueError(f"device {device} is asked for, and torch sees {count} CUDA devices")
    return torch.device("cuda", torch.cuda.current_device()) if device == torch.device("cuda") else device


class _Weights:
    """Where each weight of a model on the meta device is in a checkpoint, and how a part of it is read."""

    def __init__(self, model: PreTrainedModel, checkpoint: Checkpoint, device: torch.device):
        self.checkpoint, self.device = checkpoint, device
        self._sources: dict[torch.Tensor, tuple[_Stored | _Experts, torch.dtype]] = {}
        wide = model._keep_in_fp32_modules_strict or ()  # in fp32 whatever the dtype of the model
        computed = {name for name, _ in model.named_buffers()} - model.state_dict().keys()
        tensors = (*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False))
        tensors = [(name, tensor) for name, tensor in tensors if name not in computed]
        self.taken: set[str] = set()  # of the stored names
        for name, tensor in tensors:
            source = _find(checkpoint, name, tensor)
            if source is not None:
                dtype = torch.float32 if any(part in name for part in wide) else tensor.dtype
                self._sources.setdefault(tensor, (source, dtype))
                self.taken |= set(source.names)
        missing = [name for name, tensor in tensors if tensor not in self._sources]  # of tied weights, one is stored
        if missing:
            raise ValueError(f"{checkpoint.folder} lacks {some(missing)}, which {type(model).__name__} has")
        ignored = [re.compile(pattern) for pattern in model._keys_to_ignore_on_load_unexpected or ()]
        left = [name for name in checkpoint.names - self.taken if not any(pattern.search(name) for pattern in ignored)]
        if left:
            warnings.warn(f"{type(model).__name__} has no place for {some(sorted(left))}: left", stacklevel=3)

    def read(self, tensor: torch.Tensor, *index: slice) -> torch.Tensor:
        source, dtype = self._sources[tensor]
        stored = source.read(self.checkpoint, *index)
        made = stored.to(dtype)
        if dtype == torch.float8_e8m0fnu and not torch.equal(made.float(), stored.float()):
            raise ValueError(f"{source.names[0]}: scales of scale_fmt 'ue8m0' must be powers of two")
        return made.to(self.device)

    def fill(self, model: PreTrainedModel) -> None:
        """Reads what is still to be read: the weights that every rank has whole."""
        whole = {}
        for module in model.modules():
            for name, tensor in (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)):
                if not tensor.is_meta:
                    continue
                if tensor in self._sources and tensor not in whole:
                    read = self.read(tensor)
                    whole[tensor] = nn.Parameter(read, False) if isinstance(tensor, nn.Parameter) else read
                if tensor not in whole:  # neither stored nor made anew
                    raise ValueError(f"{type(module).__name__}.{name} is not stored in {self.checkpoint.folder}")
                setattr(module, name, whole[tensor])


class _Stored:
    """A tensor as it is in a file."""

    def __init__(self, name: str):
        self.names = (name,)

    def read(self, checkpoint: Checkpoint, *index: slice) -> torch.Tensor:
        return checkpoint.read(*self.names, *index)


class _Experts:
    """Of all experts one tensor, which files have by expert: gate_proj and up_proj, or down_proj, of each."""

    def __init__(self, prefix: str, num_experts: int, projections: tuple[str, ...], rows: int, kind: str):
        self.rows = rows // len(projections)  # of one projection
        self._by_projection = [
            [f"{prefix}.{expert}.{projection}.{kind}" for expert in range(num_experts)] for projection in projections
        ]
        self.names = tuple(name for names in self._by_projection for name in names)

    def read(self, checkpoint: Checkpoint, experts: slice, rows: slice, *columns: slice) -> torch.Tensor:
        """Rows of one of the projections."""
        which = 0 if rows.start is None else rows.start // self.rows
        if rows.start is not None:
            rows = slice(rows.start - which * self.rows, rows.stop - which * self.rows)
        return torch.stack([checkpoint.read(name, rows, *columns) for name in self._by_projection[which][experts]])


def _find(checkpoint: Checkpoint, name: str, tensor: torch.Tensor) -> _Stored | _Experts | None:
    prefix, _, last = name.rpartition(".")
    fused = {"gate_up_proj": ("gate_proj", "up_proj"), "down_proj": ("down_proj",)}
    kind = "weight_scale_inv" if last.endswith("_scale_inv") else "weight"
    last = last.removesuffix("_scale_inv")
    if name in checkpoint.names:
        source, expected = _Stored(name), tuple(tensor.shape)
    elif prefix.endswith(".experts") and last in fused:
        source = _Experts(prefix, tensor.shape[0], fused[last], tensor.shape[1], kind)
        expected = (source.rows, tensor.shape[2])
    else:
        return None
    for stored in source.names:
        if stored not in checkpoint.names:
            return None
        checkpoint.require(stored, expected, tensor.dtype)
    return source
