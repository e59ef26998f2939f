"""Answer policy `sparse(n)`: in every layer and KV head, a pass reads the pages that its queries want most, n tokens' worth.

Every row (a query head of a token) scores all pages by the index and spreads one vote over them, as its attention would; the
pages with the most votes over all rows of the KV head are read by all of them. Nothing is kept from pass to pass: each slice of
the question and each token of the answer chooses anew.
"""
from dataclasses import dataclass
from itertools import groupby
from operator import attrgetter

import torch

from statekv_ros.memory.answering.snapshot import Snapshot


@dataclass(frozen=True)
class Choice:
    """Pages to read in one layer.

    Attributes:
        pages: their numbers in the page table, [kv_heads, pages] int64.
        starts, lengths: where they lie in the pool, [kv_heads, pages] int32; length 0: not read.
        moves: how many positions further right a page's keys are read, [kv_heads, pages] int32; None: all where they stand.
    """
    pages: torch.Tensor
    starts: torch.Tensor
    lengths: torch.Tensor
    moves: torch.Tensor | None


@dataclass(frozen=True)
class _Group:
    """Pages, side by side in the table, that a query stands alike before; `turn` in the index's own positions."""
    first: int
    stop: int
    turn: int


class PageChooser:
    """Chooses among the pages of a snapshot that are still held.

    Attributes:
        tokens: that a pass reads at most, per layer and KV head.
    """

    def __init__(self, snapshot: Snapshot):
        self.tokens = snapshot.policy.loaded_tokens
        self._table, self._rotate = snapshot.seen.detailed.pages, snapshot.seen.backbone.rotate
        steps, device = snapshot.steps, snapshot.seen.backbone.device
        self._first, self._stop = steps[0].page, steps[-1].page + len(steps[-1].lengths)
        moves = torch.zeros(self._stop - self._first, dtype=torch.int32)
        self._groups: list[_Group] = []
        # Over hours steps are many, stretches are few.
        for stretch, alike in groupby(steps, attrgetter('stretch')):
            alike = list(alike)
            first, last = alike[0], alike[-1]
            # Its first step that can be read decides where all of it stands.
            turn = snapshot.turn(first.record.position, stretch.shift)
            stop = last.page + len(last.lengths)
            moves[first.page - self._first:stop - self._first] = -turn
            self._add(first.page, stop, turn + stretch.shift - stretch.position)
        self._unwanted = None
        if len(steps) <= steps[-1].record.step - steps[0].record.step:
            unwanted = torch.ones(self._stop - self._first, dtype=torch.bool)
            for step in steps:
                unwanted[step.page - self._first:step.page - self._first + len(step.lengths)] = False
            self._unwanted = unwanted.to(device)
        self._moves = moves.to(device) if moves.any() else None
        shortest = int(self._table.lengths(slice(self._first, self._stop)).min())
        self._count = max(1, self.tokens // shortest)

    def choose(self, layer: int, rows: torch.Tensor) -> Choice | None:
        """The pages that these rows read together; None when none is held any more.

        Args:
            rows: rotated queries times the attention scale, [kv_heads, rows, head_dim] fp32.
        """
        first = max(self._first, self._table.first)
        if first >= self._stop:
            return None
        votes = torch.softmax(self._scores(layer, rows, first), dim=-1).sum(dim=1)
        best = votes.topk(min(votes.shape[-1], self._count), dim=-1).indices
        held = slice(first, self._stop)
        lengths = self._table.lengths(held)[best]
        lengths = lengths.masked_fill(lengths.cumsum(dim=-1) > self.tokens, 0)
        if self._unwanted is not None:
            lengths = lengths.masked_fill(self._unwanted[first - self._first:][best], 0)
        moves = None if self._moves is None else self._moves[first - self._first:][best]
        return Choice(best + first, self._table.starts(held)[best], lengths, moves)

    def _scores(self, layer: int, rows: torch.Tensor, first: int) -> torch.Tensor:
        """How much each row wants each page from number `first` on, [kv_heads, rows, pages] fp32."""
        scores = []
        for group in self._groups:
            pages = slice(max(group.first, first), group.stop)
            if pages.start < pages.stop:
                turned = self._rotate(rows, group.turn) if group.turn else rows
                entries = self._table.entries(layer, pages)
                scores.append(self._table.index.scores(turned.to(entries.dtype), entries).float())
        scores = torch.cat(scores, dim=-1) if len(scores) > 1 else scores[0]
        scores += self._table.lengths(slice(first, self._stop)).log()
        if self._unwanted is not None:
            scores.masked_fill_(self._unwanted[first - self._first:], float('-inf'))
        return scores

    def _add(self, first: int, stop: int, turn: int) -> None:
        last = self._groups[-1] if self._groups else None
        if last is not None and last.turn == turn:
            self._groups[-1] = _Group(last.first, stop, turn)   # what lies between is not wanted, and masked
        else:
            self._groups.append(_Group(last.stop if last else first, stop, turn))
