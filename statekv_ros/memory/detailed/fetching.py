"""Pages of steps that are not on the device, read from the nearest tier that has them, many at a time."""
from __future__ import annotations

from collections import OrderedDict, defaultdict
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch

from statekv_ros.backbones.base import Backbone
from statekv_ros.memory.detailed.blobs import page_cuts
from statekv_ros.memory.detailed.formats import Format
from statekv_ros.memory.detailed.pages import HeldStep
from statekv_ros.memory.detailed.staging import row_bytes
from statekv_ros.memory.detailed.tiers import Tier

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


class PageFetcher:
    """Reads from tiers, the nearest first. Pages that lie alike in their steps are read together: over hours steps are many, and
    lengths are few."""

    def __init__(self, backbone: Backbone, form: Format, tiers: Sequence[Tier]):
        self._backbone, self._form, self._tiers = backbone, form, tiers
        self._tokens: OrderedDict[int, np.ndarray] = OrderedDict()
        self._cuts: dict[tuple[int, ...], list[int]] = {}   # in few bits, where pages of steps of these lengths begin

    def fetch(self, layer: int, pages: Sequence[tuple[int, HeldStep]]) -> Iterator[Fetched]:
        """A layer of pages by number, each with its step; those that no tier can read are left out."""
        self._read_tokens([step for _, step in pages])
        alike = defaultdict(list)
        for page, step in pages:
            alike[step.lengths, page - step.page].append((page, step))
        found = defaultdict(list)   # by turn
        for (lengths, number), together in sorted(alike.items(), key=lambda item: item[0][0][item[0][1]]):
            begin, length = sum(lengths[:number]), lengths[number]
            read = self._data(layer, lengths, number, [step for _, step in together])
            for (page, step), (turn, data) in zip(together, read):
                tokens = self._tokens.get(step.record.step)
                if data is not None and tokens is not None:
                    found[turn].append((page, length, tokens[:, begin:begin + length], data))
        for turn, of_turn in found.items():
            numbers, lengths, tokens, data = zip(*of_turn)
            data = torch.frombuffer(bytearray().join(data), dtype=torch.uint8)
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
        [(data, as_computed)] = self._runs(part, [step.record.step], size, [slice(0, size)])
        if data is None:
            return None
        return torch.from_numpy(np.frombuffer(data, np.uint8).copy()).view(dtype).view(shape), as_computed

    def _data(self, layer: int, lengths: tuple[int, ...], number: int,
              steps: Sequence[HeldStep]) -> list[tuple[int, bytes | memoryview | None]]:
        """A page of a layer of each of some steps with pages of such lengths: by how much its keys have to be turned, and its
        bytes; None: it cannot be read."""
        layout, numbers = self._backbone.layout, [step.record.step for step in steps]
        if not self._form.rotated:
            cuts = self._cuts.get(lengths)
            if cuts is None:        # steps alike share them
                cuts = self._cuts[lengths] = page_cuts(layout, self._form.bits, lengths)
            begin = layer * cuts[-1]
            run = slice(begin + cuts[number], begin + cuts[number + 1])
            return [(0, data) for data, _ in self._runs('packed', numbers, layout.layers * cuts[-1], [run])]
        heads, width, tokens, begin = layout.kv_heads, row_bytes(layout, self._form), sum(lengths), sum(lengths[:number])
        firsts = [(head * tokens + begin) * width for head in range(layer * heads, (layer + 1) * heads)]
        runs = [slice(first, first + lengths[number] * width) for first in firsts]
        keys, values = (self._runs(part, numbers, layout.layers * heads * tokens * width, runs) for part in ('key', 'value'))
        # Each may come from a tier of its own; it is keys that are turned.
        return [(step.turn if as_computed else 0, None if key is None or value is None else b''.join((key, value)))
                for step, (key, as_computed), (value, _) in zip(steps, keys, values)]

    def _read_tokens(self, steps: Sequence[HeldStep]) -> None:
        """Have what `Staging.tokens` has of these steps at hand, as far as it can be read."""
        held, missing = self._tokens, defaultdict(dict)
        for step in steps:
            number = step.record.step
            if number in held:
                held.move_to_end(number)
            elif step.positions is not None:
                held[number] = _tokens(step, step.positions.reshape(-1, step.record.tokens).cpu().numpy())
            else:
                missing[step.record.tokens][number] = step
        axes = self._backbone.position_axes
        for tokens, of_length in missing.items():
            size = axes * np.int32().itemsize * tokens
            for step, (data, _) in zip(of_length.values(), self._runs('key_positions', list(of_length), size, [slice(0, size)])):
                if data is not None:
                    held[step.record.step] = _tokens(step, np.frombuffer(data, np.int32).reshape(axes, -1))
        while len(held) > max(_TOKENS_KEPT, len(steps)):
            held.popitem(last=False)

    def _runs(self, part: str, steps: Sequence[int], size: int,
              runs: Sequence[slice]) -> list[tuple[bytes | memoryview | None, bool]]:
        """What the nearest tier has of each step, and whether its keys are as the model computed them; None when none can read
        it."""
        found: list = [(None, False)] * len(steps)
        left = range(len(steps))
        for tier in self._tiers:
            here = [at for at in left if tier.holds(steps[at])]
            for at, data in zip(here, tier.runs(part, [steps[at] for at in here], size, runs) if here else ()):
                found[at] = data, tier.as_computed
            left = [at for at in left if found[at][0] is None]
        return found


def _tokens(step: HeldStep, positions: np.ndarray) -> np.ndarray:
    """As `Staging.tokens` has those of a step at positions [axes, tokens] int32."""
    token = np.arange(step.record.tokens) - step.record.visual_start
    return np.concatenate([positions, ((token >= 0) & (token < step.record.visual_tokens))[None]], dtype=np.int32)
