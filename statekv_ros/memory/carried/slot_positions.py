"""Where the tokens of the compressed state stand when positions are bounded: four numbers per slot beside key and value."""
import torch

from statekv_ros.backbones.base import KVLayout
from statekv_ros.memory.carried.positions import PositionPolicy, StepPlace, dense


class SlotPositions:
    """Follows each slot's token from step to step: `place`, then `slots` is to be updated as the state's own slots are.

    Attributes:
        shift: of the newest step.
        slots: begin and end of each slot's stretch, offset (true position - position given to the model) and turn,
            [4, layers, kv_heads, capacity] int64.
    """

    def __init__(self, layout: KVLayout, policy: PositionPolicy):
        self.policy = policy
        self.shift = 0
        self.slots = torch.zeros(4, layout.layers, layout.kv_heads, 0, dtype=torch.int64, device=layout.device)

    @property
    def turn(self) -> torch.Tensor:
        """How far each slot's key has to be turned to stand where it belongs, [layers, kv_heads, capacity] int64."""
        return self.slots[3]

    def grow(self, capacity: int, live: int) -> None:
        """Make room for `capacity` slots; the first `live` keep what they have."""
        slots = self.slots.new_zeros((*self.slots.shape[:3], capacity))
        slots[..., :live] = self.slots[..., :live]
        self.slots = slots

    def place(self, live: int, step: StepPlace) -> bool:
        """Find the shift of a step behind `live` slots and note its tokens there; whether keys have to be turned for it.

        Waits for the device when it re-indexes: the shift depends on what was evicted.
        """
        turns = self._re_index(live, step)
        self.slots[..., live:live + step.tokens] = self._table(step)[:, None, None]
        return turns

    def _re_index(self, live: int, step: StepPlace) -> bool:
        # As long as every token is there, there is no gap to close.
        evicted = live < step.first_ordinal
        if not self.policy.passes_limit(step, self.shift) and (self.policy.lazy or not evicted):
            return False
        begin, end, offset, turn = self.slots[..., :live]
        left, covered = dense(begin, end)
        self.shift = self.policy.shift(step, int(covered.max()) if live else 0)
        first = step.position - self.shift
        moved = begin - (first - covered[..., None] + left).clamp_min(0)
        turn += offset - moved
        offset.copy_(moved)
        return True

    def settle(self, live: int) -> None:
        """The keys of the first `live` slots have been turned for good."""
        self.slots[3, ..., :live] = 0

    def moved(self, live: int) -> torch.Tensor:
        """Offset and turn of the first `live` slots, [2, layers, kv_heads, live] int32: what `place` changed in all of them."""
        return self.slots[2:, ..., :live].int()

    def follow(self, step: StepPlace, shift: int, ordinal: torch.Tensor, moved: torch.Tensor | None) -> None:
        """Do again what a step did, from its shift and what `moved` gave then; ordinal [layers, kv_heads, kept] int64 of the
        slots in use."""
        self.shift, kept = shift, ordinal.shape[-1]
        index = ordinal - step.first_ordinal
        new = self._table(step)[:, index.clamp_min(0)]
        self.slots[..., :kept] = torch.where(index >= 0, new, self.slots[..., :kept])
        if moved is not None:
            self.slots[2:, ..., :kept] = moved.to(self.slots)

    def rows(self, slots: slice) -> torch.Tensor:
        """All that is known of some slots, [4, layers, kv_heads, slots] int64."""
        return self.slots[..., slots]

    def put_rows(self, slots: slice, shift: int, rows: torch.Tensor) -> None:
        """Set slots to what `rows` gave; `shift` of the newest step."""
        self.shift = shift
        self.slots[..., slots] = rows.to(self.slots)

    def _table(self, step: StepPlace) -> torch.Tensor:
        """What `slots` has of a step's tokens, [4, tokens]."""
        begin, end = step.stretches()
        return torch.stack([begin, end, torch.full_like(begin, self.shift), torch.zeros_like(begin)])
