"""How the rows of an unfused program travel. Each case writes its program once, in these words.

Both transports offer reduce_scatter, all_gather and all_reduce of the case's input, and `pad_rows` for what a program
keeps of its own rows. They differ in how uneven token counts travel.
"""

import torch
import torch.distributed as dist

import tp_fused

from .context import all_gather_single

_reduce_scatter_single = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


class OverTpFused:
    """tp_fused's own transport, nothing fused: what is left of the gain is the gain of fusing."""

    def __init__(self, context, num_tokens: int, input: torch.Tensor | None = None):
        self.group, self.num_tokens, self.input = context.group, num_tokens, input

    def pad_rows(self, rows: torch.Tensor) -> torch.Tensor:
        return rows

    def reduce_scatter(self) -> torch.Tensor:
        return tp_fused.reduce_scatter_rows(self.input, self.group)

    def all_gather(self, rows: torch.Tensor) -> torch.Tensor:
        return tp_fused.all_gather_rows(rows, self.num_tokens, self.group)

    def all_reduce(self) -> torch.Tensor:
        return self.all_gather(self.reduce_scatter())

    prepare_all_reduce = None


class OverTorch:
    """torch.distributed: what a program uses today.

    reduce_scatter_tensor and all_gather_into_tensor want equal shares. An engine pads its batch once, when it makes
    it, so padding is not charged: the input lies padded before the clock starts, the program computes on its padded
    rows (no more than the largest share, which sets the time anyway) and its gathered rows stay padded.
    """

    def __init__(self, context, num_tokens: int, input: torch.Tensor | None = None):
        self.group, self.world_size, self.input = context.group, context.world_size, input
        self.share, self.scratch = context.row_count(num_tokens, 0), None
        if input is not None:
            counts = [context.row_count(num_tokens, rank) for rank in range(self.world_size)]
            self.padded = torch.cat([self.pad_rows(rows) for rows in input.split(counts)])

    def pad_rows(self, rows: torch.Tensor) -> torch.Tensor:
        padded = rows.new_zeros(self.share, rows.shape[1])
        padded[: rows.shape[0]] = rows
        return padded

    def reduce_scatter(self) -> torch.Tensor:
        output = self.padded.new_empty(self.share, self.padded.shape[1])
        _reduce_scatter_single(output, self.padded, group=self.group)
        return output

    def all_gather(self, rows: torch.Tensor) -> torch.Tensor:
        output = rows.new_empty(self.world_size * self.share, rows.shape[1])
        all_gather_single(output, rows, group=self.group)
        return output

    def prepare_all_reduce(self) -> None:
        """all_reduce works in place; an engine gives it a fresh product, so the copy is not charged."""
        if self.scratch is None:
            self.scratch = torch.empty_like(self.input)
        self.scratch.copy_(self.input)  # to where a captured graph looks for it

    def all_reduce(self) -> torch.Tensor:
        dist.all_reduce(self.scratch, group=self.group)
        return self.scratch
