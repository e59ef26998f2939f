"""The model's own words behind what it was given to read, token by token, and where they looked."""
from collections.abc import Callable, Collection, Sequence

import torch

from statekv_ros.backbones.base import TokenInputs
from statekv_ros.backbones.family import Family
from statekv_ros.memory.answering.reading import Reading


class Telling:
    """One pass of its own over whatever is read into it, from position 0: nothing of it stays but what the caller takes.

    Attributes:
        position: virtual position of the next token.
        tokens: tokens read so far, told ones included.
    """

    def __init__(self, backbone: Family, cancelled: Callable[[], bool], layers: Collection[int] | None = None):
        """layers: whose attention is noted; None for all."""
        self._backbone = backbone
        self._reading = Reading(backbone, cancelled)
        self._layers = range(backbone.layout.layers) if layers is None else layers
        self._noting = False
        self.position = self.tokens = 0

    @property
    def attention(self) -> torch.Tensor:
        """Softmax mass that each token read so far was paid by the tokens given to `next`, summed over those tokens, the
        noted layers and the query heads, [tokens] fp32. A view."""
        return self._reading.tail_mass

    def read(self, inputs: TokenInputs) -> torch.Tensor:
        """Hidden states [1, tokens, hidden] of tokens that attend to all before them and causally to themselves."""
        self._reading.begin(inputs.tokens)
        hidden = self._backbone.forward(inputs, self)
        self._reading.commit()
        self.position = inputs.next_position
        self.tokens += inputs.tokens
        return hidden

    def read_ids(self, token_ids: Sequence[int]) -> None:
        """Text tokens."""
        if token_ids:
            self.read(self._backbone.embed(token_ids, self.position))

    def next(self, token: int) -> int:
        """Read one text token, noting the attention that it pays; the token most likely to follow it."""
        self._noting = True
        hidden = self.read(self._backbone.embed([token], self.position))
        self._noting = False
        return int(self._backbone.logits(hidden[0, -1]).argmax())

    def attend(self, layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor,
               scale: float) -> torch.Tensor:
        """See `AttentionMemory`."""
        self._reading.scoring = self._noting and layer in self._layers
        return self._reading.attend(layer, query, key, value, scale)
