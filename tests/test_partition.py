"""The row rule: Python, C and torch.tensor_split say the same. Of columns it is the rule of their units."""

import ctypes
from pathlib import Path

import pytest
import torch
import torch._dynamo.testing

import tp_fused
from tools import c_api
from tp_fused import partition
from tp_fused.native import _C, DTYPE_CODES

COUNTS = [*range(18), 63, 64, 65, 257, 1023, 16384, 2**31 + 5, 2**40 + 7]


@pytest.mark.parametrize("num_tokens", COUNTS)
@pytest.mark.parametrize("world_size", range(1, 9))
def test_rows_are_those_of_tensor_split(num_tokens, world_size):
    parts = torch.empty(num_tokens, device="meta").tensor_split(world_size)
    expected = [(part.storage_offset(), part.numel()) for part in parts]
    ranks = range(world_size)
    assert [_C.rows_of(num_tokens, rank, world_size) for rank in ranks] == expected
    starts = [partition.row_start(num_tokens, rank, world_size) for rank in ranks]
    assert list(zip(starts, partition.row_counts(num_tokens, world_size), strict=True)) == expected
    slices = [partition.row_slice(num_tokens, rank, world_size) for rank in ranks]
    assert [(own.start, own.stop - own.start) for own in slices] == expected


@pytest.mark.parametrize(
    ("share", "kind", "message"),
    [
        ((-1, 0, 2), ValueError, "num_tokens must not be negative, got -1"),
        ((5, 7, 2), ValueError, "rank must be 0 to 1, of world_size=2, got 7"),
        ((5, -1, 2), ValueError, "rank must be 0 to 1, of world_size=2, got -1"),
        ((5, 0, 0), ValueError, "world_size must be positive, got 0"),
        ((5.5, 0, 2), TypeError, "num_tokens must be an integer, got 5.5"),
        ((5, 0, None), TypeError, "world_size must be an integer, got None"),
    ],
)
@pytest.mark.parametrize("function", [tp_fused.row_count, tp_fused.row_start, tp_fused.row_slice])
def test_a_share_that_there_is_not(function, share, kind, message):
    with pytest.raises(kind) as error:
        function(*share)
    assert str(error.value) == message


def test_one_graph_has_the_shares_of_any_count():
    counter = torch._dynamo.testing.CompileCounter()

    @torch.compile(backend=counter, fullgraph=True, dynamic=True)
    def shares(rows):
        own = tp_fused.row_slice(rows.shape[0], 1, 3)
        return rows[own], rows.new_empty(tp_fused.row_count(rows.shape[0], 1, 3))

    for num_tokens in (9, 17, 64):
        own, empty = shares(torch.arange(num_tokens))
        assert own.tolist() == torch.arange(num_tokens).tensor_split(3)[1].tolist() and len(empty) == len(own)
    assert counter.frame_count == 1


@pytest.mark.parametrize(("dtype", "unit"), [(torch.bfloat16, 8), (torch.float32, 8), (torch.float8_e4m3fn, 128)])
@pytest.mark.parametrize("columns", [0, 1, 7, 8, 9, 144, 2112, 2113])
@pytest.mark.parametrize("world_size", [1, 3, 8])
def test_columns_are_whole_units_and_all_of_them(columns, dtype, unit, world_size):
    library = ctypes.CDLL(str(Path(_C.__file__).parent / "libtp_fused.so"))  # c_api.load wants the CUDA ops, too
    call, start, count = c_api.Call(), ctypes.c_int64(), ctypes.c_int64()
    call.columns, call.dtype = columns, DTYPE_CODES[dtype]
    parts = torch.arange(-(-columns // unit)).tensor_split(world_size)
    end = 0
    for rank, units in enumerate(parts):
        library.tpf_columns_of(ctypes.byref(start), ctypes.byref(count), ctypes.byref(call), rank, world_size)
        assert (start.value, count.value) == (end, min(len(units) * unit, columns - end))
        end += count.value
    assert end == columns
    library.tpf_columns_of(ctypes.byref(start), ctypes.byref(count), ctypes.byref(call), world_size, world_size)
    assert (start.value, count.value) == (0, 0)
