"""Where the host of a rank was while its peers waited for it: told beside the fault that came of it."""

import faulthandler
import tempfile

STALL_S = 12.0  # well under the deadline of an op


class StallWatch:
    """Writes the stacks of this process down when a step takes longer than `STALL_S`."""

    def __init__(self):
        self._file = tempfile.TemporaryFile("w+")  # noqa: SIM115 (closed by `close`)
        self._number = 0

    def step(self, number: int) -> None:
        self._number = number
        faulthandler.dump_traceback_later(STALL_S, file=self._file)

    def text(self) -> str:
        self._file.seek(0)
        stacks = self._file.read()
        where = f"\nAfter {STALL_S:.0f} s of call {self._number}, or one before, the host was here:\n"
        return where + stacks if stacks else ""

    def close(self) -> None:
        faulthandler.cancel_dump_traceback_later()
        self._file.close()
