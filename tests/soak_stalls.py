"""Where the host of a rank was while its peers waited for it: told beside the fault that came of it."""

import faulthandler
import tempfile

import torch

STALL_S = 12.0  # well under the deadline of an op
LARGE, SMALL = 4 << 30, 512 << 10  # bytes that torch's allocator keeps for tensors of over a MiB, and of under
SMALL_BLOCKS = 1024


class StallWatch:
    """Writes the stacks of this process down when a step takes longer than `STALL_S`."""

    def __init__(self):
        self._file = tempfile.TemporaryFile("w+")  # noqa: SIM115 (closed by `close`)

    def step(self) -> None:
        faulthandler.dump_traceback_later(STALL_S, file=self._file)

    def text(self) -> str:
        self._file.seek(0)
        stacks = self._file.read()
        return f"\nAfter {STALL_S:.0f} s of a step the host was here:\n{stacks}" if stacks else ""

    def close(self) -> None:
        faulthandler.cancel_dump_traceback_later()
        self._file.close()


def fill_allocator() -> None:
    """Has torch's allocator take memory now. Where ranks share a card, a rank that asks the driver for more in the
    middle of a run may have to wait until the kernels of the others end, and these wait for that rank."""
    blocks = [torch.empty(LARGE, dtype=torch.uint8, device="cuda")]
    blocks += [torch.empty(SMALL, dtype=torch.uint8, device="cuda") for _ in range(SMALL_BLOCKS)]
    torch.cuda.synchronize()
    del blocks
