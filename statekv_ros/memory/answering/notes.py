"""What an answer looked at: attention noted pass by pass, and the steps that got most of it."""
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch

from statekv_ros.memory.detailed.held import HeldSteps, Records
from statekv_ros.memory.records import Evidence


class Noted(NamedTuple):
    """What one forward pass noted, layer by layer.

    Attributes:
        of_parts: where it is to be added up, mass, and stream indices of the tokens; of_pages: numbers in the page table, and
            mass of visual tokens; of_tail: mass of each token.
    """
    of_parts: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]
    of_pages: list[tuple[torch.Tensor, torch.Tensor]]
    of_tail: list[torch.Tensor]

    def in_few(self) -> 'Noted':
        """The same in as few tensors as may be, so that adding it up is little work however many layers there are."""
        of_parts = {}
        for where, mass, ordinals in self.of_parts:
            so_far = of_parts.get(id(where))
            of_parts[id(where)] = where, mass if so_far is None else so_far[1] + mass, ordinals
        of_pages = [tuple(torch.cat([each.flatten() for each in every]) for every in zip(*self.of_pages))]
        of_tail = [torch.cat(self.of_tail).sum(dim=0, keepdim=True)]
        return Noted(list(of_parts.values()), of_pages if self.of_pages else [], of_tail)

    def sums(self) -> torch.Tensor:
        """All mass of each part, choice of pages and tail, [...] fp32."""
        masses = [*(mass for _, mass, _ in self.of_parts), *(mass for _, mass in self.of_pages), *self.of_tail]
        return torch.stack([mass.sum() for mass in masses])


class Notes:
    """Softmax mass, summed over layers and query heads: for each token of parts and tail, for each page of those chosen."""

    def __init__(self, device: torch.device, ordinal: int, steps: HeldSteps):
        """
        Args:
            ordinal: stream index of the first token of the tail.
            steps: those whose pages may be chosen.
        """
        self._tail = torch.zeros(0, device=device)
        self._ordinal, self._steps = ordinal, steps
        self._first_page = self._steps[0].page if self._steps else 0
        stop = self._steps[-1].page + len(self._steps[-1].lengths) if self._steps else 0
        self._pages = torch.zeros(stop - self._first_page, device=device)
        self._newest = Noted([], [], [])    # added up once the pass has ended
        self._added = True
        self._step_pages: np.ndarray | None = None      # first page of each step
        self._spans: tuple[torch.Tensor, torch.Tensor] | None = None    # stream indices of visual tokens

    def begin(self) -> None:
        """A new forward pass."""
        self._add_up()
        self._put(Noted([], [], []))

    def newest(self) -> Noted:
        """What the newest forward pass noted, which is forgotten here."""
        newest = self._newest
        self._put(Noted([], [], []))
        return newest

    def put(self, newest: Noted) -> None:
        """Have this noted by the newest forward pass, and nothing else."""
        self._put(newest)
        self._added = False

    def make_room(self, tokens: int) -> None:
        """The tail may have so many tokens."""
        if tokens > self._tail.shape[0]:
            tail = self._tail.new_zeros(tokens)
            tail[:self._tail.shape[0]] = self._tail
            self._tail = tail

    def add_part(self, part, layer: int, mass: torch.Tensor) -> None:
        """mass: [kv_heads, tokens] of a part in one layer."""
        ordinals = part.view.ordinal
        self._newest.of_parts.append((part.mass, mass.sum(dim=0), ordinals) if part.mass.ndim == 1 else
                                     (part.mass[layer], mass, ordinals[layer]))
        self._added = False

    def add_tail(self, mass: torch.Tensor) -> None:
        """mass: [kv_heads, tokens] in one layer."""
        self._newest.of_tail.append(mass)
        self._added = False

    def add_pages(self, pages: torch.Tensor, mass: torch.Tensor) -> None:
        """pages: numbers in the page table, mass: of their visual tokens; [kv_heads, pages] each."""
        self._newest.of_pages.append((pages, mass))
        self._added = False

    def tail(self, tokens: int) -> torch.Tensor:
        """Mass of each token of the tail, [tokens] fp32."""
        self._add_up()
        return self._tail[:tokens]

    def take_back(self) -> None:
        """Forget what the newest forward pass added."""
        if self._added:
            self._add_newest(-1)
        self._put(Noted([], [], []))

    def evidence(self, records: Records, limit: int, parts: list, tail_tokens: int) -> tuple[Evidence, ...]:
        """The most attended steps among `records`, greatest share first.

        Only visual tokens count: the prefix, timestamps and delimiters draw attention whatever they stand beside.
        """
        tail = self._tail_ordinals(tail_tokens), self.tail(tail_tokens)
        pages = self._pages.nonzero().squeeze(1)
        tokens = [*((part.view.ordinal, part.mass) for part in parts), tail]
        return self._most_attended(records, limit, pages, self._pages[pages], tokens)

    def newest_evidence(self, records: Records, limit: int) -> tuple[Evidence, ...]:
        """The same by what the newest forward pass added."""
        pages, masses = self._newest_pages()
        tokens = [(ordinals, mass) for _, mass, ordinals in self._newest.of_parts]
        if self._newest.of_tail:
            tail = self._newest_tail()
            tokens.append((self._tail_ordinals(len(tail)), tail))
        return self._most_attended(records, limit, pages, masses, tokens)

    def _most_attended(self, records: Records, limit: int, pages: torch.Tensor, page_masses: torch.Tensor,
                       tokens: Sequence[tuple[torch.Tensor, torch.Tensor]]) -> tuple[Evidence, ...]:
        """tokens: stream indices and masses, of one shape."""
        if not records or limit <= 0:
            return ()
        # Steps whose pages are chosen are the first of `records`. There may be many, so none is looked at by itself.
        if self._step_pages is None:
            self._step_pages = self._steps.column('page') - self._first_page
        step = np.searchsorted(self._step_pages, pages.cpu().numpy(), 'right') - 1
        masses = np.bincount(step, page_masses.double().cpu().numpy(), len(records)).astype(float)    # of nothing, it is of int
        if len(records) > len(self._steps):
            masses[len(self._steps):] = self._by_tokens(records[len(self._steps):], tokens).cpu().numpy()
        attended = np.flatnonzero(masses > 0)
        best, total = attended[np.argsort(-masses[attended], kind='stable')[:limit]], masses[attended].sum()
        looked_at = ((records[number], float(masses[number] / total)) for number in best.tolist())
        return tuple(Evidence(record.first_stamp_ns, record.last_stamp_ns, share, record.pose, record.step)
                     for record, share in looked_at)

    def _by_tokens(self, records: Records,
                   tokens: Sequence[tuple[torch.Tensor, torch.Tensor]]) -> torch.Tensor:
        """Mass of each record's visual tokens, [records] fp64."""
        if self._spans is None or len(self._spans[0]) != len(records):
            starts = records.column('first_ordinal') + records.column('visual_start')
            self._spans = tuple(torch.from_numpy(ordinals).to(self._tail.device) for ordinals in (
                starts, starts + records.column('visual_tokens')))
        starts, ends = self._spans
        per_step = torch.zeros(len(records), dtype=torch.float64, device=starts.device)
        for ordinal, mass in tokens:
            ordinal, mass = ordinal.reshape(-1), mass.reshape(-1).double()
            step = torch.searchsorted(starts, ordinal, right=True) - 1
            visual = (step >= 0) & (ordinal < ends[step.clamp_min(0)])
            per_step.index_add_(0, step[visual], mass[visual])
        return per_step

    def _tail_ordinals(self, tokens: int) -> torch.Tensor:
        return torch.arange(self._ordinal, self._ordinal + tokens, device=self._tail.device)

    def _add_up(self) -> None:
        if not self._added:
            self._add_newest(1)
            self._added = True

    @torch.inference_mode()     # as the passes that noted it
    def _add_newest(self, sign: int) -> None:
        for noted, mass, _ in self._newest.of_parts:
            noted.add_(mass, alpha=sign)
        if self._newest.of_pages:
            pages, mass = self._newest_pages()
            self._pages.index_add_(0, pages, mass, alpha=sign)
        if self._newest.of_tail:
            tail = self._newest_tail()
            self._tail[:len(tail)].add_(tail, alpha=sign)

    def _newest_pages(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Pages of the newest pass, counted from the first one that may be chosen, and their masses; some more than once."""
        if not self._newest.of_pages:
            return self._pages[:0].long(), self._pages[:0]
        pages, masses = (torch.cat([each.flatten() for each in noted]) for noted in zip(*self._newest.of_pages))
        return pages - self._first_page, masses

    def _newest_tail(self) -> torch.Tensor:
        return torch.cat(self._newest.of_tail).sum(dim=0)

    def _put(self, newest: Noted) -> None:
        self._newest, self._added = newest, True
