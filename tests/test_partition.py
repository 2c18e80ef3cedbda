"""The row rule: Python, C and torch.tensor_split say the same."""

import pytest
import torch

from tp_fused import partition
from tp_fused.native import _C

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
