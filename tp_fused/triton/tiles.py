"""Which tile a projection is computed in, and how many there are.

Whatever is chosen, a row's result has the same bits: every tile adds up the products of a row in one chain, along the
hidden size, 16 of them (32 in fp8) at a time.
"""

import functools
from dataclasses import dataclass

# The last columns of a weight, where there are no more than these, are a strip of their own. The projections that
# matter end in one of 64: 2112 is 8 x 256 + 64.
STRIP = 64


@dataclass(frozen=True)
class Tile:
    """What one block computes at a time: `rows` x `columns`, in steps of `depth` along the hidden size."""

    rows: int
    columns: int
    depth: int
    cost: float  # time of a tile among as many as there are blocks, in units of the largest tile's

    @property
    def num_warps(self) -> int:
        return self.rows // 16

    def strip(self, columns: int) -> int:
        """STRIP where a weight of `columns` columns ends in a strip, 0 where its last tile is cut off instead."""
        return STRIP if columns > self.columns > STRIP and 0 < columns % self.columns <= STRIP else 0

    def count(self, num_rows: int, columns: int) -> int:
        """Tiles of [num_rows, columns]. One of the strip has as many more rows as it has fewer columns."""
        row_blocks = -(-num_rows // self.rows)
        if strip := self.strip(columns):
            return row_blocks * (columns // self.columns) + -(-row_blocks // (self.columns // strip))
        return row_blocks * -(-columns // self.columns)

    def num_stages(self, arch: int, itemsize: int) -> int:
        """How many steps' operands fit into shared memory; what is copied without TMA holds one stage less there."""
        room = 200 * 1024 if is_large(arch) else 96 * 1024
        return min(8, room // ((self.rows + self.columns) * self.depth * itemsize) + (not is_large(arch)))


def is_large(arch: int) -> bool:
    """Hopper and the Blackwell of data centres: TMA, 227 KB of shared memory, matrix operands read from there."""
    return 90 <= arch < 120


def has_fp8(arch: int) -> bool:
    """Whether matrix instructions take e4m3; elsewhere the kernel converts."""
    return arch >= 89


# Small tiles wait for memory, and for each other at every step: fewer steps.
_TILES = (
    Tile(128, 256, 64, 1.00),
    Tile(128, 128, 64, 0.60),
    Tile(128, 64, 64, 0.40),
    Tile(64, 64, 128, 0.28),
    Tile(64, 32, 128, 0.22),
    Tile(64, 16, 128, 0.18),
)
# A scale holds for 128 columns of the hidden size, and the sum of every 128 needs registers beside the total.
_TILES_FP8 = tuple(Tile(tile.rows, tile.columns, 128, tile.cost) for tile in _TILES if tile.columns <= 128)


def tiles(arch: int, fp8: bool) -> tuple[Tile, ...]:
    """The tiles that fit into the registers and the shared memory of an sm_`arch`."""
    widest = 256 if is_large(arch) else 128 if has_fp8(arch) or not fp8 else 64
    return tuple(tile for tile in (_TILES_FP8 if fp8 else _TILES) if tile.columns <= widest)


@functools.lru_cache(maxsize=4096)
def choose(num_rows: int, columns: int, num_ctas: int, arch: int, fp8: bool) -> Tile:
    """The tile with which `num_ctas` blocks need the least time."""
    return min(tiles(arch, fp8), key=lambda tile: -(-tile.count(num_rows, columns) // num_ctas) * tile.cost)
