"""One camera's memory in a store: its steps as they come, in few bits once they are old, and without what a restart no longer
needs of them."""
from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from statekv_ros.store.store import MemoryStore
from statekv_ros.store.tier import PACKED, PACKED_PARTS, DiskTier

if TYPE_CHECKING:
    import torch

    from statekv_ros.memory.saved.saving import SavedStep

_TRIMMED_AT_ONCE = 4        # more than come in, so that what waits gets less, and few, so that a step writes little


class KeptCamera:
    """Called by the one thread that writes.

    Attributes:
        tier: what answers read of it.
    """

    def __init__(self, store: MemoryStore, camera: str, tier: DiskTier):
        """Raises StoreError where a record is damaged."""
        self.tier = tier
        self._store, self._camera = store, camera
        self._untrimmed = [step for step, header in store.steps(camera) if step >= 0 and header.get('raw', True)] \
            if tier.packed else []
        self._packed_to = -1
        tier.attach(store, camera)

    def put(self, steps: Iterable[SavedStep]) -> list[tuple[str, int]]:
        """Store steps; returns camera and number of each that had to leave for them, as the other methods do.

        Raises:
            StoreError: as `MemoryStore.put`.
        """
        gone = []
        for step in steps:
            gone += self._store.put(self._camera, step.step, step.header, step.parts)
            if step.step >= 0:
                if self.tier.packed:
                    self._untrimmed.append(step.step)
                else:
                    self.tier.wrote(step.step)
        return gone

    def put_packed(self, packed: Iterable[tuple[int, torch.Tensor]]) -> list[tuple[str, int]]:
        """Add what steps are in few bits; from then on answers can read them here."""
        gone = []
        for step, blob in packed:
            gone += self._store.amend(self._camera, step, {PACKED: True}, {PACKED: blob})
            self.tier.wrote(step)
            self._packed_to = max(self._packed_to, step)
        return gone

    def trim(self, needed: int) -> list[tuple[str, int]]:
        """Leave out of some steps all that answers do not read, if they are older than `needed`, from where on they lead to the
        carried context."""
        gone = []
        for step in self._untrimmed[:_TRIMMED_AT_ONCE]:
            if step >= needed or step > self._packed_to:
                break
            self._untrimmed.remove(step)
            if self.tier.holds(step):   # else it could not be put into few bits, and stays as it is
                gone += self._store.amend(self._camera, step, {'raw': False}, {}, keep=PACKED_PARTS)
        return gone

    def left(self, step: int) -> None:
        """A step had to leave."""
        self.tier.left(step)
        if self._untrimmed and self._untrimmed[0] <= step:
            self._untrimmed = [other for other in self._untrimmed if other != step]

    def clear(self) -> None:
        """Forget all of the camera. Raises StoreError."""
        self._store.clear(self._camera)
        self._untrimmed.clear()
        self._packed_to = -1
        self.tier.clear()
