"""Pages of steps that are not on the device, read from the nearest tier that has them, many at a time."""
from __future__ import annotations

from collections import OrderedDict, defaultdict
from collections.abc import Iterator, Sequence
from itertools import accumulate, chain
from operator import itemgetter
from typing import NamedTuple

import numpy as np
import torch

from statekv_ros.backbones.base import Backbone
from statekv_ros.memory.detailed.blobs import page_cuts
from statekv_ros.memory.detailed.formats import Format
from statekv_ros.memory.detailed.pages import HeldStep
from statekv_ros.memory.detailed.staging import row_bytes
from statekv_ros.memory.detailed.tiers import Run, Tier

_TOKENS_KEPT = 4096     # steps of which it stays on the host where their tokens stand


class Fetched(NamedTuple):
    """Pages on the host, the shortest first.

    Attributes:
        pages: their numbers.
        turn: by how many positions their keys have to be turned.
        lengths, data, tokens: as `Staging.fill` takes them.
    """
    pages: Sequence[int]
    turn: int
    lengths: Sequence[int]
    data: torch.Tensor
    tokens: torch.Tensor


class _Cut(NamedTuple):
    """How steps of some lengths of pages are cut: first token of each page, and, in few bits, its first byte in a layer."""
    tokens: list[int]
    data: list[int]


class PageFetcher:
    """Reads from tiers, the nearest first."""

    def __init__(self, backbone: Backbone, form: Format, tiers: Sequence[Tier]):
        self._backbone, self._form, self._tiers = backbone, form, tiers
        self._tokens: OrderedDict[int, np.ndarray] = OrderedDict()
        self._cuts: dict[tuple[int, ...], _Cut] = {}

    def fetch(self, layer: int, pages: Sequence[tuple[int, HeldStep]]) -> Iterator[Fetched]:
        """A layer of pages by number, each with its step; those that no tier can read are left out."""
        self._read_tokens([step for _, step in pages])
        alike = defaultdict(list)
        for (page, step), (turn, data) in zip(pages, self._data(layer, pages)):
            tokens = self._tokens.get(step.record.step)
            if data is not None and tokens is not None:
                number = page - step.page
                begin, length = self._cut(step).tokens[number], step.lengths[number]
                alike[turn].append((length, page, tokens[:, begin:begin + length], data))
        for turn, found in alike.items():
            found.sort(key=itemgetter(0))
            lengths, numbers, tokens, data = zip(*found)
            data = torch.frombuffer(bytearray().join(chain.from_iterable(data)), dtype=torch.uint8)
            yield Fetched(numbers, turn, lengths, data, torch.from_numpy(np.concatenate(tokens, axis=1)))

    def positions_of(self, step: HeldStep) -> torch.Tensor | None:
        """Of a step's tokens, [axes, tokens] int32 on the host; None when they cannot be read."""
        self._read_tokens([step])
        tokens = self._tokens.get(step.record.step)
        return None if tokens is None else torch.from_numpy(tokens[:-1])

    def forget(self, step: int) -> None:
        """A step is not held any more."""
        self._tokens.pop(step, None)

    def read(self, step: HeldStep, part: str, dtype: torch.dtype, shape: tuple[int, ...]) -> tuple[torch.Tensor, bool] | None:
        """All of a part, and whether keys are as the model computed them; None when no tier can read it."""
        size = dtype.itemsize * int(np.prod(shape))
        [(data, as_computed)] = self._runs(part, [Run(step.record.step, size, 0, size)])
        if data is None:
            return None
        return torch.from_numpy(np.frombuffer(data, np.uint8).copy()).view(dtype).view(shape), as_computed

    def _data(self, layer: int, pages: Sequence[tuple[int, HeldStep]]) -> list[tuple[int, list | None]]:
        """Of each page, by how much its keys have to be turned, and the runs of bytes that make it; None: it cannot be read."""
        layout = self._backbone.layout
        if not self._form.rotated:
            runs = []
            for page, step in pages:
                cuts, number = self._cut(step).data, page - step.page
                begin = layer * cuts[-1]
                runs.append(Run(step.record.step, layout.layers * cuts[-1], begin + cuts[number], begin + cuts[number + 1]))
            return [(0, None if data is None else (data,)) for data, _ in self._runs('packed', runs)]
        heads, width = layout.kv_heads, row_bytes(layout, self._form)
        runs = []
        for page, step in pages:
            tokens, begin = step.record.tokens, self._cut(step).tokens[page - step.page]
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

    def _cut(self, step: HeldStep) -> _Cut:
        lengths = step.lengths      # steps alike share it
        if lengths not in self._cuts:
            self._cuts[lengths] = _Cut([0, *accumulate(lengths)], [] if self._form.rotated else page_cuts(
                self._backbone.layout, self._form.bits, lengths))
        return self._cuts[lengths]

    def _read_tokens(self, steps: Sequence[HeldStep]) -> None:
        """Have what `Staging.tokens` has of these steps at hand, as far as it can be read."""
        held, missing = self._tokens, {}
        for step in steps:
            number = step.record.step
            if number in held:
                held.move_to_end(number)
            elif step.positions is not None:
                held[number] = _tokens(step, step.positions.reshape(-1, step.record.tokens).cpu().numpy())
            else:
                missing[number] = step
        if missing:
            axes = self._backbone.position_axes
            sizes = {number: axes * np.int32().itemsize * step.record.tokens for number, step in missing.items()}
            runs = [Run(number, size, 0, size) for number, size in sizes.items()]
            for step, (data, _) in zip(missing.values(), self._runs('key_positions', runs)):
                if data is not None:
                    held[step.record.step] = _tokens(step, np.frombuffer(data, np.int32).reshape(axes, -1))
        while len(held) > max(_TOKENS_KEPT, len(steps)):
            held.popitem(last=False)

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


def _tokens(step: HeldStep, positions: np.ndarray) -> np.ndarray:
    """As `Staging.tokens` has those of a step at positions [axes, tokens] int32."""
    token = np.arange(step.record.tokens) - step.record.visual_start
    return np.concatenate([positions, ((token >= 0) & (token < step.record.visual_tokens))[None]], dtype=np.int32)
