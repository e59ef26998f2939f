"""What the engine holds for one camera."""
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from statekv_ros.memory import VideoStream
from statekv_ros.node.mailbox import Mailbox
from statekv_ros.node.pictures import Album
from statekv_ros.node.reasons import reason_of

_TELL_EVERY_S = 10.0    # a camera whose every step fails must not fill the log


@dataclass
class Camera:
    """Its stream, its images and what became of them.

    Attributes:
        decode: undecoded message -> uint8 [height, width, 3] RGB, and its frame_id; raises FrameError.
        rejected, last_error: images refused because of bad data, and the newest reason.
        failures: frame steps that failed for another reason; frames_failed: images that they cost.
        frames_processed: images that are in the memory or wait for their partner; with those refused and those failed, all that
            were taken from the mailbox.
        album: its pictures; None where nobody wants any.
        size: height and width of its newest image; None before the first.
    """
    name: str
    stream: VideoStream
    decode: Callable[[Any], tuple[np.ndarray, str]]
    mailbox: Mailbox = field(default_factory=Mailbox)
    rejected: int = 0
    failures: int = 0
    frames_failed: int = 0
    last_error: str = ''
    frame_id: str = ''
    album: Album | None = None
    frames_processed: int = 0
    size: tuple[int, int] | None = None
    failures_told: int = 0
    told_at: float = float('-inf')

    def note_failure(self, frames_lost: int, error: Exception) -> str:
        """A frame step failed. What is to be logged of it; '' when that was told just now."""
        self.failures += 1
        self.frames_failed += frames_lost
        self.frames_processed += 1 - frames_lost      # its partner was counted when it came
        self.last_error = reason_of(error)
        now = time.monotonic()
        if now - self.told_at < _TELL_EVERY_S:
            return ''
        count, self.failures_told, self.told_at = self.failures - self.failures_told, self.failures, now
        return (f'frame step of camera {self.name} failed{f" ({count} times since this was last told)" * (count > 1)}: '
                + ''.join(traceback.format_exception(error)))
