"""The row rule: which tokens belong to which rank. `torch.tensor_split`'s, and nothing else (csrc/partition.h)."""


def row_count(num_tokens, rank: int, world_size: int):
    """Rows that `rank` owns of `num_tokens`; 0 where there are fewer tokens than ranks.

    `num_tokens` may be symbolic (torch.SymInt).
    """
    return (num_tokens + world_size - 1 - rank) // world_size


def row_start(num_tokens: int, rank: int, world_size: int) -> int:
    """The first row that `rank` owns."""
    per, rem = divmod(num_tokens, world_size)
    return rank * per + min(rank, rem)


def row_slice(num_tokens: int, rank: int, world_size: int) -> slice:
    """`rank`'s rows as a slice: `full[row_slice(...)]` is what `torch.tensor_split(full, world_size)[rank]` is."""
    start = row_start(num_tokens, rank, world_size)
    return slice(start, start + row_count(num_tokens, rank, world_size))


def row_counts(num_tokens: int, world_size: int) -> list[int]:
    """Every rank's rows."""
    return [row_count(num_tokens, rank, world_size) for rank in range(world_size)]
