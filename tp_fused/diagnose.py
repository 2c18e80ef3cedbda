"""What became of a group's ranks, put together from what each of them knows: `tp_fused.diagnose`."""

import contextlib
import json
import os
import threading
import time
from dataclasses import dataclass, field

import torch.distributed as dist

from . import checks, faults
from .groups import _workspaces, process_group

_POLL_S = 0.02
_ended_at: dict[str, float] = {}  # this rank's last diagnosis of a group
# Which of two faults of the same call is told: a wait in vain, or for a rank that is gone, may follow from another one.
_PLACES = {faults.DISAGREE: 0, faults.PEER_DIED: 2, faults.PEER_CLOSED: 2, faults.NEVER_ARRIVED: 3}


@dataclass(frozen=True)
class RankState:
    """What is known of one rank.

    answered: it called `diagnose`, too; otherwise what follows was found in memory that it shares, if anything was.
    calls: ops that it has begun on the workspace; None: not known. call: the last of them, in words. in_call: whether
    it is inside that one. fault: what it ran into, in words. closed: it has no open workspace.
    """

    rank: int
    answered: bool = False
    calls: int | None = None
    call: str | None = None
    in_call: bool | None = None
    fault: str | None = None
    closed: bool = False
    record: dict | None = field(default=None, repr=False)

    def __str__(self) -> str:
        told = [] if self.answered else ["did not answer"]
        if self.closed:
            told.append("has no open workspace")
        if self.fault is not None:
            told.append(self.fault)
        elif self.calls == 0:
            told.append("has called nothing yet")
        elif self.calls is not None:
            told.append(f"{'is in' if self.in_call else 'last made'} call #{self.calls} {self.call or ''}".rstrip())
        elif self.answered and not self.closed:
            told.append("has met no fault")
        return f"rank {self.rank}: {'; '.join(told)}"


@dataclass(frozen=True)
class Diagnosis:
    """`verdict`: the first cause, in a sentence. `culprits`: the ranks that it is about; `op` and `call_number`: the
    call in which it showed, None where nothing did. `ranks`: what is known of each rank. str(diagnosis) is the verdict.
    """

    verdict: str
    culprits: tuple[int, ...]
    op: str | None
    call_number: int | None
    ranks: tuple[RankState, ...]

    def __str__(self) -> str:
        return self.verdict


def diagnose(group: dist.ProcessGroup | None = None, timeout_s: float = 5.0) -> Diagnosis:
    """Says which rank of `group` (default: all) began the trouble, from the records of all that can still tell.

        try:
            h, residual = tp_fused.rs_rmsnorm(x, residual, weight)
            workspace.check()  # on cuda, an op returns before its peers have come
        except tp_fused.CollectiveFault:
            tp_fused.diagnose()
            raise

        rank 3 never entered call #1842 rs_rmsnorm(num_tokens=1024, hidden_size=7168, dtype=bfloat16); ranks 0-2 waited
        30.0 s

    Each rank that calls it posts its last record in the group's store and reads what the others have posted, until it
    has heard from all or timeout_s seconds are over. Neither the GPU nor a collective of the group is used, which may
    hang; on the cpu backend, what ranks that do not answer have written into shared memory is read as well. It may be
    called by any of the ranks, before a fault or after it, from any thread, and again.

    The lowest rank that takes part prints the verdict; all return it.

    Raises ValueError where the group is not this process's, and in a forked child of a rank.
    """
    if not dist.is_available() or not dist.is_initialized():
        raise ValueError("tp_fused.diagnose needs torch.distributed: call torch.distributed.init_process_group first")
    group = process_group(group) if group is not None else dist.group.WORLD
    checks.seconds("timeout_s", timeout_s)
    workspaces = {made.token: made for (name, _), made in _workspaces.items() if name == group.group_name}
    if any(made._pid != os.getpid() for made in workspaces.values()):
        raise ValueError("tp_fused.diagnose: this process was forked from the rank, and is none itself")
    own = {token: _own_state(made) for token, made in workspaces.items()}
    # Of several workspaces, one for each kind of device, that in which something has happened.
    token = next((token for token, state in own.items() if state.get("record")), next(iter(own), None))
    exchange = _Exchange(group, own, token, timeout_s)
    posts = exchange.run()
    if token is None:  # closed here; the others say which one is meant
        token = next((other for post in posts.values() for other in post["states"]), None)
    states = []
    for rank in range(group.size()):
        told = own if rank == group.rank() else posts[rank]["states"] if rank in posts else {}
        seen = _seen_state(workspaces[token], rank) if token in workspaces and token not in told else {}
        closed = (rank == group.rank() or rank in posts) and not told
        answered = closed or token in told
        states.append(_rank_state(rank, told.get(token or "", seen), answered, closed))
    diagnosis = _judge(states, exchange.failure, timeout_s)
    if group.rank() == min((*posts, group.rank())):
        print(diagnosis, flush=True)
    return diagnosis


# ---- what a rank knows ----

_STATUS_OF = {"never arrived": faults.NEVER_ARRIVED, "disagrees": faults.DISAGREE}  # the reference backend's reasons


def _own_state(workspace) -> dict:
    """This rank's own; on cuda that is what its kernels have left in pinned host memory."""
    if workspace.backend != "reference":
        return _seen_state(workspace, workspace.rank)
    state = {"calls": workspace.calls}
    if workspace.fault is not None:
        fault = workspace.fault
        expected = {"op": fault.op}
        state["record"] = {
            "status": _STATUS_OF.get(fault.reason, 0),
            **{"rank": fault.rank, "peer": fault.peer, "call_number": fault.call_number},
            **{"epoch": fault.call_number, "waited_s": 0.0, "expected": expected, "text": str(fault)},
        }
    return state


def _seen_state(workspace, rank: int) -> dict:
    """What memory that the host can read says of a rank."""
    team = workspace.team  # which another thread may close meanwhile
    if team is None:
        return {}
    state = dict(team.progress(rank) or {})
    record = team.fault_on_host(rank)
    if record["status"]:
        state["record"] = record
    return state


def _rank_state(rank: int, state: dict, answered: bool, closed: bool) -> RankState:
    record = state.get("record")
    call = record["expected"] if record else state.get("call")
    return RankState(
        rank,
        answered,
        calls=record["call_number"] if record else state.get("calls"),
        call=call_text(call) if call else None,
        in_call=state.get("in_call"),
        fault=_words(record) if record else None,
        closed=closed or bool(state.get("closed")),
        record=record,
    )


class _Exchange:
    """What ranks tell each other through the store of their group.

    In a thread of its own and over a connection of its own: a store does not answer when the process that serves it is
    gone or stopped, and one connection serves one request at a time.
    """

    def __init__(self, group, states: dict, token: str | None, timeout_s: float):
        self._group, self._token, self._timeout_s = group, token, timeout_s
        self._begin, now = time.monotonic(), time.time()
        self._since = max(now - timeout_s, _ended_at.get(group.group_name, 0.0))
        self._post = json.dumps({"posted_at": now, "states": states})
        self._posts: dict[int, dict] = {}
        self.failure: str | None = None

    def run(self) -> dict[int, dict]:
        """The posts of the other ranks that came in time."""
        thread = threading.Thread(target=self._exchange, daemon=True)
        thread.start()
        thread.join(self._timeout_s + 5 * _POLL_S)
        if thread.is_alive():
            self.failure = "it does not answer"
        _ended_at[self._group.group_name] = time.time()
        return dict(self._posts)

    def _exchange(self) -> None:
        try:
            store = dist.distributed_c10d._get_process_group_store(self._group)
            clone = getattr(store, "clone", None)
            if clone is not None:
                with contextlib.suppress(NotImplementedError, RuntimeError):  # one written in Python has none
                    store = clone()
            # Groups of other ranks may have the same name, and the same store.
            ranks = "_".join(map(str, dist.get_process_group_ranks(self._group)))
            keys = [f"tp_fused/diagnose/{ranks}/{rank}" for rank in range(self._group.size())]
            store.set(keys[self._group.rank()], self._post)
            waiting = {*range(self._group.size())} - {self._group.rank()}
            while waiting and time.monotonic() - self._begin < self._timeout_s:
                for rank in sorted(waiting):
                    if store.check([keys[rank]]) and self._take(rank, json.loads(store.get(keys[rank]))):
                        waiting.discard(rank)
                time.sleep(_POLL_S)
        except Exception as error:  # a store may raise anything; the verdict then rests on what else is known
            self.failure = str(error).splitlines()[0] if str(error) else type(error).__name__

    def _take(self, rank: int, post: dict) -> bool:
        """Keeps a post of this diagnosis, and says whether no better one is to be waited for.

        A fault is for ever; all else may be what the rank has told in an earlier diagnosis.
        """
        state = post["states"].get(self._token)
        current = bool(state and state.get("record")) or post["posted_at"] >= self._since
        if current:
            self._posts[rank] = post
        return current and (state is not None or self._token is None)


# ---- the verdict ----


def _judge(states: list[RankState], failure: str | None, timeout_s: float) -> Diagnosis:
    records = {state.rank: state.record for state in states if state.record}
    silent = [state.rank for state in states if not state.answered]
    if records:
        verdict, culprits, first = _first_cause(states, records)
        op, call_number = _op(first["expected"]), first["call_number"]
    else:
        verdict, culprits, op, call_number = _no_fault(states)
    if silent and not records:
        verdict += f"; {_ranks(silent)} did not answer within {timeout_s:.1f} s"
    if failure is not None:
        verdict += f" (the group's store cannot be read: {failure})"
    return Diagnosis(verdict, tuple(sorted(culprits)), op, call_number, tuple(states))


def _first_cause(states: list[RankState], records: dict[int, dict]) -> tuple[str, set[int], dict]:
    """(the verdict, the ranks that it is about, the record that it is taken from)."""

    def order(record: dict) -> tuple:
        status = record["status"]
        # What follows from another rank's fault comes last, whichever call it showed in.
        return status == faults.PEER_FAULTED, record["call_number"], _PLACES.get(status, 1), record["rank"]

    first = min(records.values(), key=order)
    status, number = first["status"], first["call_number"]
    alike = {rank: r for rank, r in records.items() if r["call_number"] == number and r["status"] == status}
    call = f"call #{number} {call_text(first['expected'])}"
    if status == faults.DISAGREE:
        return *_disagreement(first, records), first
    # Who was waited for; torch.distributed does not say (-1).
    absent = {r["peer"] for r in alike.values()} - {-1}
    absent |= {s.rank for s in states if s.calls is not None and s.calls < number}
    late = {s.rank for s in states if s.rank in absent and s.calls is not None and s.calls >= number}
    if status == faults.NEVER_ARRIVED and not absent:
        silent = {s.rank for s in states if not s.answered}
        told = f"{_ranks(silent)} did not answer; " if silent else ""
        return told + _words(first), silent, first
    if status == faults.NEVER_ARRIVED:
        told = f"came too late to {call}" if late == absent else f"never entered {call}"
        return f"{_ranks(absent)} {told}{_waited(records, number, absent)}", absent, first
    if status == faults.INTERRUPTED and not late:
        told = f"had not entered {call} when a signal ended the wait"
        return f"{_ranks(absent)} {told}{_waited(records, number, absent)}", absent, first
    if status in (faults.PEER_DIED, faults.PEER_CLOSED):
        gone = {r["peer"] for r in alike.values()}
        told = "closed the workspace" if status == faults.PEER_CLOSED else "ended"
        whose = _ranks(gone) if status == faults.PEER_CLOSED else f"the process of {_ranks(gone)}"
        return f"{whose} {told} before it entered {call}{_waited(records, number, gone)}", gone, first
    if status == faults.PEER_FAULTED:  # of which nothing but this was heard
        return f"rank {first['peer']} gave up before {call}, and has not said why", {first["peer"]}, first
    return _words(first), {*alike}, first


def _disagreement(first: dict, records: dict[int, dict]) -> tuple[str, set[int]]:
    """What each rank has called in the round, those first of whom there are fewer."""
    if "text" in first:
        return first["text"], {first["rank"], first["peer"]} - {-1}
    called = {}
    for record in records.values():
        if record["epoch"] == first["epoch"]:
            called[record["rank"]] = record["expected"]
    for record in records.values():
        if record["epoch"] == first["epoch"] and record["status"] == faults.DISAGREE:
            called.setdefault(record["peer"], record["seen"])
    sides: dict[str, list[int]] = {}
    for rank in sorted(called):
        sides.setdefault(json.dumps(called[rank]), []).append(rank)
    fewest_first = sorted(sides.values(), key=lambda ranks: (len(ranks), -ranks[0]))
    told = "; ".join(f"{_ranks(ranks)} called {call_text(called[ranks[0]])}" for ranks in fewest_first)
    return f"call #{first['call_number']}: {told}", {*fewest_first[0]}


def _waited(records: dict[int, dict], number: int, but: set[int]) -> str:
    waits = {rank: r["waited_s"] for rank, r in records.items() if r["call_number"] == number and rank not in but}
    waits = {rank: seconds for rank, seconds in waits.items() if seconds >= 0.05}  # others came after the fault
    return f"; {_ranks(waits)} waited {max(waits.values()):.1f} s" if waits else ""


def _no_fault(states: list[RankState]) -> tuple[str, set[int], str | None, int | None]:
    known = [state for state in states if state.calls is not None]
    inside = [state for state in known if state.in_call]
    number = max((state.calls or 0 for state in inside), default=None)
    behind = {state.rank for state in known if number is not None and (state.calls or 0) < number}
    if not behind:
        return "no rank has met a fault", set(), None, None
    ahead = [state for state in inside if state.calls == number]
    call = f"call #{number} {ahead[0].call}"
    missing = f"{_ranks(behind)} {'is' if len(behind) == 1 else 'are'}"
    waiting = f"{_ranks(s.rank for s in ahead)} {'waits' if len(ahead) == 1 else 'wait'}"
    verdict = f"no fault yet: {missing} not in {call}, in which {waiting}"
    return verdict, behind, ahead[0].call.split("(")[0], number


# ---- words ----


def _words(record: dict) -> str:
    return record.get("text") or str(faults.fault_from(record))


def _op(call: dict) -> str:
    return faults.op_name(call["op"])


def call_text(call: dict) -> str:
    """A call as in a program: `rs_rmsnorm(num_tokens=1024, hidden_size=7168, dtype=bfloat16, residual, eps=1e-06)`."""
    said = []
    for name, value in call.items():
        if name == "dtype":
            said.append(f"dtype={faults.DTYPES.get(value, value)}")
        elif name == "variant":
            said += [option for bit, option in faults.VARIANTS.items() if value & bit]
        elif name == "source":
            said += [f"input in symmetric buffer {value[0]}"] if value[0] else []
        elif name != "op" and (value or name in ("num_tokens", "hidden_size")):
            said.append(f"{name}={faults.shortest(value) if isinstance(value, float) else value}")
    return f"{_op(call)}({', '.join(said)})" if said else _op(call)


def _ranks(ranks) -> str:
    """`rank 3`, `ranks 0-2`, `ranks 0, 1 and 4-6`."""
    runs: list[list[int]] = []
    for rank in sorted(ranks):
        if runs and rank == runs[-1][-1] + 1:
            runs[-1].append(rank)
        else:
            runs.append([rank])
    words = [w for run in runs for w in ([f"{run[0]}-{run[-1]}"] if len(run) > 2 else map(str, run))]
    text = words[0] if len(words) == 1 else f"{', '.join(words[:-1])} and {words[-1]}"
    return f"rank {text}" if len(runs) == 1 and len(runs[0]) == 1 else f"ranks {text}"
