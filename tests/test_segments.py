"""Shared-memory segments: another one than was meant is refused, with the check that failed and both numbers."""

import os
import secrets
import struct
from pathlib import Path

import pytest

from tp_fused.native import _C

BYTES, TOKEN = 8192, 0x1234567890ABCDEF
WHOLE = BYTES + _C.SEGMENT_HEADER_BYTES
MAGIC = struct.unpack("<Q", b"tp_fused")[0]


@pytest.fixture
def named():
    """A segment under its name still, and where the file is."""
    name = f"/tp_fused-test-{secrets.token_hex(8)}"
    path = Path("/dev/shm" + name)
    yield name, path, _C.Segment(BYTES, True, name, TOKEN)
    path.unlink(missing_ok=True)


def open_again(name: str, size: int = BYTES, token: int = TOKEN):
    return _C.Segment(size, False, name, token)


def test_what_one_rank_writes_another_reads(named):
    name, path, segment = named
    memoryview(segment)[:4] = b"abcd"
    opened = memoryview(open_again(name))
    assert opened[:4] == b"abcd" and opened.nbytes == BYTES and not any(opened[4:])
    assert path.stat().st_mode & 0o7777 == 0o600 and path.stat().st_size == WHOLE


def test_the_mode_does_not_depend_on_the_umask():
    name, before = f"/tp_fused-test-{secrets.token_hex(8)}", os.umask(0o777)
    try:
        _C.Segment(BYTES, True, name, TOKEN)
    finally:
        os.umask(before)
    open_again(name)
    assert os.stat("/dev/shm" + name).st_mode & 0o7777 == 0o600
    _C.Segment.unlink(name)


def word(path: Path, index: int, value: int | None = None) -> int:
    """A 64-bit word of the header, overwritten with `value`; what it was."""
    with path.open("r+b") as file:
        file.seek(8 * index)
        (before,) = struct.unpack("<Q", file.read(8))
        if value is not None:
            file.seek(8 * index)
            file.write(struct.pack("<Q", value))
    return before


# What is done to the file, and the refusal.
OTHERS = {
    "empty": (lambda path: os.truncate(path, 0), rf"its size is 0, expected {WHOLE}"),
    "a byte short": (lambda path: os.truncate(path, WHOLE - 1), rf"its size is {WHOLE - 1}, expected {WHOLE}"),
    "a page long": (lambda path: os.truncate(path, WHOLE + 4096), rf"its size is {WHOLE + 4096}, expected {WHOLE}"),
    "group-readable": (lambda path: path.chmod(0o640), r"its mode is 0640, expected 0600"),
    "writable by others": (lambda path: path.chmod(0o602), r"its mode is 0602, expected 0600"),
    "set-user-id": (lambda path: path.chmod(0o4600), r"its mode is 04600, expected 0600"),
    "never written": (lambda path: word(path, 0, 0), rf"its magic number is 0, expected {MAGIC:#x}"),
    "of another library": (lambda path: word(path, 0, MAGIC + 1), rf"its magic number is {MAGIC + 1:#x}"),
    "of another version": (
        lambda path: word(path, 1, word(path, 1) + (1 << 48)),
        r"its layout version is 0x[0-9a-f]+, expected 0x[0-9a-f]+$",
    ),
    "of another layout": (lambda path: word(path, 1, word(path, 1) + 8), r"its layout version is 0x"),
    "of another size": (lambda path: word(path, 2, BYTES - 1), rf"its recorded size is {BYTES - 1}, expected {BYTES}"),
    "stale": (lambda path: word(path, 3, TOKEN - 1), rf"its token is {TOKEN - 1:#x}, expected {TOKEN:#x}"),
}


@pytest.mark.parametrize("other", OTHERS)
def test_another_segment_is_refused(named, other):
    name, path, _ = named
    change, refusal = OTHERS[other]
    change(path)
    with pytest.raises(OSError, match=f"cannot map shared memory {name} of {BYTES} bytes: {refusal}"):
        open_again(name)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a file away")
def test_another_users_segment_is_refused(named):
    name, path, _ = named
    os.chown(path, 1234, -1)
    with pytest.raises(OSError, match=r"its owner's user id is 1234, expected 0"):
        open_again(name)


@pytest.mark.parametrize("size", [BYTES - 1, BYTES + 1, 1, 2**40])
def test_a_segment_of_another_size_is_refused(named, size):
    with pytest.raises(OSError, match=rf"its size is {WHOLE}, expected {size + 4096}"):
        open_again(named[0], size)


def test_a_refused_segment_is_given_back(named):
    """Neither its descriptor nor its memory stays."""
    name, path, _ = named
    word(path, 3, 0)

    def held() -> tuple[int, int]:
        return len(os.listdir("/proc/self/fd")), Path("/proc/self/maps").read_text().count(name)

    before = held()
    for _ in range(3):
        with pytest.raises(OSError, match="token"):
            open_again(name)
    assert held() == before


def test_a_symbolic_link_is_not_followed(named):
    name, path, _ = named
    link = path.with_name(path.name + "-link")
    link.symlink_to(path)
    try:
        with pytest.raises(OSError, match="Too many levels of symbolic links"):
            open_again(name + "-link")
    finally:
        link.unlink()


@pytest.mark.parametrize(
    ("make", "refusal"),
    [(os.mkfifo, "its file type is 010000, expected 0100000"), (os.mkdir, "Invalid argument|Is a directory")],
)
def test_what_is_no_file_is_refused(make, refusal):
    name = f"/tp_fused-test-{secrets.token_hex(8)}"
    make("/dev/shm" + name, 0o600)
    try:
        with pytest.raises(OSError, match=refusal):
            open_again(name)
    finally:
        (os.rmdir if make is os.mkdir else os.unlink)("/dev/shm" + name)


def test_a_name_that_is_taken_or_gone(named):
    name, path, segment = named
    with pytest.raises(OSError, match=f"cannot create shared memory {name} of {BYTES} bytes: File exists"):
        _C.Segment(BYTES, True, name, TOKEN)
    assert path.stat().st_size == WHOLE  # the refused creator has not touched it
    _C.Segment.unlink(name)
    with pytest.raises(OSError, match="No such file or directory"):
        open_again(name)
    memoryview(segment)[-1] = 1


BAD_ARGUMENTS = {
    "no bytes": ({"bytes": 0}, ValueError, "of 0 bytes"),
    "fewer": ({"bytes": -(2**63) - 1}, ValueError, f"of {-(2**63) - 1} bytes"),
    "more than memory": ({"bytes": 2**60}, MemoryError, f"of {2**60} bytes"),
    "the most an int64 takes": ({"bytes": 2**63 - 1}, MemoryError, f"of {2**63 - 1} bytes: File too large"),
    "more": ({"bytes": 2**63}, MemoryError, f"of {2**63} bytes: File too large"),
    "a NUL": ({"name": "/tp_fused-test\0x"}, ValueError, "must not contain NUL"),
    "no name": ({"name": ""}, OSError, "Invalid argument"),
    "a path": ({"name": "/tp_fused/../x"}, OSError, "Invalid argument"),
    "a long name": ({"name": "/" + "x" * 300}, OSError, "too long|Invalid argument"),
}


@pytest.mark.parametrize("create", [True, False])
@pytest.mark.parametrize("bad", BAD_ARGUMENTS)
def test_bad_arguments(bad, create):
    change, kind, message = BAD_ARGUMENTS[bad]
    arguments = {
        "bytes": BYTES,
        "create": create,
        "name": f"/tp_fused-test-{secrets.token_hex(8)}",
        "token": 1,
        **change,
    }
    if not create and kind is MemoryError and change["bytes"] < 2**63:
        kind, message = OSError, "No such file|File too large"
    with pytest.raises(kind, match=message):
        _C.Segment(**arguments)
    assert not [entry for entry in os.listdir("/dev/shm") if entry == arguments["name"][1:]]


@pytest.mark.parametrize(
    ("arguments", "rows"),
    [
        ((2**63 - 1, 7, 8), (7 * ((2**63 - 1) // 8) + 7, (2**63 - 1) // 8)),
        ((2**63 - 1, 0, 1), (0, 2**63 - 1)),
        *(
            ((count, *ranks), (0, 0))
            for count, *ranks in [(-1, 0, 2), (-(2**63), 0, 1), (5, 0, 0), (5, 2, 2), (5, -1, 2)]
        ),
        ((-(2**63), 0, -1), (0, 0)),
    ],
    ids=str,
)
def test_rows_of_extremes(arguments, rows):
    assert _C.rows_of(*arguments) == rows


@pytest.mark.parametrize("on_cuda", [False, True])
@pytest.mark.parametrize("slot_bytes", [-1, -(2**63), 2**62, 2**63 - 1])
def test_regions_that_no_number_holds(slot_bytes, on_cuda):
    assert _C.region_bytes(slot_bytes, on_cuda) == -1
    assert _C.region_bytes(2**61, on_cuda) > 2**62
