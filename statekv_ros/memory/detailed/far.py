"""Steps that have left the device: which they are, which tier has them, and their pages brought up when an answer reads them."""
from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch

from statekv_ros.backbones.base import Backbone
from statekv_ros.backbones.upload import to_device
from statekv_ros.memory.detailed.blobs import from_blobs, page_cuts
from statekv_ros.memory.detailed.fetching import Fetched, PageFetcher, Wanted
from statekv_ros.memory.detailed.formats import Format
from statekv_ros.memory.detailed.pages import HeldStep
from statekv_ros.memory.detailed.shares import Shares
from statekv_ros.memory.detailed.staging import Staging
from statekv_ros.memory.detailed.step_rows import StepRows
from statekv_ros.memory.detailed.tiers import HostTier, Tier
from statekv_ros.memory.pose import Pose

_MOST_WAITING = 8       # steps in main memory beyond its bound, until the tier below has them


class Round(NamedTuple):
    """Pages that are staged at the same time.

    Attributes:
        columns: which of the pages asked for each is, [kv_heads, pages] int64.
        starts, lengths: first row and rows, in the staging of the layer, [kv_heads, pages] int32; length 0: not used.
        slots: where their scales are, [kv_heads, pages] int32.
    """
    columns: torch.Tensor
    starts: torch.Tensor
    lengths: torch.Tensor
    slots: torch.Tensor


class FarSteps:
    """The oldest steps of a detailed cache, as far as a tier has them.

    Attributes:
        steps: oldest first.
        host: main memory; the tiers below it are the caller's.
        staging: where pages are read from; None until the first.
    """

    def __init__(self, backbone: Backbone, form: Format, below: Sequence[Tier], shares: Shares, page_tokens: int):
        self.steps = StepRows(page_tokens)
        self.host = HostTier(shares.host, backbone.device)
        self.staging: Staging | None = None
        self._backbone, self._form, self._staging_bytes, self._lent = backbone, form, shares.staging, shares.lent
        self._below = tuple(below)
        self._fetcher = PageFetcher(backbone, form, (self.host, *below), page_tokens)
        self._means: dict[tuple[int, bool], torch.Tensor] = {}  # by step and whether of visual tokens alone
        self._longest = 0

    @property
    def bytes(self) -> int:
        """Bytes on the device."""
        return self._staged - self._borrowed

    @property
    def host_bytes(self) -> int:
        """Bytes in main memory, what it lends for staging included."""
        return self.host.bytes + self._borrowed

    @property
    def _staged(self) -> int:
        return self.staging.bytes if self.staging else 0

    @property
    def _borrowed(self) -> int:
        """Bytes of the staging that count as main memory: what is more than the device's own share, as far as they are lent."""
        return min(self._lent, max(0, self._staged - (self._staging_bytes - self._lent)))

    def append(self, step: HeldStep, parts: Callable[[], dict[str, torch.Tensor]]) -> None:
        """Hold a step, newer than all that are here; `parts`, as of `tiers`, are asked for where main memory is to have it."""
        number = step.record.step
        if self.host.max_bytes or not self._is_below(number):
            self.host.put(number, parts())
        step.row, step.slot = -1, None
        self.adopt(step)

    def adopt(self, step: HeldStep) -> None:
        """Hold a step, newer than all that are here, that a tier below has."""
        self.steps.append(step)
        for visual, mean in enumerate((step.mean, step.visual_mean)):
            if mean is not None:
                self._means[step.record.step, bool(visual)] = mean
        self._longest = max(self._longest, *step.lengths)

    def pop_lost(self) -> list[HeldStep]:
        """Let go of the steps that no tier has any more, oldest first."""
        numbers = self.host.crowded_out(self._is_below, _MOST_WAITING if self._below else 0)
        for tier in self._below:
            numbers += tier.gone()
        lost = []
        for number in sorted(set(numbers)):
            at = self.steps.find(number)
            if at is not None and not self._is_held(number):
                lost.append(self.steps.pop(at))
                for visual in (False, True):
                    self._means.pop((number, visual), None)
                self._fetcher.forget(number)
        return lost

    def rounds(self, layer: int, pages: torch.Tensor, lengths: torch.Tensor) -> Iterator[Round]:
        """Bring pages up, as many at a time as there is room for. What cannot be read is left out.

        Args:
            pages, lengths: numbers and tokens, [kv_heads, pages]; length 0: not wanted. The host waits for them.
        """
        # Lists: they are short, and a call of NumPy costs as much as some fifty of their elements.
        numbers, tokens = pages.tolist(), lengths.tolist()
        wanted = sorted({page for row, of_row in zip(numbers, tokens) for page, length in zip(row, of_row) if length})
        if not wanted:
            return
        staging = self._staging_for(max(map(max, tokens)))
        held = staging.slot_of(layer)
        if len(wanted) > staging.slots:
            wanted.sort(key=lambda page: page not in held)      # first what is there: later rounds may take its place
        for first in range(0, len(wanted), staging.slots):
            part = wanted[first:first + staging.slots]
            self._bring_up(layer, sorted(part))
            slots = {page: held[page] for page in part if page in held}     # else it could not be read
            yield self._round([[(column, slots[page], length) for column, (page, length) in enumerate(zip(row, of_row))
                                if length and page in slots] for row, of_row in zip(numbers, tokens)])

    def mean_key(self, step: HeldStep, bias: torch.Tensor | None, visual: bool) -> torch.Tensor | None:
        """A step's keys before rotation, averaged over its tokens or `visual` ones, [layers, kv_heads, head_dim] fp32, kept; None
        when it cannot be read."""
        name = step.record.step, visual
        if name not in self._means:
            mean = self._mean_key(step, bias, step.record.visual if visual else slice(None))
            if mean is None:
                return None
            self._means[name] = mean
        return self._means[name]

    def place(self, number: int, pose: Pose) -> None:
        """Where a step was seen is known now; nothing where it is not here."""
        at = self.steps.find(number)
        if at is not None:
            self.steps.place(at, pose)

    def _mean_key(self, step: HeldStep, bias: torch.Tensor | None, tokens: slice) -> torch.Tensor | None:
        layout, record = self._backbone.layout, step.record
        if self._form.rotated:
            shape = layout.layers, layout.kv_heads, record.tokens, layout.head_dim
            found = self._fetcher.read(step, 'key', layout.dtype, shape)
            if found is None:
                return None
            key = self._backbone.rotate(found[0].to(layout.device).float(), step.turn if found[1] else 0)
            positions = self._fetcher.positions_of(step)
            if positions is None:
                return None
            # As `TokenInputs` has them: of several axes, a batch stands between.
            positions = (positions if len(positions) == 1 else positions[:, None]).to(layout.device)
            return self._backbone.unrotated(key, positions)[:, :, tokens].mean(dim=2)
        cuts = page_cuts(layout, self._form.bits, step.lengths)
        found = self._fetcher.read(step, 'packed', torch.uint8, (layout.layers, cuts[-1]))
        if found is None:
            return None
        keys = [self._form.decode(from_blobs(layout, self._form.bits, length, found[0][:, begin:end])[0])
                for begin, end, length in zip(cuts, cuts[1:], step.lengths)]
        mean = torch.cat(keys, dim=2)[:, :, tokens].mean(dim=2).to(layout.device)
        return mean if bias is None else mean + bias

    def _is_held(self, number: int) -> bool:
        return self.host.holds(number) or self._is_below(number)

    def _is_below(self, number: int) -> bool:
        return any(tier.holds(number) for tier in self._below)

    def _staging_for(self, tokens: int) -> Staging:
        if self.staging is None or self.staging.page_tokens < tokens:
            longest = max(self._longest, tokens)
            layout, axes = self._backbone.layout, self._backbone.position_axes
            self.staging, size = None, self._staging_bytes
            while self.staging is None:
                try:
                    self.staging = Staging(layout, self._form, axes, longest, size)
                except torch.OutOfMemoryError:
                    if not size:
                        raise
                    size //= 2
        return self.staging

    def _round(self, found: list[list[tuple[int, int, int]]]) -> Round:
        """found: of each KV head's pages that are staged, which of those asked for it is, slot and tokens."""
        width = max(1, *map(len, found))
        filled = np.array([row + [(0, 0, 0)] * (width - len(row)) for row in found])
        columns, slots, lengths = to_device(torch.from_numpy(filled), self._backbone.device).unbind(-1)
        slots, lengths = slots.int(), lengths.int()
        return Round(columns, slots * self.staging.page_tokens, lengths, slots)

    def _bring_up(self, layer: int, pages: Sequence[int]) -> None:
        missing = self.staging.missing(layer, pages)
        if not missing:
            return
        at = np.searchsorted(self.steps.column('page'), missing, 'right') - 1
        for found in self._fetcher.fetch(layer, Wanted(missing, *self.steps.numbers(at, Wanted._fields[1:]))):
            data = self._turned(found) if found.turn else found.data
            self.staging.fill(layer, self.staging.place(layer, found.pages), found.lengths, data, found.tokens)

    def _turned(self, found: Fetched) -> torch.Tensor:
        """Data of pages in the model's own dtype, with their keys turned; on the device."""
        layout = self._backbone.layout
        rows = to_device(found.data, layout.device).view(layout.dtype).view(-1, layout.head_dim)
        turned = []
        for page in rows.split([2 * layout.kv_heads * length for length in found.lengths]):
            key, value = page.chunk(2)
            turned += self._backbone.rotate(key, found.turn), value
        return torch.cat(turned).flatten().view(torch.uint8)
