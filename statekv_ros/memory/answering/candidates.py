"""How many votes each page gets in a pass: all are scored, or, where these are many, strays and those of the most wanted leaves."""
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch

from statekv_ros.backbones.upload import to_device
from statekv_ros.kernels.page_votes import Leaves, Line, Lines, Scratch, page_votes
from statekv_ros.memory.detailed.leaves import CHAPTER, LEAF, LEAVES, STRAYS, VOLUME
from statekv_ros.memory.detailed.table import ENTRY_DTYPE, PageTable

# A group goes through the leaves of a volume too of which others have no more than this part,
_ELSEWHERE = .25
# and of which it has at least that one: the rest may be lost, or not be asked for.
_LEFT = .25
# Leaves that a pass opens at least, and pages in opened ones for each page that it reads; docs/finding_pages.md says what fewer
# lose.
OPEN_LEAVES = 32
_OPEN_PAGES = 16


@dataclass(frozen=True)
class Group:
    """Pages, side by side in the table, that a query stands alike before; `turn` in the index's own positions."""
    first: int
    stop: int
    turn: int


class Walk(NamedTuple):
    """What a pass goes through in a layer.

    Attributes:
        of: what was held and sorted when this was made.
        lines: without numbers where they are all pages from the first on, as they are; the strays of leaves among them.
        through: groups and chapters that are gone through by leaves.
        sizes: logarithms of all pages' lengths, [pages] fp32; -inf: of those in these chapters that are not asked for, or that
            another group scores one by one.
    """
    of: tuple[int, ...]
    lines: Lines
    through: list[tuple[int, slice]]
    sizes: torch.Tensor


def leaves_to_open(pages: int) -> int:
    """How many a pass opens that reads so many pages."""
    return max(OPEN_LEAVES, pages * _OPEN_PAGES // LEAF)


class Candidates:
    """Votes on pages for `PageChooser`: it hardly scores more of them when there are many."""

    def __init__(self, table: PageTable, rotate: Callable[[torch.Tensor, torch.Tensor], torch.Tensor], groups: Sequence[Group],
                 leaves: int | None, unwanted: torch.Tensor | None = None):
        """
        Args:
            rotate: `Backbone.rotate`; looked at now.
            groups: oldest first, side by side.
            leaves: so many are opened in each group; None: all pages are scored, whatever their number.
            unwanted: pages from the first group's first on that get no vote, [pages] bool; with it, `leaves` is None.
        """
        self._table, self._groups, self._leaves = table, groups, leaves
        turns, self._turn = [group.turn for group in groups], None
        if any(turns):      # a matrix for each group, side by side: one product a pass
            unit = torch.eye(table.head_dim, device=table.device)
            self._turn = rotate(unit[None], to_device(torch.tensor(turns)[:, None], table.device)).transpose(0, 1).flatten(1)
        # What is sorted later changes nothing in an answer that has begun; what is lost is not read.
        self._stops = table.leaves.stops
        self._first = groups[0].first
        mean = table.lengths(slice(self._first, groups[-1].stop)).float().mean()
        self._of_leaf = (mean.log() + math.log(LEAF)).view(1, 1, 1)
        # Leaves of the first volume have pages before the first one too; that of the oldest pages may not have any.
        self._begin = max(self._first - self._first % (VOLUME * CHAPTER), min(self._first, table.leaves.first * CHAPTER))
        self._sizes = table.sizes(slice(self._begin, groups[-1].stop))
        if unwanted is not None or self._first > table.first:
            self._sizes = self._sizes.clone()
            self._sizes[:self._first - self._begin] = float('-inf')
        if unwanted is not None:
            self._sizes[self._first - self._begin:].masked_fill_(unwanted, float('-inf'))
        self._walks: dict[int, Walk] = {}       # by layer
        # What is the same in all layers, made once: pages that are not sorted, and, where all of those that are scored one by one
        # are strays or such pages, where they lie.
        self._plain: dict[tuple[int, int, int], tuple[Line, torch.Tensor]] = {}
        self._alike: dict[tuple[tuple[int, int, int, bool], ...], Lines] = {}
        self._scratch: Scratch | None = None

    @property
    def most(self) -> int:
        """Pages and leaves that a row scores at most."""
        pages = self._groups[-1].stop - self._first
        if self._leaves is None:
            return pages
        ends = (2 * VOLUME + 1) * CHAPTER       # some of a volume at both, and what is not sorted yet
        return min(pages, pages // LEAF + pages // CHAPTER * STRAYS + len(self._groups) * (self._leaves * LEAF + ends))

    def votes(self, layer: int, rows: torch.Tensor, first: int) -> tuple[torch.Tensor | None, torch.Tensor]:
        """Each row spreads one vote over all pages; those of pages that are not scored are lost.

        Args:
            rows: rotated queries times the attention scale, [kv_heads, rows, head_dim] fp32.
            first: number of the oldest page that may be read, none before the first group's.

        Returns:
            Pages by number, [kv_heads, pages] int32, None for all from `first` on; their votes [kv_heads, pages] fp32, -1 where
            a page is a candidate twice, as of `page_votes`.
        """
        table, walk = self._table, self._walk(layer, first)
        asked = rows[:, :, None] if self._turn is None else (rows @ self._turn).unflatten(2, (len(self._groups), -1))
        queries = table.index.queries(asked.permute(2, 0, 1, 3))
        if self._scratch is None and rows.device.type == 'cpu':
            self._scratch = Scratch(len(rows), queries.shape[-1], LEAF, ENTRY_DTYPE)
        leaves = None
        if walk.through:
            of_leaves, pages, chapter = table.leaves.layer(layer)
            through = [(group, slice((chapters.start - chapter) * LEAVES, (chapters.stop - chapter) * LEAVES))
                       for group, chapters in walk.through]
            leaves = Leaves(of_leaves, pages, chapter * CHAPTER, through, self._leaves, self._of_leaf, walk.sizes, self._begin)
        return page_votes(queries, table.layer(layer), walk.lines, leaves, self._scratch)

    def _walk(self, layer: int, first: int) -> Walk:
        """Kept from pass to pass, for most go through the same."""
        leaves = self._table.leaves
        state = first, leaves.codes.stop, *leaves.state(layer)
        walk = self._walks.get(layer)
        if walk is None or walk.of != state:
            walk = self._walks[layer] = self._walk_anew(layer, first, state)
        return walk

    def _walk_anew(self, layer: int, first: int, state: tuple[int, ...]) -> Walk:
        table = self._table
        through, elsewhere, parts = [], [], []      # parts: group, first page, the one behind the last, whether through leaves
        for index, group in enumerate(self._groups):
            span = slice(max(group.first, first), group.stop)
            if span.start >= span.stop:
                continue
            whole = self._whole(layer, span, first)
            if whole is None:
                parts.append((index, span.start, span.stop, False))
                continue
            through.append((index, whole))
            pages = slice(whole.start * CHAPTER, whole.stop * CHAPTER)
            parts += [(index, span.start, pages.start, False), (index, pages.start, pages.stop, True),
                      (index, pages.stop, span.stop, False)]
            elsewhere += [slice(pages.start, span.start), slice(span.stop, pages.stop)]
        elsewhere, sizes = [pages for pages in elsewhere if pages.start < pages.stop], self._sizes
        if elsewhere:
            sizes = sizes.clone()
        for pages in elsewhere:
            sizes[pages.start - self._begin:pages.stop - self._begin] = float('-inf')
        made = [each for group, begin, stop, in_leaves in parts
                for each in self._lines(layer, group, slice(begin, stop), in_leaves, sizes)]
        lines, pages = ([each[part] for each in made] for part in range(2))
        unsorted, numbers = table.leaves.chapters(layer).stop * CHAPTER, None
        if first < unsorted:
            heads = max((len(each) for each in pages), default=1)
            none = torch.zeros(heads, 0, dtype=torch.int32, device=table.device)
            numbers = torch.cat([none, *(each.expand(heads, -1) for each in pages)], dim=1)
        if any(begin < min(stop, unsorted) and not in_leaves for _, begin, stop, in_leaves in parts):
            return Walk(state, Lines(lines, numbers), through, sizes)
        walk = Walk(state, Lines(lines, numbers, self._alike.get(tuple(parts))), through, sizes)
        self._alike.setdefault(tuple(parts), walk.lines)
        return walk

    def _lines(self, layer: int, group: int, pages: slice, in_leaves: bool,
               sizes: torch.Tensor) -> Iterator[tuple[Line, torch.Tensor]]:
        """Pages that are scored one by one, and their numbers, [kv_heads or 1, pages] int32: all of a part, or, where it is gone
        through by leaves, the strays."""
        leaves = self._table.leaves
        if in_leaves:
            strays, numbers = leaves.strays(layer, slice(pages.start // CHAPTER, pages.stop // CHAPTER))
            at = ~torch.arange(strays.start, strays.stop, device=numbers.device)[None]
            yield Line(group, at, sizes[numbers - self._begin][:, None], strays=True), numbers
            return
        plain = pages.start >= leaves.chapters(layer).stop * CHAPTER        # the same in all layers
        name = group, pages.start, pages.stop
        if plain and name in self._plain:
            yield self._plain[name]
            return
        for piece, volume in self._by_volume(pages):
            places, numbers = self._table.lying(layer, piece)
            line = Line(group, places, self._sizes[numbers - self._begin][:, None], volume, strays=volume is not None)
            if plain:
                self._plain[name] = line, numbers.int()
            yield line, numbers.int()

    def _by_volume(self, pages: slice) -> Iterator[tuple[slice, int | None]]:
        """Pages as parts that are in one volume of codes each, or have no codes, and which volume it is."""
        codes, begin = self._table.leaves.codes, pages.start
        while begin < min(pages.stop, codes.stop):
            volume = begin // codes.volume
            end = min(pages.stop, (volume + 1) * codes.volume)
            yield slice(begin, end), volume
            begin = end
        if begin < pages.stop:
            yield slice(begin, pages.stop), None

    def _whole(self, layer: int, span: slice, first: int) -> slice | None:
        """The chapters that are worth going through by leaves for a span: its own, and those of which it has nearly all that is sorted
        together. Where the oldest steps stand otherwise than all others, as they do, one volume would be scored page by page for ever."""
        leaves = self._table.leaves
        held = slice(max(leaves.first, self._begin // CHAPTER), min(self._stops[layer], self._groups[-1].stop // CHAPTER))
        chapters = slice(max(held.start, span.start // CHAPTER), min(held.stop, -(-span.stop // CHAPTER)))
        begin, end = chapters.start, chapters.stop
        if begin < end:
            begin = self._worth(layer, begin, span, held, first).start
        if begin < end:
            end = self._worth(layer, end - 1, span, held, first).stop
        worth = self._leaves is not None and (end - begin) * LEAVES > self._leaves
        return slice(begin, end) if worth else None

    def _worth(self, layer: int, chapter: int, span: slice, held: slice, first: int) -> slice:
        """The chapters that one at an end of a span is sorted with; an empty slice at the side of the span where too much of them is
        elsewhere, or not held."""
        together = self._table.leaves.together(layer, chapter)
        pages = slice(together.start * CHAPTER, together.stop * CHAPTER)
        inside, whole = min(span.stop, pages.stop) - max(span.start, pages.start), pages.stop - pages.start
        others = whole - inside - max(0, first - pages.start)
        if (held.start <= together.start and together.stop <= held.stop and others <= _ELSEWHERE * whole
                and inside >= _LEFT * whole):
            return together
        return slice(together.stop, together.start)
