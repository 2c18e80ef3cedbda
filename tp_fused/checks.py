"""What is wrong with a call, in words. The native kernels refuse the same calls (csrc/torch_call.h), without words."""

import ctypes
import dataclasses
import math
import numbers
import reprlib
from typing import Any

import torch

from . import partition
from .symbols import certain, other_shape, stands_in

FLOATS = (torch.bfloat16, torch.float16, torch.float32)
E4M3 = torch.float8_e4m3fn
GATHERED = (*FLOATS, E4M3, torch.uint8)  # by all_gather_rows
_PLAIN = (bool, int, float, str, torch.dtype)
LARGEST = 2**31 - 1  # widths and group sizes reach the kernels as 32-bit integers


def given(name: str, tensor: torch.Tensor | None) -> None:
    """There is a dense tensor: torch takes None for any tensor, and any layout."""
    if not isinstance(tensor, torch.Tensor):
        raise TypeError(f"{name} must be a tensor, got {described(tensor)}")
    if tensor.layout != torch.strided or tensor.is_nested:
        layout = "nested" if tensor.is_nested else tensor.layout
        raise TypeError(f"{name} must be a dense tensor, got a {layout} one")


def as_float(name: str, value) -> float:
    try:
        return float(value)
    except OverflowError:
        raise ValueError(f"{name} must be a number that fits into 64 bits, got {described(value)}") from None


def count(name: str, value, least: int = 0, most: int = LARGEST) -> None:
    """An integer from `least`, which is 0 or 1, to `most`."""
    if not isinstance(value, numbers.Integral) or isinstance(value, bool):
        raise TypeError(f"{name} must be an integer, got {described(value)}")
    if value < least:  # pyright: ignore[reportOperatorIssue]
        raise ValueError(f"{name} must {'be positive' if least else 'not be negative'}, got {described(value)}")
    if value > most:  # pyright: ignore[reportOperatorIssue]
        raise ValueError(f"{name}={described(value)} is over {most}")


def seconds(name: str, value) -> None:
    if not isinstance(value, numbers.Real) or isinstance(value, bool):
        raise TypeError(f"{name} must be a number of seconds, got {described(value)}")
    if not as_float(name, value) >= 0:
        raise ValueError(f"{name} must not be negative, got {value}")


def device(value) -> torch.device:
    try:
        return torch.device(value)
    except (RuntimeError, TypeError) as error:
        kind = TypeError if isinstance(error, TypeError) else ValueError
        raise kind(f"device {described(value)} cannot be used: {error}") from None


def memory(name: str, tensor: torch.Tensor) -> None:
    """The storage holds all of the tensor: FSDP, for one, frees storages that tensors still point to."""
    if tensor.numel() == 0:
        return
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    needed, held = (tensor.storage_offset() + last + 1) * tensor.itemsize, tensor.untyped_storage().nbytes()
    if held < needed:
        raise ValueError(
            f"{name} of shape {tuple(tensor.shape)} needs {needed} bytes, its storage has {held}: it has been freed"
        )


def rows(name: str, tensor: torch.Tensor, dtypes=FLOATS, device: torch.device | None = None) -> None:
    """`tensor` is a contiguous [rows, columns] of one of `dtypes`, on `device`."""
    given(name, tensor)
    if tensor.dim() != 2:
        raise ValueError(f"{name} must be [rows, columns], got shape {tuple(tensor.shape)}")
    if tensor.dtype not in dtypes:
        raise TypeError(f"{name} must be one of {', '.join(map(str, dtypes))}, got {tensor.dtype}")
    if not stands_in(tensor):
        if not tensor.is_contiguous():
            raise ValueError(
                f"{name} of shape {tuple(tensor.shape)} has strides {tensor.stride()}: its rows must be contiguous, "
                f"call .contiguous() first"
            )
        memory(name, tensor)
    if device is not None and tensor.device != device:
        raise ValueError(f"{name} is on {tensor.device}, the input on {device}")


def like(name: str, tensor: torch.Tensor, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> None:
    """`tensor` is contiguous and has this shape, dtype and device."""
    given(name, tensor)
    if other_shape(tensor, shape):
        raise ValueError(f"{name} must have shape {tuple(shape)}, got {tuple(tensor.shape)}")
    if tensor.dtype != dtype:
        raise TypeError(f"{name} is {tensor.dtype}, expected {dtype}")
    if tensor.device != device:
        raise ValueError(f"{name} is on {tensor.device}, expected {device}")
    if stands_in(tensor):
        return
    if not tensor.is_contiguous():
        raise ValueError(f"{name} of shape {tuple(shape)} has strides {tensor.stride()}: it must be contiguous")
    memory(name, tensor)


def eps(value: float) -> None:
    if not 0 < ctypes.c_float(value).value < math.inf:
        raise ValueError(f"eps must be positive and finite in fp32, got {value}")


def weight_offset(value: float) -> None:
    if not math.isfinite(ctypes.c_float(value).value):
        raise ValueError(f"weight_offset must be finite in fp32, got {value}")


def norm_weight(name: str, weight: torch.Tensor, shape: tuple[int, ...], rows: torch.Tensor, dtype=None) -> None:
    """`weight` is contiguous, has this shape and lies where `rows` do, in their dtype, or `dtype`, or in fp32."""
    given(name, weight)
    like(name, weight, shape, torch.float32 if weight.dtype == torch.float32 else dtype or rows.dtype, rows.device)


def group_size(value: int) -> None:
    """Columns that share an fp8 scale; more than a row has are as many as it has."""
    if value < 1:
        raise ValueError(f"group_size must be positive, got {value}")
    narrow("group_size", value)


def scale_layout(value: str) -> None:
    if value not in ("row", "column"):
        raise ValueError(f'scale_layout must be "row" or "column", got {value!r}')


def quantisation(workspace, size: int, layout: str, hidden_size: int) -> None:
    """How the rows of an op that reduces are quantised."""
    scale_layout(layout)
    group_size(size)
    if workspace.backend == "cuda" and size not in (64, 128) and size < hidden_size:
        raise ValueError(f"on cuda, group_size must be 64, 128 or hidden_size={hidden_size}, got {size}")


def weight_scale(scale: torch.Tensor, weight: torch.Tensor) -> None:
    """One for each 128 x 128 block."""
    blocks = tuple(-(-size // 128) for size in weight.shape)
    like("weight_scale", scale, blocks, torch.float32, weight.device)


def narrow(name: str, value: int) -> None:
    if value > LARGEST:
        raise ValueError(f"{name}={value} is over {LARGEST}")


def addressable(slot_bytes: int, workspace) -> None:
    """All the ranks' regions, of a few slots each, have sizes that fit into 64 bits."""
    if slot_bytes * 8 * workspace.world_size >= 2**63:
        raise MemoryError(
            f"tp_fused.init: max_num_tokens={workspace.max_num_tokens} rows of {workspace.row_bytes} bytes on "
            f"{workspace.world_size} ranks are {slot_bytes} bytes a slot, more than can be addressed"
        )


def kernel_width(hidden_size: int) -> None:
    if hidden_size % 8 or hidden_size == 0:
        raise ValueError(f"on cuda, hidden_size must be a positive multiple of 8, got {hidden_size}")


def kernel_starts(workspace, **tensors: torch.Tensor | None) -> None:
    """What is read 16 bytes at a time begins at a multiple of 16 bytes."""
    if workspace.backend != "cuda":
        return
    for name, tensor in tensors.items():
        if tensor is not None and tensor.data_ptr() % 16:
            raise ValueError(
                f"on cuda, {name} must begin at a multiple of 16 bytes, got one at address {tensor.data_ptr():#x}"
            )


def capacity(workspace, input: torch.Tensor, num_tokens: int, columns: int, dtype=None, name="hidden_size") -> None:
    """The workspace is open, on the input's card, and made for calls of this size; `dtype`: if not the input's."""
    workspace.require_open()
    workspace.require_caller()
    if workspace.device_index not in (None, input.device.index):
        raise ValueError(
            f"the input is on {input.device}, the workspace on cuda:{workspace.device_index}: call "
            f"torch.cuda.set_device({input.device.index}) before tp_fused.init"
        )
    dtype = dtype or input.dtype
    token_count(num_tokens)
    if num_tokens > workspace.max_num_tokens:
        raise ValueError(
            f"num_tokens={num_tokens} is over the workspace's max_num_tokens={workspace.max_num_tokens}; "
            f"call tp_fused.init(max_num_tokens={num_tokens}, ...) once, on all ranks"
        )
    row_fits(workspace, columns, dtype, name)
    narrow(name, columns)


def row_fits(workspace, columns: int, dtype: torch.dtype, name: str = "hidden_size") -> None:
    if columns * dtype.itemsize > workspace.row_bytes:
        raise ValueError(
            f"{name}={columns} of {dtype} ({columns * dtype.itemsize} bytes a row) does not fit the "
            f"workspace, made for hidden_size={workspace.hidden_size}, latent_size={workspace.latent_size} of "
            f"{workspace.dtype} ({workspace.row_bytes} bytes a row); call tp_fused.init again, on all ranks"
        )


def token_count(num_tokens) -> None:
    if certain(num_tokens < 0):
        raise ValueError(f"num_tokens must not be negative, got {num_tokens}")


def local_rows(workspace, name: str, tensor: torch.Tensor, num_tokens: int) -> None:
    """`tensor` holds exactly this rank's rows of `num_tokens`."""
    expected = partition.row_count(num_tokens, workspace.rank, workspace.world_size)
    if tensor.shape[0] != expected:
        raise ValueError(
            f"{name} has {tensor.shape[0]} rows; rank {workspace.rank} of {workspace.world_size} owns {expected} of "
            f"num_tokens={num_tokens}"
        )


def residual_rows(workspace, residual: torch.Tensor | None, input: torch.Tensor) -> torch.Tensor | None:
    """This rank's rows of `residual`, which may be the full tensor or the slice already."""
    if residual is None:
        return None
    rows("residual", residual, (input.dtype,), input.device)
    num_tokens, hidden_size = input.shape
    own = partition.row_slice(num_tokens, workspace.rank, workspace.world_size)
    if residual.shape[1] == hidden_size:
        if residual.shape[0] == num_tokens:
            return residual[own]
        if residual.shape[0] == own.stop - own.start:
            return residual
    raise ValueError(
        f"residual must be the full [{num_tokens}, {hidden_size}] or rank {workspace.rank}'s slice "
        f"[{own.stop - own.start}, {hidden_size}], got {tuple(residual.shape)}"
    )


def reduction(workspace, input: torch.Tensor, residual=None) -> torch.Tensor | None:
    """The inputs of an op that reduces; returns this rank's rows of the residual."""
    rows("input", input)
    capacity(workspace, input, input.shape[0], input.shape[1])
    workspace.require_kernel_width(input.shape[1])
    residual = residual_rows(workspace, residual, input)
    if workspace.backend == "cuda":
        kernel_width(input.shape[1])
    kernel_starts(workspace, input=input, residual=residual)
    return residual


def normed_reduction(
    workspace, input: torch.Tensor, residual, weight, epsilon: float, offset: float, name: str = "weight"
) -> torch.Tensor | None:
    """The same of one that norms what it has reduced. name: of its weight."""
    residual = reduction(workspace, input, residual)
    norm_weight(name, weight, (input.shape[1],), input)
    kernel_starts(workspace, **{name: weight})
    eps(epsilon)
    weight_offset(offset)
    return residual


def projected_rows(input, weight, name: str = "weight", dtype=None) -> None:
    """A weight that such rows are multiplied by, or their like of `dtype`."""
    rows(name, weight, (dtype or input.dtype,), input.device)
    if certain(weight.shape[1] != input.shape[1]):
        raise ValueError(f"{name} is {tuple(weight.shape)}, but the input has {input.shape[1]} columns")


def projection_weight(
    workspace, input, weight, num_tokens: int, output_dtype=None, name: str = "weight", dtype=None
) -> None:
    """A replicated [columns, hidden_size] weight, by which num_tokens rows like the input's, or of `dtype`, are
    multiplied."""
    dtype = dtype or input.dtype
    projected_rows(input, weight, name, dtype)
    capacity(workspace, input, num_tokens, weight.shape[0], output_dtype, f"{name}.shape[0]")
    narrow("input.shape[1]", input.shape[1])
    kernel_starts(workspace, **{name: weight})
    if workspace.backend == "cuda" and weight.shape[0] == 0:
        raise ValueError(f"on cuda, {name} must have rows, got {tuple(weight.shape)}")
    if workspace.backend == "cuda" and dtype == E4M3:
        kernel_fp8_weight(tuple(weight.shape))


def kernel_fp8_weight(shape: tuple[int, ...]) -> None:
    if shape[0] % 8 or shape[1] % 16:
        raise ValueError(f"on cuda, an fp8 weight must have a multiple of 8 rows and of 16 columns, got {shape}")


def projection(
    workspace, input, weight, num_tokens: int, complete: bool, input_dtypes=FLOATS, output_dtype=None
) -> None:
    """The inputs of an op that projects this rank's rows or, if they are complete, all of them."""
    rows("input", input, input_dtypes)
    projection_weight(workspace, input, weight, num_tokens, output_dtype)
    if not complete:
        local_rows(workspace, "input", input, num_tokens)
    elif input.shape[0] != num_tokens:
        raise ValueError(f"input has {input.shape[0]} rows; with complete=True it is all num_tokens={num_tokens}")
    kernel_starts(workspace, input=input)


def fp8_scales(scale: torch.Tensor, q: torch.Tensor, group_size: int = 128) -> None:
    """`scale` is fp32, one for each row and `group_size` columns of `q`, row-major or column-major."""
    given("scale", scale)
    expected = (q.shape[0], -(-q.shape[1] // group_size))
    if other_shape(scale, expected):
        raise ValueError(f"scale must be {expected} for a {tuple(q.shape)} input, got {tuple(scale.shape)}")
    if scale.dtype != torch.float32:
        raise TypeError(f"scale must be torch.float32, got {scale.dtype}")
    if scale.device != q.device:
        raise ValueError(f"scale is on {scale.device}, the input on {q.device}")
    if stands_in(scale):
        return
    if 1 not in scale.stride() and scale.numel() > 1:
        raise ValueError(f"scale has strides {scale.stride()}: it must be row-major or column-major")
    memory("scale", scale)


def latent_norms(weight: torch.Tensor, dtype: torch.dtype | None = None, **norms: torch.Tensor) -> None:
    """The weights of the two latent norms, by name, fit into the projection's columns, of its dtype or this one."""
    for name, norm in norms.items():
        given(name, norm)
        if norm.dim() != 1:
            raise ValueError(f"{name} must be one-dimensional, got shape {tuple(norm.shape)}")
        norm_weight(name, norm, norm.shape, weight, dtype)
    (q_name, q_a), (kv_name, kv_a) = norms.items()
    if q_a.dtype != kv_a.dtype:
        raise TypeError(f"{q_name} is {q_a.dtype}, {kv_name} {kv_a.dtype}: they must be the same")
    if certain(q_a.shape[0] + kv_a.shape[0] > weight.shape[0]):
        raise ValueError(
            f"{q_name} ({q_a.shape[0]}) and {kv_name} ({kv_a.shape[0]}) are longer than the projection's "
            f"{weight.shape[0]} columns"
        )


def described(value) -> str:
    """An argument, as it is told in an error: short, whatever it is."""
    if isinstance(value, torch.Tensor):
        if value.is_nested or value.layout != torch.strided:
            return f"a {'nested' if value.is_nested else value.layout} tensor"
        where = f"of strides {value.stride()} at {value.storage_offset()} on {value.device}"
        return f"{value.dtype} {tuple(value.shape)} {where}"
    if isinstance(value, int) and value.bit_length() > 128:  # Python writes out no number of some thousand digits
        return f"an integer of {value.bit_length()} bits"
    if value is None or isinstance(value, (*_PLAIN, torch.device)):
        return reprlib.repr(value)
    kind, shape = type(value), getattr(value, "shape", ())
    name = kind.__qualname__ if kind.__module__ == "builtins" else f"{kind.__module__}.{kind.__qualname__}"
    return f"{name} of shape {shape}" if shape else f"{reprlib.repr(value)} ({name})"


@dataclasses.dataclass(frozen=True)
class Strange:
    """What ranks tell each other of an argument of a type that no check admits: it may not be picklable."""

    words: str

    def __repr__(self) -> str:
        return self.words


def exchangeable(value) -> Any:
    """The argument itself, or words for it."""
    return value if value is None or isinstance(value, _PLAIN) else Strange(described(value))
