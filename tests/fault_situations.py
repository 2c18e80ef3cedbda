"""What may go wrong between ranks, done to one call of any op: these functions run on the ranks of a pool.

In each situation one rank, `ODD`, does something else than its peers. Every rank notes what came of its calls, as
`Step`s: test_fault_table.py judges them, and fault_table.py puts them into words.
"""

import concurrent.futures
import dataclasses
import functools
import os
import select
import signal
import time
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.distributed as dist
from programs import ALL_OPS, COMPOSED, LATENT, Call
from ranks import outcome, settled, workspace

import tp_fused

ODD = 1  # the rank that misbehaves
SIZES = {"hidden_size": 256, "latent_size": sum(LATENT)}
SHORT_S, LONG_S = 1.0, 8.0  # deadlines: where one is to pass, and where none is
TWO_STREAMS_CALLS = 8
ONE_DTYPE = ("qkv_a_proj_ag_fp8", "qkv_a_proj_ag_norm_fp8")  # rows of another dtype are refused


class Step(NamedTuple):
    """What came of one call: "right" (and so are its numbers), "wrong", or the type of the error; `text` says more."""

    role: str  # whose call it was: "peers", "itself" or "child"
    found: str
    text: str
    seconds: float


@dataclasses.dataclass
class Site:
    """Where a situation comes about: an open workspace on which all ranks have made `call` once."""

    made: tp_fused.Workspace
    call: Call
    group: dist.ProcessGroup | None = None

    @property
    def odd(self) -> bool:
        return dist.get_rank() == ODD

    def arguments(self, call: Call) -> dict:
        return call.arguments(dist.get_rank(), dist.get_world_size()) | {"group": self.group}

    def step(self, call: Call | None = None, **arguments) -> Step:
        """Makes a call, by default `self.call`, and compares what it returns with the unfused program."""
        call = call or self.call
        given = self.arguments(call) | arguments
        return self.note(lambda: [call.run(dist.get_rank(), dist.get_world_size(), given)], [call])

    def check(self) -> Step:
        return self.note(self.made.check)

    def note(self, function: Callable, calls: list[Call] | None = None) -> Step:
        """`function` returns the outputs of the calls."""
        role = "itself" if self.odd else "peers"
        results, seconds = outcome(settled, self.made, function)
        if isinstance(results, Exception):
            return Step(role, type(results).__name__, str(results), seconds)
        for call, outputs in zip(calls or [], results or [], strict=True):
            try:
                call.check(outputs, dist.get_rank(), dist.get_world_size())
            except AssertionError as error:
                return Step(role, "wrong", str(error), seconds)
        return Step(role, "right", "", seconds)

    def go_on(self) -> list[Step]:
        """What a situation that is no fault leaves behind: nothing."""
        return [self.step(), self.check(), self.step()]


def other_op(call: Call) -> Call:
    return dataclasses.replace(call, op=ALL_OPS[(ALL_OPS.index(call.op) + 1) % len(ALL_OPS)])


# ---- late ----


def come_beyond_the_deadline(site: Site) -> list[Step]:
    if not site.odd:
        steps = [site.step()]
        dist.barrier()
        return steps
    dist.barrier()  # the others have given up
    return [site.step(), site.check()]


def come_within_the_deadline(site: Site) -> list[Step]:
    time.sleep(0.3 * site.odd)
    return site.go_on()


# ---- something else ----


def other_num_tokens(site: Site) -> list[Step]:
    return [site.step(dataclasses.replace(site.call, num_tokens=site.call.num_tokens + site.odd))]


def another_op(site: Site) -> list[Step]:
    return [site.step(other_op(site.call) if site.odd else site.call)]


def other_dtype(site: Site) -> list[Step]:
    if site.odd and site.call.op in ONE_DTYPE:
        return [site.step(q=site.arguments(site.call)["q"].bfloat16())]
    return [site.step(dataclasses.replace(site.call, dtype=torch.bfloat16 if site.odd else torch.float32))]


def other_hidden_size(site: Site) -> list[Step]:
    return [site.step(dataclasses.replace(site.call, hidden_size=128 if site.odd else 256))]


def another_order(site: Site) -> list[Step]:
    calls = [site.call, other_op(site.call)]
    return [site.step(call) for call in (reversed(calls) if site.odd else calls)]


# ---- what goes wrong on one rank ----


def close(site: Site) -> list[Step]:
    if site.odd:
        site.made.close()
    return [site.step()]


def raise_between_two_ops(site: Site) -> list[Step]:
    """A loop of two ops, of which all have made the first; an exception takes the odd rank to the next turn."""
    try:
        if site.odd:
            raise KeyError("of the program")
        return [site.step(other_op(site.call))]
    except KeyError:
        return [site.step()]


def fork(site: Site) -> list[Step]:
    """The odd rank's child calls what its parent is to call, with other numbers; then the parent does."""
    steps = [_call_in_a_child(site)] if site.odd else []
    return steps + site.go_on()


def _call_in_a_child(site: Site) -> Step:
    other = dataclasses.replace(site.call, seed=1)
    arguments, begin = site.arguments(other), time.monotonic()
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            found, _ = outcome(other.run, dist.get_rank(), dist.get_world_size(), arguments)
            told = (
                [type(found).__name__, str(found)] if isinstance(found, Exception) else ["wrong", "the call was made"]
            )
            os.write(writer, "\n".join(told).encode()[:4000])
        finally:
            os._exit(0)
    os.close(writer)
    ready, _, _ = select.select([reader], [], [], LONG_S / 2)
    told = os.read(reader, 4096).decode() if ready else "wrong\nthe child hangs"
    os.close(reader)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return Step("child", *told.split("\n", 1), time.monotonic() - begin)


# ---- graphs and streams, on cuda ----


def capture(call: Call, arguments: dict) -> tuple[torch.cuda.CUDAGraph, tuple]:
    """A graph of the call, and its outputs."""
    graph = torch.cuda.CUDAGraph()
    torch.utils.deterministic.fill_uninitialized_memory = False  # with NaN, which would be a part of the graph
    try:
        with torch.cuda.graph(graph):
            outputs = call.run(dist.get_rank(), dist.get_world_size(), arguments)
    finally:
        torch.utils.deterministic.fill_uninitialized_memory = True
    return graph, outputs


def replay_on_one_rank(site: Site) -> list[Step]:
    """The odd rank replays a graph of the call that its peers make eagerly."""
    if not site.odd:
        return [site.step(), *site.go_on()]
    graph, outputs = capture(site.call, site.arguments(site.call))

    def replay():
        for output in outputs:
            output.view(torch.uint8).fill_(42)
        graph.replay()
        return [outputs]

    replays = [site.note(replay, [site.call]) for _ in range(2)]
    return [*replays, site.check(), site.note(replay, [site.call])]


def call_on_two_streams(site: Site) -> list[Step]:
    """Eager calls, on two streams in turn, without an event between them."""
    calls = [dataclasses.replace(site.call, seed=seed) for seed in range(TWO_STREAMS_CALLS)]
    given = [site.arguments(call) for call in calls]
    streams = [torch.cuda.Stream() for _ in range(2)]
    torch.cuda.synchronize()
    dist.barrier()

    def launch():
        results = []
        for index, (call, arguments) in enumerate(zip(calls, given, strict=True)):
            with torch.cuda.stream(streams[index % 2]):
                results.append(call.run(dist.get_rank(), dist.get_world_size(), arguments))
        return results

    return [site.note(launch, calls), *site.go_on()]


def replay_on_two_streams(site: Site) -> list[Step]:
    """Graphs of two calls, replayed on two streams without an event between them."""
    calls = [dataclasses.replace(site.call, seed=seed) for seed in range(2)]
    captured = [capture(call, site.arguments(call)) for call in calls]
    streams = [torch.cuda.Stream() for _ in range(2)]
    torch.cuda.synchronize()
    dist.barrier()

    def launch():
        for _ in range(TWO_STREAMS_CALLS):
            for (graph, _), stream in zip(captured, streams, strict=True):
                with torch.cuda.stream(stream):
                    graph.replay()
        return [outputs for _, outputs in captured]

    return [site.note(launch, calls)]


# ---- the situations of the table ----


@dataclasses.dataclass(frozen=True)
class Situation:
    """`title`: the row of the table. `run`: what a rank does. `words` (fault_table.py) of what its peers and the odd
    rank itself have to come upon, by role, on cpu and on cuda. A set: either will do. `odd`: a pattern of the ranks
    that may be named.
    """

    title: str
    run: Callable[[Site], list[Step]] | None
    cpu: dict[str, set[str]] | None
    cuda: dict[str, set[str]]
    deadline_s: float = LONG_S
    odd: str = str(ODD)


def _alike(peers: str, itself: str, deadline_s: float = LONG_S) -> dict:
    words = {"peers": {peers}, "itself": {itself}}
    return {"cpu": words, "cuda": words, "deadline_s": deadline_s}


_DISAGREES, _RIGHT = _alike("disagrees", "disagrees"), _alike("right", "right")
_CHILD = {"peers": {"right"}, "itself": {"right"}, "child": {"refused"}}
_OVERLAPS = {"peers": {"overlaps", "right"}, "itself": {"overlaps", "right"}}
SITUATIONS = {
    "late": Situation(
        "comes after the deadline", come_beyond_the_deadline, **_alike("never arrived", "never arrived", SHORT_S)
    ),
    "within": Situation("comes late, within the deadline", come_within_the_deadline, **_RIGHT),
    "tokens": Situation("calls with another token count", other_num_tokens, **_DISAGREES),
    "op": Situation("calls another op", another_op, **_DISAGREES),
    "dtype": Situation("calls with another dtype", other_dtype, **_DISAGREES),
    "hidden": Situation("calls with another hidden size", other_hidden_size, **_DISAGREES),
    "order": Situation("makes two calls in the other order", another_order, **_DISAGREES),
    "exception": Situation("leaves an op out after an exception", raise_between_two_ops, **_DISAGREES),
    "closed": Situation("closes its workspace", close, **_alike("closed", "refused")),
    "fork": Situation("forks; the child calls", fork, cpu=_CHILD, cuda=_CHILD),
    "graph": Situation("replays a graph, the others call eagerly", replay_on_one_rank, cpu=None, cuda=_RIGHT["cuda"]),
    "streams": Situation("all call on two streams", call_on_two_streams, cpu=None, cuda=_RIGHT["cuda"]),
    "graph streams": Situation(
        "all replay graphs on two streams", replay_on_two_streams, cpu=None, cuda=_OVERLAPS, deadline_s=2.0, odd=r"\d"
    ),
    # The last one, since it costs a pool.
    "killed": Situation("is killed", None, cpu={"peers": {"died"}}, cuda={"peers": {"never arrived"}}),
}


def expected(name: str, op: str, device: str) -> dict[str, set[str]]:
    if name == "dtype" and op in ONE_DTYPE:
        return {"peers": {"never arrived"}, "itself": {"refused"}}
    words = getattr(SITUATIONS[name], device)
    if name == "graph streams" and op in COMPOSED:
        # On one rank the first op of one graph may come where another rank has the second op of the other.
        words = {role: of_role | {"disagrees"} for role, of_role in words.items()}
    return words


def deadline_of(name: str, op: str, device: str) -> float:
    if (name == "dtype" and op in ONE_DTYPE) or (name, device) == ("killed", "cuda"):
        return SHORT_S
    return SITUATIONS[name].deadline_s


def call_of(op: str, device: str) -> Call:
    return Call(op, num_tokens=9, hidden_size=256, residual="full", device=device)


def come_about(name: str, device: str) -> dict[str, list[Step]]:
    """Runs on a rank: the situation in every op, each in a workspace of its own."""
    if device == "cuda":
        _warm_up()
    if name == "killed":
        return be_killed(device)
    if name == "late" and device == "cpu":
        return be_late(device)
    return {op: _come_about(name, op, device) for op in ALL_OPS}


def _come_about(name: str, op: str, device: str) -> list[Step]:
    with workspace(device, device, timeout_s=deadline_of(name, op, device), **SIZES) as made:
        site = Site(made, call_of(op, device))
        _begin_well(site)
        steps = SITUATIONS[name].run(site)
        dist.barrier()
        return steps


@functools.cache
def _warm_up() -> None:
    """Once on a rank: kernels are loaded, cuBLAS is set up and Triton compiles before a short deadline is at stake."""
    with workspace("cuda", "cuda", timeout_s=100.0, **SIZES) as made:
        for op in ALL_OPS:
            _begin_well(Site(made, call_of(op, "cuda")))


def _begin_well(site: Site) -> None:
    step = site.step()
    if step.found != "right":
        raise AssertionError(f"before anything has gone wrong: {step}")
    dist.barrier()


def be_killed(device: str) -> dict[str, list[Step]]:
    """Runs on a rank: a group and a workspace for every op; then the odd rank is killed, once for all of them.

    On cuda while it is idle: under MPS, a process that dies with kernels in flight takes others with it.
    """
    sites = _sites("killed", device)
    time.sleep(0.2)  # the barrier's messages arrive
    if dist.get_rank() == ODD:
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(0.1)
    return {op: [site.step()] for op, site in sites.items()}


def be_late(device: str) -> dict[str, list[Step]]:
    """Runs on a rank: as `_come_about`, but in threads that wait for the deadline at the same time."""
    sites = _sites("late", device)

    def come(op: str) -> list[Step]:
        sites[op].made.attach_thread()
        return [sites[op].step(), sites[op].check()] if sites[op].odd else [sites[op].step()]

    if dist.get_rank() == ODD:
        dist.barrier()  # the others have given up
    with concurrent.futures.ThreadPoolExecutor(len(ALL_OPS)) as executor:
        steps = dict(zip(ALL_OPS, executor.map(come, ALL_OPS), strict=True))
    if dist.get_rank() != ODD:
        dist.barrier()
    dist.barrier()
    for site in sites.values():
        site.made.close()
        dist.destroy_process_group(site.group)
    return steps


def _sites(name: str, device: str) -> dict[str, Site]:
    """A group and a workspace for every op."""
    os.environ["TP_FUSED_BACKEND"] = device
    everyone = list(range(dist.get_world_size()))
    sizes = {"max_num_tokens": 64, "dtype": torch.float32, "device": device, **SIZES}
    sites = {}
    for op in ALL_OPS:
        group = dist.new_group(everyone)
        made = tp_fused.init(group, timeout_s=deadline_of(name, op, device), **sizes)
        sites[op] = Site(made, call_of(op, device), group)
        _begin_well(sites[op])
    return sites
