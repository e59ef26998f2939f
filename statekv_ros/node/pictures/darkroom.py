"""The threads that deal with pictures, so that neither the engine nor a callback does. No ROS in here."""
import traceback
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial

import numpy as np

from statekv_ros.store.retention import value_cost
from statekv_ros.thumbnails import make_thumbnail

NO_PICTURE = b''


class Darkroom:
    """Makes thumbnails in one thread, looks them up in another and draws in a third: a disk that takes its time holds up no frame
    step, and a picture for people no answer.

    Attributes:
        made: thumbnails so far; made_bytes: of them; disk_bytes: that they take of the memory's file, where there is one.
    """

    def __init__(self, log: Callable[[str], None]):
        """log: takes what goes wrong, with its traceback."""
        self._log = log
        self.made = self.made_bytes = self.disk_bytes = 0
        self._making = ThreadPoolExecutor(1, 'statekv-thumbnails')
        self._showing = ThreadPoolExecutor(1, 'statekv-pictures')
        self._drawing = ThreadPoolExecutor(1, 'statekv-drawing')
        for thread in self._threads:
            thread.submit(int)      # begins it: a node has as many from the start

    def make(self, frame: np.ndarray, width: int, quality: int) -> Future[bytes]:
        """A future of the frame's thumbnail; `NO_PICTURE` where it cannot be made."""
        return self._making.submit(self._attempt, partial(self._make, frame, width, quality), NO_PICTURE)

    def facts(self) -> dict:
        """For /diagnostics: thumbnails so far, and kB (10^3 bytes) of one on average, as it is and as it takes of the disk."""
        made = self.made
        return {'pictures_made': made, 'picture_kb': round(self.made_bytes / max(1, made) / 1e3, 2),
                'picture_disk_kb': round(self.disk_bytes / max(1, made) / 1e3, 2)}

    def show(self, work: Callable[[], None]) -> bool:
        """Do work that reads pictures, after what came before; false where it is closed."""
        return self._submit(self._showing, work)

    def draw(self, work: Callable[[], None]) -> bool:
        """The same of work that nobody waits for."""
        return self._submit(self._drawing, work)

    def close(self) -> None:
        """Begin nothing any more. Does not wait."""
        for thread in self._threads:
            thread.shutdown(wait=False)

    @property
    def _threads(self) -> tuple[ThreadPoolExecutor, ...]:
        return self._making, self._showing, self._drawing

    def _submit(self, thread: ThreadPoolExecutor, work: Callable[[], None]) -> bool:
        try:
            thread.submit(self._attempt, work, None)
        except RuntimeError:    # closed: the node is ending
            return False
        return True

    def _make(self, frame: np.ndarray, width: int, quality: int) -> bytes:
        picture = make_thumbnail(frame, width, quality)
        self.made += 1
        self.made_bytes += len(picture)
        self.disk_bytes += value_cost(len(picture))
        return picture

    def _attempt(self, work: Callable, otherwise):
        try:
            return work()
        except Exception:
            self._log(f'a picture failed: {traceback.format_exc()}')
            return otherwise
