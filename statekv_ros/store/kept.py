"""One camera's memory in a store: its steps as they come, in few bits once they are old, and without what a restart no longer
needs of them."""
from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

from statekv_ros.store.store import MemoryStore
from statekv_ros.store.tier import PACKED, PACKED_PARTS, PICTURE, DiskTier

if TYPE_CHECKING:
    import torch

    from statekv_ros.memory.pose import Pose
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
        self._untrimmed: list[int] = []
        self._packed_to = -1
        tier.attach(store, camera, self._headers())

    def save(self, steps: Iterable[SavedStep], packed: Iterable[tuple[int, torch.Tensor]], needed: int) -> Iterator[tuple[str, int]]:
        """Store what a frame changed, as the result is gone through.

        Args:
            packed: what older steps are in few bits, by their numbers; from then on answers can read them here.
            needed: steps from this one on lead to the carried context; some of the older ones lose all that answers do not read.

        Yields:
            Camera and number of each step that had to leave for it, also where the next one cannot be stored.

        Raises:
            StoreError: as `MemoryStore.put`.
        """
        yield from self._put(steps)
        yield from self._put_packed(packed)
        yield from self._trim(needed)

    def place(self, poses: Iterable[tuple[int, Pose]]) -> Iterator[tuple[str, int]]:
        """Store where steps were seen that are there already; otherwise as `save`."""
        for step, pose in poses:
            yield from self._store.amend(self._camera, step, {'pose': pose.saved()}, {})

    def _headers(self) -> Iterator[tuple[int, dict]]:
        """Of what is there already; notes what is to be trimmed."""
        for step, header in self._store.headers(self._camera):
            if step >= 0:
                if self.tier.packed and header.get('raw', True):
                    self._untrimmed.append(step)
                yield step, header

    def _put(self, steps: Iterable[SavedStep]) -> Iterator[tuple[str, int]]:
        for step in steps:
            yield from self._store.put(self._camera, step.step, step.header, step.parts)
            if step.step >= 0:
                if self.tier.packed:
                    self._untrimmed.append(step.step)
                else:
                    self.tier.wrote(step.step)

    def _put_packed(self, packed: Iterable[tuple[int, torch.Tensor]]) -> Iterator[tuple[str, int]]:
        for step, blob in packed:
            yield from self._store.amend(self._camera, step, {PACKED: True}, {PACKED: blob})
            self.tier.wrote(step)
            self._packed_to = max(self._packed_to, step)

    def _trim(self, needed: int) -> Iterator[tuple[str, int]]:
        for step in self._untrimmed[:_TRIMMED_AT_ONCE]:
            if step >= needed or step > self._packed_to:
                break
            self._untrimmed = [other for other in self._untrimmed if other != step]     # it may have left meanwhile
            if self.tier.holds(step):   # else it could not be put into few bits, and stays as it is
                yield from self._store.amend(self._camera, step, {'raw': False}, {}, keep=(*PACKED_PARTS, PICTURE))

    def picture(self, step: int) -> bytes | None:
        """The picture of a step; None where it has none, or there is no such step. From any thread.

        Raises:
            StoreError: it is damaged.
        """
        record = self._store.record(self._camera, step)
        if record is None or PICTURE not in record.parts:
            return None
        return self._store.load_part(self._camera, step, PICTURE)

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
