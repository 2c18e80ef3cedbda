"""Which part of a weight a rank keeps, and the weights that all decoders have."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import nn

from ... import partition

BLOCK = 128  # rows, and columns, of an fp8 weight that share a scale


def frozen(tensor: torch.Tensor) -> nn.Parameter:
    return nn.Parameter(tensor, requires_grad=False)


def read_memory(parameter: torch.Tensor, *index: slice) -> torch.Tensor:
    """A part as memory of its own, so that the whole can be freed."""
    return parameter[index].clone(memory_format=torch.contiguous_format) if index else parameter


def is_fp8(weight: torch.Tensor) -> bool:
    return weight.dtype == torch.float8_e4m3fn


def in_blocks(own: slice) -> slice:
    """The blocks of rows, or of columns, that begin at a block and end at one or at the weight's end."""
    return slice(own.start // BLOCK, -(-own.stop // BLOCK))


class Shards:
    """What one rank takes of a model's weights.

    `read(parameter, *slices)` returns that part of it, of no slices the whole. Weights that are still in files have no
    other access: whatever is left of a weight has to come through here.
    """

    def __init__(self, rank: int, world_size: int, read: Callable[..., torch.Tensor] = read_memory):
        self.rank, self.world_size, self.read = rank, world_size, read

    def share(self, size: int, unit: int = 1) -> slice:
        """This rank's part of `size` units, in columns."""
        return scaled(partition.row_slice(size, self.rank, self.world_size), unit)

    def share_blocks(self, size: int, block: int) -> slice:
        """This rank's part of `size` columns in whole blocks, of which the last may be smaller."""
        own = self.share(-(-size // block), block)
        return slice(min(own.start, size), min(own.stop, size))

    def take(self, parameter: torch.Tensor, *index: slice) -> nn.Parameter:
        return frozen(self.read(parameter, *index))

    def column_parallel(self, linear: nn.Linear, own: slice) -> None:
        linear.weight = self.take(linear.weight, own)
        if is_fp8(linear.weight):
            linear.weight_scale_inv = self.take(linear.weight_scale_inv, in_blocks(own))
        if linear.bias is not None:
            linear.bias = self.take(linear.bias, own)
        linear.out_features = own.stop - own.start

    def row_parallel(self, linear: nn.Linear, own: slice) -> None:
        """Leaves the partial sum; the bias is rank 0's to add."""
        linear.weight = self.take(linear.weight, slice(None), own)
        if is_fp8(linear.weight):
            linear.weight_scale_inv = self.take(linear.weight_scale_inv, slice(None), in_blocks(own))
        if self.rank != 0:
            linear.bias = None
        linear.in_features = own.stop - own.start

    def attention(self, attention: nn.Module, shares: dict[str, slice]) -> None:
        for name, own in shares.items():
            split = self.row_parallel if name == "o_proj" else self.column_parallel
            split(getattr(attention, name), own)

    def feed_forward(self, mlp: nn.Module) -> None:
        """A dense MLP, or routed and shared experts."""
        if hasattr(mlp, "experts"):
            self._experts(mlp.experts)
            mlp = mlp.shared_experts
        linears = (mlp.gate_proj, mlp.up_proj, mlp.down_proj)
        fp8 = any(is_fp8(linear.weight) for linear in linears)
        own = self.share_blocks(mlp.intermediate_size, BLOCK if fp8 else 1)
        self.column_parallel(mlp.gate_proj, own)
        self.column_parallel(mlp.up_proj, own)
        self.row_parallel(mlp.down_proj, own)
        mlp.intermediate_size = own.stop - own.start

    def _experts(self, experts: nn.Module) -> None:
        """By intermediate columns, padded with zeros, which add nothing: grouped GEMMs take rows of whole 16 bytes."""
        if is_fp8(experts.down_proj):
            self._fp8_experts(experts)
            return
        size, every = experts.intermediate_dim, slice(None)
        own = self.share(size)
        count = own.stop - own.start
        padding = -count % (16 // experts.down_proj.element_size())
        halves = (self.read(experts.gate_up_proj, every, slice(at + own.start, at + own.stop)) for at in (0, size))
        experts.gate_up_proj = frozen(torch.cat([F.pad(half, (0, 0, 0, padding)) for half in halves], dim=1))
        experts.down_proj = frozen(F.pad(self.read(experts.down_proj, every, every, own), (0, padding)))
        experts.intermediate_dim = count + padding

    def _fp8_experts(self, experts: nn.Module) -> None:
        size, every = experts.intermediate_dim, slice(None)
        own = self.share_blocks(size, BLOCK)
        for name, part, half in (("", own, size), ("_scale_inv", in_blocks(own), size // BLOCK)):
            gate_up, down = getattr(experts, f"gate_up_proj{name}"), getattr(experts, f"down_proj{name}")
            halves = [self.read(gate_up, every, slice(at + part.start, at + part.stop)) for at in (0, half)]
            # As bytes: on CUDA torch does not join tensors of every dtype of one byte (2.11: scales of ue8m0).
            joined = torch.cat([rows.view(torch.uint8) for rows in halves], dim=1).view(gate_up.dtype)
            setattr(experts, f"gate_up_proj{name}", frozen(joined))
            setattr(experts, f"down_proj{name}", self.take(down, every, every, part))
        experts.intermediate_dim = own.stop - own.start


def scaled(units: slice, unit: int) -> slice:
    return slice(units.start * unit, units.stop * unit)
