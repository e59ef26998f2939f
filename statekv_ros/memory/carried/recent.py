"""The carried context of the policies we compare with: the newest R frames, every frame, or none."""
from collections import deque
from dataclasses import dataclass

import torch

from statekv_ros.backbones.base import Backbone
from statekv_ros.memory.carried.causal import causal_attention
from statekv_ros.memory.carried.positions import PositionPolicy, StepPlace

_FIRST_CAPACITY = 256


@dataclass
class _Step:
    tokens: int
    frames: int
    position: int = 0       # true
    shift: int = 0          # true position - position given to the model


class RecentFrames:
    """Keys and values of the newest frames in stream order, in a buffer that is moved to its front when its end is reached.

    Same life as `CompressedState`: `begin`, one `attend` per layer, `commit`. The prefix counts as the oldest step and goes
    like any other. There are no gaps in it to close, so whether positions are `contiguous` or `lazy_shift` makes no
    difference: it moves left as a whole when the next step would pass the limit.

    Attributes:
        tokens: keys carried per layer and KV head.
        budget: 0, there is no budget in tokens.
        shift: how far left of its true position the newest step stands.
        rewritten: keys were turned where they lie since this was last set to false.
    """
    budget = 0

    def __init__(self, backbone: Backbone, max_frames: int | None, positions: PositionPolicy):
        """max_frames: whole steps are dropped as long as at least this many frames stay; None keeps all, 0 keeps none."""
        self.layout = backbone.layout
        self.shift = 0
        self.rewritten = False
        self._max_frames = max_frames
        self._positions, self._rotate = positions, backbone.rotate
        self._steps: deque[_Step] = deque()  # oldest first
        self._begin = self._end = 0
        self._first_ordinal = 0
        self._step = _Step(0, 0)
        self._key, self._value = self.layout.empty(0), self.layout.empty(0)

    @property
    def tokens(self) -> int:
        return self._rows

    @property
    def _rows(self) -> int:
        """In use in the buffer."""
        return self._end - self._begin

    def begin(self, step: StepPlace) -> None:
        """Make room for a step and decide where it stands; see `positions`.

        Raises:
            FrameError: the step does not fit into the positions there are.
        """
        if self._positions.passes_limit(step, self.shift):
            self._move_left(step)
        self._step = _Step(step.tokens, step.frames, step.position, self.shift)
        if not self._rows:
            self._first_ordinal = step.first_ordinal
        if self._end + step.tokens > self._key.shape[2]:
            self._move_to_front(max(_FIRST_CAPACITY, 2 * (self._rows + step.tokens)))

    def attend(self, layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor,
               scale: float) -> torch.Tensor:
        """Attention of the step's queries over [carried frames ; frame]; see `AttentionMemory`."""
        return causal_attention(query, *self._with_step(layer, key, value), scale)

    def _with_step(self, layer: int, key: torch.Tensor, value: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Write the step's keys and values behind those carried. Returns all of them, [1, kv_heads, tokens, head_dim] each."""
        end = self._end + self._step.tokens
        self._key[layer, :, self._end:end] = key[0]
        self._value[layer, :, self._end:end] = value[0]
        return self._key[layer, None, :, self._begin:end], self._value[layer, None, :, self._begin:end]

    def commit(self) -> None:
        """Add the step and let go of the oldest ones."""
        self._steps.append(self._step)
        self._end += self._step.tokens
        self._let_go()

    def _let_go(self) -> None:
        if self._max_frames is None:
            return
        frames = sum(step.frames for step in self._steps)
        while self._steps and frames - self._steps[0].frames >= self._max_frames:
            oldest = self._steps.popleft()
            frames -= oldest.frames
            self._begin += oldest.tokens
            self._first_ordinal += oldest.tokens

    def stream(self, columns: slice) -> None:
        """See `CompressedState.stream`: nobody asks how important these keys are, so they have no part in such a launch."""

    def frame(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values [layers, kv_heads, tokens, head_dim] of the step that was begun, where they lie."""
        rows = slice(self._end, self._end + self._step.tokens)
        return self._key[:, :, rows], self._value[:, :, rows]

    def change(self, first_ordinal: int, tokens: int) -> tuple[dict, dict[str, torch.Tensor]]:
        """What a commit changed, for `follow`: nothing but the step, so only where the carried frames begin."""
        return {'tokens': self.tokens, 'first_ordinal': self._first_ordinal}, {}

    def follow(self, step: StepPlace, shift: int, key: torch.Tensor, value: torch.Tensor, header: dict,
               parts: dict[str, torch.Tensor]) -> None:
        """Take a step again; see `CompressedState.follow`."""
        self.shift = shift
        self.begin(step)
        for row, given in zip(self.frame(), (key, value)):
            row.copy_(given)
        self.commit()

    def share(self, slots: slice) -> tuple[dict, dict[str, torch.Tensor]]:
        """All that is carried, for `put_share`; there is no part of it."""
        live = slice(self._begin, self._end)
        return ({'tokens': self.tokens, 'first_ordinal': self._first_ordinal, 'share': [0, self.tokens],
                 'steps': [[step.tokens, step.frames, step.position, step.shift] for step in self._steps]},
                {'share_key': self._key[:, :, live], 'share_value': self._value[:, :, live]})

    def put_share(self, shift: int, header: dict, parts: dict[str, torch.Tensor]) -> None:
        """Carry what `share` gave; `shift` of the newest step."""
        self.shift, self._first_ordinal = shift, header['first_ordinal']
        self._steps = deque(_Step(*step) for step in header['steps'])
        self._begin, self._end = 0, header['tokens']
        self._key, self._value = (parts[name].to(self.layout.device) for name in ('share_key', 'share_value'))

    def kept(self) -> torch.Tensor:
        """Ordinals of the carried tokens, [layers, kv_heads, tokens] int64, oldest first."""
        ordinals = torch.arange(self._first_ordinal, self._first_ordinal + self._rows, device=self.layout.device)
        return ordinals.expand(self.layout.layers, self.layout.kv_heads, -1)

    def copy(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Keys, values [layers, kv_heads, tokens, head_dim] and ordinals as they are now, safe from later steps."""
        live = slice(self._begin, self._end)
        return self._key[:, :, live].clone(), self._value[:, :, live].clone(), self.kept().clone()

    def _move_left(self, step: StepPlace) -> None:
        """Re-index what is carried so that `step` fits behind it."""
        self.rewritten = self.rewritten or bool(self._steps)
        oldest = self._steps[0].position if self._steps else step.position
        self.shift = self._positions.shift(step, step.position - oldest)
        end = self._begin
        for carried in self._steps:
            begin, end = end, end + carried.tokens
            shift = min(self.shift, carried.position)  # nothing stands left of 0
            key = self._key[:, :, begin:end]
            key.copy_(self._rotate(key, carried.shift - shift))
            carried.shift = shift

    def _move_to_front(self, capacity: int) -> None:
        live = slice(self._begin, self._end)
        key, value = self.layout.empty(capacity), self.layout.empty(capacity)
        key[:, :, :self._rows], value[:, :, :self._rows] = self._key[:, :, live], self._value[:, :, live]
        self._begin, self._end = 0, self._rows
        self._key, self._value = key, value
