"""The row rule: Python, C and torch.tensor_split say the same. Of columns it is the rule of their units."""

import ctypes
from pathlib import Path

import pytest
import torch

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
