"""Pages of steps that are not on the device, read from the nearest tier that has them, many at a time."""
from __future__ import annotations

from collections import OrderedDict, defaultdict
from collections.abc import Iterator, Sequence
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import torch

from statekv_ros.backbones.base import Backbone, KVLayout
from statekv_ros.memory.detailed.blobs import SCALES, page_cuts
from statekv_ros.memory.detailed.formats import Format
from statekv_ros.memory.detailed.pages import HeldStep
from statekv_ros.memory.detailed.tiers import Run, Tier

_POSITIONS_KEPT = 4096  # steps whose tokens' positions stay on the host


class Fetched(NamedTuple):
    """Pages on the host, each with room for as many tokens as the longest has.

    Attributes:
        pages: their numbers.
        turn: by how many positions their keys have to be turned.
        given, positions, visual: as `Staging.fill` takes them.
    """
    pages: list[int]
    turn: int
    given: list[torch.Tensor]
    positions: torch.Tensor
    visual: torch.Tensor


class PageFetcher:
    """Reads from tiers, the nearest first."""

    def __init__(self, backbone: Backbone, form: Format, tiers: Sequence[Tier]):
        self._backbone, self._form, self._tiers = backbone, form, tiers
        self._positions: OrderedDict[int, np.ndarray] = OrderedDict()

    def fetch(self, layer: int, pages: Sequence[tuple[int, HeldStep]]) -> Iterator[Fetched]:
        """A layer of pages by number, each with its step; those that no tier can read are left out."""
        self._read_positions([step for _, step in pages])
        alike = defaultdict(list)
        for (page, step), (turn, numbers) in zip(pages, self._numbers(layer, pages)):
            if numbers is not None and step.record.step in self._positions:
                alike[turn].append((page, step, numbers))
        for turn, found in alike.items():
            numbers, steps, given = zip(*found)
            begins = [sum(step.lengths[:page - step.page]) for page, step in zip(numbers, steps)]
            lengths = [step.lengths[page - step.page] for page, step in zip(numbers, steps)]
            positions = np.zeros((len(found), self._backbone.position_axes, max(lengths)), np.int32)
            for row, step, begin, length in zip(positions, steps, begins, lengths):
                row[:, :length] = self._positions[step.record.step][:, begin:begin + length]
            first = np.array([[begin - step.record.visual_start] for begin, step in zip(begins, steps)])
            token = first + np.arange(max(lengths))
            visual = (token >= 0) & (token < np.array([[step.record.visual_tokens] for step in steps]))
            yield Fetched(list(numbers), turn, self._stacked(given, np.array(lengths)), torch.from_numpy(positions),
                          torch.from_numpy(visual))

    def positions_of(self, step: HeldStep) -> torch.Tensor | None:
        """Of a step's tokens, [axes, tokens] int32 on the host; None when they cannot be read."""
        self._read_positions([step])
        positions = self._positions.get(step.record.step)
        return None if positions is None else torch.from_numpy(positions)

    def forget(self, step: int) -> None:
        """A step is not held any more."""
        self._positions.pop(step, None)

    def read(self, step: HeldStep, part: str, dtype: torch.dtype, shape: tuple[int, ...]) -> tuple[torch.Tensor, bool] | None:
        """All of a part, and whether keys are as the model computed them; None when no tier can read it."""
        size = dtype.itemsize * int(np.prod(shape))
        [(data, as_computed)] = self._runs(part, [Run(step.record.step, size, 0, size)])
        if data is None:
            return None
        return torch.from_numpy(np.frombuffer(data, np.uint8).copy()).view(dtype).view(shape), as_computed

    def _numbers(self, layer: int, pages: Sequence[tuple[int, HeldStep]]) -> list[tuple[int, list | None]]:
        """Of each page, by how much its keys have to be turned, and the runs of bytes that make it; None: it cannot be read."""
        layout = self._backbone.layout
        if not self._form.rotated:
            runs = []
            for page, step in pages:
                cuts, number = _cuts(layout, self._form.bits, step.lengths), page - step.page
                begin = layer * cuts[-1]
                runs.append(Run(step.record.step, layout.layers * cuts[-1], begin + cuts[number], begin + cuts[number + 1]))
            return [(0, None if data is None else [data]) for data, _ in self._runs('packed', runs)]
        heads, width = layout.kv_heads, layout.head_dim * layout.dtype.itemsize
        runs = []
        for page, step in pages:
            tokens, begin = step.record.tokens, sum(step.lengths[:page - step.page])
            for head in range(layer * heads, (layer + 1) * heads):
                first = (head * tokens + begin) * width
                runs.append(Run(step.record.step, layout.layers * heads * tokens * width, first,
                                first + step.lengths[page - step.page] * width))
        keys, values = self._runs('key', runs), self._runs('value', runs)
        found = []
        for number, (_, step) in enumerate(pages):
            of_page = slice(number * heads, (number + 1) * heads)
            parts = [data for data, _ in (*keys[of_page], *values[of_page])]
            # Each part may come from a tier of its own; it is keys that are turned.
            turn = step.turn if keys[of_page][0][1] else 0
            found.append((turn, None if any(data is None for data in parts) else parts))
        return found

    def _stacked(self, given: Sequence[list], lengths: np.ndarray) -> list[torch.Tensor]:
        """Numbers, and scales where there are any, as `Staging.fill` takes them, from the runs of bytes of pages so long."""
        layout, raw = self._backbone.layout, self._form.rotated
        width = layout.head_dim * layout.dtype.itemsize if raw else layout.head_dim * self._form.bits // 8
        numbers = np.zeros((len(given), 2, layout.kv_heads, lengths.max(), width), np.uint8)
        scales = np.zeros((len(given), 0 if raw else SCALES * layout.kv_heads * layout.head_dim * 2), np.uint8)
        for length in set(lengths.tolist()):    # two as a rule
            alike = np.flatnonzero(lengths == length)
            data = b''.join(run for page in alike.tolist() for run in given[page])
            data = np.frombuffer(data, np.uint8).reshape(len(alike), -1)
            cut = numbers[0, :, :, :length].size
            numbers[alike, :, :, :length] = data[:, :cut].reshape(-1, *numbers.shape[1:3], length, width)
            scales[alike] = data[:, cut:]
        numbers = torch.from_numpy(numbers)
        if raw:
            return [numbers.view(layout.dtype)]
        return [numbers, torch.from_numpy(scales).view(torch.float16).view(len(given), SCALES, layout.kv_heads, layout.head_dim)]

    def _read_positions(self, steps: Sequence[HeldStep]) -> None:
        """Have those of these steps at hand, as far as they can be read."""
        missing: dict[int, HeldStep] = {}
        for step in steps:
            number = step.record.step
            if number in self._positions:
                self._positions.move_to_end(number)
            elif step.positions is not None:
                self._positions[number] = step.positions.reshape(-1, step.record.tokens).cpu().numpy()
            else:
                missing[number] = step
        axes = self._backbone.position_axes
        size = axes * np.int32().itemsize
        runs = [Run(number, size * step.record.tokens, 0, size * step.record.tokens) for number, step in missing.items()]
        for run, (data, _) in zip(runs, self._runs('key_positions', runs)):
            if data is not None:
                self._positions[run.step] = np.frombuffer(data, np.int32).reshape(axes, -1).copy()
        while len(self._positions) > max(_POSITIONS_KEPT, len(steps)):
            self._positions.popitem(last=False)

    def _runs(self, part: str, runs: Sequence[Run]) -> list[tuple[bytes | memoryview | None, bool]]:
        """What the nearest tier has of each, and whether its keys are as the model computed them; None when none can read it."""
        found: list = [(None, False)] * len(runs)
        left = list(range(len(runs)))
        for tier in self._tiers:
            here = [at for at in left if tier.holds(runs[at].step)]
            for at, data in zip(here, tier.runs(part, [runs[at] for at in here]) if here else ()):
                found[at] = data, tier.as_computed
            left = [at for at in left if found[at][0] is None]
        return found


@lru_cache(maxsize=64)
def _cuts(layout: KVLayout, bits: int, lengths: tuple[int, ...]) -> list[int]:
    return page_cuts(layout, bits, lengths)
