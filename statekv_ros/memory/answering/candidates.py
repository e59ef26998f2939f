"""Which pages a pass scores: all, or, where these are many, those of the leaves that its queries want most."""
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from statekv_ros.memory.detailed.leaves import CHAPTER, LEAVES
from statekv_ros.memory.detailed.table import PageTable

# Leaves that a pass opens, if it reads no more pages than that. 128 keep 99.6 % of the votes of 7,200 pages, 64 keep 98.3.
OPEN_LEAVES = 128


@dataclass(frozen=True)
class Group:
    """Pages, side by side in the table, that a query stands alike before; `turn` in the index's own positions."""
    first: int
    stop: int
    turn: int


class Candidates:
    """Scores pages for `PageChooser`: hardly more of them when there are many."""

    def __init__(self, table: PageTable, rotate: Callable[[torch.Tensor, int], torch.Tensor], groups: Sequence[Group],
                 leaves: int | None):
        """
        Args:
            rotate: `Backbone.rotate`.
            groups: oldest first, side by side.
            leaves: so many are opened in each group; None: all pages are scored, whatever their number.
        """
        self._table, self._rotate, self._groups, self._leaves = table, rotate, groups, leaves
        # What is sorted later changes nothing in an answer that has begun.
        self._stops = table.leaves.stops

    def scored(self, layer: int, rows: torch.Tensor, first: int) -> tuple[torch.Tensor | None, torch.Tensor]:
        """How much each row wants each page, those before number `first` left out.

        Args:
            rows: rotated queries times the attention scale, [kv_heads, rows, head_dim] fp32.

        Returns:
            Pages by number, [kv_heads, pages] int64, None for all from `first` on; scores [kv_heads, rows, pages] fp32.
        """
        found, scores, through_leaves = [], [], False
        for group in self._groups:
            span = slice(max(group.first, first), group.stop)
            if span.start >= span.stop:
                continue
            turned = self._rotate(rows, group.turn) if group.turn else rows
            whole = self._whole(layer, span)
            if whole is None:
                found.append(span)
                scores.append(self._scores(turned, self._table.entries(layer, span)))
                continue
            through_leaves = True
            pages = self._best(layer, turned, whole)
            ends = slice(span.start, whole.start * CHAPTER), slice(whole.stop * CHAPTER, span.stop)
            found += [ends[0], pages, ends[1]]
            scores += [self._scores(turned, entries) for entries in (
                self._table.entries(layer, ends[0]), self._table.entries_of(layer, pages), self._table.entries(layer, ends[1]))]
        scores = torch.cat(scores, dim=-1) if len(scores) > 1 else scores[0]
        if not through_leaves:
            scores += self._table.lengths(slice(first, self._groups[-1].stop)).log()
            return None, scores
        pages = torch.cat([torch.arange(part.start, part.stop, device=rows.device).expand(len(rows), -1)
                           if isinstance(part, slice) else part for part in found], dim=-1)
        scores += self._table.lengths(slice(self._table.first, self._table.stop))[pages - self._table.first].log()[:, None]
        return pages, scores

    def _whole(self, layer: int, span: slice) -> slice | None:
        """The chapters of a span that are worth going through by leaves."""
        leaves = self._table.leaves
        chapters = slice(max(leaves.first, -(-span.start // CHAPTER)), min(self._stops[layer], span.stop // CHAPTER))
        worth = self._leaves is not None and (chapters.stop - chapters.start) * LEAVES > self._leaves
        return chapters if worth else None

    def _best(self, layer: int, rows: torch.Tensor, chapters: slice) -> torch.Tensor:
        """Pages of the leaves that these rows want most, by number, [kv_heads, pages] int64."""
        scores = self._scores(rows, self._table.leaves.entries(layer, chapters))
        # Votes in logarithms: the good leaves stand so far out that most votes would be 0.
        votes = torch.log_softmax(scores, dim=-1).logsumexp(dim=1)
        return self._table.leaves.pages(layer, chapters, votes.topk(self._leaves, dim=-1).indices)

    def _scores(self, rows: torch.Tensor, entries: torch.Tensor) -> torch.Tensor:
        return self._table.index.scores(rows.to(entries.dtype), entries).float()
