"""Pages of steps that are not on the device, read from the nearest tier that has them, many at a time."""
from __future__ import annotations

from collections import OrderedDict, defaultdict
from collections.abc import Iterator, Sequence
from operator import itemgetter
from typing import NamedTuple

import numpy as np
import torch

from statekv_ros.backbones.base import Backbone
from statekv_ros.memory.detailed.blobs import page_cuts
from statekv_ros.memory.detailed.formats import Format
from statekv_ros.memory.detailed.pages import HeldStep, page_lengths
from statekv_ros.memory.detailed.staging import row_bytes
from statekv_ros.memory.detailed.tiers import Extent, Tier

_TOKENS_KEPT = 4096     # steps of which it stays on the host where their tokens stand


class Wanted(NamedTuple):
    """Pages by number and, of each, what is known of its step, as `StepRows` have it; `page`: the step's first one."""
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


class Kind(NamedTuple):
    """What pages have in common that are as many tokens, at the same place in steps of as many.

    Attributes:
        length: of the page, in tokens.
        tokens: which bytes it has of what `_tokens` gives of its step.
        extents: what it has, in each layer, of the part `packed`, or of `key` and of `value`.
    """
    length: int
    tokens: slice
    extents: Sequence[Extent]


class PageFetcher:
    """Reads from tiers, the nearest first, all pages that a pass wants of a layer in one call each."""

    def __init__(self, backbone: Backbone, form: Format, tiers: Sequence[Tier], page_tokens: int):
        """page_tokens: as of `page_lengths`."""
        self._backbone, self._form, self._tiers, self._page_tokens = backbone, form, tiers, page_tokens
        self._tokens: OrderedDict[int, bytes] = OrderedDict()   # of steps, as `_tokens` gives them
        # By tokens of the step, and which of its pages it is: over hours they are few.
        self._kinds: dict[tuple[int, int], Kind] = {}

    def fetch(self, layer: int, wanted: Wanted) -> Iterator[Fetched]:
        """A layer of pages; those that no tier can read are left out."""
        own = self._read_tokens(wanted.step, wanted.tokens, wanted.visual_start, wanted.visual_tokens)
        kinds = [self._kind(tokens, page - first) for tokens, page, first in zip(wanted.tokens, wanted.pages, wanted.page)]
        turns, read = self._data(wanted.step, wanted.turn, [kind.extents[layer] for kind in kinds])
        found = defaultdict(list)   # by turn
        for page, kind, of_step, turn, data in zip(wanted.pages, kinds, own, turns, read):
            if data is not None and of_step is not None:
                found[turn].append((kind.length, page, data, of_step[kind.tokens]))
        for turn, of_turn in found.items():
            lengths, numbers, data, tokens = zip(*sorted(of_turn, key=itemgetter(0)))
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
        (data,), (as_computed,) = self._runs(part, [step.record.step], [Extent(size, (slice(0, size),))])
        if data is None:
            return None
        return torch.from_numpy(np.frombuffer(data, np.uint8).copy()).view(dtype).view(shape), as_computed

    def _kind(self, tokens: int, number: int) -> Kind:
        """Of page `number` of a step of so many tokens."""
        kind = self._kinds.get((tokens, number))
        if kind is None:
            lengths, layout = page_lengths(tokens, self._page_tokens), self._backbone.layout
            begin, length = sum(lengths[:number]), lengths[number]
            if self._form.rotated:
                width = row_bytes(layout, self._form)
                size = layout.layers * layout.kv_heads * tokens * width
                firsts = range(begin * width, size, tokens * width)     # of each KV head
                runs = [tuple(slice(first, first + length * width) for first in firsts[head:head + layout.kv_heads])
                        for head in range(0, len(firsts), layout.kv_heads)]
            else:
                cuts = page_cuts(layout, self._form.bits, lengths)
                size = layout.layers * cuts[-1]
                runs = [(slice(first + cuts[number], first + cuts[number + 1]),) for first in range(0, size, cuts[-1])]
            of_token = (self._backbone.position_axes + 1) * np.int32().itemsize
            kind = self._kinds[tokens, number] = Kind(length, slice(begin * of_token, (begin + length) * of_token),
                                                      [Extent(size, of_layer) for of_layer in runs])
        return kind

    def _data(self, steps: Sequence[int], turns: Sequence[int],
              extents: Sequence[Extent]) -> tuple[Sequence[int], Sequence[bytes | memoryview | None]]:
        """Pages of a layer: by how much the keys of each have to be turned, and its bytes; None: it cannot be read.

        Args:
            steps, turns: number of each page's step, and by how much keys as the model computed them have to be turned.
        """
        if not self._form.rotated:
            return [0] * len(steps), self._runs('packed', steps, extents)[0]
        # Each may come from a tier of its own; it is keys that are turned.
        (keys, as_computed), (values, _) = (self._runs(part, steps, extents) for part in ('key', 'value'))
        return ([turn if has else 0 for turn, has in zip(turns, as_computed)],
                [None if key is None or value is None else b''.join((key, value)) for key, value in zip(keys, values)])

    def _read_tokens(self, steps: Sequence[int], tokens: Sequence[int], visual_starts: Sequence[int],
                     visual_tokens: Sequence[int]) -> list[bytes | None]:
        """What `Staging.tokens` has of each of these steps, token by token; None where it cannot be read. Kept.

        Args:
            steps: their numbers; a step that is there more than once is read once.
            tokens, visual_starts, visual_tokens: of each, as `StepRecord` has them.
        """
        held, axes = self._tokens, self._backbone.position_axes
        own = [held.get(number) for number in steps]
        if None not in own:
            return own
        missing = {}
        for at, number in enumerate(steps):
            if own[at] is None:
                size = axes * np.int32().itemsize * tokens[at]
                missing[number] = Extent(size, (slice(0, size),)), visual_starts[at], visual_tokens[at]
        read, _ = self._runs('key_positions', list(missing), [extent for extent, *_ in missing.values()])
        for (number, (_, *visual)), data in zip(missing.items(), read):
            if data is not None:
                held[number] = _tokens(np.frombuffer(data, np.int32).reshape(axes, -1), *visual)
        own = [held.get(number) for number in steps]
        while len(held) > _TOKENS_KEPT:
            held.popitem(last=False)
        return own

    def _runs(self, part: str, steps: Sequence[int],
              extents: Sequence[Extent]) -> tuple[list[bytes | memoryview | None], list[bool]]:
        """What the nearest tier has of each step, None when none can read it; and whether its keys are as the model computed
        them."""
        found: list = [None] * len(steps)
        as_computed = [False] * len(steps)
        left = range(len(steps))
        for tier in self._tiers:
            here = [at for at in left if tier.holds(steps[at])]
            if here:
                for at, data in zip(here, tier.runs(part, [steps[at] for at in here], [extents[at] for at in here])):
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
