"""Which position the model is given for a token of an endless stream.

A token's true position (records, `VideoStream.next_position`) grows without end. The model is given `true - shift`. What
the shift does to the keys that are carried along is the policy:

* `native`: the shift stays 0, as in StateKV's publication; past the trained context the model meets positions it never saw.
* `contiguous`: before every step the carried keys are re-indexed densely, right-aligned before the step (StreamingVLM).
* `lazy_shift`: native until the next step would pass the limit; only then re-indexed, as `contiguous` does each time
  (HERMES). Below the limit it is native to the bit.

Re-indexing closes the gaps that evicted tokens left, per layer and KV head. Tokens that share a place in the stream (an
M-RoPE grid) move as one, so what is left of a grid keeps its layout. What still does not fit stands at position 0.
"""
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch.nn.functional import pad

from statekv_ros.errors import FrameError, PolicyError
from statekv_ros.memory.policies import PrefillPolicy

POSITIONS = ('native', 'contiguous', 'lazy_shift')
# For every family: it costs nothing and changes nothing until the limit, and keys are then rounded once per half limit.
# `full` cannot be re-indexed at a bounded cost, so it stays native.
DEFAULT_POSITIONS = 'lazy_shift'
_UNBOUNDED = 2**62


@dataclass(frozen=True)
class StepPlace:
    """A step's tokens in the stream, in true positions.

    Attributes:
        position, next_position: the stretch of positions that the step takes, a pause before its first token included.
        start: where its first token stands.
        starts: where each token stands, [tokens] int64, never falling.
        largest_shift: see `Backbone.largest_shift`; asked only when there is something to shift, for the device must then
            be waited for.
    """
    tokens: int
    frames: int
    first_ordinal: int
    position: int
    next_position: int
    start: int
    starts: torch.Tensor
    largest_shift: Callable[[], int]

    def stretches(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Begin and end of the stretch of each token's place, [tokens] int64 each: all places together fill the step's.

        Tokens at one place have one stretch; the first one begins where the last step ended.
        """
        begin = torch.where(self.starts == self.start, self.position, self.starts)
        following = pad(self.starts, (0, 1), value=self.next_position)
        return begin, following[torch.searchsorted(self.starts, self.starts, right=True)]


@dataclass(frozen=True)
class PositionPolicy:
    """Which positions there are, and when the past is re-indexed to stay within them.

    Attributes:
        kind: one of POSITIONS.
        limit: no frame step is given a position at or past it.
        end: no question or answer is given a position at or past it; the room between is theirs.
        stretch: so many positions of the detailed cache keep their true distances from each other.
    """
    kind: str
    limit: int = _UNBOUNDED
    end: int = _UNBOUNDED

    @property
    def stretch(self) -> int:
        return self.limit // 2

    def __str__(self) -> str:
        return self.kind

    @property
    def bounded(self) -> bool:
        return self.kind != 'native'

    @property
    def lazy(self) -> bool:
        return self.kind == 'lazy_shift'

    def passes_limit(self, step: StepPlace, shift: int) -> bool:
        """Whether a step would stand past the limit with this shift."""
        return step.next_position - shift > self.limit

    def shift(self, step: StepPlace, carried: int) -> int:
        """Shift of a step behind `carried` re-indexed positions.

        Raises:
            FrameError: the step alone does not fit.
        """
        # Half the limit stays free when re-indexing should be rare.
        room = self.limit // 2 if self.lazy else self.limit - (step.next_position - step.position)
        shift = max(step.position - max(0, min(carried, room)), step.next_position - self.limit, 0)
        if shift:
            shift = min(shift, step.largest_shift())
        if self.passes_limit(step, shift):
            raise FrameError(f'this step needs {step.next_position - shift} positions, but positions "{self.kind}" has '
                             f'{self.limit} for frames with this model: lower max_frame_pixels')
        return shift


def parse_positions(text: str, prefill: PrefillPolicy, max_position: int) -> PositionPolicy:
    """Parse `native`, `contiguous`, `lazy_shift` or '' (the default) for a model trained for `max_position` positions.

    A quarter of the positions is kept for the question and its answer.

    Raises:
        PolicyError: unknown name, or one that the prefill policy cannot have.
    """
    name = text.strip()
    if not name:
        name = 'native' if prefill.kind == 'full' else DEFAULT_POSITIONS
    if name not in POSITIONS:
        raise PolicyError(f'positions must be {", ".join(POSITIONS)} or empty for the default, got {text!r}')
    if name == 'native':
        return PositionPolicy(name)
    if prefill.kind == 'full':
        raise PolicyError(f'positions {name!r} needs a prefill policy that forgets, but "full" carries every frame: use '
                          'positions native, or prefill policy statekv or window')
    return PositionPolicy(name, max_position - max_position // 4, max_position)


def dense(begin: torch.Tensor, end: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Close the gaps between stretches.

    Args:
        begin, end: [..., tokens] int64 stretches in any order; two are the same or do not overlap.

    Returns:
        Positions covered by stretches left of each, [..., tokens] int64, and by all of them, [...].
    """
    # Begin and end both grow along the stream, so their sum orders the places and tells one from the next.
    place, order = (begin + end).sort(dim=-1)
    length = (end - begin).gather(-1, order)
    is_first = torch.ones_like(place, dtype=torch.bool)
    is_first[..., 1:] = place[..., 1:] != place[..., :-1]
    covered = torch.where(is_first, length, 0).cumsum(dim=-1)
    left = torch.empty_like(covered).scatter_(-1, order, covered - length)
    return left, covered[..., -1] if place.shape[-1] else covered.sum(dim=-1)
