"""One class an op of catalog.py: its inputs, the fused call, the unfused program, what is right, and the bytes.

`bytes` and the bus factor follow nccl-tests: a reduce-scatter's
bytes are one rank's input, an all-gather's are one rank's output, (world_size - 1) / world_size of them cross a rank's
link. `memory_bytes` is what all ranks together have to read and write, and sets the floor: see `Case.memory_bytes`.
"""

import functools

import torch

import tp_fused
from tp_fused import reference

from . import catalog
from .baselines import BASELINES
from .context import compact
from .peers import FlashInfer, LeftOut, OverNcclWindows, fastest, ways
from .timing import Program
from .transports import OverSymmMem, OverTorch, OverTpFused

EPS = 1e-6
TRANSPORTS = {"dist": OverTorch, "allreduce": OverTorch, "nccl-symm": OverNcclWindows, "own": OverTpFused}
OPS = torch.ops.tp_fused  # as engines and compiled graphs call them


def rms_norm(rows: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.rms_norm(rows, (rows.shape[1],), weight.to(rows.dtype), EPS)


def add_norm(rows: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor):
    """What follows a reduction, in place on its fresh output."""
    rows.add_(residual)
    return rms_norm(rows, weight), rows


def steps_apart(value: torch.Tensor, expected: torch.Tensor) -> torch.Tensor:
    """How many representable numbers lie between two tensors' elements; 0 only where the bits are the same."""
    integer = {1: torch.int8, 2: torch.int16, 4: torch.int32}[value.element_size()]
    smallest = torch.iinfo(integer).min

    def ordered(tensor):
        bits = tensor.contiguous().view(integer).long()
        return torch.where(bits < 0, smallest - bits - 1, bits)

    return (ordered(value) - ordered(expected)).abs()


class Case:
    """An op at one token count on one rank. Subclasses name themselves in `op`."""

    op: str
    bus_passes = 1  # 2 where rows are scattered and gathered again, as nccl-tests counts an all-reduce

    def __init__(self, context, num_tokens: int):
        self.context, self.num_tokens, self.group = context, num_tokens, context.group.group_name
        options = context.options
        self.own_rows = context.row_count(num_tokens)
        self.hidden, self.latent, self.itemsize = options.hidden, options.latent, context.dtype.itemsize
        # A result of the kernels differs from the oracle by the order of fp32 sums at most: on the CPU, not at all.
        self.roundings = 0 if context.device.type == "cpu" else 1

    def fused(self) -> tuple[torch.Tensor, ...]:
        raise NotImplementedError

    def unfused(self, via) -> Program:
        """The ordinary program over a transport; its outputs are those of `fused`, padded where the transport pads."""
        raise NotImplementedError

    def count_wrong(self, outputs: tuple[torch.Tensor, ...]) -> int:
        """Elements of this rank's outputs that are not what they must be."""
        raise NotImplementedError

    @property
    def bytes(self) -> int:
        raise NotImplementedError

    @property
    def memory_bytes(self) -> int:
        """What all ranks together read and write at least, when every byte is touched once."""
        raise NotImplementedError

    def explain(self) -> str:
        return self.context.explain(self.op)

    def programs(self) -> dict[str, Program]:
        """What is timed: "fused" first, then its variants, then the baselines."""
        programs = {"fused": Program(self.fused, case=self)}
        for name in self.context.options.variants:
            variant = type(self)(self.context.variant(name), self.num_tokens)
            programs[name] = Program(variant.fused, case=variant)
        for name in self.available_baselines(self.context):
            if self.num_tokens > 0 or BASELINES[name].empty:
                try:
                    program = self.baseline(name)
                except LeftOut as why:
                    self.context.left_out[name] = str(why)
                    continue
                if program is not None:
                    programs[name] = program
        return programs

    @classmethod
    def available_baselines(cls, context) -> tuple[str, ...]:
        left_out = cls.left_out(context)
        return tuple(name for name in cls._asked_baselines(context) if name not in left_out)

    @classmethod
    def left_out(cls, context) -> dict[str, str]:
        """Baselines that would be available, and why they are not."""
        reasons = {
            name: context.left_out.get(name) or BASELINES[name].why_not(context)
            for name in cls._asked_baselines(context)
        }
        return {name: reason for name, reason in reasons.items() if reason}

    @classmethod
    def _asked_baselines(cls, context) -> list[str]:
        asked = context.options.baselines
        names = [name for name in catalog.OPS[cls.op].baselines if asked is None or name in asked]
        return [name for name in names if BASELINES[name].available(context)]

    def baseline(self, name: str) -> Program | None:
        """None where it cannot run at this size."""
        if name == "barrier":
            return self.bare_barrier()
        kind = TRANSPORTS[name]
        return self.unfused(kind(self.context, self.num_tokens, getattr(self, "input", None)))

    def bare_barrier(self) -> Program:
        def call():
            self.context.barrier()
            return ()

        return Program(call, expected=lambda: ())

    def resembles(self, outputs, expected) -> bool:
        """Whether a baseline computes the same thing, give or take its own roundings."""
        for output, right in zip(outputs, expected, strict=True):
            if output.shape[0] != right.shape[0]:
                if right.shape[0] == self.num_tokens:
                    output = compact(output, self.num_tokens, self.context.world_size)
                output = output[: right.shape[0]]
            output, right = output.double(), right.double()
            # On average, since one rounding may move an fp8 number by an eighth; `not <=` catches NaN.
            if right.numel() and not (output - right).abs().mean() <= 0.05 * right.abs().mean():
                return False
        return True

    def _local(self, function):
        """The part of an unfused program that runs on one rank, compiled where --compile asks for it."""
        return torch.compile(function, dynamic=False) if self.context.options.compile else function


# ---- ops that begin with a reduction ----


class ReductionCase(Case):
    """Partial sums of all ranks, a residual of which each rank holds its rows, and a norm's weight."""

    def __init__(self, context, num_tokens: int):
        super().__init__(context, num_tokens)
        shares = [self._partial(context.rank, owner) for owner in range(context.world_size)]
        self.input = context.place(torch.cat(shares))
        self.residual = self._residual(context.rank)
        self.weight = 1 + 0.1 * context.constant("norm", (self.hidden,))

    def _partial(self, source: int, owner: int) -> torch.Tensor:
        """What rank `source` adds to the rows of rank `owner`: a tensor of its own, so that a peer can make just it."""
        shape = (self.context.row_count(self.num_tokens, owner), self.hidden)
        return self.context.random("partial", self.num_tokens, source, owner, shape=shape)

    def _residual(self, owner: int) -> torch.Tensor:
        shape = (self.context.row_count(self.num_tokens, owner), self.hidden)
        return self.context.random("residual", self.num_tokens, owner, shape=shape)

    @functools.cached_property
    def full_residual(self) -> torch.Tensor:
        """The rows of all ranks, which a program without scattered rows holds on every rank."""
        return torch.cat([self._residual(owner) for owner in range(self.context.world_size)])

    def all_reduced(self, via, finish) -> Program:
        """What engines do today: all-reduce, then `finish(rows, residual)` of all rows on every rank.

        Of the residual that is returned last, the rows of this rank.
        """
        own = tp_fused.row_slice(self.num_tokens, self.context.rank, self.context.world_size)
        residual = self.full_residual

        def call():
            *outputs, residual_out = finish(via.all_reduce(), residual)
            return (*outputs, residual_out[own])

        return Program(call, via.prepare_all_reduce)

    def all_reduce_baseline(self, name: str, finish) -> Program:
        if name in ("twoshot", "oneshot"):
            via = OverSymmMem(self.context, self.num_tokens, self.input, one_shot=name == "oneshot")
        else:
            via = TRANSPORTS[name](self.context, self.num_tokens, self.input)
        return self.all_reduced(via, finish)

    def flashinfer(self, finish) -> Program | None:
        """FlashInfer's fused all-reduce, then `finish(normed rows)` on every rank. None where it cannot run."""
        own = tp_fused.row_slice(self.num_tokens, self.context.rank, self.context.world_size)
        residual = self.full_residual

        def program(way: str) -> Program:
            via = self.context.keep(f"flashinfer {way}", lambda: FlashInfer(self.context, way))

            def call():
                output, residual_out = via.all_reduce_norm(self.input, residual, self.weight, EPS)
                return (*finish(output), residual_out[own])

            return Program(call)

        programs = {way: program(way) for way in ways(self.context, self.num_tokens)}
        return fastest(self.context, programs) if programs else None

    def expected_sum(self, residual: torch.Tensor | None) -> torch.Tensor:
        parts = [self._partial(source, self.context.rank) for source in range(self.context.world_size)]
        return reference.sum_in_rank_order(parts, residual)

    @functools.cached_property
    def expected(self) -> tuple[torch.Tensor, torch.Tensor]:
        """(output, residual_out) of this rank's rows."""
        residual_out = self.expected_sum(self.residual)
        return reference.rms_norm(residual_out, self.weight, EPS), residual_out

    @property
    def bytes(self) -> int:
        return self.num_tokens * self.hidden * self.itemsize

    @property
    def reduction_bytes(self) -> int:
        """Every rank's input is read; staged, all but the owner's rows are written and read once more."""
        copies = 0 if self.context.options.zero_copy else self.context.world_size - 1
        return (self.context.world_size + 2 * copies) * self.bytes


class RsRmsnorm(ReductionCase):
    op = "rs_rmsnorm"

    def fused(self):
        return OPS.rs_rmsnorm(self.input, self.residual, self.weight, EPS, self.group)

    def baseline(self, name):
        if name == "symm":
            if self.num_tokens % self.context.world_size:
                return None
            via = OverSymmMem(self.context, self.num_tokens, self.input)
            return Program(lambda: (via.reduce_scatter(),), expected=lambda: (self.expected_sum(None),))
        return super().baseline(name)

    def unfused(self, via):
        residual, finish = via.pad_rows(self.residual), self._local(add_norm)
        return Program(lambda: finish(via.reduce_scatter(), residual, self.weight))

    def count_wrong(self, outputs):
        output, residual_out = outputs
        wrong = (steps_apart(residual_out, self.expected[1]) > 0).sum()
        return int(wrong + (steps_apart(output, self.expected[0]) > self.roundings).sum())

    @property
    def memory_bytes(self):
        return self.reduction_bytes + 3 * self.bytes


class RsRmsnormAg(ReductionCase):
    op = "rs_rmsnorm_ag"
    bus_passes = 2

    def fused(self):
        return OPS.rs_rmsnorm_ag(self.input, self.residual, self.weight, EPS, self.group)

    def unfused(self, via):
        residual, finish = via.pad_rows(self.residual), self._local(add_norm)

        def call():
            output, residual_out = finish(via.reduce_scatter(), residual, self.weight)
            return via.all_gather(output), residual_out

        return Program(call)

    def baseline(self, name):
        if name == "flashinfer":
            return self.flashinfer(lambda output: (output,))
        if name in ("allreduce", "nccl-symm", "twoshot", "oneshot"):
            norm = self._local(add_norm)
            return self.all_reduce_baseline(name, lambda rows, residual: norm(rows, residual, self.weight))
        if name == "rs_rmsnorm":
            arguments = (self.input, self.residual, self.weight, EPS, self.group)
            return Program(lambda: OPS.rs_rmsnorm(*arguments), expected=lambda: self.expected)
        return super().baseline(name)

    @functools.cached_property
    def expected_output(self) -> torch.Tensor:
        return self.context.gather_rows(self.expected[0], self.num_tokens)

    def count_wrong(self, outputs):
        output, residual_out = outputs
        wrong = (steps_apart(residual_out, self.expected[1]) > 0).sum()
        return int(wrong + (steps_apart(output, self.expected_output) > self.roundings).sum())

    @property
    def memory_bytes(self):
        return self.reduction_bytes + (2 + self.context.world_size) * self.bytes


class ReduceScatterRows(ReductionCase):
    op = "reduce_scatter_rows"

    def fused(self):
        return (OPS.reduce_scatter_rows(self.input, self.group),)

    def unfused(self, via):
        return Program(lambda: (via.reduce_scatter(),))

    def count_wrong(self, outputs):
        return int((steps_apart(outputs[0], self.expected_rows) > 0).sum())

    @functools.cached_property
    def expected_rows(self) -> torch.Tensor:
        return self.expected_sum(None)

    @property
    def memory_bytes(self):
        return self.reduction_bytes + self.bytes


# ---- ops that end with a gather ----


class AllGatherRows(Case):
    op = "all_gather_rows"

    def __init__(self, context, num_tokens: int):
        super().__init__(context, num_tokens)
        self.rows = self._rows_of(context.rank)

    def _rows_of(self, rank: int) -> torch.Tensor:
        shape = (self.context.row_count(self.num_tokens, rank), self.hidden)
        return self.context.random("rows", self.num_tokens, rank, shape=shape)

    def fused(self):
        return (OPS.all_gather_rows(self.rows, self.num_tokens, self.group),)

    def unfused(self, via):
        rows = via.pad_rows(self.rows)
        return Program(lambda: (via.all_gather(rows),))

    @functools.cached_property
    def expected(self) -> torch.Tensor:
        return torch.cat([self._rows_of(rank) for rank in range(self.context.world_size)])

    def count_wrong(self, outputs):
        return int((steps_apart(outputs[0], self.expected) > 0).sum())

    @property
    def bytes(self):
        return self.num_tokens * self.hidden * self.itemsize

    @property
    def memory_bytes(self):
        return (1 + self.context.world_size) * self.bytes
