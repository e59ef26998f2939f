"""What votes are spread over: pages that are scored one by one, and leaves of pages, of which the best are opened."""
from collections.abc import Sequence
from functools import cached_property
from typing import NamedTuple

import torch


MIDDLE = 7.5     # where a code of 4 bits stands for no difference


class Entries(NamedTuple):
    """Entries of pages, at places. Those at places from `stop` on are there as they are; of those before it there is by how much
    they differ from their leaf's, in 4 bits: an entry is `entry of leaf + scale of leaf * step of volume * (code - 7.5)`. A leaf
    is of places side by side, as is a volume. Strays' entries, which have no such place, are there as they are.

    Attributes:
        exact: [kv_heads, capacity, width] fp16 or fp32.
        offset: to add to a place to find it in `exact`.
        codes: [kv_heads, places, bytes] uint8, two numbers in each, the first in its lower half.
        steps: [kv_heads, volumes, width] fp32.
        scales: [kv_heads, leaves] fp32, of those that have codes.
        base: place of the first code, a multiple of `volume`.
        volume, leaf: places of one.
        leaves: entries of leaves, [kv_heads, leaves, width], in the dtype of `exact`, as `strays`.
        first_leaf: place of the first one's first page, a multiple of `leaf`.
        strays: [kv_heads, strays, width].
        first_stray: which of all the first one here is.
    """
    exact: torch.Tensor
    offset: int
    codes: torch.Tensor
    steps: torch.Tensor
    scales: torch.Tensor
    base: int
    stop: int
    volume: int
    leaf: int
    leaves: torch.Tensor
    first_leaf: int
    strays: torch.Tensor
    first_stray: int

    @property
    def coded(self) -> bool:
        """Whether any is in 4 bits."""
        return self.stop > self.base

    @classmethod
    def plain(cls, exact: torch.Tensor, offset: int = 0) -> 'Entries':
        """None of them in 4 bits, and no stray."""
        kv_heads, _, width = exact.shape
        none = exact[:, :0].contiguous()
        return cls(exact, offset, exact.new_empty(kv_heads, 0, -(-width // 2), dtype=torch.uint8),
                   exact.new_empty(kv_heads, 0, width, dtype=torch.float32), exact.new_empty(kv_heads, 0, dtype=torch.float32),
                   0, 0, 1, 1, none, 0, none, 0)


class Line(NamedTuple):
    """Pages that the queries of one group score one by one.

    Attributes:
        places: of their entries, a slice of those of all KV heads, or [kv_heads or 1, pages] integers; ~i of stray i.
        sizes: logarithms of their lengths, [kv_heads or 1, 1, pages] fp32; -inf: it gets no vote.
        volume: that all of the places are in, where they have codes: so many volumes behind place 0; None: none has codes.
        strays: whether they are; where they have codes, some may be, behind all that are not.
    """
    group: int
    places: slice | torch.Tensor
    sizes: torch.Tensor
    volume: int | None = None
    strays: bool = False

    @property
    def count(self) -> int:
        return self.sizes.shape[-1]


class Flat(NamedTuple):
    """Lines side by side: places and sizes [kv_heads or 1, pages] int32 and fp32, groups [pages] int32, ascending."""
    places: torch.Tensor
    groups: torch.Tensor
    sizes: torch.Tensor


class Lines:
    """Pages that are scored one by one, in as many lines as there are, groups ascending.

    Attributes:
        numbers: of their pages, [kv_heads or 1, pages] int32; None: they are known.
        count: of pages.
    """

    def __init__(self, lines: Sequence[Line], numbers: torch.Tensor | None, like: 'Lines | None' = None):
        """like: others, as many, of which only sizes and numbers may be different."""
        self.lines, self.numbers, self._like = tuple(lines), numbers, like
        self.count = sum(line.count for line in self.lines)
        self._room: torch.Tensor | None = None

    def __iter__(self):
        return iter(self.lines)

    @cached_property
    def flat(self) -> Flat:
        """For a kernel that takes all lines at once; made once, for a memory is asked the same pages many times."""
        sizes = _side_by_side([line.sizes[:, 0] for line in self])
        if self._like is not None:
            return self._like.flat._replace(sizes=sizes)
        device = sizes.device
        places = [torch.arange(line.places.start, line.places.stop, dtype=torch.int32, device=device)[None]
                  if isinstance(line.places, slice) else line.places.int() for line in self]
        groups = torch.cat([torch.full((line.count,), line.group, dtype=torch.int32, device=device) for line in self])
        return Flat(_side_by_side(places), groups, sizes)

    def room(self, kv_heads: int, opened: int) -> torch.Tensor:
        """Numbers of `opened` pages, which are to be written, and of these, [kv_heads, opened + count] int32; the same each
        time."""
        if self._room is None or self._room.shape != (kv_heads, opened + self.count):
            self._room = torch.empty(kv_heads, opened + self.count, dtype=torch.int32, device=self.numbers.device)
            self._room[:, opened:] = self.numbers
        return self._room


class Leaves(NamedTuple):
    """Leaves of pages that lie side by side.

    Attributes:
        entries: of leaves, [kv_heads, leaves, width] in the dtype of those of pages.
        pages: their pages by number, [kv_heads, leaves, pages of a leaf] int32; ~number of a stray, which is among the lines.
        first_place: where the entries of the first leaf's pages begin; the others' follow. A leaf lies in one volume.
        through: group and leaves, of each stretch that is gone through.
        opened: of each stretch, fewer than it has.
        size: logarithm of the tokens of a leaf, [1, 1, 1] fp32.
        sizes, first: of pages from number `first` on, [pages] fp32, as in `Line`.
    """
    entries: torch.Tensor
    pages: torch.Tensor
    first_place: int
    through: Sequence[tuple[int, slice]]
    opened: int
    size: torch.Tensor
    sizes: torch.Tensor
    first: int


def _side_by_side(parts: list[torch.Tensor]) -> torch.Tensor:
    heads = max(len(part) for part in parts)
    return torch.cat([part.expand(heads, -1) for part in parts], dim=1).contiguous()
