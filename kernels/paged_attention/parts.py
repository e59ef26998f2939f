"""What an answer reads at once: its own tokens, side by side, and pages of several pools; and what it got from them."""
from typing import NamedTuple

import torch

from .pool import PackedPool, Rope


class Span(NamedTuple):
    """Tokens side by side, which every row sees, but for what lies behind the token that asks.

    Attributes:
        key, value: [kv_heads, tokens, head_dim]; what nobody sees must be finite.
        places: of the tokens that ask, one behind the other, [new] int64 on the device; None: nothing lies behind any.
    """
    key: torch.Tensor
    value: torch.Tensor
    places: torch.Tensor | None = None

    @property
    def new(self) -> int:
        """Tokens that ask; with no places, any number of them."""
        return 1 if self.places is None else len(self.places)


class PoolPages(NamedTuple):
    """Pages of one pool, as `paged_attention` takes them."""
    key: torch.Tensor | PackedPool
    value: torch.Tensor | None
    starts: torch.Tensor
    lengths: torch.Tensor
    moves: torch.Tensor | None = None
    noted: torch.Tensor | None = None
    rope: Rope | None = None
    entries: torch.Tensor | None = None

    @property
    def bits(self) -> int:
        """Of a number in the pool; 16 for one of whatever dtype."""
        return self.key.bits if isinstance(self.key, PackedPool) else 16


class Noted(NamedTuple):
    """What parts that were read side by side got.

    Attributes:
        lse: logarithms of what each row gives to each token of a span, or to each page's noted rows, before they are
            normalised, [kv_heads, rows, columns] fp32; -inf for nothing.
        counts: columns of each part.
    """
    lse: torch.Tensor
    counts: list[int]


class Read(NamedTuple):
    """What rows read.

    Attributes:
        output: [kv_heads, rows, head_dim] fp32; lse: log-sum-exp of their scores, [kv_heads, rows] fp32.
        noted: of the span first, then of pages; empty where nobody asks.
    """
    output: torch.Tensor
    lse: torch.Tensor
    noted: list[Noted]
