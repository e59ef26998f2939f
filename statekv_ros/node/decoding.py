"""Images that wait while a step is computed are decoded on another core meanwhile; the engine still takes none but the newest."""
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager

import numpy as np

from statekv_ros.node.camera import Camera
from statekv_ros.node.mailbox import Arrival

_MOST_REPLACED = 1      # between two steps; from cameras that are faster than that most of what was decoded would be for nothing

Decoded = tuple[np.ndarray, str]


class DecodingAhead:
    """One thread for all cameras. What it has of an image that a newer one replaced is dropped, and nobody hears of it."""

    def __init__(self, cameras: Sequence[Camera]):
        self._cameras = tuple(cameras)
        self._thread = ThreadPoolExecutor(1, 'statekv-decoding')
        self._thread.submit(int)        # begins the thread: a node has as many from the start
        self._lock = threading.Lock()
        self._stepping = self._closed = False
        self._ahead: dict[str, tuple[Arrival, Future[Decoded]]] = {}
        self._dropped = {camera.name: 0 for camera in cameras}      # when an image was taken last

    @contextmanager
    def while_stepping(self) -> Iterator[None]:
        """Around what the engine's thread waits for the device in."""
        self._stepping = True
        for camera in self._cameras:
            self.look(camera)
        try:
            yield
        finally:
            self._stepping = False

    def look(self, camera: Camera) -> None:
        """An image may wait: begin to decode it, if a step is being computed. From any thread."""
        with self._lock:
            newest = camera.mailbox.newest
            if not self._stepping or self._closed or newest is None or \
                    camera.mailbox.dropped - self._dropped[camera.name] > _MOST_REPLACED:
                return
            before, future = self._ahead.get(camera.name, (None, None))
            if before is newest:
                return
            if future is not None:
                future.cancel()
            self._ahead[camera.name] = newest, self._thread.submit(camera.decode, newest.message)

    def take(self, camera: Camera) -> tuple[Arrival, Future[Decoded] | None]:
        """The image that waits, and what it becomes, if that was begun."""
        with self._lock:
            arrival = camera.mailbox.take()
            self._dropped[camera.name] = camera.mailbox.dropped
            before, future = self._ahead.pop(camera.name, (None, None))
            # One that has not begun waits behind another camera's.
            if future is not None and (future.cancel() or before is not arrival):
                future = None
            return arrival, future

    def close(self) -> None:
        """Begin nothing any more. Does not wait."""
        with self._lock:
            self._closed = True
        self._thread.shutdown(wait=False, cancel_futures=True)
