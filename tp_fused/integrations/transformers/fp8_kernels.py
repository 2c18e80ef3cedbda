"""Products of fine-grained fp8 weights where transformers has no kernels: on CPUs, and on GPUs without `kernels`.

transformers' FP8Linear and FP8Experts call three functions, which it downloads from a hub and which run on GPUs alone.
"""

import functools
import warnings

import torch
from transformers.integrations import finegrained_fp8

from ... import native, reference
from .same_model import as_integers
from .sharding import BLOCK


@functools.cache
def supply_kernels() -> None:
    """Has transformers find `_Kernels` where it would find none. Its own, where they load, keep serving GPUs."""
    theirs = None
    if torch.cuda.is_available():
        try:
            theirs = finegrained_fp8.load_finegrained_fp8_kernel()
        except (ImportError, OSError) as error:  # not installed; not to be downloaded
            warnings.warn(f"fp8 products run on tp_fused's Triton kernels: {error}", stacklevel=3)
    ours = _Kernels(theirs)
    bundle = finegrained_fp8.FineGrainedFP8(ours.matmul, ours.batched_matmul, ours.grouped_matmul)
    finegrained_fp8._FINEGRAINED_FP8 = bundle


class _Kernels:
    """transformers' three functions, as its modules call them. `theirs`: what they are on GPUs, or None."""

    def __init__(self, theirs):
        self.theirs = theirs

    def _serves(self, input: torch.Tensor) -> bool:
        return self.theirs is None or not input.is_cuda

    def matmul(self, input, weight, weight_scale_inv, block_size, output_dtype, activation_scale=None):
        if not self._serves(input):
            arguments = (input, weight, weight_scale_inv, block_size, output_dtype)
            return self.theirs.matmul(*arguments, activation_scale=activation_scale)
        q, scale = quantize(input.flatten(0, -2), _rounded(weight_scale_inv))
        return _product(q, scale, weight, weight_scale_inv).to(output_dtype).unflatten(0, input.shape[:-1])

    def grouped_matmul(self, input, weight, weight_scale_inv, offsets, tokens_per_expert, block_size):
        """Rows sorted by expert, those of expert e before offsets[e]."""
        if not self._serves(input):
            options = dict(offsets=offsets, tokens_per_expert=tokens_per_expert, block_size=block_size)
            return self.theirs.grouped_matmul(input, weight, weight_scale_inv, **options)
        if len(input) <= len(weight):
            rows = torch.arange(len(input), dtype=offsets.dtype, device=offsets.device)
            return self._by_row(input, weight, weight_scale_inv, torch.searchsorted(offsets, rows, right=True))
        ends = [0, *offsets.tolist()]
        rows = [slice(*ends[expert : expert + 2]) for expert in range(len(weight))]
        return self._by_expert(input, weight, weight_scale_inv, rows)

    def batched_matmul(self, input, weight, weight_scale_inv, block_size, expert_ids):
        """A row of every (token, expert)."""
        if not self._serves(input):
            options = dict(block_size=block_size, expert_ids=expert_ids)
            return self.theirs.batched_matmul(input, weight, weight_scale_inv, **options)
        if len(input) <= len(weight):
            return self._by_row(input, weight, weight_scale_inv, expert_ids)
        rows = [(expert_ids == expert).nonzero().flatten() for expert in range(len(weight))]
        return self._by_expert(input, weight, weight_scale_inv, rows)

    def _by_row(self, input, weight, weight_scale_inv, expert_ids) -> torch.Tensor:
        """Of few rows. Nothing is read on the host, so that a CUDA graph can capture it."""
        q, scale = quantize(input, _rounded(weight_scale_inv))
        output = input.new_empty(len(input), weight.shape[1])
        own = expert_ids.clamp(0, len(weight) - 1)
        for row in range(len(input)):
            here = slice(row, row + 1)
            expert = _pick(weight, own[here]), _pick(weight_scale_inv, own[here])
            output[here] = _product(q[here], scale[here], *expert).to(output.dtype)
        return output.masked_fill_((expert_ids != own).unsqueeze(-1), 0)  # rows of no expert here

    def _by_expert(self, input, weight, weight_scale_inv, rows) -> torch.Tensor:
        """Zeros for rows of no expert here."""
        q, scale = quantize(input, _rounded(weight_scale_inv))
        output = input.new_zeros(len(input), weight.shape[1])
        for expert, own in enumerate(rows):
            part = q[own], scale[own]
            if len(part[0]):
                output[own] = _product(*part, weight[expert], weight_scale_inv[expert]).to(output.dtype)
        return output


def quantize(rows: torch.Tensor, round_scales: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """e4m3 values of rows and a scale for each 128 columns."""
    triton = native.triton_projection()[0] if rows.is_cuda else None
    if triton is None or torch.cuda.get_device_capability(rows.device) < (8, 9):  # Triton's e4m3 begins there
        return reference.quantize_e4m3(rows, BLOCK, round_scales=round_scales)
    from ...triton.quantize import quantize_e4m3

    return quantize_e4m3(rows.contiguous(), round_scales)


def _product(q, scale, weight, weight_scale_inv) -> torch.Tensor:
    output = torch.empty(len(q), len(weight), dtype=torch.bfloat16, device=q.device)
    native.project_fp8(q, scale, weight, weight_scale_inv.float(), output, 0)
    return output


def _pick(stacked: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """The one of `index` [1], as integers: not every dtype of one byte can be selected."""
    return as_integers(stacked).index_select(0, index)[0].view(stacked.dtype)


def _rounded(weight_scale_inv: torch.Tensor) -> bool:
    """Whether scales are powers of two: the rows' are where the weight's are."""
    return weight_scale_inv.dtype == torch.float8_e8m0fnu
