"""Long random runs: the calls of a `Sequence` are made by the ranks of a pool, and every result is looked at.

The first result of each distinct call is compared with the unfused program, every later one with what that says, where
it says it to the bit (sums, gathered rows, and on the CPU all but products), and with the first one where it does not.
What all ranks have is the same bits on all of them. On CUDA the comparisons are made by the GPU and read every
`WINDOW` calls, so that ranks run as far ahead of each other as the ops let them.
"""

import contextlib
import dataclasses
import functools
import os
import time
import traceback
from collections import Counter

import torch
import torch.distributed as dist
from programs import COMPOSED, PROJECTIONS, same_bits
from soak_calls import Kind, Segment, Sequence, SoakCall, Step
from soak_stalls import StallWatch

import tp_fused
from tp_fused import reference

WINDOW = {"cpu": 1, "cuda": 100}
TIMEOUT_S = 30.0  # of an op
LIMIT_S = 240.0  # of a segment, which takes seconds
MOST_TOLD = 10  # wrong results that a rank describes
_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32}
# The outputs that all ranks have.
_EVERYWHERE = {"all_gather_rows": 1, "rs_rmsnorm_ag": 1, "rs_rmsnorm_ag_fp8": 2, "mla_prologue": 3}
_EVERYWHERE |= {**dict.fromkeys(PROJECTIONS, 3), "qkv_a_proj_ag_norm_fp8": 4, "mla_prologue_fp8": 4}


@dataclasses.dataclass(frozen=True)
class Injection:
    """An error made on purpose, to see that it is found: once, by rank `rank`, at call `number` or soon after.

    what: "bit" flips one in the first output, "rows" swaps two there, "raise" and "exit" end the rank.
    """

    what: str
    number: int
    rank: int

    def __str__(self) -> str:
        return f"{self.what}:{self.number}:{self.rank}"

    @classmethod
    def parse(cls, text: str) -> "Injection":
        what, number, rank = text.split(":")
        if what not in ("bit", "rows", "raise", "exit"):
            raise ValueError(f"what to inject must be bit, rows, raise or exit, got {what!r}")
        return cls(what, int(number), int(rank))

    def apply(self, outputs) -> bool:
        """False where there is nothing to spoil, and there has to be."""
        if self.what == "raise":
            raise RuntimeError("injected")
        if self.what == "exit":
            os._exit(3)
        output = outputs[0]
        if output.numel() == 0 or (self.what == "rows" and len(output) < 2):
            return False
        if self.what == "bit":
            output.view(torch.uint8)[-1, -1] ^= 1
        else:
            output[:2] = output[:2].flip(0).clone()
        return True


@dataclasses.dataclass
class Wrong:
    """A result that is not what it has to be, or what a call ran into."""

    number: int
    rank: int
    message: str


@dataclasses.dataclass
class Report:
    """What became of a segment on one rank. calls: by op, of the groups in which this rank is the first."""

    calls: Counter
    num_wrong: int = 0
    wrong: list[Wrong] = dataclasses.field(default_factory=list)
    digests: dict = dataclasses.field(default_factory=dict)  # by (kind, version), of what all ranks have


def run_segment(sequence: Sequence, first: int, end: int, injection: Injection | None) -> Report:
    """Runs on a rank: the calls first..end - 1, which lie in one segment."""
    os.environ.pop("TP_FUSED_BACKEND", None)
    watch = StallWatch()
    run = _Run(sequence.segment(first // sequence.segment_calls), injection)
    try:
        with contextlib.ExitStack() as stack:
            run.open(stack)
            for number in range(first, end):
                watch.step(number)
                run.step(number)
            run.recorder.flush()
            run.digest()
    except Exception as error:
        about = f"{type(error).__name__}: {error}"
        if not isinstance(error, tp_fused.CollectiveFault):
            about += "\n" + traceback.format_exc()
        run.recorder.tell(run.number, about + watch.text())
    finally:
        watch.close()
    return run.report


@functools.cache
def _group(ranks: tuple[int, ...], place: int) -> dist.ProcessGroup:
    """The group of a segment's `place`-th workspace; like `new_group`, called by all ranks in the same order."""
    return dist.group.WORLD if place == 0 else dist.new_group(list(ranks))


class _Recorder:
    """Which rows of which results were wrong."""

    def __init__(self, report: Report, device: str):
        self._report, self._window, self._rank = report, WINDOW[device], dist.get_rank()
        self._pending: list[tuple[int, int, torch.Tensor]] = []  # number, output, which rows are wrong
        self.workspaces: list = []

    def compare(self, number: int, outputs, expected) -> None:
        for index, (actual, right) in enumerate(zip(outputs, expected, strict=True)):
            if actual.shape != right.shape or actual.dtype != right.dtype or actual.stride() != right.stride():
                seen, wanted = ((x.shape, x.stride(), x.dtype) for x in (actual, right))
                self.tell(number, f"output {index} is {seen}, expected {wanted}")
            elif actual.numel():
                actual, right = _integers(actual), _integers(right)
                if self._window > 1:
                    self._pending.append((number, index, (actual != right).any(1)))
                elif not torch.equal(actual, right):
                    self._tell_rows(number, index, (actual != right).any(1))

    def after(self, number: int) -> None:
        if self._window > 1 and number % self._window == 0:
            self.flush()

    def flush(self) -> None:
        """Reads what the comparisons found, and whether an op met trouble."""
        pending, self._pending = self._pending, []
        if pending and torch.cat([rows for _, _, rows in pending]).any().item():
            for number, index, rows in pending:
                if rows.any().item():
                    self._tell_rows(number, index, rows)
        for made in self.workspaces:
            made.check()

    def tell(self, number: int, message: str) -> None:
        self._report.num_wrong += 1
        if len(self._report.wrong) < MOST_TOLD:
            self._report.wrong.append(Wrong(number, self._rank, message))

    def _tell_rows(self, number: int, index: int, rows: torch.Tensor) -> None:
        self.tell(number, f"output {index}: {_count_rows(rows)}")


def _count_rows(rows: torch.Tensor) -> str:
    wrong = rows.nonzero().flatten().tolist()
    return f"{len(wrong)} of {len(rows)} rows wrong: {wrong[:8]}"


def _integers(tensor: torch.Tensor) -> torch.Tensor:
    """The bits, eight bytes at a time where rows are made of such."""
    size = tensor.element_size()
    if tensor.is_contiguous() and tensor.shape[-1] * size % 8 == 0 and tensor.storage_offset() * size % 8 == 0:
        return tensor.view(torch.int64)
    return tensor.view(_INTEGERS[size])


def _copy(tensor: torch.Tensor) -> torch.Tensor:
    """With the same strides: a clone has no padding."""
    return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=tensor.device).copy_(tensor)


def _digest(tensor: torch.Tensor) -> int:
    """Of all bits and where they are."""
    bits = _integers(tensor).contiguous().view(-1).long()
    places = torch.arange(1, len(bits) + 1, device=bits.device)
    return ((bits ^ (bits >> 32)) * (places * 2654435761 | 1)).sum().item()


class _Distinct:
    """A distinct call, on this rank: its inputs and what comes out, by version."""

    def __init__(self, kind: Kind, workspace, memory: torch.Tensor):
        self.kind, self.call, self.workspace = kind, kind.call, workspace
        self.rank, self.world_size = workspace.rank, workspace.world_size
        self.arguments = self.call.arguments(self.rank, self.world_size) | {"group": workspace.group}
        self.inputs: dict[int, dict] = {}
        self.expected: dict[int, tuple] = {}
        self.in_place, self.graph = None, None
        if kind.in_place is not None:
            input = self.arguments["input"]
            place = memory[kind.in_place : kind.in_place + input.numel() * input.element_size()]
            self.in_place = place.view(input.dtype).view(input.shape)

    def add_version(self, version: int) -> None:
        made = self.call.of_version(version).arguments(self.rank, self.world_size)
        names = ("q", "scale") if "q" in made else ("input",)
        self.inputs[version] = {name: made[name] for name in names}

    def run(self, version: int, **options) -> tuple[torch.Tensor, ...]:
        """The outputs of a replay or of an eager call, which `options` alter."""
        inputs = self.inputs[version]
        if self.graph is not None and not options:
            for name, value in inputs.items():
                self._static[name].copy_(value)
            for output in self._outputs:
                (output.view(torch.uint8) if output.element_size() == 1 else output).fill_(42)
            self.graph.replay()
            outputs = self._outputs
        else:
            if self.in_place is not None:
                inputs = {"input": self.in_place.copy_(inputs["input"])}
            outputs = self.call.run(self.rank, self.world_size, self.arguments | inputs | options)
        if self.in_place is not None:
            self.in_place.fill_(float("nan"))  # only that peers have read it makes this safe
        return outputs

    def capture(self, pool) -> None:
        """From now on the call is a graph. Called after an eager one: kernels are loaded."""
        varying = next(iter(self.inputs.values()))
        copies = {"input": self.in_place} if self.in_place is not None else {n: _copy(t) for n, t in varying.items()}
        self._static = self.arguments | copies
        graph = torch.cuda.CUDAGraph()
        torch.utils.deterministic.fill_uninitialized_memory = False  # a part of the graph it would be
        try:
            with torch.cuda.graph(graph, pool=pool):
                self._outputs = self.call.run(self.rank, self.world_size, self._static)
        finally:
            torch.utils.deterministic.fill_uninitialized_memory = True
        self.graph = graph


def _check(call: SoakCall, outputs, rank: int, world_size: int) -> None:
    """Raises AssertionError where these are not the unfused program's."""
    call.compare(outputs, rank, world_size)
    if call.op == "rs_rmsnorm_fp8" and call.options["keep_output"]:
        how = (call.options[name] for name in ("group_size", "scale_layout", "round_scales"))
        same_bits(outputs[:2], reference.quantize_e4m3(outputs[3], *how))


def _rows_that_differ(call: SoakCall, outputs, rank: int, world_size: int) -> str:
    """Of an output that has the same bits on every backend."""
    exact = call.exact(rank, world_size)
    if exact is None:
        return ""
    index, right = exact
    if outputs[index].shape != right.shape or right.numel() == 0:
        return ""
    return f"; output {index}: {_count_rows((_integers(outputs[index]) != _integers(right)).any(1))}"


class _Run:
    """A segment on this rank."""

    def __init__(self, segment: Segment, injection: Injection | None):
        self.segment, self.injection = segment, injection
        self.device, self.rank = segment.sequence.device, dist.get_rank()
        self.report = Report(Counter())
        self.recorder = _Recorder(self.report, self.device)
        self.number = segment.first
        self.workspaces: list = []  # None where this rank has no part
        self.memories: list = []
        self.distinct: dict[int, _Distinct] = {}
        self._pool = None  # of the graphs' memory

    def open(self, stack: contextlib.ExitStack) -> None:
        if self.device == "cuda":
            # As the unfused program adds up, of whose errors the bound is made.
            torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False
            torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction = False
        for index, space in enumerate(self.segment.spaces):
            group = _group(space.ranks, index)
            made = memory = None
            if self.rank in space.ranks:
                made = tp_fused.init(
                    group,
                    max_num_tokens=space.max_num_tokens,
                    hidden_size=space.row_bytes // space.dtype.itemsize,
                    dtype=space.dtype,
                    timeout_s=TIMEOUT_S,
                    device=self.device,
                )
                stack.enter_context(made)
                self.recorder.workspaces.append(made)
                if made.backend != self.device:
                    raise RuntimeError(f"the {made.backend} backend serves, not {self.device}: {made.reason}")
                memory = made.symm_empty((max(1, self._bytes_in_place(index)),), dtype=torch.uint8)
            self.workspaces.append(made)
            self.memories.append(memory)
        stack.callback(self.distinct.clear)  # graphs go before what they point into

    def _bytes_in_place(self, space: int) -> int:
        sizes = [
            kind.in_place + kind.call.num_tokens * kind.call.hidden_size * kind.call.dtype.itemsize
            for kind in self.segment.kinds
            if kind.space == space and kind.in_place is not None
        ]
        return max(sizes, default=0)

    def step(self, number: int) -> None:
        self.number = number
        step = self.segment.steps[number - self.segment.first]
        kind = self.segment.kinds[step.kind]
        workspace = self.workspaces[kind.space]
        if workspace is None:
            return
        if step.late == self.rank:
            self._delay(step)
        if step.kind not in self.distinct:
            self.distinct[step.kind] = _Distinct(kind, workspace, self.memories[kind.space])
        distinct = self.distinct[step.kind]
        if step.version not in distinct.inputs:
            distinct.add_version(step.version)
            self._first(distinct, step.version, self._relatives(distinct, step.version))
        elif step.version not in distinct.expected:  # the last one was wrong
            self._first(distinct, step.version)
        else:
            outputs = distinct.run(step.version)
            self._count(kind)
            self._inject(outputs)
            self.recorder.compare(number, outputs, distinct.expected[step.version])
            if self.device == "cpu":  # here torch does not fill what it hands to the native library
                for output in filter(torch.numel, outputs):
                    _integers(output).fill_(-1 if output.element_size() > 1 else 255)
        self.recorder.after(number)

    def _relatives(self, distinct: _Distinct, version: int) -> list[tuple[torch.Tensor, ...]]:
        """Results of other calls, with which those of this one must agree, from all ranks of the group."""
        call, results = distinct.call.of_version(version), []
        if call.options.get("keep_output") is False:  # with the output, q can be checked to the bit
            kept = dataclasses.replace(call, options=call.options | {"keep_output": True})
            q, scale, residual_out, output = self._checked(kept, distinct.run(version, keep_output=True), distinct)
            results.append((q, scale, residual_out, output[:0]))
        if distinct.kind.captured and distinct.graph is None:
            eager = self._checked(call, distinct.run(version), distinct)
            if call.op not in (*PROJECTIONS, *COMPOSED):  # torch's products may have other bits when they are captured
                results.append(eager)
            self._pool = self._pool or torch.cuda.graph_pool_handle()
            distinct.capture(self._pool)
        return results

    def _first(self, distinct: _Distinct, version: int, relatives=()) -> None:
        """A call whose results are checked on the spot; what later ones have to be."""
        wrong = self.report.num_wrong
        outputs = distinct.run(version)
        self._inject(outputs)
        self._checked(distinct.call.of_version(version), outputs, distinct)
        for other in relatives:
            self.recorder.compare(self.number, outputs, other)
        if self.report.num_wrong == wrong:
            distinct.expected[version] = tuple(map(_copy, outputs)) if distinct.graph is not None else outputs

    def _checked(self, call: SoakCall, outputs, distinct: _Distinct):
        self._count(distinct.kind)
        try:
            _check(call, outputs, distinct.rank, distinct.world_size)
        except AssertionError as error:
            rows = _rows_that_differ(call, outputs, distinct.rank, distinct.world_size)
            self.recorder.tell(self.number, f"its first result: {error}{rows}")
        return outputs

    def _count(self, kind: Kind) -> None:
        if self.segment.spaces[kind.space].ranks[0] == self.rank:
            self.report.calls[kind.call.op] += 1

    def _delay(self, step: Step) -> None:
        if step.on_device:
            torch.cuda._sleep(int(step.seconds * 1.5e9))  # cycles
        else:
            time.sleep(step.seconds)

    def _inject(self, outputs) -> None:
        injection = self.injection
        if injection is not None and injection.rank == self.rank and injection.number <= self.number:
            if self.device == "cuda":
                torch.cuda.synchronize()
            if injection.apply(outputs):
                self.injection = None

    def digest(self) -> None:
        """Of what all ranks have, for whoever compares them."""
        for index, distinct in self.distinct.items():
            for version, expected in distinct.expected.items():
                digests = tuple(_digest(x) for x in expected[: _EVERYWHERE.get(distinct.call.op, 0)] if x.numel())
                self.report.digests[index, version] = digests
