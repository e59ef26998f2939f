"""The compressed state: at most B keys and values per layer and KV head, carried from frame step to frame step."""
import torch

from statekv_ros.backbones.base import Backbone
from statekv_ros.kernels.scored_attention import scored_attention
from statekv_ros.kernels.state_update import update_state
from statekv_ros.memory.carried.positions import PositionPolicy, StepPlace
from statekv_ros.memory.carried.slot_positions import SlotPositions

_FIRST_CAPACITY = 256
_SLOT_GROUP = 16


class CompressedState:
    """Slots [0, tokens) hold the state; a frame step is written behind them and competes for them (StateKV, the update).

    `begin`, one `attend` per layer, `commit`: a step that fails before `commit` leaves the state as it was.

    Attributes:
        tokens: keys carried per layer and KV head, never above `budget`.
        budget: B in tokens.
    """

    def __init__(self, backbone: Backbone, budget: int, positions: PositionPolicy):
        self.layout = backbone.layout
        self.budget = budget
        self.tokens = 0
        self._frame_tokens = 0
        self._rotate = backbone.rotate
        self._places = SlotPositions(self.layout, positions) if positions.bounded else None
        self._turns = False
        self._allocate(0)

    @property
    def shift(self) -> int:
        """How far left of its true position the newest step stands."""
        return self._places.shift if self._places else 0

    def begin(self, step: StepPlace) -> None:
        """Make room for a step and decide where it stands; see `positions`.

        Raises:
            FrameError: the step does not fit into the positions there are.
        """
        tokens, first_ordinal = step.tokens, step.first_ordinal
        self._frame_tokens = tokens
        live = self.tokens + tokens
        if live > self._key.shape[2]:
            # Doubling keeps copies rare while the state fills; once it is full only a longer step can ask for more.
            self._allocate(max(live, min(2 * live, self.budget + tokens), min(_FIRST_CAPACITY, self.budget + tokens)))
        self._ordinal[..., self.tokens:live] = torch.arange(first_ordinal, first_ordinal + tokens,
                                                            device=self.layout.device)
        if self._places and self._places.place(self.tokens, step):
            self._turn()

    def attend(self, layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor,
               scale: float) -> torch.Tensor:
        """Attention of the step's queries over [state ; frame], noting each key's importance; see `AttentionMemory`."""
        live = self.tokens + self._frame_tokens
        self._key[layer, :, self.tokens:live] = key[0]
        self._value[layer, :, self.tokens:live] = value[0]
        keys = self._key[layer, None, :, :live]
        if self._turns:
            keys = torch.cat([self._placed(layer)[None], key], dim=2)
        return scored_attention(query, keys, self._value[layer, None, :, :live], scale,
                                importance_out=self._importance[layer, None, :, :live])[0]

    def commit(self) -> None:
        """Keep the B most important of state and frame, for all layers and KV heads at once."""
        self.tokens = update_state(self._key, self._value, self._ordinal, self._importance,
                                   self.tokens + self._frame_tokens, self.budget)
        if self._places:
            self._places.keep(self.kept())

    def place(self) -> tuple | None:
        """Where the step that was begun is computed; None when that will not be so again: the state is filling up, or each
        step turns a copy of its keys."""
        if self.tokens < self.budget or self._turns:
            return None
        return (self._key.data_ptr(), self._value.data_ptr(), self._importance.data_ptr(), self._key.shape[2],
                self._frame_tokens)

    def frame(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Keys and values [layers, kv_heads, tokens, head_dim] of the step that was begun, and the importance of state and
        step [layers, kv_heads, state + tokens], where they lie."""
        live = self.tokens + self._frame_tokens
        return self._key[:, :, self.tokens:live], self._value[:, :, self.tokens:live], self._importance[:, :, :live]

    def kept(self) -> torch.Tensor:
        """Ordinals of the carried tokens, [layers, kv_heads, tokens] int64, in no particular order."""
        return self._ordinal[..., :self.tokens]

    def copy(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Keys, values [layers, kv_heads, tokens, head_dim] and ordinals as they are now, safe from later steps."""
        if self._turns:
            key = torch.stack([self._placed(layer) for layer in range(self.layout.layers)])
        else:
            key = self._key[:, :, :self.tokens].clone()
        return key, self._value[:, :, :self.tokens].clone(), self.kept().clone()

    def _turn(self) -> None:
        """Move the carried keys to their new places.

        Turned in place, every turn rounds them once more: in bf16 a key is 0.5 % off after ten turns, 8 % after 374, which
        is what InternVL3 needs for eight hours at a frame per second. Where turns come with every step, keys therefore stay
        as they were written and each step turns a copy.
        """
        self._turns = not self._places.policy.lazy
        if self._turns:
            return
        for layer in range(self.layout.layers):
            self._key[layer, :, :self.tokens] = self._placed(layer)
        self._places.settle(self.tokens)

    def _placed(self, layer: int) -> torch.Tensor:
        """Carried keys of a layer at their places, [kv_heads, tokens, head_dim]."""
        return self._rotate(self._key[layer, :, :self.tokens], self._places.turn[layer, :, :self.tokens])

    def _allocate(self, capacity: int) -> None:
        # Whole groups of slots, so that every layer's begin where kernels like to read.
        layout, old, capacity = self.layout, self.tokens, -(-capacity // _SLOT_GROUP) * _SLOT_GROUP
        key, value = layout.empty(capacity), layout.empty(capacity)
        ordinal = torch.empty(layout.layers, layout.kv_heads, capacity, dtype=torch.int64, device=layout.device)
        if old:
            key[:, :, :old], value[:, :, :old] = self._key[:, :, :old], self._value[:, :, :old]
            ordinal[..., :old] = self._ordinal[..., :old]
        self._key, self._value, self._ordinal = key, value, ordinal
        if self._places:
            self._places.grow(capacity, old)
        self._importance = torch.empty(ordinal.shape, dtype=torch.float32, device=layout.device)
