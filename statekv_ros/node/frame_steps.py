"""From what waits in the mailboxes to frame steps, and to those who want to hear of them. Used by the engine's thread alone."""
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from contextlib import ExitStack
from dataclasses import dataclass

import numpy as np

from statekv_ros.errors import FrameError
from statekv_ros.memory import StepReport
from statekv_ros.memory.together import Given, Outcome, Together
from statekv_ros.node.camera import Camera
from statekv_ros.node.decoding import DecodingAhead
from statekv_ros.node.disk import Disk
from statekv_ros.node.watches.checks import Checks


@dataclass
class _Taken:
    """An image on its way. `waited_ms`: in the mailbox; `waiting`: frames that waited for it; `picture`: for the album."""
    camera: Camera
    stamp_ns: int
    waited_ms: float
    waiting: int
    frame: np.ndarray | None = None
    picture: Future[bytes] | None = None
    preprocess_ms: float = 0.0


class FrameSteps:
    """Steps of cameras: those whose images wait at the same moment and have one size as one batch; see `memory.together`.

    Attributes:
        count: frame steps of all cameras so far.
        together: steps the streams.
        ahead: decodes what comes meanwhile.
    """

    def __init__(self, cameras: Sequence[Camera], on_step: Callable[[Camera, StepReport, float], None],
                 on_failure: Callable[[Exception], None], log: Callable[[str], None], disk: Disk | None, checks: Checks | None):
        """
        Args:
            on_failure: called after each step that failed for another reason than its image.
            others: as `Engine` takes them.
        """
        self.count = 0
        self.together = Together()
        self.ahead = DecodingAhead(cameras)
        self._cameras, self._on_step, self._on_failure, self._log = tuple(cameras), on_step, on_failure, log
        self._disk, self._checks = disk, checks

    def can_take(self, camera: Camera) -> bool:
        """Whether an image waits, and the step before it is on disk: a kill then costs at most the one in progress."""
        return camera.mailbox.waiting and not (self._disk is not None and self._disk.busy(camera.name))

    def batches(self) -> list[list[Camera]]:
        """All cameras, always in the same order; those whose newest images had one size are together."""
        by_size: dict[tuple[int, int] | None, list[Camera]] = {}
        for camera in self._cameras:
            by_size.setdefault(camera.size, []).append(camera)
        return list(by_size.values())

    def locate_again(self) -> None:
        """Take the poses that came after their steps."""
        for camera in self._cameras:
            camera.stream.locate_again()
            if self._disk is not None:
                self._disk.save_poses(camera.name)

    def run(self, cameras: Sequence[Camera]) -> bool:
        """Take the images that wait now of these cameras, and no others: nobody waits for anybody. Whether there were any."""
        # A step is waited for before the next image is taken. To queue the next one's while the GPU works would hide some
        # milliseconds, but take an image a step older than it need be, and lay a failed step at the next one's door.
        taken = [self._take(camera) for camera in cameras if self.can_take(camera)]
        whole = [image for image in taken if image.frame is not None]
        if not whole:
            return bool(taken)
        with self.ahead.while_stepping():
            outcomes = self.together.step([Given(image.camera.stream, image.frame, image.stamp_ns, image.preprocess_ms)
                                           for image in whole])
        with ExitStack() as each:       # what one's callback raises keeps nobody from hearing of the others
            for image, outcome in reversed(list(zip(whole, outcomes))):
                each.callback(self._settle, image, outcome)
        return bool(taken)

    def _take(self, camera: Camera) -> _Taken:
        arrival, decoding = self.ahead.take(camera)
        begun, image = time.perf_counter(), _Taken(camera, arrival.stamp_ns, arrival.waited_ms, len(camera.stream.pending))
        try:
            frame, camera.frame_id = camera.decode(arrival.message) if decoding is None else decoding.result()
            if camera.album is not None:
                image.picture = camera.album.take(frame)
        except Exception as error:
            self._settle(image, error)
        else:
            image.frame, camera.size = frame, frame.shape[:2]
        image.preprocess_ms = (time.perf_counter() - begun) * 1e3
        return image

    def _settle(self, image: _Taken, outcome: Outcome) -> None:
        camera = image.camera
        if isinstance(outcome, FrameError):
            camera.rejected += 1
            camera.last_error = str(outcome)
        elif isinstance(outcome, Exception):    # the node must outlive a bad step; what was seen before it is untouched
            if told := camera.note_failure(image.waiting + 1 - len(camera.stream.pending), outcome):
                self._log(told)
            if camera.album is not None:
                camera.album.put(None, image.stamp_ns, image.picture)
            self._on_failure(outcome)
        else:
            camera.frames_processed += 1
            if camera.album is not None:
                camera.album.put(outcome, image.stamp_ns, image.picture)
            if self._disk is not None:
                self._disk.save(camera.name)
            if outcome is not None:
                self._note_step(image, outcome)

    def _note_step(self, image: _Taken, report: StepReport) -> None:
        self.count += 1
        if self._checks is not None:
            self._checks.note_step(image.camera.name, report.last_stamp_ns)
        self._on_step(image.camera, report, image.waited_ms)
