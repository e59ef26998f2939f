"""The compressed state: at most B keys and values per layer and KV head, carried from frame step to frame step."""
import torch

from statekv_ros.backbones.base import KVLayout
from statekv_ros.kernels.scored_attention import scored_attention
from statekv_ros.kernels.state_update import update_state

_FIRST_CAPACITY = 256


class CompressedState:
    """Slots [0, tokens) hold the state; a frame step is written behind them and competes for them (StateKV, the update).

    `begin`, one `attend` per layer, `commit`: a step that fails before `commit` leaves the state as it was.

    Attributes:
        tokens: keys carried per layer and KV head, never above `budget`.
        budget: B in tokens.
    """

    def __init__(self, layout: KVLayout, budget: int):
        self.layout = layout
        self.budget = budget
        self.tokens = 0
        self._frame_tokens = 0
        self._allocate(0)

    def begin(self, tokens: int, frames: int, first_ordinal: int) -> None:
        """Make room for a step of `tokens` tokens, numbered from `first_ordinal` in the stream."""
        self._frame_tokens = tokens
        live = self.tokens + tokens
        if live > self._key.shape[2]:
            # Doubling keeps copies rare while the state fills; once it is full only a longer step can ask for more.
            self._allocate(max(live, min(2 * live, self.budget + tokens), min(_FIRST_CAPACITY, self.budget + tokens)))
        self._ordinal[..., self.tokens:live] = torch.arange(first_ordinal, first_ordinal + tokens,
                                                            device=self.layout.device)

    def attend(self, layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor,
               scale: float) -> torch.Tensor:
        """Attention of the step's queries over [state ; frame], noting each key's importance; see `AttentionMemory`."""
        live = self.tokens + self._frame_tokens
        self._key[layer, :, self.tokens:live] = key[0]
        self._value[layer, :, self.tokens:live] = value[0]
        return scored_attention(query, self._key[layer, None, :, :live], self._value[layer, None, :, :live], scale,
                                importance_out=self._importance[layer, None, :, :live])[0]

    def commit(self) -> None:
        """Keep the B most important of state and frame, for all layers and KV heads at once."""
        self.tokens = update_state(self._key, self._value, self._ordinal, self._importance,
                                   self.tokens + self._frame_tokens, self.budget)

    def kept(self) -> torch.Tensor:
        """Ordinals of the carried tokens, [layers, kv_heads, tokens] int64, in no particular order."""
        return self._ordinal[..., :self.tokens]

    def copy(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Keys, values [layers, kv_heads, tokens, head_dim] and ordinals as they are now, safe from later steps."""
        return (self._key[:, :, :self.tokens].clone(), self._value[:, :, :self.tokens].clone(), self.kept().clone())

    def _allocate(self, capacity: int) -> None:
        layout, old = self.layout, self.tokens
        key, value = layout.empty(capacity), layout.empty(capacity)
        ordinal = torch.empty(layout.layers, layout.kv_heads, capacity, dtype=torch.int64, device=layout.device)
        if old:
            key[:, :, :old], value[:, :, :old] = self._key[:, :, :old], self._value[:, :, :old]
            ordinal[..., :old] = self._ordinal[..., :old]
        self._key, self._value, self._ordinal = key, value, ordinal
        self._importance = torch.empty(ordinal.shape, dtype=torch.float32, device=layout.device)
