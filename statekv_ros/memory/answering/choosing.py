"""Which pages a pass reads: those that its queries want most, or the same ones in every pass.

Answer policy `sparse(n)` chooses n tokens' worth in every layer and KV head. Every row (a query head of a token) scores the
pages by the index (all, or its candidates where very many are held) and spreads one vote over them, as its attention would; the
pages with the most votes over all rows of the KV head are read by all of them. Nothing is kept from pass to pass: each slice of
the question and each token of the answer chooses anew.
"""
from bisect import bisect_left
from collections.abc import Sequence
from itertools import pairwise

import numpy as np
import torch

from statekv_ros.backbones.upload import to_device
from statekv_ros.kernels.page_votes import PageColumns, Places, page_places
from statekv_ros.memory.answering.candidates import Candidates, Group, leaves_to_open
from statekv_ros.memory.answering.snapshot import Snapshot
from statekv_ros.memory.detailed.pages import HeldStep, by_stretch
from statekv_ros.memory.detailed.table import PageTable


class PageChooser:
    """Chooses among the pages of a snapshot that are still held.

    Attributes:
        tokens: that a pass reads at most, per layer and KV head.
        scored: pages and leaves that each row of a pass scores at most.
    """

    def __init__(self, snapshot: Snapshot):
        self.tokens = snapshot.policy.loaded_tokens
        self._table = snapshot.seen.detailed.pages
        steps, device = snapshot.steps, snapshot.seen.backbone.device
        self._first, self._stop = steps[0].page, steps[-1].page + len(steps[-1].lengths)
        pages = slice(self._first, self._stop)
        self._unwanted, lengths = None, self._table.lengths(pages)
        if len(steps) <= steps[-1].record.step - steps[0].record.step:
            unwanted = torch.ones(self._stop - self._first, dtype=torch.bool)
            for step in steps:
                unwanted[step.page - self._first:step.page - self._first + len(step.lengths)] = False
            unwanted = unwanted.to(device) & (lengths > 0)      # what was lost in between is not there to be wanted
            self._unwanted = unwanted if unwanted.any() else None
            firsts = [steps[begin] for begin, _ in by_stretch(steps)]
        else:
            firsts = steps[:1]              # only the oldest stretch can have lost steps
        begins, positions, shifts = self._table.stretches(pages)
        seen_from = positions.copy()    # of a stretch, the first step that can be read decides where all of it stands
        for step in firsts:
            if step.record.position != step.stretch.position:
                seen_from[(positions == step.stretch.position) & (shifts == step.stretch.shift)] = step.record.position
        turns = snapshot.turns(seen_from, shifts)
        self._moves = None
        if turns.any():
            told = to_device(torch.from_numpy(np.stack([-turns, np.diff(begins, append=self._stop)])), device)
            self._moves = told[0].int().repeat_interleave(told[1], output_size=self._stop - self._first)
        self._groups = _groups(begins, turns + shifts - positions, self._stop)
        shortest = int(lengths.min()) or int(torch.where(lengths > 0, lengths, lengths.max()).min())      # 0: lost
        self._count = max(1, self.tokens // max(1, shortest))
        # Pages that are exact: never more while this answer lasts.
        self._exact = self._stop - max(self._first, min(self._stop, self._table.boundary))
        # Where pages that nobody wants lie between, leaves would be full of them.
        leaves = leaves_to_open(self._count) if self._unwanted is None else None
        self._candidates = Candidates(self._table, snapshot.seen.backbone.rotate, self._groups, leaves, self._unwanted)
        self.scored = self._candidates.most

    def choose(self, layer: int, rows: torch.Tensor) -> list[Places]:
        """The pages that these rows read together, those that are in one pool in one choice.

        Args:
            rows: rotated queries times the attention scale, [kv_heads, rows, head_dim] fp32.
        """
        first = max(self._first, self._table.first)
        if first >= self._stop:
            return []
        candidates, votes = self._candidates.votes(layer, rows, first)
        votes, best = votes.topk(min(votes.shape[-1], self._count), dim=-1)
        table = self._table
        columns = PageColumns(*table.columns, table.near, self._stop, table.boundary_there,
                              table.boundary > max(first, table.near), self._exact, self._first, self._moves, self._unwanted)
        return page_places(best, votes, candidates, first, columns, self.tokens)

    def place(self) -> tuple | None:
        """See `Reading.place`; None where some pages are not on the device."""
        table = self._table
        first = max(self._first, table.first)
        if table.near > first:
            return None
        return first, table.boundary > first, *table.place(), *table.leaves.place()


class FixedPages:
    """Pages that all KV heads read in every pass, as far as they are still held.

    Attributes:
        tokens: that a pass reads at most, per layer and KV head.
    """

    def __init__(self, table: PageTable, steps: Sequence[HeldStep], turns: Sequence[int], kv_heads: int, device: torch.device):
        """
        Args:
            steps: those to read, oldest first.
            turns: by how many positions a query has to be turned for each.
        """
        self.tokens = sum(step.record.tokens for step in steps)
        self._table, self._kv_heads = table, kv_heads
        self._numbers = [step.page + page for step in steps for page in range(len(step.lengths))]
        moves = [-turn for step, turn in zip(steps, turns) for _ in step.lengths]
        self._pages = to_device(torch.tensor(self._numbers, dtype=torch.int64), device)
        self._moves = to_device(torch.tensor(moves, dtype=torch.int32), device) if any(moves) else None

    def choose(self, layer: int, rows: torch.Tensor) -> list[Places]:
        """As `PageChooser.choose`, whatever the rows are."""
        held, near, exact = self._cuts()
        return [self._choice(part, packed, part.stop == near) for part, packed in (
            (slice(held, near), False), (slice(near, exact), True), (slice(exact, None), False)) if self._numbers[part]]

    def place(self) -> tuple | None:
        """See `Reading.place`; None where some pages are not on the device."""
        held, near, exact = self._cuts()
        return None if near > held else (held, exact, *self._table.place())

    def _cuts(self) -> tuple[int, int, int]:
        """Which of the pages is the first one that is held, that is on the device, and that is exact."""
        table = self._table
        return tuple(bisect_left(self._numbers, number) for number in (table.first, table.near, table.boundary))

    def _choice(self, part: slice, packed: bool, far: bool) -> Places:
        pages = self._pages[part]
        starts, lengths, slots = self._table.places(pages)

        def of_all_heads(numbers: torch.Tensor) -> torch.Tensor:
            return numbers.expand(self._kv_heads, -1)

        return Places(of_all_heads(pages), of_all_heads(starts), of_all_heads(lengths),
                      None if self._moves is None else of_all_heads(self._moves[part]),
                      of_all_heads(slots) if packed else None, far)


def _groups(begins: np.ndarray, turns: np.ndarray, stop: int) -> list[Group]:
    """Stretches side by side that stand alike, up to page `stop`, by their first pages and how a query stands before them,
    [stretches] int64 each."""
    firsts = np.flatnonzero(np.diff(turns, prepend=turns[0] - 1))
    return [Group(*part, turn) for part, turn in zip(pairwise([*begins[firsts].tolist(), stop]), turns[firsts].tolist())]


def turns_of(snapshot: Snapshot, steps: Sequence[HeldStep]) -> list[int]:
    """By how many positions a query has to be turned for each of these steps, oldest first."""
    turns = []
    for begin, end in by_stretch(steps):    # its first step that can be read decides where all of a stretch stands
        turns += [snapshot.turn(steps[begin].record.position, steps[begin].stretch.shift)] * (end - begin)
    return turns
