"""What is an answer's own: the keys and values of its tokens, and of what lies before them, in room for more."""
from collections.abc import Sequence

import torch

from statekv_ros.backbones.base import KVLayout
from statekv_ros.kernels.paged_attention import Span

_FIRST_CAPACITY = 64


class Tail:
    """Tokens one behind the other. How many there are is told on the device, by the places of those that ask; room grows by
    doubling, so that it is seldom another one.

    Attributes:
        before: tokens that lie before the first.
        tokens: so far, those of the pass in progress not among them.
        key, value: [layers, kv_heads, capacity, head_dim].
    """

    def __init__(self, layout: KVLayout, before: Sequence[tuple[torch.Tensor, torch.Tensor]]):
        """before: keys and values [layers, kv_heads, tokens, head_dim] of what lies before the first token, in parts."""
        self._layout = layout
        self.before, self.tokens, self._asking = sum(key.shape[2] for key, _ in before), 0, 0
        self.key, self.value = layout.empty(self.before), layout.empty(self.before)
        if before:
            keys, values = zip(*before)
            torch.cat(keys, dim=2, out=self.key)
            torch.cat(values, dim=2, out=self.value)
        self._places = torch.zeros(0, dtype=torch.int64)

    @property
    def next_place(self) -> int:
        """Where the next token comes to lie, what lies before the first included."""
        return self.before + self.tokens

    @property
    def capacity(self) -> int:
        """Of its own tokens."""
        return self.key.shape[2] - self.before

    def begin(self, tokens: int) -> None:
        """Have room for so many more, which a pass gives."""
        self._asking, held, needed = tokens, self.next_place, self.next_place + tokens
        if needed > self.key.shape[2]:
            # What nobody reads has to be finite all the same.
            key, value = (self._layout.empty(max(2 * needed, _FIRST_CAPACITY)).zero_() for _ in range(2))
            key[:, :, :held], value[:, :, :held] = self.key[:, :, :held], self.value[:, :, :held]
            self.key, self.value = key, value
        self._places = torch.arange(held, needed, device=self._layout.device)

    def begin_at(self, place: torch.Tensor) -> None:
        """After `begin`, of a pass that is recorded: the device is told the place of its token, [1] int64."""
        self._places = place

    def put(self, layer: int, key: torch.Tensor, value: torch.Tensor) -> Span:
        """Keys and values [kv_heads, tokens, head_dim] of the tokens that ask; what these attend to."""
        return Span(self.key[layer].index_copy_(1, self._places, key), self.value[layer].index_copy_(1, self._places, value),
                    self._places)

    def commit(self) -> None:
        """Keep the tokens of the pass."""
        self.tokens += self._asking

    def newest(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Places of the tokens of the pass, and copies of their keys and values, for `put_back`."""
        return self._places, self.key[:, :, self._places], self.value[:, :, self._places]

    def put_back(self, newest: tuple[torch.Tensor, torch.Tensor, torch.Tensor]) -> None:
        """As `newest` found it."""
        self._places, key, value = newest
        self.key[:, :, self._places], self.value[:, :, self._places] = key, value

    def place(self) -> tuple[int, ...]:
        """Where the room for its tokens lies."""
        return self.key.data_ptr(), self.value.data_ptr(), self.capacity
