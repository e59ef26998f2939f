"""What an answer looked at: attention noted pass by pass, and the steps that got most of it."""
from collections.abc import Sequence

import numpy as np
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
        # What the newest pass added to which masses; of which tokens, None for the tail's.
        self._newest: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]] = []
        self._newest_pages: list[tuple[torch.Tensor, torch.Tensor]] = []
        self._step_pages: np.ndarray | None = None      # first page of each step
        self._spans: tuple[torch.Tensor, torch.Tensor] | None = None    # stream indices of visual tokens

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
        ordinals = part.view.ordinal
        self._add(*((part.mass, mass.sum(dim=0), ordinals) if part.mass.ndim == 1 else (part.mass[layer], mass, ordinals[layer])))

    def add_tail(self, mass: torch.Tensor) -> None:
        """mass: [tokens]."""
        self._add(self.tail[:mass.shape[0]], mass, None)

    def add_pages(self, pages: torch.Tensor, mass: torch.Tensor) -> None:
        """pages: numbers in the page table, mass: of their visual tokens; [kv_heads, pages] each."""
        pages, mass = (pages - self._first_page).reshape(-1), mass.reshape(-1)
        self._pages.index_add_(0, pages, mass)
        self._newest_pages.append((pages, mass))

    def take_back(self) -> None:
        """Forget what the newest forward pass added."""
        for noted, mass, _ in self._newest:
            noted -= mass
        for pages, mass in self._newest_pages:
            self._pages.index_add_(0, pages, -mass)
        self.begin()

    def evidence(self, records: Sequence[StepRecord], limit: int, parts: list, tail_tokens: int) -> tuple[Evidence, ...]:
        """The most attended steps among `records`, greatest share first.

        Only visual tokens count: the prefix, timestamps and delimiters draw attention whatever they stand beside.
        """
        pages = self._pages.nonzero().squeeze(1)
        tail = self._tail_ordinals(tail_tokens), self.tail[:tail_tokens]
        tokens = [*((part.view.ordinal, part.mass) for part in parts), tail]
        return self._most_attended(records, limit, pages, self._pages[pages], tokens)

    def newest_evidence(self, records: Sequence[StepRecord], limit: int) -> tuple[Evidence, ...]:
        """The same by what the newest forward pass added."""
        pages, masses = (torch.cat(noted) for noted in zip(*self._newest_pages)) if self._newest_pages else (self._pages[:0],) * 2
        tokens = [(self._tail_ordinals(len(mass)) if ordinals is None else ordinals, mass)
                  for _, mass, ordinals in self._newest]
        return self._most_attended(records, limit, pages.long(), masses, tokens)

    def _most_attended(self, records: Sequence[StepRecord], limit: int, pages: torch.Tensor, page_masses: torch.Tensor,
                       tokens: Sequence[tuple[torch.Tensor, torch.Tensor]]) -> tuple[Evidence, ...]:
        """tokens: stream indices and masses, of one shape."""
        if not records or limit <= 0:
            return ()
        # Steps whose pages are chosen are the first of `records`. There may be many, so none is looked at by itself.
        if self._step_pages is None:
            self._step_pages = np.fromiter((step.page for step in self._steps), np.int64, len(self._steps)) - self._first_page
        step = np.searchsorted(self._step_pages, pages.cpu().numpy(), 'right') - 1
        masses = np.bincount(step, page_masses.double().cpu().numpy(), len(records)).astype(float)    # of nothing, it is of int
        if len(records) > len(self._steps):
            masses[len(self._steps):] = self._by_tokens(records[len(self._steps):], tokens).cpu().numpy()
        attended = np.flatnonzero(masses > 0)
        best, total = attended[np.argsort(-masses[attended], kind='stable')[:limit]], masses[attended].sum()
        looked_at = ((records[number], float(masses[number] / total)) for number in best.tolist())
        return tuple(Evidence(record.first_stamp_ns, record.last_stamp_ns, share, record.pose, record.step)
                     for record, share in looked_at)

    def _by_tokens(self, records: Sequence[StepRecord],
                   tokens: Sequence[tuple[torch.Tensor, torch.Tensor]]) -> torch.Tensor:
        """Mass of each record's visual tokens, [records] fp64."""
        if self._spans is None or len(self._spans[0]) != len(records):
            device = self.tail.device
            starts = torch.tensor([r.first_ordinal + r.visual_start for r in records], device=device)
            self._spans = starts, starts + torch.tensor([r.visual_tokens for r in records], device=device)
        starts, ends = self._spans
        per_step = torch.zeros(len(records), dtype=torch.float64, device=starts.device)
        for ordinal, mass in tokens:
            ordinal, mass = ordinal.reshape(-1), mass.reshape(-1).double()
            step = torch.searchsorted(starts, ordinal, right=True) - 1
            visual = (step >= 0) & (ordinal < ends[step.clamp_min(0)])
            per_step.index_add_(0, step[visual], mass[visual])
        return per_step

    def _tail_ordinals(self, tokens: int) -> torch.Tensor:
        return torch.arange(self._ordinal, self._ordinal + tokens, device=self.tail.device)

    def _add(self, noted: torch.Tensor, mass: torch.Tensor, ordinals: torch.Tensor | None) -> None:
        noted += mass
        self._newest.append((noted, mass, ordinals))
