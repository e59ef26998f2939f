"""What an answer looked at: attention noted pass by pass, and the steps that got most of it."""
from bisect import bisect_right
from collections import defaultdict
from collections.abc import Sequence
from operator import attrgetter

import torch

from statekv_ros.memory.detailed.pages import HeldStep
from statekv_ros.memory.records import Evidence, StepRecord


class Notes:
    """Softmax mass, summed over layers and query heads: for each token of parts and tail, for each page of those chosen.

    Attributes:
        tail: mass of each token of the answer's own tail, [capacity] fp32.
    """

    def __init__(self, device: torch.device, ordinal: int, steps: Sequence[HeldStep]):
        """
        Args:
            ordinal: stream index of the first token of the tail.
            steps: those whose pages may be chosen.
        """
        self.tail = torch.zeros(0, device=device)
        self._ordinal, self._steps = ordinal, steps
        self._first_page = self._steps[0].page if self._steps else 0
        stop = self._steps[-1].page + len(self._steps[-1].lengths) if self._steps else 0
        self._pages = torch.zeros(stop - self._first_page, device=device)
        self._newest: list[tuple[torch.Tensor, torch.Tensor]] = []      # what the newest pass added to which masses
        self._newest_pages: list[tuple[torch.Tensor, torch.Tensor]] = []

    def begin(self) -> None:
        """A new forward pass."""
        self._newest.clear()
        self._newest_pages.clear()

    def make_room(self, tokens: int) -> None:
        """The tail may have so many tokens."""
        if tokens > self.tail.shape[0]:
            tail = self.tail.new_zeros(2 * tokens)
            tail[:self.tail.shape[0]] = self.tail
            self.tail = tail

    def add_part(self, part, layer: int, mass: torch.Tensor) -> None:
        """mass: [kv_heads, tokens] of a part in one layer."""
        self._add(*((part.mass, mass.sum(dim=0)) if part.mass.ndim == 1 else (part.mass[layer], mass)))

    def add_tail(self, mass: torch.Tensor) -> None:
        """mass: [tokens]."""
        self._add(self.tail[:mass.shape[0]], mass)

    def add_pages(self, pages: torch.Tensor, mass: torch.Tensor) -> None:
        """pages: numbers in the page table, mass: of their visual tokens; [kv_heads, pages] each."""
        pages, mass = (pages - self._first_page).reshape(-1), mass.reshape(-1)
        self._pages.index_add_(0, pages, mass)
        self._newest_pages.append((pages, mass))

    def take_back(self) -> None:
        """Forget what the newest forward pass added."""
        for noted, mass in self._newest:
            noted -= mass
        for pages, mass in self._newest_pages:
            self._pages.index_add_(0, pages, -mass)
        self.begin()

    def evidence(self, records: Sequence[StepRecord], limit: int, parts: list, tail_tokens: int) -> tuple[Evidence, ...]:
        """The most attended steps among `records`, greatest share first.

        Only visual tokens count: the prefix, timestamps and delimiters draw attention whatever they stand beside.
        """
        if not records or limit <= 0:
            return ()
        device = self.tail.device
        # Steps whose pages are chosen are the first of `records`. There may be many, and few were looked at.
        masses: dict[int, float] = defaultdict(float)
        noted = self._pages.nonzero().squeeze(1)
        for page, mass in zip(noted.tolist(), self._pages[noted].tolist()):
            masses[bisect_right(self._steps, self._first_page + page, key=attrgetter('page')) - 1] += mass
        others = records[len(self._steps):]
        if others:
            starts = torch.tensor([r.first_ordinal + r.visual_start for r in others], device=device)
            ends = starts + torch.tensor([r.visual_tokens for r in others], device=device)
            per_step = torch.zeros(len(others), dtype=torch.float64, device=device)
            tail = torch.arange(self._ordinal, self._ordinal + tail_tokens, device=device)
            for ordinal, mass in [*((part.view.ordinal, part.mass) for part in parts), (tail, self.tail[:tail_tokens])]:
                ordinal, mass = ordinal.reshape(-1), mass.reshape(-1).double()
                step = torch.searchsorted(starts, ordinal, right=True) - 1
                visual = (step >= 0) & (ordinal < ends[step.clamp_min(0)])
                per_step.index_add_(0, step[visual], mass[visual])
            masses |= enumerate(per_step.tolist(), start=len(self._steps))
        total = sum(masses.values())
        best = sorted((number for number in masses if masses[number] > 0), key=lambda number: (-masses[number], number))[:limit]
        return tuple(Evidence(records[number].first_stamp_ns, records[number].last_stamp_ns, masses[number] / total)
                     for number in best)

    def _add(self, noted: torch.Tensor, mass: torch.Tensor) -> None:
        noted += mass
        self._newest.append((noted, mass))
