"""How many votes each page gets in a pass: all are scored, or, where these are many, those of the most wanted leaves."""
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from statekv_ros.memory.detailed.index import scores
from statekv_ros.memory.detailed.leaves import CHAPTER, LEAF, LEAVES
from statekv_ros.memory.detailed.table import PageTable

# Leaves that a pass opens, if it reads no more pages than that; docs/hours.md says what fewer lose.
OPEN_LEAVES = 192


@dataclass(frozen=True)
class Group:
    """Pages, side by side in the table, that a query stands alike before; `turn` in the index's own positions."""
    first: int
    stop: int
    turn: int


class Candidates:
    """Votes on pages for `PageChooser`: it hardly scores more of them when there are many."""

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
        scored, through = [], []
        for group in self._groups:
            span = slice(max(group.first, first), group.stop)
            if span.start >= span.stop:
                continue
            queries = self._table.index.queries(self._rotate(rows, group.turn) if group.turn else rows)
            whole, parts = self._whole(layer, span), [span]
            if whole is not None:
                through.append((queries, whole, self._leaf_scores(layer, queries, whole)))
                parts = [slice(span.start, whole.start * CHAPTER), slice(whole.stop * CHAPTER, span.stop)]
            scored += [(part, scores(queries, self._table.entries(layer, part)).add_(self._table.lengths(part).log()))
                       for part in parts if part.start < part.stop]
        if not through:
            of_pages = torch.cat([of_part for _, of_part in scored], dim=-1)
            if unwanted is not None:
                of_pages.masked_fill_(unwanted, float('-inf'))
            return None, torch.softmax(of_pages, dim=-1).sum(dim=1)
        mass = torch.cat([*(of_part for _, of_part in scored), *(of_leaves for *_, of_leaves in through)], dim=-1).logsumexp(
            dim=-1, keepdim=True)
        pages = [torch.arange(part.start, part.stop, device=rows.device).expand(len(rows), -1) for part, _ in scored]
        of_pages, closed = [of_part for _, of_part in scored], torch.zeros_like(mass)
        for queries, whole, of_leaves in through:
            shares = of_leaves.sub_(mass).exp_()
            best = shares.sum(dim=1).topk(self._leaves, dim=-1).indices
            # Leaves that stay closed get their votes too: else a row that wants a bit of everything had more say in what is open.
            closed += shares.scatter_(2, best[:, None].expand(-1, rows.shape[1], -1), 0).sum(dim=-1, keepdim=True)
            found = self._table.leaves.pages(layer, whole, best)
            pages.append(found)
            lengths = self._table.lengths_of(found).log()[:, None]
            of_pages.append(scores(queries, self._table.entries_of(layer, found)).add_(lengths))
        votes = torch.softmax(torch.cat([*of_pages, closed.log().add_(mass)], dim=-1), dim=-1)
        return torch.cat(pages, dim=-1), votes.sum(dim=1)[:, :-1]

    def _whole(self, layer: int, span: slice) -> slice | None:
        """The chapters of a span that are worth going through by leaves."""
        leaves = self._table.leaves
        chapters = slice(max(leaves.first, -(-span.start // CHAPTER)), min(self._stops[layer], span.stop // CHAPTER))
        worth = self._leaves is not None and (chapters.stop - chapters.start) * LEAVES > self._leaves
        return chapters if worth else None

    def _leaf_scores(self, layer: int, queries: torch.Tensor, chapters: slice) -> torch.Tensor:
        """How much each row wants each leaf, [kv_heads, rows, leaves] fp32."""
        length = self._table.lengths(slice(chapters.start * CHAPTER, chapters.stop * CHAPTER)).float().mean().log()
        return scores(queries, self._table.leaves.entries(layer, chapters)).add_(length + math.log(LEAF))
