"""Times programs in turn on all ranks. The slowest rank counts.

Iteration i of every program comes before iteration i + 1 of any, so that what else the machine does falls on all of
them alike. Before each sample the ranks line up on the workspace's own signals, outside of the clock.
"""

import functools
import gc
import itertools
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from .transports import PeerCopies


@dataclass
class Program:
    """A call to be timed, and what has to be done before each, off the clock.

    expected: what the call's outputs resemble; by default, what the fused op returns. case: whose outputs they are,
    where they have to be right, not only alike. way: which of several programs of one name this is.
    """

    call: Callable[[], object]
    prepare: Callable[[], None] | None = None
    expected: Callable[[], tuple[torch.Tensor, ...]] | None = None
    case: object = None
    way: str | None = None


@dataclass
class Samples:
    """Seconds per call, the slowest rank's, and what the last call returned here."""

    seconds: torch.Tensor
    last: object = None

    @property
    def median(self) -> float:
        return self.seconds.median().item()

    @property
    def p99(self) -> float:
        """The time that 99 of 100 calls stay within; of fewer than 100 calls, the slowest."""
        ordered = self.seconds.sort().values
        return ordered[-(-99 * len(ordered) // 100) - 1].item()


class HostClock:
    """Calls that return when their work is done: the process's own clock."""

    rounds_in_flight = 1

    def begin(self) -> None:
        pass

    def load(self, program: Program, context) -> Program:
        return program

    def sample(self, program: Program, meet) -> tuple[float, object]:
        if program.prepare is not None:
            program.prepare()
        meet()
        start = time.perf_counter()
        result = program.call()
        return time.perf_counter() - start, result

    def seconds(self, samples: list[float]) -> list[float]:
        return samples


@dataclass
class _Graph:
    graph: torch.cuda.CUDAGraph
    calls: int
    result: object
    prepare: Callable[[], None] | None


FEWEST_CALLS, MOST_CALLS, GRAPH_S = 8, 32, 3e-3


def calls_per_graph(seconds: float) -> int:
    """For calls of so many seconds: some 3 ms of them, within bounds. The launch of a graph weighs little then."""
    if seconds * MOST_CALLS <= GRAPH_S:
        return MOST_CALLS
    return max(FEWEST_CALLS, int(GRAPH_S / seconds))


class CudaClock:
    """Graph replay between two events. A graph holds several calls, so that its launch weighs little.

    Rounds are queued ahead of the card, or the host's launches would show; hence `rounds_in_flight`.
    """

    rounds_in_flight = 20

    def begin(self) -> None:
        """Keeps the card busy (for some 100 us) while the first rounds are queued."""
        torch.cuda._sleep(200_000)

    def load(self, program: Program, context) -> _Graph:
        """Captures the fewest calls, and once more where they turn out to be short. Collective."""
        if program.prepare is not None:
            program.prepare()
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):  # lazy set-up of libraries is not for a capture
            program.call()
        torch.cuda.synchronize()
        loaded = self._capture(program, stream, FEWEST_CALLS)
        samples = [self.sample(loaded, context.meet)[0] for _ in range(2)]  # the first replay has more to set up
        context.settle()
        slowest = context.host_reduce(self.seconds(samples[1:]))[0].item()  # so that the ranks agree
        if calls_per_graph(slowest) > FEWEST_CALLS:
            loaded = None  # its memory is for the next
            loaded = self._capture(program, stream, calls_per_graph(slowest))
        return loaded

    def _capture(self, program: Program, stream: torch.cuda.Stream, calls: int) -> _Graph:
        graph = torch.cuda.CUDAGraph()
        # thread_local: NCCL's watchdog thread asks after events meanwhile, which a global capture would forbid.
        with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
            for _ in range(calls):
                result = program.call()  # what the call before the last returned makes room
        return _Graph(graph, calls, result, program.prepare)

    def sample(self, program: _Graph, meet) -> tuple[tuple[torch.cuda.Event, torch.cuda.Event, int], object]:
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        if program.prepare is not None:
            program.prepare()
        meet()
        start.record()
        program.graph.replay()
        stop.record()
        return (start, stop, program.calls), program.result

    def seconds(self, samples) -> list[float]:
        return [start.elapsed_time(stop) * 1e-3 / calls for start, stop, calls in samples]


def measure(context, programs: dict[str, Program], tick=lambda done, total: None) -> dict[str, Samples]:
    """Samples of every program. `tick` hears of the progress, off the clock.

    Warm-up: --warmup rounds, or fewer when they have spent --budget seconds. Iterations: --iters, or as many as fit
    into --budget, 3 to 1000. The ranks agree on both: they go by the slowest.
    """
    options = context.options
    clock = CudaClock() if context.device.type == "cuda" else HostClock()
    context.host_barrier()
    loaded = {name: clock.load(program, context) for name, program in programs.items()}

    def run(iterations: int) -> tuple[dict[str, list[float]], dict[str, object]]:
        seconds, last = {name: [] for name in loaded}, {}
        for begin in range(0, iterations, clock.rounds_in_flight):
            samples = {name: [] for name in loaded}
            clock.begin()
            for _ in range(begin, min(begin + clock.rounds_in_flight, iterations)):
                for name, program in loaded.items():
                    last.pop(name, None)  # its memory is for the next call, as in a loop of layers
                    sample, last[name] = clock.sample(program, context.meet)
                    samples[name].append(sample)
            context.settle()
            for name, taken in samples.items():
                seconds[name] += clock.seconds(taken)
            tick(min(begin + clock.rounds_in_flight, iterations), iterations)
        return seconds, last

    warmup_s, rounds = 0.0, 0
    while rounds < options.warmup and (rounds == 0 or warmup_s < options.budget_s):
        start = time.perf_counter()
        run(1)
        warmup_s += context.host_reduce([time.perf_counter() - start])[0].item()
        rounds += 1
    iterations = options.iters or int(min(max(options.budget_s * rounds / warmup_s, 3), 1000))
    seconds, last = run(iterations)
    slowest = context.host_reduce(list(seconds.values()))
    return {name: Samples(slowest[i], last[name]) for i, name in enumerate(loaded)}


def host_calls(seconds: float) -> int:
    """For `host_time`, of calls of so many seconds: some 100 ms of them, so that what came before weighs little."""
    return int(min(max(0.1 / seconds, 200), 3000))


@dataclass(frozen=True)
class HostTime:
    """Seconds that an eager call keeps the CPU until it returns, its launches included: medians of calls.

    slowest, fastest: of the ranks. empty: the slowest rank's of an `empty_call`, which came in turn with the op's.
    """

    slowest: float
    fastest: float
    empty: float


def empty_call(outputs: tuple[torch.Tensor, ...]) -> Callable[[], object]:
    """The least that an eager call of these outputs is made of: torch.empty for each, and an empty kernel's launch.

    torch has no cheaper launch than torch.cuda._sleep(0): a kernel of one thread, for which there is no dispatcher to
    go through and no tensor to look at.
    """
    makers = [
        functools.partial(torch.empty, tensor.shape, dtype=tensor.dtype, device=tensor.device) for tensor in outputs
    ]
    launch = torch.cuda._sleep

    def call():
        made = [make() for make in makers]
        launch(0)
        return made

    return call


def host_time(context, program: Program, calls: int) -> HostTime:
    """Of CUDA programs: on the CPU a call's time is its work's.

    A busy machine delays both kinds of call alike; hence they take turns. What the caller does with the results is not
    the call's own: they are let go of off the clock. The queue is kept short, or a launch would wait for the card to
    take it.
    """
    timed = (program.call, empty_call(program.call()))
    seconds = ([], [])
    gc.disable()
    try:
        for index in range(calls):
            if index % 8 == 0:
                context.settle()
            for call, taken in zip(timed, seconds, strict=True):
                start = time.perf_counter()
                results = call()
                taken.append(time.perf_counter() - start)
                del results
    finally:
        gc.enable()
    context.settle()
    median, empty = map(statistics.median, seconds)
    slowest, fastest, slowest_empty = context.host_reduce([median, -median, empty]).tolist()
    return HostTime(slowest, -fastest, slowest_empty)


def link_bandwidth(context) -> float | None:
    """Bytes a second that copies out of another card's memory bring, all cards at once. None where there is no link."""
    if context.ranks_per_card != 1 or context.world_size == 1 or context.workspace.backend != "cuda":
        return None
    rows = 2**28 // (context.options.hidden * context.dtype.itemsize)
    memory = PeerCopies(context, rows * context.world_size, context.options.hidden)
    source = memory.buffers[(context.rank + 1) % context.world_size][0]
    target = torch.empty_like(source)
    context.host_barrier()
    seconds = _copy_seconds(target, source)
    return source.nbytes / context.host_reduce([seconds])[0].item()


def _copy_seconds(target: torch.Tensor, source: torch.Tensor) -> float:
    """The median of 20 copies."""
    events = [torch.cuda.Event(enable_timing=True) for _ in range(21)]
    for event in events:
        target.copy_(source)
        event.record()
    torch.cuda.synchronize()
    return statistics.median(start.elapsed_time(stop) * 1e-3 for start, stop in itertools.pairwise(events))


def copy_bandwidth(context) -> float:
    """Bytes read and written a second by large copies: what the memory that the ranks use gives at its best.

    On the CPU all ranks copy at once. A card is measured by one of the ranks that share it, while the others wait.
    """
    if context.device.type != "cuda":
        size = 64 * 2**20
        source = torch.ones(size, dtype=torch.uint8)
        target = torch.zeros_like(source)
        samples = measure(context, {"copy": Program(lambda: target.copy_(source))})["copy"]
        return 2 * size * context.world_size / samples.median
    size, cards, seconds = 2**30, context.world_size // context.ranks_per_card, 0.0
    context.host_barrier()
    if context.rank < cards:
        source = torch.ones(size, dtype=torch.uint8, device=context.device)
        target = torch.zeros_like(source)
        seconds = _copy_seconds(target, source)
        del source, target
        torch.cuda.empty_cache()
    return 2 * size * cards / context.host_reduce([seconds])[0].item()
