"""Ranks as threads of one process, on the native layer: no process group, no workspace of `tp_fused.init`."""

import concurrent.futures
import secrets
import types

from tp_fused import faults
from tp_fused.native import _C


class ThreadRanks:
    """`world_size` ranks whose regions lie in one shared-memory segment."""

    def __init__(self, world_size: int, slot_bytes: int = 1 << 20, timeout_s: float = 20.0):
        self.world_size = world_size
        region = _C.region_bytes(slot_bytes)
        self.segment = make_segment(region * world_size)
        regions = [self.segment.base + rank * region for rank in range(world_size)]
        self.workspaces = [self._workspace(rank, regions, slot_bytes, timeout_s) for rank in range(world_size)]

    def _workspace(self, rank: int, regions: list[int], slot_bytes: int, timeout_s: float):
        """What the functions of tp_fused.native ask of a workspace."""
        team = _C.Team(rank=rank, regions=regions, slot_bytes=slot_bytes, timeout_ns=int(timeout_s * 1e9))

        def check():
            raise faults.fault_from(team.fault(rank))

        asked = {"rank": rank, "world_size": self.world_size, "device_index": None, "team": team, "check": check}
        return types.SimpleNamespace(**asked)

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
