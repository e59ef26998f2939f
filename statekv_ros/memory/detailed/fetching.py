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
from statekv_ros.memory.detailed.pages import HeldStep, page_lengths
from statekv_ros.memory.detailed.staging import row_bytes
from statekv_ros.memory.detailed.tiers import Tier

_TOKENS_KEPT = 4096     # steps of which it stays on the host where their tokens stand


class Wanted(NamedTuple):
    """Pages by number and, of each, what is known of its step, as `StepRows` have it."""
    pages: Sequence[int]
    page: Sequence[int]
    step: Sequence[int]
    tokens: Sequence[int]
    turn: Sequence[int]
    visual_start: Sequence[int]
    visual_tokens: Sequence[int]


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

    def __init__(self, backbone: Backbone, form: Format, tiers: Sequence[Tier], page_tokens: int):
        """page_tokens: as of `page_lengths`."""
        self._backbone, self._form, self._tiers, self._page_tokens = backbone, form, tiers, page_tokens
        self._tokens: OrderedDict[int, bytes] = OrderedDict()    # of steps, as `_tokens` makes them
        self._token_bytes = (backbone.position_axes + 1) * np.int32().itemsize
        self._cuts: dict[tuple[int, ...], list[int]] = {}   # in few bits, where pages of steps of these lengths begin

    def fetch(self, layer: int, wanted: Wanted) -> Iterator[Fetched]:
        """A layer of pages; those that no tier can read are left out."""
        own = self._read_tokens(wanted.step, wanted.tokens, wanted.visual_start, wanted.visual_tokens)
        alike: dict[tuple[int, int], list[int]] = {}    # by tokens of the step, and which of its pages it is
        for at, (page, first, tokens) in enumerate(zip(wanted.pages, wanted.page, wanted.tokens)):
            alike.setdefault((tokens, page - first), []).append(at)
        kinds = [(page_lengths(tokens, self._page_tokens), number, together) for (tokens, number), together in alike.items()]
        found = defaultdict(list)   # by turn
        for lengths, number, together in sorted(kinds, key=lambda kind: kind[0][kind[1]]):
            first, length = sum(lengths[:number]) * self._token_bytes, lengths[number]
            span = slice(first, first + length * self._token_bytes)
            steps, turns = [wanted.step[at] for at in together], [wanted.turn[at] for at in together]
            for at, turn, data in zip(together, *self._data(layer, lengths, number, steps, turns)):
                if data is not None and own[at] is not None:
                    found[turn].append((wanted.pages[at], length, data, own[at][span]))
        for turn, of_turn in found.items():
            numbers, lengths, data, tokens = zip(*of_turn)
            yield Fetched(numbers, turn, lengths, _joined(data, torch.uint8), _joined(tokens, torch.int32))

    def positions_of(self, step: HeldStep) -> torch.Tensor | None:
        """Of a step's tokens, [axes, tokens] int32 on the host; None when they cannot be read."""
        record = step.record
        own, = self._read_tokens([record.step], [record.tokens], [record.visual_start], [record.visual_tokens])
        return None if own is None else _joined([own], torch.int32).view(record.tokens, -1).t()[:-1]

    def forget(self, step: int) -> None:
        """A step is not held any more."""
        self._tokens.pop(step, None)

    def read(self, step: HeldStep, part: str, dtype: torch.dtype, shape: tuple[int, ...]) -> tuple[torch.Tensor, bool] | None:
        """All of a part, and whether keys are as the model computed them; None when no tier can read it."""
        size = dtype.itemsize * int(np.prod(shape))
        (data,), (as_computed,) = self._runs(part, [step.record.step], size, [slice(0, size)])
        if data is None:
            return None
        return torch.from_numpy(np.frombuffer(data, np.uint8).copy()).view(dtype).view(shape), as_computed

    def _data(self, layer: int, lengths: tuple[int, ...], number: int, steps: Sequence[int],
              turns: Sequence[int]) -> tuple[Sequence[int], Sequence[bytes | memoryview | None]]:
        """A page of a layer of each of some steps with pages of such lengths: by how much its keys have to be turned, and its
        bytes; None: it cannot be read.

        Args:
            steps, turns: numbers of the steps, and by how much keys as the model computed them have to be turned.
        """
        layout = self._backbone.layout
        if not self._form.rotated:
            cuts = self._cuts.get(lengths)
            if cuts is None:        # steps alike share them
                cuts = self._cuts[lengths] = page_cuts(layout, self._form.bits, lengths)
            begin = layer * cuts[-1]
            run = slice(begin + cuts[number], begin + cuts[number + 1])
            return [0] * len(steps), self._runs('packed', steps, layout.layers * cuts[-1], [run])[0]
        heads, width, tokens, begin = layout.kv_heads, row_bytes(layout, self._form), sum(lengths), sum(lengths[:number])
        firsts = [(head * tokens + begin) * width for head in range(layer * heads, (layer + 1) * heads)]
        runs = [slice(first, first + lengths[number] * width) for first in firsts]
        # Each may come from a tier of its own; it is keys that are turned.
        (keys, as_computed), (values, _) = (
            self._runs(part, steps, layout.layers * heads * tokens * width, runs) for part in ('key', 'value'))
        return ([turn if has else 0 for turn, has in zip(turns, as_computed)],
                [None if key is None or value is None else b''.join((key, value)) for key, value in zip(keys, values)])

    def _read_tokens(self, steps: Sequence[int], tokens: Sequence[int], visual_starts: Sequence[int],
                     visual_tokens: Sequence[int]) -> list[bytes | None]:
        """What `Staging.tokens` has of each of these steps, token by token; None where it cannot be read. Kept.

        Args:
            steps: their numbers; a step that is there more than once is read once.
            tokens, visual_starts, visual_tokens: of each, as `StepRecord` has them.
        """
        held, missing = self._tokens, defaultdict(dict)
        for at, number in enumerate(steps):
            if number in held:
                held.move_to_end(number)
            else:
                missing[tokens[at]][number] = visual_starts[at], visual_tokens[at]
        axes = self._backbone.position_axes
        for count, of_length in missing.items():
            size = axes * np.int32().itemsize * count
            read, _ = self._runs('key_positions', list(of_length), size, [slice(0, size)])
            for (number, visual), data in zip(of_length.items(), read):
                if data is not None:
                    held[number] = _tokens(np.frombuffer(data, np.int32).reshape(axes, -1), *visual)
        own = [held.get(number) for number in steps]
        while len(held) > _TOKENS_KEPT:
            held.popitem(last=False)
        return own

    def _runs(self, part: str, steps: Sequence[int], size: int,
              runs: Sequence[slice]) -> tuple[list[bytes | memoryview | None], list[bool]]:
        """What the nearest tier has of each step, None when none can read it; and whether its keys are as the model computed
        them."""
        found: list = [None] * len(steps)
        as_computed = [False] * len(steps)
        left = range(len(steps))
        for tier in self._tiers:
            here = [at for at in left if tier.holds(steps[at])]
            if here:
                for at, data in zip(here, tier.runs(part, [steps[at] for at in here], size, runs)):
                    found[at], as_computed[at] = data, tier.as_computed
                left = [at for at in left if found[at] is None]
        return found, as_computed


def _tokens(positions: np.ndarray, visual_start: int, visual_tokens: int) -> bytes:
    """As `Staging.fill` takes those of a step at positions [axes, tokens] int32."""
    token = np.arange(positions.shape[1]) - visual_start
    visual = (token >= 0) & (token < visual_tokens)
    return np.concatenate([positions, visual[None]], dtype=np.int32).T.tobytes()


def _joined(parts: Sequence[bytes | memoryview], dtype: torch.dtype) -> torch.Tensor:
    """Their numbers one behind the other: bytes are joined several times as fast as arrays."""
    return torch.frombuffer(bytearray().join(parts), dtype=dtype)
