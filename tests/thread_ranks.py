"""Ranks as threads of one process: no process group, no `tp_fused.init`."""

import concurrent.futures
import os
import secrets

import torch

from tp_fused import groups
from tp_fused.native import _C
from tp_fused.workspace import Workspace


class ThreadRank(Workspace):
    """A workspace of the cpu backend whose group has another name on every rank: all of them are in one process."""

    def __init__(self, rank: int, regions: list[int], slot_bytes: int, timeout_s: float):
        self.group_name = f"rank {rank} of threads {secrets.token_hex(8)}"
        self.rank, self.world_size, self.members = rank, len(regions), list(range(len(regions)))
        self.device_type, self.backend, self.device_index = "cpu", "cpu", None
        self.max_num_tokens, self.row_bytes, self.limits = 2**20, slot_bytes, None
        self.closed, self._pid, self.caller = False, os.getpid(), _C.Caller()
        self.team = _C.Team(rank=rank, regions=regions, slot_bytes=slot_bytes, timeout_ns=int(timeout_s * 1e9))
        self.team.serve(self.caller, self.group_name, self.max_num_tokens, self.row_bytes)
        groups._workspaces[self.group_name, self.device_type] = self

    def call(self, op: str, *arguments, **options):
        return getattr(torch.ops.tp_fused, op)(*arguments, **options, group_name=self.group_name)

    def close_as(self, end: str) -> None:
        """Nothing: torch's compile caches know no name of it."""


class ThreadRanks:
    """`world_size` ranks whose regions lie in one shared-memory segment."""

    def __init__(self, world_size: int, slot_bytes: int = 1 << 20, timeout_s: float = 20.0):
        self.world_size = world_size
        region = _C.region_bytes(slot_bytes)
        self.segment = make_segment(region * world_size)
        regions = [self.segment.base + rank * region for rank in range(world_size)]
        self.workspaces = [ThreadRank(rank, regions, slot_bytes, timeout_s) for rank in range(world_size)]
        for one in self.workspaces:
            one.team.keep(self.segment)

    def run(self, function) -> list:
        """function(workspace) of every rank, at the same time."""
        with concurrent.futures.ThreadPoolExecutor(self.world_size) as executor:
            return [future.result() for future in [executor.submit(function, w) for w in self.workspaces]]


def make_segment(size: int):
    """A segment that has lost its name already."""
    name = f"/tp_fused-test-{secrets.token_hex(8)}"
    segment = _C.Segment(size, create=True, name=name)
    _C.Segment.unlink(name)
    return segment
