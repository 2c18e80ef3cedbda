"""Where the host of a rank was while its peers waited for it: told beside the fault that came of it."""

import faulthandler
import tempfile

import torch

STALL_S = 12.0  # well under the deadline of an op
# Bytes that torch's allocator keeps for tensors of over a MiB, at most, and of under.
LARGE, SMALL = 8 << 30, 512 << 10
SMALL_BLOCKS = 1024


class StallWatch:
    """Writes the stacks of this process down when a step takes longer than `STALL_S`."""

    def __init__(self):
        self._file = tempfile.TemporaryFile("w+")  # noqa: SIM115 (closed by `close`)
        self._allocations = 0

    def begin(self) -> None:
        """All is open: from here on no rank should need more memory of the driver."""
        self._allocations = _driver_allocations()

    def step(self) -> None:
        faulthandler.dump_traceback_later(STALL_S, file=self._file)

    def text(self) -> str:
        self._file.seek(0)
        stacks, asked = self._file.read(), _driver_allocations() - self._allocations
        told = f"\nAfter {STALL_S:.0f} s of a step the host was here:\n{stacks}" if stacks else ""
        return told + (f"\ntorch's allocator has asked the driver for memory {asked} times" if asked else "")

    def close(self) -> None:
        faulthandler.cancel_dump_traceback_later()
        self._file.close()


def _driver_allocations() -> int:
    return torch.cuda.memory_stats().get("num_device_alloc", 0) if torch.cuda.is_initialized() else 0


def fill_allocator(ranks: int) -> None:
    """Has torch's allocator take memory now. Where ranks share a card, a rank that asks the driver for more in the
    middle of a run may have to wait until the kernels of the others end, and these wait for that rank."""
    large = min(LARGE, torch.cuda.mem_get_info()[1] // (2 * ranks))
    blocks = [torch.empty(large, dtype=torch.uint8, device="cuda")]
    blocks += [torch.empty(SMALL, dtype=torch.uint8, device="cuda") for _ in range(SMALL_BLOCKS)]
    torch.cuda.synchronize()
    del blocks
