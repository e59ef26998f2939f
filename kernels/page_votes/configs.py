"""Launch configurations of page votes, alike on every chip; each is compiled for all of them by `statekv-bench aot --all`."""
from typing import NamedTuple


class Tile(NamedTuple):
    """One program's work: `rows` by `keys` candidates, `width` numbers of their entries at a time, and how the compiler spreads
    it."""

    rows: int
    keys: int
    width: int
    warps: int
    stages: int
    registers: int = 255


def width_block(tile: Tile, width: int) -> int:
    """Numbers of entries of `width` that are taken at a time: half as many where the last ones would not fill the tile, for what
    leaves some out takes registers that are not there."""
    return min(tile.width if width % tile.width == 0 else max(16, tile.width // 2), 1 << (width - 1).bit_length())


# Products are exact fp32, on the ordinary cores: entries are halves, and what they are multiplied with has squares in it.
SCORE = Tile(16, 32, 32, 4, 2)
OPEN = Tile(16, 32, 32, 4, 2)
VOTES = Tile(16, 64, 1, 4, 1)
PLACES = Tile(1, 1, 1, 4, 1)
SPLITS = 16         # of a row's sums that are put together at a time
CHOSEN = 256        # chosen pages whose places are found at a time
BEST = 64           # opened leaves that are looked for at a time
INTERPRETER = Tile(64, 128, 128, 4, 1)      # in the interpreter a program costs the same whatever its size
