"""The row rule: which tokens belong to which rank. `torch.tensor_split`'s, and nothing else (csrc/partition.h)."""

import numbers
import reprlib

import torch
from torch.compiler import is_compiling


def row_count(num_tokens, rank: int, world_size: int):
    """Rows that `rank` owns of `num_tokens`; 0 where there are fewer tokens than ranks.

    `num_tokens` may be symbolic (torch.SymInt). Raises ValueError for a count below zero, or a rank that there is not.
    """
    _require_share(num_tokens, rank, world_size)
    return (num_tokens + world_size - 1 - rank) // world_size


def row_start(num_tokens: int, rank: int, world_size: int) -> int:
    """The first row that `rank` owns."""
    _require_share(num_tokens, rank, world_size)
    return rank * (num_tokens // world_size) + min(rank, num_tokens % world_size)  # no divmod: Dynamo has none of sizes


def row_slice(num_tokens: int, rank: int, world_size: int) -> slice:
    """`rank`'s rows as a slice: `full[row_slice(...)]` is what `torch.tensor_split(full, world_size)[rank]` is."""
    start = row_start(num_tokens, rank, world_size)
    return slice(start, start + row_count(num_tokens, rank, world_size))


def row_counts(num_tokens: int, world_size: int) -> list[int]:
    """Every rank's rows."""
    return [row_count(num_tokens, rank, world_size) for rank in range(world_size)]


def _require_share(num_tokens, rank: int, world_size: int) -> None:
    """There is such a share. Nothing is asked of symbols, or while torch compiles: it would guard on the answer."""
    if is_compiling():
        return
    for name, value in (("num_tokens", num_tokens), ("rank", rank), ("world_size", world_size)):
        if not isinstance(value, (numbers.Integral, torch.SymInt)):
            raise TypeError(f"{name} must be an integer, got {reprlib.repr(value)}")
    if isinstance(num_tokens, numbers.Integral) and num_tokens < 0:  # pyright: ignore[reportOperatorIssue]
        raise ValueError(f"num_tokens must not be negative, got {num_tokens}")
    if isinstance(world_size, numbers.Integral) and isinstance(rank, numbers.Integral):
        if world_size < 1:
            raise ValueError(f"world_size must be positive, got {world_size}")
        if not 0 <= rank < world_size:
            raise ValueError(f"rank must be 0 to {world_size - 1}, of world_size={world_size}, got {rank}")
