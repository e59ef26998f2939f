"""The compressed state: at most B keys and values per layer and KV head, carried from frame step to frame step."""
from contextlib import AbstractContextManager, nullcontext

import torch

from statekv_ros.backbones.base import Backbone
from statekv_ros.kernels.scored_attention import scored_attention
from statekv_ros.kernels.scored_attention.streams import Stream
from statekv_ros.kernels.state_update import move_rows, select_slots, update_state
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
        rewritten: keys were turned where they lie since this was last set to false.
    """

    def __init__(self, backbone: Backbone, budget: int, positions: PositionPolicy):
        self.layout = backbone.layout
        self.budget = budget
        self.tokens = 0
        self._frame_tokens = 0
        self._rotate = backbone.rotate
        self._places = SlotPositions(self.layout, positions) if positions.bounded else None
        self._turns = self.rewritten = False
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
                                   self.tokens + self._frame_tokens, self.budget,
                                   beside=self._places.slots if self._places else None)

    def select(self) -> tuple[torch.Tensor, torch.Tensor]:
        """The first part of `commit` where `place` is known: which slots move where, see `select_slots`. Changes nothing."""
        live = self.tokens + self._frame_tokens
        return select_slots(self._importance[..., :live], self._ordinal[..., :live], self.budget)

    def move(self, source: torch.Tensor, target: torch.Tensor) -> None:
        """The second part, of what `select` gave. Done twice, it changes nothing more."""
        move_rows(self._key, self._value, self._ordinal, source, target, self._places.slots if self._places else None)

    def stream(self, columns: slice) -> Stream | None:
        """For attention beside others in one launch, of the step that was begun, whose tokens are in these columns of its row;
        None where this step turns a copy of its keys."""
        return None if self._turns else Stream(self._key, self._value, self._importance, self.tokens, columns)

    def place(self) -> tuple | None:
        """Where the step that was begun is computed; None when that will not be so again: the state is filling up, or each
        step turns a copy of its keys."""
        if self.tokens < self.budget or self._turns:
            return None
        parts = self._key, self._value, self._importance, self._ordinal, *([self._places.slots] if self._places else [])
        return (*(part.data_ptr() for part in parts), self._key.shape[2], self._frame_tokens)

    def for_recording(self) -> 'CompressedState':
        """What a recording is made over: the state itself, which stays where it is."""
        return self

    def standing_for(self, other: 'CompressedState') -> AbstractContextManager:
        """See `side_by_side.States`; `other` is this one."""
        return nullcontext()

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

    def change(self, first_ordinal: int, tokens: int) -> tuple[dict, dict[str, torch.Tensor]]:
        """What the commit of a step of `tokens` tokens changed, for `follow`, as plain values and tensors:

        slots: where each of its tokens landed, [layers, kv_heads, tokens] int32, -1 where it was not kept;
        moved: where each slot's token stands, if every step moves them all; see `SlotPositions.moved`.
        """
        index = self.kept() - first_ordinal
        slots = torch.full((*index.shape[:2], tokens + 1), -1, dtype=torch.int32, device=index.device)
        here = torch.arange(self.tokens, dtype=torch.int32, device=index.device).expand_as(index)
        slots.scatter_(-1, torch.where(index >= 0, index, tokens), here)    # the last column takes those of older steps
        parts = {'slots': slots[..., :tokens]}
        if self._turns:
            parts['moved'] = self._places.moved(self.tokens)
        return {'tokens': self.tokens, 'turns': self._turns}, parts

    def follow(self, step: StepPlace, shift: int, key: torch.Tensor, value: torch.Tensor, header: dict,
               parts: dict[str, torch.Tensor]) -> None:
        """Do again what a commit did. Slots that nobody has told of stay undefined until `put_share` does.

        Args:
            shift: of the step.
            key, value: of the step as `frame` gave them, [layers, kv_heads, tokens, head_dim].
            header, parts: as `change` gave them.
        """
        self._hold(header)
        slots = parts['slots'].to(self.layout.device).long()
        layer, head, token = (slots >= 0).nonzero(as_tuple=True)
        slot = slots[layer, head, token]
        self._key[layer, head, slot] = key.to(self.layout.device)[layer, head, token]
        self._value[layer, head, slot] = value.to(self.layout.device)[layer, head, token]
        self._ordinal[layer, head, slot] = token + step.first_ordinal
        if self._places:
            self._places.follow(step, shift, self.kept(), parts.get('moved'))

    def share(self, slots: slice) -> tuple[dict, dict[str, torch.Tensor]]:
        """Some slots as they are, for `put_share`: plain values, and tensors [layers, kv_heads, slots, ...]."""
        parts = {'share_key': self._key[:, :, slots], 'share_value': self._value[:, :, slots],
                 'share_ordinal': self._ordinal[..., slots]}
        if self._places:
            parts['share_places'] = self._places.rows(slots)
        return {'tokens': self.tokens, 'turns': self._turns, 'share': [slots.start, slots.stop]}, parts

    def put_share(self, shift: int, header: dict, parts: dict[str, torch.Tensor]) -> None:
        """Set slots to what `share` gave; `shift` of the newest step."""
        self._hold(header)
        slots = slice(*header['share'])
        self._key[:, :, slots], self._value[:, :, slots] = parts['share_key'], parts['share_value']
        self._ordinal[..., slots] = parts['share_ordinal']
        if self._places:
            self._places.put_rows(slots, shift, parts['share_places'])

    def _hold(self, header: dict) -> None:
        if header['tokens'] > self._key.shape[2]:
            self._allocate(min(2 * header['tokens'], self.budget))
        self.tokens, self._turns = header['tokens'], header['turns']

    def _turn(self) -> None:
        """Move the carried keys to their new places.

        Turned in place, every turn rounds them once more: in bf16 a key is 0.5 % off after ten turns, 8 % after 374, which
        is what InternVL3 needs for eight hours at a frame per second. Where turns come with every step, keys therefore stay
        as they were written and each step turns a copy.
        """
        self._turns = not self._places.policy.lazy
        if self._turns:
            return
        self.rewritten = True
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
        ordinal = torch.full((layout.layers, layout.kv_heads, capacity), -1, dtype=torch.int64, device=layout.device)
        if old:
            key[:, :, :old], value[:, :, :old] = self._key[:, :, :old], self._value[:, :, :old]
            ordinal[..., :old] = self._ordinal[..., :old]
        self._key, self._value, self._ordinal = key, value, ordinal
        if self._places:
            self._places.grow(capacity, old)
        self._importance = torch.empty(ordinal.shape, dtype=torch.float32, device=layout.device)
