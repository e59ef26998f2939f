"""The store as the lowest tier of a camera's detailed cache: answers read the pages that they chose from it."""
from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Sequence

from statekv_ros.errors import StoreError
from statekv_ros.store.reader import StoreReader
from statekv_ros.store.step_set import StepSet

PACKED, INDEX, KEY_POSITIONS = 'packed', 'index', 'key_positions'
PACKED_PARTS = PACKED, INDEX, KEY_POSITIONS     # all that is read of a step in few bits
PICTURE = 'picture'


class DiskTier:
    """Reads for the thread that owns the memory, while another one writes and calls `wrote` and `left`.

    Attributes:
        as_computed: keys are stored as the model computed them, unless in few bits.
        packed: whether steps are read in few bits, rather than as they came.
    """
    as_computed = True

    def __init__(self, packed: bool):
        self.packed = packed
        self._store: StoreReader | None = None
        self._camera = ''
        self._steps = StepSet()
        self._gone: deque[int] = deque()

    def attach(self, store: StoreReader, camera: str, headers: Iterable[tuple[int, dict]]) -> None:
        """Read from this store; before, nothing is held.

        Args:
            headers: of the steps that it has of the camera.
        """
        self._store, self._camera = store, camera
        self._steps = StepSet(step for step, header in headers
                              if (header.get(PACKED, False) if self.packed else header.get('raw', True)))

    def detach(self) -> None:
        """Hold nothing any more."""
        self._store = None
        self.clear()

    def wrote(self, step: int) -> None:
        """A step can be read now."""
        self._steps.add(step)

    def left(self, step: int) -> None:
        """A step is not there any more."""
        if step in self._steps:
            self._steps.discard(step)
            self._gone.append(step)

    def holds(self, step: int) -> bool:
        return step in self._steps

    def runs(self, part: str, steps: Sequence[int], extents: Sequence[tuple[int, Sequence[slice]]]) -> Sequence[bytes | None]:
        try:
            return self._store.runs(self._camera, part, steps, extents)
        except StoreError:      # the file cannot be read
            return [None] * len(steps)

    def gone(self) -> Iterable[int]:
        gone = []
        while self._gone:
            gone.append(self._gone.popleft())
        return gone

    def clear(self) -> None:
        self._steps.clear()
        self._gone.clear()
