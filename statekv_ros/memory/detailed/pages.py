"""What lies where in the detailed cache: steps, the stretches of positions they stand in, and views of them for answers."""
from bisect import bisect_left
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

import torch

from statekv_ros.memory.detailed.index import even_lengths
from statekv_ros.memory.records import StepRecord


@dataclass(frozen=True, slots=True)
class Stretch:
    """Consecutive steps whose keys stand at their true distances from each other, whatever was re-indexed meanwhile.

    It spans no more positions than the model knows; an answer turns its query to read it.

    Attributes:
        position: true position of its first token.
        shift: keys stand at their true positions less this.
    """
    position: int
    shift: int


@dataclass(slots=True)      # over hours there are many
class HeldStep:
    """One step of the cache.

    Attributes:
        row: where its rows begin in its pool; changes when the pool is resized; -1 once it has left the device.
        stretch: the one that it stands in.
        page: number of its first page; lengths: tokens of its pages.
        positions: of its tokens as its keys are rotated, shaped as in `TokenInputs`, int32; None once it is in few bits, where
            they are kept with it.
        slot: where the scales of its pages begin, in few bits; None while it is exact.
        turn: by how many positions its keys are turned, from how the model computed them.
        mean, visual_mean: its keys before rotation, averaged over its tokens and over its visual tokens, [layers, kv_heads,
            head_dim] fp32; None until asked for.
    """
    record: StepRecord
    row: int
    stretch: Stretch
    page: int
    lengths: tuple[int, ...]
    positions: torch.Tensor | None
    slot: int | None = None
    turn: int = 0
    mean: torch.Tensor | None = None
    visual_mean: torch.Tensor | None = None

    @property
    def starts(self) -> list[int]:
        """First rows of its pages."""
        rows, row = [], self.row
        for length in self.lengths:
            rows.append(row)
            row += length
        return rows

    def of_heads(self, heads: slice) -> 'HeldStep':
        """The same of some KV heads."""
        return replace(self, mean=None if self.mean is None else self.mean[:, heads],
                       visual_mean=None if self.visual_mean is None else self.visual_mean[:, heads])


@dataclass(frozen=True)
class MemoryView:
    """Keys and values that an answer reads, without a copy where it can be avoided.

    Attributes:
        key, value: [layers, kv_heads, tokens, head_dim].
        ordinal: stream index of each token, [tokens] int64, or [layers, kv_heads, tokens] where heads hold different ones.
        position: true position of its first token.
        shift: how far left of their true positions its keys stand; None: where the carried context has them.
        first_ordinal: of its first token.
        reused: whether its rows may be used again for newer steps.
    """
    key: torch.Tensor
    value: torch.Tensor
    ordinal: torch.Tensor
    position: int = 0
    shift: int | None = None
    first_ordinal: int = 0
    reused: bool = False

    def newer(self, ordinal: int) -> 'MemoryView':
        """Only its tokens from `ordinal` on."""
        if not self.reused or not self.first_ordinal < ordinal:
            return self
        gone = ordinal - self.first_ordinal
        return replace(self, key=self.key[:, :, gone:], value=self.value[:, :, gone:], ordinal=self.ordinal[gone:],
                       first_ordinal=ordinal)


@lru_cache(maxsize=1024)
def page_lengths(tokens: int, page_tokens: int) -> tuple[int, ...]:
    """Tokens of a step's pages: as few pages as are no longer than `page_tokens`, as even as can be. Steps alike share it."""
    return tuple(even_lengths(tokens, -(-tokens // page_tokens)))


def by_stretch(steps: Sequence[HeldStep]) -> Iterator[tuple[int, int]]:
    """Where the steps of each stretch begin and end. Over hours steps are many, stretches are few: not every step is
    looked at."""
    begin = 0
    while begin < len(steps):
        stretch = steps[begin].stretch
        end = bisect_left(steps, True, begin, key=lambda step: step.stretch is not stretch)
        yield begin, end
        begin = end


def runs(steps: Sequence[HeldStep], seamless: bool = False, anywhere: bool = False,
         near: int | None = None) -> list[list[HeldStep]]:
    """As few runs of steps that lie side by side in one stretch as hold all; if `seamless`, none has a position between two of
    its steps; if `anywhere`, they need not lie side by side. From true position `near` on, where nothing is read nearer than it
    is, stretches of one shift are one."""
    found: list[list[HeldStep]] = []
    for step in steps:
        last = found[-1][-1] if found else None
        together = last is not None and (last.stretch is step.stretch or near is not None and (
            found[-1][0].record.position >= near and last.stretch.shift == step.stretch.shift))
        if together and (
                anywhere or last.row + last.record.tokens == step.row) and \
                last.record.first_ordinal + last.record.tokens == step.record.first_ordinal and (
                not seamless or last.record.next_position == step.record.position):
            found[-1].append(step)
        else:
            found.append([step])
    return found
