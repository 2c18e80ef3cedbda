"""What goes wrong between ranks, told in words. The record is `tpf_fault` of csrc/tp_fused.h."""

import ctypes

from .native import _C

NEVER_ARRIVED, DISAGREE, PEER_FAULTED, PEER_CLOSED, PEER_DIED, INTERRUPTED, OVERLAP, CLOSED = range(1, 9)

OPS = _C.OPS  # names by number
DTYPES = {0: "bfloat16", 1: "float16", 2: "float32", 3: "float8_e4m3fn", 4: "uint8"}
VARIANTS = {
    1: "complete",
    2: "residual",
    4: "column scales",
    8: "keep_output",
    16: "bias",
    32: "one kernel",
    64: "fp32 norm weight",
    128: "rounded scales",
    256: "rows gathered",
}


class CollectiveFault(RuntimeError):
    """Ranks that were to meet in an op did not: one is late beyond the deadline, gone, or calls something else.

    The workspace of the op stays faulted, on all ranks that saw it: every later op on it raises this again until
    `tp_fused.init` makes a new one. The process and its other work are not affected.

    Attributes: `op`, `call_number` (calls on this workspace, from 1), `rank` (whose report this is), `peer` (about
    whom), `reason` ("never arrived", "disagrees", "gave up", "closed", "died", "interrupted", "overlaps"). Ranks are
    those of the group; where they are not the global ones, the message has these, too.
    """

    def __init__(self, message: str, op: str, call_number: int, rank: int, peer: int, reason: str):
        super().__init__(message)
        self.op, self.call_number, self.rank, self.peer, self.reason = op, call_number, rank, peer, reason

    def __reduce__(self):
        return type(self), (str(self), self.op, self.call_number, self.rank, self.peer, self.reason)


def op_name(number: int) -> str:
    """Of an op, or of the barrier, which no op of torch's is: the benchmark calls it."""
    return "barrier" if number == _C.BARRIER else OPS.get(number, f"op {number}")


def shortest(value: float) -> str:
    """The fewest decimal digits that say this float32: 1e-06, not the double 9.999999974752427e-07."""
    digits = (f"{value:.{count}g}" for count in range(1, 9))
    return next((said for said in digits if ctypes.c_float(float(said)).value == value), f"{value:.9g}")


def _differences(expected: dict, seen: dict) -> tuple[str, str]:
    """The fields in which two calls differ, as `(what the first says, what the second says)`."""

    def words(call: dict, key: str) -> str:
        value = call[key]
        if key == "op":
            return op_name(value)
        if key == "dtype":
            return f"dtype={DTYPES.get(value, value)}"
        if key == "variant":
            names = [name for bit, name in VARIANTS.items() if value & bit]
            return " and ".join(names) if names else "no option set"
        if key == "group_size" and OPS.get(call["op"]) == "qkv_a_proj_ag_norm_fp8":
            return "a quantised q_a" if value else "q_a in 16 bits"
        if key == "source":
            buffer, offset = value
            return f"an input at byte {offset} of symmetric buffer {buffer}" if buffer else "an ordinary input"
        return f"{key}={shortest(value)}" if isinstance(value, float) else f"{key}={value}"

    keys = [key for key in expected if expected[key] != seen[key]]
    if not keys:
        return "the same, in as many blocks as its card has room for", "the same, in another number of blocks"
    if "op" in keys:  # the rest follows from it
        keys = ["op"] + (["num_tokens"] if "num_tokens" in keys else [])
    return ", ".join(words(expected, key) for key in keys), ", ".join(words(seen, key) for key in keys)


def in_group(message: str, members: list[int]) -> str:
    """The message, with the global ranks of the group's members where these are not 0, 1, ..."""
    if members == list(range(len(members))):
        return message
    return f"{message} (ranks of a group, whose global ranks are {', '.join(map(str, members))})"


def fault_from(record: dict, *others: dict, members: list[int] | None = None) -> CollectiveFault:
    """The exception for a record. `others`: where the awaited peer gave up first, its own, and so on. `members`: the
    global ranks of the group."""
    op = op_name(record["expected"]["op"])
    rank, peer, status = record["rank"], record["peer"], record["status"]
    call = f"{op} #{record['call_number']}"
    if status == DISAGREE:
        mine, theirs = _differences(record["expected"], record["seen"])
        reason, message = "disagrees", f"{call}: rank {peer} called with {theirs}, rank {rank} with {mine}"
    elif status == NEVER_ARRIVED:
        waited = f"rank {rank} waited {record['waited_s']:.3g} s"
        reason, message = "never arrived", f"{call}: rank {peer} never arrived; {waited}"
    elif status == PEER_FAULTED:
        because = f" ({fault_from(*others)})" if others and others[0]["status"] else ""
        reason, message = "gave up", f"{call}: rank {peer} has given up on this workspace{because}"
    elif status == PEER_CLOSED:
        reason, message = "closed", f"{call}: rank {peer} closed its workspace before it arrived"
    elif status == INTERRUPTED:
        reason, message = "interrupted", f"{call}: a signal ended rank {rank}'s wait for rank {peer}"
    elif status == OVERLAP:
        reason = "overlaps"
        message = (
            f"{call}: it began on rank {rank} before the workspace's call before it had ended: graphs and calls of one "
            f"workspace must follow each other, on one stream or by events"
        )
    elif status == CLOSED:
        reason = "closed"
        message = f"{call}: rank {rank} replayed a CUDA graph captured on a workspace closed since: capture it again"
    else:
        reason, message = "died", f"{call}: the process of rank {peer} ended before it arrived"
    message = in_group(message, members or [])
    return CollectiveFault(message, op, record["call_number"], rank, peer, reason)
