"""One camera's pictures: which steps have one, and where it lies. No ROS in here."""
from __future__ import annotations

import threading
from array import array
from collections import OrderedDict, deque
from collections.abc import Callable
from concurrent.futures import Future
from typing import NamedTuple

import numpy as np

from statekv_ros.memory import StepReport, VideoStream
from statekv_ros.node.pictures.darkroom import NO_PICTURE, Darkroom
from statekv_ros.store.hours import PICTURES_IN_MEMORY

Thumbnail = Future[bytes] | bytes
_LATEST = 2     # the newest step, and frames that wait for the next one


class Seen(NamedTuple):
    """A step that is held, or frames that wait for one: its number, and the header stamps (ns) of its first and last frame."""
    step: int
    first_ns: int
    last_ns: int


class Album:
    """A picture of the last frame of each frame step that the detailed cache holds, and of the frame that waits for its partner.

    The engine's thread calls `take` and `put`, the one that writes the disk `newest` and `wrote`; the others are for any thread.
    """

    def __init__(self, darkroom: Darkroom, stream: VideoStream, width: int, quality: int,
                 load: Callable[[int], bytes | None] = lambda step: None, waiting: bytes | None = None,
                 in_memory_bytes: int = PICTURES_IN_MEMORY):
        """
        Args:
            stream: as it was brought back.
            width, quality: of the thumbnails; a width of 0: none are made.
            load: reads the picture of a step from the disk, None where it has none.
            waiting: picture of the frame that waits in the stream.
            in_memory_bytes: bound on those that the disk does not hold.
        """
        self._darkroom, self._stream, self._load = darkroom, stream, load
        self._width, self._quality, self._most_bytes = width, quality, in_memory_bytes
        self._lock = threading.Lock()
        self._rows = tuple(array('q') for _ in Seen._fields)        # sorted by step
        self._forgotten_ns: int | None = None
        self._pictures: OrderedDict[int, Thumbnail] = OrderedDict()     # those in main memory, by step
        self._bytes, self._uncounted = 0, []
        self._frames: dict[int, Thumbnail] = {}     # of frames that wait, by stamp
        self._latest: deque[tuple[Seen, Thumbnail]] = deque(maxlen=_LATEST)    # whether the disk has them or not
        self._under_way: Future[bytes] | None = None
        for record in stream.detailed.records():
            self._add(Seen(record.step, record.first_stamp_ns, record.last_stamp_ns))
        if stream.pending:
            self._frames[stream.pending.stamps_ns[-1]] = waiting or NO_PICTURE
        self._follow()

    def take(self, frame: np.ndarray) -> Future[bytes] | None:
        """Begin to make the picture of a frame, uint8 [height, width, 3] RGB, which nobody changes any more; None where none are
        made. Waits for the one before, so that frames do not pile up where steps are faster than pictures."""
        if not self._width:
            return None
        if self._under_way is not None:
            self._under_way.result()
        self._under_way = self._darkroom.make(frame, self._width, self._quality)
        return self._under_way

    def put(self, report: StepReport | None, stamp_ns: int, picture: Future[bytes] | None) -> None:
        """A frame of this stamp is in the stream, or was in a step that failed; with the report of the step that it completed."""
        if picture is not None:
            self._frames[stamp_ns] = picture
        with self._lock:
            self._count()
            if report is not None:
                self._add(Seen(report.step, report.first_stamp_ns, report.last_stamp_ns))
        self._follow()

    def clear(self) -> None:
        """The stream has forgotten everything."""
        with self._lock:
            for row in self._rows:
                del row[:]
            self._pictures.clear()
            self._latest.clear()
            self._frames.clear()
            self._uncounted.clear()
            self._bytes, self._forgotten_ns = 0, None

    def newest(self, step: int) -> bytes:
        """The picture of a step that is about to be written, once it is made; `NO_PICTURE` where there is none."""
        with self._lock:
            picture = self._pictures.get(step, NO_PICTURE)
        return _made(picture)

    def wrote(self, step: int) -> None:
        """The disk has the picture of a step."""
        with self._lock:
            self._drop(step)

    def seen(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Number, first and last stamp (ns) of each step that is held and of frames that wait, int64 [steps] each."""
        with self._lock:
            return tuple(np.array(row, np.int64) for row in self._rows)

    @property
    def forgotten_ns(self) -> int | None:
        """The oldest header stamp that was forgotten; None where nothing was."""
        return self._forgotten_ns

    def picture(self, step: int, stamp_ns: int) -> tuple[int, bytes] | None:
        """The picture of a step that holds a frame of this stamp, and its own stamp; None where there is none, or no such step.

        Raises:
            StoreError: it is damaged.
        """
        with self._lock:
            index = int(np.searchsorted(np.frombuffer(self._rows[0], np.int64), step)) if self._rows[0] else 0
            row = Seen(*(column[index] for column in self._rows)) if index < len(self._rows[0]) else Seen(-1, 0, 0)
            picture = self._pictures.get(step)
        if row.step != step or not row.first_ns <= stamp_ns <= row.last_ns:
            return None
        found = _made(picture) if picture is not None else self._load(step)
        return (row.last_ns, found) if found else None

    def latest(self, stamp_ns: int) -> tuple[int, bytes] | None:
        """As `picture`, of the newest step or of frames that wait, without waiting for anything; None where it is not one of these, or
        not made yet."""
        with self._lock:
            for row, picture in reversed(self._latest):
                if row.first_ns <= stamp_ns <= row.last_ns:
                    found = picture if isinstance(picture, bytes) else picture.result() if picture.done() else NO_PICTURE
                    return (row.last_ns, found) if found else None
        return None

    def _follow(self) -> None:
        """Hold what the stream holds."""
        stream = self._stream
        waiting, oldest = stream.pending.stamps_ns, next(stream.detailed.records(), None)
        with self._lock:
            self._forgotten_ns = stream.detailed.forgotten_first_ns
            if self._rows[0] and self._rows[0][-1] >= stream.steps:     # frames that waited, and no longer do
                self._remove(len(self._rows[0]) - 1)
            if waiting:
                self._add(Seen(stream.steps, waiting[0], waiting[-1]))
            least = oldest.step if oldest is not None else stream.steps
            while self._rows[0] and self._rows[0][0] < least:
                self._remove(0)
            self._frames = {stamp: picture for stamp, picture in self._frames.items() if stamp in waiting}

    def _add(self, row: Seen) -> None:
        if self._rows[0] and self._rows[0][-1] == row.step:
            self._remove(len(self._rows[0]) - 1)
        for column, value in zip(self._rows, row):
            column.append(value)
        if picture := self._frames.get(row.last_ns):
            self._pictures[row.step] = picture
            self._uncounted.append(row.step)
            self._latest.append((row, picture))

    def _remove(self, index: int) -> None:
        step = self._rows[0][index]
        self._drop(step)
        for entry in [entry for entry in self._latest if entry[0].step == step]:
            self._latest.remove(entry)
        for column in self._rows:
            del column[index]

    def _drop(self, step: int) -> None:
        picture = self._pictures.pop(step, None)
        if step in self._uncounted:
            self._uncounted.remove(step)
        elif picture is not None:
            self._bytes -= len(picture)

    def _count(self) -> None:
        """Of those that were put before, which are made by now."""
        for step in self._uncounted:
            picture = self._pictures[step] = _made(self._pictures[step])
            self._bytes += len(picture)
        self._uncounted.clear()
        while self._bytes > self._most_bytes:
            self._drop(next(iter(self._pictures)))


def _made(picture: Thumbnail) -> bytes:
    return picture if isinstance(picture, bytes) else picture.result()
