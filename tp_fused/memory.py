"""The memory of a workspace: one shared segment of a host, or torch's symmetric memory; and what its parts take."""

import errno
import os
import secrets
import shutil

import torch
from torch._C._distributed_c10d import _SymmetricMemory

from .native import _C
from .rendezvous import Meeting


def region_parts(slot_bytes: int, on_cuda: bool = False) -> dict[str, int]:
    """Bytes of every part of a rank's region, and of what is allocated beside it later."""
    fixed, host = _C.region_bytes(0), _C.region_bytes(slot_bytes)
    return {
        "control": _C.CONTROL_BYTES,
        "signals": fixed - _C.CONTROL_BYTES,
        "staging slots": host - fixed,
        "inboxes": _C.region_bytes(slot_bytes, on_cuda=on_cuda) - host,
        "symmetric buffers": 0,
        "mailbox": 0,
    }


def symmetric(meeting: Meeting, num_bytes: int, device: torch.device):
    """torch's symmetric memory: this rank's tensor of bytes, and the handle that knows where every rank's is mapped."""
    # Not from torch's pool of it: there a tensor's place depends on what its process had before.
    tensor = _SymmetricMemory.empty_strided_p2p((num_bytes,), (1,), torch.uint8, device)
    return tensor, meeting.rendezvous(tensor)


def shared_segment(meeting: Meeting, bytes_per_rank: int) -> _C.Segment:
    """One segment, mapped by all ranks of this host and nameless by the time this returns."""
    size = bytes_per_rank * meeting.world_size

    def attempt(make):
        try:
            return make(), None
        except (OSError, MemoryError) as error:
            return None, error

    step = "get as far as making the shared memory"
    # With the process that makes it: should one be left behind, whose it was can be seen.
    named = {"name": f"/tp_fused-{os.getpid()}-{secrets.token_hex(16)}", "token": secrets.randbits(64)}
    named = meeting.gather(named, step)[0]
    segment, error = attempt(lambda: _C.Segment(size, True, **named)) if meeting.rank == 0 else (None, None)
    try:
        error = meeting.gather(error, step)[0]
        if error is None and meeting.rank != 0:
            segment, error = attempt(lambda: _C.Segment(size, False, **named))
        errors = meeting.gather(error, "get as far as mapping the shared memory")
    finally:
        if meeting.rank == 0 and segment is not None:
            _C.Segment.unlink(named["name"])
    for rank, error in enumerate(errors):
        if error is not None:
            raise type(error)(f"rank {rank}: {error}. {_what_to_do(error, size)}, or use TP_FUSED_BACKEND=reference")
    assert segment is not None
    return segment


def _what_to_do(error: Exception, size: int) -> str:
    if isinstance(error, MemoryError):
        return (
            f"The workspace needs {size / 2**20:.1f} MiB of /dev/shm, which has {_free_bytes('/dev/shm') / 2**20:.1f} "
            f"MiB free: ask for fewer tokens, enlarge it (docker run --shm-size)"
        )
    if os.strerror(errno.EMFILE) in str(error):
        return "Raise its limit of open files (ulimit -n)"
    return "All ranks must be able to use /dev/shm"


def _free_bytes(path: str) -> int:
    return shutil.disk_usage(path).free if os.path.isdir(path) else 0
