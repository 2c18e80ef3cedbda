"""How the rows of an unfused program travel. Each case writes its program once, in these words.

The first two transports offer reduce_scatter, all_gather and all_reduce of the case's input, and `pad_rows` for what a
program keeps of its own rows. They differ in how uneven token counts travel. The others, CUDA's, have a part of that.
"""

import itertools

import torch
import torch.distributed as dist
import torch.distributed._symmetric_memory as symm_mem

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
        return self.reduce_scatter_into(self.padded.new_empty(self.share, self.padded.shape[1]))

    def reduce_scatter_into(self, output: torch.Tensor) -> torch.Tensor:
        _reduce_scatter_single(output, self.padded, group=self.group)
        return output

    def all_gather(self, rows: torch.Tensor) -> torch.Tensor:
        if rows.dtype == torch.float8_e4m3fn:  # which not every process group knows
            return self.all_gather(rows.view(torch.uint8)).view(rows.dtype)
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


class OverSymmMem:
    """torch's collectives on its symmetric memory: what engines use inside a node. Their input has to lie in it."""

    def __init__(self, context, num_tokens: int, input: torch.Tensor, one_shot: bool = False):
        self.group_name, self.world_size, self.input, self.one_shot = (
            context.group.group_name,
            context.world_size,
            input,
            one_shot,
        )
        self.scratch = context.symmetric("torch", num_tokens)
        self.prepare_all_reduce()

    def reduce_scatter(self) -> torch.Tensor:
        """For token counts that the ranks divide: the op cuts its input, which it wants flat, into equal shares."""
        rows, columns = self.scratch.shape
        output = self.scratch.new_empty(rows // self.world_size * columns)
        torch.ops.symm_mem.reduce_scatter_out(self.scratch.view(-1), self.group_name, False, output)
        return output.view(-1, columns)

    def prepare_all_reduce(self) -> None:
        """As OverTorch's: two-shot works in place, and a row-parallel product can write where it reads."""
        self.scratch.copy_(self.input)

    def all_reduce(self) -> torch.Tensor:
        if self.one_shot:
            return torch.ops.symm_mem.one_shot_all_reduce(self.scratch, "sum", self.group_name)
        return torch.ops.symm_mem.two_shot_all_reduce_(self.scratch, "sum", self.group_name)


class PeerCopies:
    """An all-gather in which every rank copies the others' rows out of their memory, by the driver's own copies."""

    def __init__(self, context, num_tokens: int, columns: int, dtype: torch.dtype | None = None):
        self.context, self.num_tokens, self.columns = context, num_tokens, columns
        dtype = dtype or context.dtype
        # Two buffers in turn: a rank that is a call ahead does not write what a slower one still copies.
        shape = (2, context.row_count(num_tokens, 0), columns)
        self.memory = symm_mem.empty(*shape, dtype=dtype, device=context.device)
        self.handle = symm_mem.rendezvous(self.memory, context.group.group_name)
        self.buffers = [self.handle.get_buffer(rank, shape, dtype) for rank in range(context.world_size)]
        self.turns = itertools.cycle(range(2))

    def next_rows(self) -> torch.Tensor:
        """Where this rank's rows of the next call belong."""
        self.turn = next(self.turns)
        return self.memory[self.turn, : self.context.row_count(self.num_tokens)]

    def all_gather(self) -> torch.Tensor:
        self.context.barrier()
        rank, world_size = self.context.rank, self.context.world_size
        output = self.memory.new_empty(self.num_tokens, self.columns)
        for step in range(1, world_size + 1):  # every rank begins with another peer
            peer = (rank + step) % world_size
            own = output[tp_fused.row_slice(self.num_tokens, peer, world_size)]
            own.copy_(self.buffers[peer][self.turn, : own.shape[0]])
        return output
