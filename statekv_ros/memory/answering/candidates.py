"""How many votes each page gets in a pass: all are scored, or, where these are many, those of the most wanted leaves."""
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from statekv_ros.backbones.upload import to_device
from statekv_ros.memory.detailed.index import scores
from statekv_ros.memory.detailed.leaves import CHAPTER, LEAF, LEAVES
from statekv_ros.memory.detailed.table import PageTable

# Leaves that a pass opens, if it reads no more pages than that; docs/hours.md says what fewer lose.
OPEN_LEAVES = 192
_KEPT = 32      # sets of spans whose numbers and lengths are kept


@dataclass(frozen=True)
class Group:
    """Pages, side by side in the table, that a query stands alike before; `turn` in the index's own positions."""
    first: int
    stop: int
    turn: int


class Candidates:
    """Votes on pages for `PageChooser`: it hardly scores more of them when there are many."""

    def __init__(self, table: PageTable, rotate: Callable[[torch.Tensor, torch.Tensor], torch.Tensor], groups: Sequence[Group],
                 leaves: int | None):
        """
        Args:
            rotate: `Backbone.rotate`; looked at now.
            groups: oldest first, side by side.
            leaves: so many are opened in each group; None: all pages are scored, whatever their number.
        """
        self._table, self._groups, self._leaves = table, groups, leaves
        turns, self._turn = [group.turn for group in groups], None
        if any(turns):      # a matrix for each group: one product a pass
            unit = torch.eye(table.head_dim, device=table.device)
            self._turn = rotate(unit[None], to_device(torch.tensor(turns)[:, None], table.device))[:, None]
        # What is sorted later changes nothing in an answer that has begun.
        self._stops = table.leaves.stops
        self._of_leaf = table.lengths(slice(groups[0].first, groups[-1].stop)).float().mean().log() + math.log(LEAF)
        self._in_line: dict[tuple, tuple[torch.Tensor, torch.Tensor]] = {}

    @property
    def most(self) -> int:
        """Pages and leaves that a row scores at most."""
        pages = self._groups[-1].stop - self._groups[0].first
        if self._leaves is None:
            return pages
        return min(pages, pages // LEAF + len(self._groups) * (self._leaves * LEAF + 3 * CHAPTER))

    def votes(self, layer: int, rows: torch.Tensor, first: int,
              unwanted: torch.Tensor | None = None) -> tuple[torch.Tensor | None, torch.Tensor]:
        """Each row spreads one vote over all pages; those of pages that are not scored are lost.

        Args:
            rows: rotated queries times the attention scale, [kv_heads, rows, head_dim] fp32.
            first: number of the oldest page that may be read, none before the first group's.
            unwanted: pages from `first` on that get no vote, [pages] bool; then all are scored.

        Returns:
            Pages by number, [kv_heads, pages] int64, None for all from `first` on; their votes [kv_heads, pages] fp32.
        """
        asked = rows[None] if self._turn is None else rows @ self._turn
        spans, in_line, through = [], [], []
        for group, queries in zip(self._groups, self._table.index.queries(asked)):
            span = slice(max(group.first, first), group.stop)
            if span.start >= span.stop:
                continue
            whole, parts = self._whole(layer, span), [span]
            if whole is not None:
                through.append((queries, whole))
                parts = [slice(span.start, whole.start * CHAPTER), slice(whole.stop * CHAPTER, span.stop)]
            parts = [part for part in parts if part.start < part.stop]
            spans += parts
            in_line += [scores(queries, self._table.entries(layer, part)) for part in parts]
        numbers, sizes = self._numbered(spans)
        of_leaves = [scores(queries, self._table.leaves.entries(layer, whole)) for queries, whole in through]
        every = torch.cat([*in_line, *of_leaves], dim=-1)
        if not through:
            every.add_(sizes)
            if unwanted is not None:
                every.masked_fill_(unwanted, float('-inf'))
            return None, torch.softmax(every, dim=-1).sum(dim=1)
        linear = len(numbers)
        every[..., :linear].add_(sizes)
        every[..., linear:].add_(self._of_leaf)
        shares, begin = torch.softmax(every, dim=-1), linear
        pages, opened = [numbers.expand(len(rows), -1)], []
        for (queries, whole), leaves in zip(through, of_leaves):
            end = begin + leaves.shape[-1]
            best = shares[..., begin:end].sum(dim=1).topk(self._leaves, dim=-1, sorted=False).indices
            # What stays closed keeps its share: else a row that wants a bit of everything had more say in what is open.
            every[..., begin:end].scatter_(2, best[:, None].expand(-1, rows.shape[1], -1), float('-inf'))
            begin, found = end, self._table.leaves.pages(layer, whole, best)
            pages.append(found)
            lengths = self._table.lengths_of(found)[:, None].log()
            opened.append(scores(queries, self._table.entries_of(layer, found)).add_(lengths))
        votes = torch.softmax(torch.cat([every, *opened], dim=-1), dim=-1).sum(dim=1)
        return torch.cat(pages, dim=-1), torch.cat([votes[:, :linear], votes[:, begin:]], dim=-1)

    def _numbered(self, spans: list[slice]) -> tuple[torch.Tensor, torch.Tensor]:
        """Pages of some spans by number, [pages] int64, and the logarithms of their lengths, [pages] fp32; kept, for most passes
        ask for the same. One that was lost since then gets votes, and is not read."""
        key = tuple((span.start, span.stop) for span in spans)
        if key not in self._in_line:
            if len(self._in_line) >= _KEPT:
                self._in_line.clear()
            pages = torch.cat([torch.arange(*each, device=self._table.device) for each in key or [(0, 0)]])
            sizes = [self._table.lengths(span) for span in spans]
            self._in_line[key] = pages, torch.cat(sizes).log() if sizes else pages.float()
        return self._in_line[key]

    def _whole(self, layer: int, span: slice) -> slice | None:
        """The chapters of a span that are worth going through by leaves."""
        leaves = self._table.leaves
        chapters = slice(max(leaves.first, -(-span.start // CHAPTER)), min(self._stops[layer], span.stop // CHAPTER))
        worth = self._leaves is not None and (chapters.stop - chapters.start) * LEAVES > self._leaves
        return chapters if worth else None
