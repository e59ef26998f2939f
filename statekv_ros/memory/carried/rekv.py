"""Prefill policy `rekv(n)`: the window that ReKV watches through (Di et al., ICLR 2025; arXiv 2503.00540).

A token sees the n newest tokens, itself among them, and the prompt that stands before the video. A token of the prompt that
has left the window stays in sight, as far away along the stream as the oldest token in the window: where a position is a token,
at n - 1 positions. All of the prompt stands at that one place then.
"""
import torch
from torch.nn.functional import pad, scaled_dot_product_attention

from statekv_ros.backbones.base import Backbone
from statekv_ros.errors import PolicyError
from statekv_ros.memory.carried.positions import PositionPolicy, StepPlace
from statekv_ros.memory.carried.recent import RecentFrames


class PromptAndWindow(RecentFrames):
    """The window is cut by tokens, so that the oldest step may be there in part. No node carries it, and none of it is saved.

    Attributes:
        tokens: of the window, and of the prompt those that have left it.
    """

    def __init__(self, backbone: Backbone, window_tokens: int, positions: PositionPolicy):
        """
        Args:
            window_tokens: n.

        Raises:
            PolicyError: the prompt alone is longer.
        """
        super().__init__(backbone, None, positions)
        if (prompt := backbone.prefix().tokens) > window_tokens:
            raise PolicyError(f'rekv({window_tokens}) is shorter than the prompt before the video, which has {prompt} tokens: '
                              'raise it')
        self._window = window_tokens
        self._prompt_key, self._prompt_value = self.layout.empty(0), self.layout.empty(0)       # keys as at position 0
        self._place: StepPlace | None = None
        self._starts = torch.zeros(0, dtype=torch.int64, device=self.layout.device)     # true ones, of the window's tokens
        # Of the step that was begun; None while each of its tokens sees all that is there.
        self._visible: torch.Tensor | None = None
        self._turns = self._starts

    @property
    def tokens(self) -> int:
        return self._rows + self._outside

    @property
    def _outside(self) -> int:
        """Tokens of the prompt that have left the window: they are the stream's first ones."""
        return min(self._prompt_key.shape[2], self._first_ordinal) if self._rows else 0

    def begin(self, step: StepPlace) -> None:
        """See `RecentFrames.begin`."""
        super().begin(step)
        self._place, self._visible = step, None
        if step.first_ordinal + step.tokens - self._first_ordinal <= self._window:
            return
        device = self.layout.device
        asking = torch.arange(step.first_ordinal, step.first_ordinal + step.tokens, device=device)[:, None]
        prompt = torch.arange(self._prompt_key.shape[2], device=device)
        ordinal = torch.arange(self._first_ordinal, step.first_ordinal + step.tokens, device=device)
        self._visible = torch.cat([prompt <= asking - self._window, (asking - self._window < ordinal) & (ordinal <= asking)],
                                  dim=1)
        oldest = (asking[:, 0] - self._first_ordinal - self._window + 1).clamp_min(0)
        origin = torch.cat([self._starts, step.starts])[oldest]
        self._turns = (step.starts - origin).clamp_max(self._positions.limit) - (step.starts - self.shift)

    def attend(self, layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor,
               scale: float) -> torch.Tensor:
        """Attention of the step's queries over [prompt ; window ; frame]; see `AttentionMemory`."""
        if self._visible is None:
            return super().attend(layer, query, key, value, scale)
        keys, values = self._with_step(layer, key, value)
        asking = query
        if self._prompt_key.shape[2]:
            # A query stands elsewhere for the prompt than for the window, and both share a softmax: it is there twice, side by
            # side, and each key meets the half that is meant for it.
            asking = torch.cat([self._rotate(query, self._turns), query], dim=-1)
            width = query.shape[-1]
            keys = torch.cat([pad(self._prompt_key[layer, None], (0, width)), pad(keys, (width, 0))], dim=2)
            values = torch.cat([self._prompt_value[layer, None], values], dim=2)
        kv_heads, tokens = keys.shape[1], query.shape[2]
        # Query heads of a KV head as rows of it: torch's fused kernels take a mask or grouped heads, not both.
        rows = asking.reshape(1, kv_heads, -1, asking.shape[-1])
        output = scaled_dot_product_attention(rows, keys, values, scale=scale,
                                              attn_mask=self._visible.repeat(rows.shape[2] // tokens, 1))
        return output.reshape(query.shape)

    def commit(self) -> None:
        """Add the step and let go of what has left the window."""
        if not self._place.frames:      # the prompt
            key, value = self.frame()
            self._prompt_key, self._prompt_value = self._rotate(key, -self._place.starts), value.clone()
        self._starts = torch.cat([self._starts, self._place.starts])[-self._window:]
        super().commit()

    def kept(self) -> torch.Tensor:
        """See `RecentFrames.kept`."""
        outside = torch.arange(self._outside, device=self.layout.device)
        return torch.cat([outside.expand(self.layout.layers, self.layout.kv_heads, -1), super().kept()], dim=-1)

    def copy(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """See `RecentFrames.copy`; what of the prompt has left the window stands where the window begins."""
        key, value, _ = super().copy()
        outside = slice(0, self._outside)
        if self._outside:
            turned = self._rotate(self._prompt_key[:, :, outside], (self._starts[:1] - self.shift).clamp_min(0))
            key, value = (torch.cat(parts, dim=2) for parts in ((turned, key), (self._prompt_value[:, :, outside], value)))
        return key, value, self.kept().clone()

    def _let_go(self) -> None:
        """Of whole steps, and of a part of the oldest one that is left."""
        gone = max(0, self._rows - self._window)
        self._begin += gone
        self._first_ordinal += gone
        while gone:
            oldest = self._steps[0]
            part = min(gone, oldest.tokens)
            oldest.tokens, gone = oldest.tokens - part, gone - part
            if not oldest.tokens:
                self._steps.popleft()
