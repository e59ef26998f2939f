"""The carried context of the policies we compare with: the newest R frames, every frame, or none."""
from collections import deque

import torch

from statekv_ros.backbones.base import KVLayout
from statekv_ros.memory.causal import causal_attention

_FIRST_CAPACITY = 256


class RecentFrames:
    """Keys and values of the newest frames in stream order, in a buffer that is moved to its front when its end is reached.

    Same life as `CompressedState`: `begin`, one `attend` per layer, `commit`. The prefix counts as the oldest step and goes
    like any other.

    Attributes:
        tokens: keys carried per layer and KV head.
        budget: 0, there is no budget in tokens.
    """
    budget = 0

    def __init__(self, layout: KVLayout, max_frames: int | None):
        """max_frames: whole steps are dropped as long as at least this many frames stay; None keeps all, 0 keeps none."""
        self.layout = layout
        self._max_frames = max_frames
        self._steps: deque[tuple[int, int]] = deque()  # (tokens, frames), oldest first
        self._begin = self._end = 0
        self._first_ordinal = 0
        self._step = (0, 0)
        self._key, self._value = layout.empty(0), layout.empty(0)

    @property
    def tokens(self) -> int:
        return self._end - self._begin

    def begin(self, tokens: int, frames: int, first_ordinal: int) -> None:
        """Make room for a step of `tokens` tokens from `frames` camera frames, numbered from `first_ordinal`."""
        self._step = (tokens, frames)
        if not self.tokens:
            self._first_ordinal = first_ordinal
        if self._end + tokens > self._key.shape[2]:
            self._move_to_front(max(_FIRST_CAPACITY, 2 * (self.tokens + tokens)))

    def attend(self, layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor,
               scale: float) -> torch.Tensor:
        """Attention of the step's queries over [carried frames ; frame]; see `AttentionMemory`."""
        end = self._end + self._step[0]
        self._key[layer, :, self._end:end] = key[0]
        self._value[layer, :, self._end:end] = value[0]
        return causal_attention(query, self._key[layer, None, :, self._begin:end],
                                self._value[layer, None, :, self._begin:end], scale)

    def commit(self) -> None:
        """Add the step and let go of the oldest ones."""
        self._steps.append(self._step)
        self._end += self._step[0]
        if self._max_frames is None:
            return
        frames = sum(count for _, count in self._steps)
        while self._steps and frames - self._steps[0][1] >= self._max_frames:
            tokens, count = self._steps.popleft()
            frames -= count
            self._begin += tokens
            self._first_ordinal += tokens

    def kept(self) -> torch.Tensor:
        """Ordinals of the carried tokens, [layers, kv_heads, tokens] int64, oldest first."""
        ordinals = torch.arange(self._first_ordinal, self._first_ordinal + self.tokens, device=self.layout.device)
        return ordinals.expand(self.layout.layers, self.layout.kv_heads, -1)

    def copy(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Keys, values [layers, kv_heads, tokens, head_dim] and ordinals as they are now, safe from later steps."""
        live = slice(self._begin, self._end)
        return self._key[:, :, live].clone(), self._value[:, :, live].clone(), self.kept().clone()

    def _move_to_front(self, capacity: int) -> None:
        live = slice(self._begin, self._end)
        key, value = self.layout.empty(capacity), self.layout.empty(capacity)
        key[:, :, :self.tokens], value[:, :, :self.tokens] = self._key[:, :, live], self._value[:, :, live]
        self._begin, self._end = 0, self.tokens
        self._key, self._value = key, value
