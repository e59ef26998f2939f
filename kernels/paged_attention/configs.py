"""The one table of launch configurations of paged attention: per head dim, format and rows, alike on every chip.

Every entry is compiled ahead of time for all of them by `statekv-bench aot --all`, which fails on registers that spill to the
stack and on shared memory above the chip's limit.
"""
from typing import NamedTuple

from statekv_ros.kernels.scored_attention.configs import MAX_HEAD_DIM, Tile, head_block

__all__ = ['COMBINE', 'FEW_ROWS', 'INTERPRETER', 'MASS', 'MAX_HEAD_DIM', 'MAX_PACKED_HEAD_DIM', 'TABLE', 'Config', 'Tile',
           'choose_splits', 'find_tile', 'head_block']


class Config(NamedTuple):
    """Tiles for few rows (a decoded token's) and for many (a question's); a page is read in tiles of `keys` of its tokens."""

    few: Tile
    many: Tile


COMBINE = Tile(8, 1, 4, 1)
MASS = Tile(16, 64, 4, 1)
FEW_ROWS = 16
# Larger heads have more channels to a thread than it has registers for their scales and angles.
MAX_PACKED_HEAD_DIM = 128
_MOST_SPLITS = 64

# Keys: (head dim as a power of two, bytes per element of the query, bits of the pool; 16: raw).
# Pages are short, so that a program has little to look ahead to: one stage, and several programs per processor instead.
# Exact fp32 products run on the ordinary cores, whose tiles live in registers; packed keys are fp32 until they are turned.
TABLE = {
    (32, 2, 16): Config(Tile(16, 64, 4, 1), Tile(64, 64, 4, 1)),
    (64, 2, 16): Config(Tile(16, 64, 4, 1), Tile(64, 64, 4, 1)),
    (128, 2, 16): Config(Tile(16, 64, 8, 1), Tile(64, 64, 8, 1)),
    (256, 2, 16): Config(Tile(16, 32, 4, 1), Tile(32, 32, 8, 1)),
    (32, 2, 8): Config(Tile(16, 64, 4, 1), Tile(64, 64, 4, 1)),
    (64, 2, 8): Config(Tile(16, 32, 4, 1), Tile(64, 32, 4, 1)),
    (128, 2, 8): Config(Tile(16, 32, 4, 1), Tile(64, 32, 8, 1)),
    (32, 2, 4): Config(Tile(16, 64, 4, 1), Tile(64, 64, 4, 1)),
    (64, 2, 4): Config(Tile(16, 32, 4, 1), Tile(64, 32, 4, 1)),
    (128, 2, 4): Config(Tile(16, 32, 4, 1), Tile(32, 32, 8, 1)),
    (32, 4, 16): Config(Tile(16, 32, 4, 1), Tile(32, 32, 4, 1)),
    (64, 4, 16): Config(Tile(16, 32, 4, 1), Tile(32, 32, 8, 1)),
    (128, 4, 16): Config(Tile(16, 32, 8, 1), Tile(16, 32, 8, 1)),
    (256, 4, 16): Config(Tile(16, 16, 8, 1), Tile(16, 16, 8, 1)),
    (32, 4, 8): Config(Tile(16, 32, 4, 1), Tile(32, 32, 4, 1)),
    (64, 4, 8): Config(Tile(16, 32, 8, 1), Tile(32, 32, 8, 1)),
    (128, 4, 8): Config(Tile(16, 16, 8, 1), Tile(16, 16, 8, 1)),
    (32, 4, 4): Config(Tile(16, 32, 4, 1), Tile(32, 32, 4, 1)),
    (64, 4, 4): Config(Tile(16, 32, 8, 1), Tile(32, 32, 8, 1)),
    (128, 4, 4): Config(Tile(16, 16, 8, 1), Tile(16, 16, 8, 1)),
}
# In the interpreter a program costs the same whatever its size.
INTERPRETER = Tile(64, 64, 4, 1)


def find_tile(head_dim: int, itemsize: int, bits: int, rows: int) -> Tile:
    """The entry for `rows` per KV head of a query with `itemsize` bytes per element; `bits` of the pool, 16 for a raw one."""
    config = TABLE[head_block(head_dim), itemsize, bits]
    return config.few if rows <= FEW_ROWS else config.many


def choose_splits(programs: int, pages: int, processors: int) -> int:
    """Into how many parts to split the pages, when `programs` alone would leave processors idle.

    Two programs for each processor, at least two pages a part, and at most 64 parts.
    """
    return max(1, min(-(-2 * processors // programs), _MOST_SPLITS, pages // 2))
