"""What an evaluation watches: frames with header stamps, from a bag, a video, a folder of images, or a patrol made on the fly.

Frames are sampled as the live node does it, and images that the node would refuse for their stamp are left out.
"""
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from statekv_ros.errors import BagError, EvaluationError, FrameError, ParameterError
from statekv_ros.evaluation.schema import Video
from statekv_ros.patrol.video import patrol_images
from statekv_ros.patrol.shift import LEAST_STEPS, make_shift
from statekv_ros.patrol.world import Patrol, make_patrol
from statekv_ros.replay.bag_options import BagOptions
from statekv_ros.replay.bag_reader import bag_info, choose_topics, iterate_images
from statekv_ros.replay.sources import Source
from statekv_ros.sampling import Sampler, Verdict

_NS = 10**9
_ALL_HZ = 1e9           # a sampling period of 1 ns: every frame
_PATROL = re.compile(r'(patrol|shift):seed=(\d+),steps=(\d+)(?:,size=(\d+)x(\d+))?')
Decoded = Callable[[], np.ndarray]


@dataclass(frozen=True)
class Extent:
    """What a pass over the footage found.

    Attributes:
        frames: frames that will be watched; 0 where nobody counted.
        duration_s: from the first frame to the end of the last one, which lasts one mean period.
        height, width: of the first frame, in pixels.
        seconds: time of each frame that will be watched, after the first.
    """
    frames: int
    duration_s: float
    height: int
    width: int
    seconds: tuple[float, ...]


class Footage(ABC):
    """One source; `frames` may be called again and again and gives the same."""

    def __init__(self, rate_hz: float | None):
        self._rate_hz = rate_hz

    def frames(self) -> Iterator[tuple[int, np.ndarray]]:
        """(header stamp in ns, uint8 [height, width, 3] RGB) of each frame to watch.

        Raises:
            BagError, FrameError: the source cannot be read (any further).
        """
        for _, stamp_ns, frame in self.clip():
            yield stamp_ns, frame

    def clip(self, begin_s: float = 0.0, end_s: float | None = None) -> Iterator[tuple[int, int, np.ndarray]]:
        """(ns after the source's first frame, header stamp in ns, frame) of each frame to watch of a part of the source, sampled
        from its own beginning on; else as `frames`."""
        sampler, first_ns = Sampler(self._rate_hz or _ALL_HZ), None
        for stamp_ns, decode in self._images():
            if first_ns is None and stamp_ns > 0:
                first_ns = stamp_ns
            since_ns = stamp_ns - (first_ns or 0)
            if end_s is not None and first_ns is not None and since_ns > round(end_s * _NS):
                return
            if since_ns >= round(begin_s * _NS) and sampler.judge(stamp_ns) is Verdict.SAMPLE:
                yield since_ns, stamp_ns, decode()

    def glance(self) -> Extent:
        """The first frame's size alone, for sources that would take long to look through; raises what `extent` does."""
        for stamp_ns, decode in self._images():
            if stamp_ns > 0:
                return Extent(0, float('inf'), *decode().shape[:2], ())
        raise EvaluationError('has no frame with a header stamp')

    def extent(self) -> Extent:
        """Look through the source without decoding more than its first frame.

        Raises:
            BagError, FrameError: it cannot be read.
            EvaluationError: it has no frame with a stamp, or header stamps go back.
        """
        sampler, first, last_ns, seconds = Sampler(self._rate_hz or _ALL_HZ), None, 0, []
        for stamp_ns, decode in self._images():
            verdict = sampler.judge(stamp_ns)
            if verdict in (Verdict.NO_STAMP, Verdict.DUPLICATE):
                continue
            if first is None:
                first = stamp_ns, decode().shape
            if stamp_ns < last_ns:
                raise EvaluationError(f'header stamps go back after {(last_ns - first[0]) / _NS:g} s, so no time says which '
                                      'frame is meant: cut the bag there')
            last_ns = stamp_ns
            if verdict is Verdict.SAMPLE:
                seconds.append((stamp_ns - first[0]) / _NS)
        if first is None:
            raise EvaluationError('has no frame with a header stamp')
        span_s = (last_ns - first[0]) / _NS
        count = sampler.frames_in
        return Extent(sampler.sampled, span_s * count / (count - 1) if count > 1 else 0.0, *first[1][:2], tuple(seconds))

    @abstractmethod
    def _images(self) -> Iterator[tuple[int, Decoded]]:
        """Every image's header stamp in ns, and how to decode it, in the order of recording."""


class BagFootage(Footage):
    """One image topic of a bag.

    Attributes:
        info, topics: for the player; `topics` has the one topic with its type.
    """

    def __init__(self, path: Path, topic: str = '', rate_hz: float | None = None):
        """Raises BagError for a bag that cannot be read, has no such topic, or several where none is named."""
        super().__init__(rate_hz)
        self.info = bag_info(path)
        self.topics = choose_topics(self.info, [topic] if topic else None)
        if len(self.topics) > 1:
            raise BagError(f'bag {path} has several image topics: name one in the field "topic": {", ".join(self.topics)}')

    def _images(self) -> Iterator[tuple[int, Decoded]]:
        for image in iterate_images(self.info, self.topics):
            yield image.stamp_ns, image.frame


class FileFootage(Footage):
    """A video file or a folder of images; stamps are those that `statekv-bag make` would write."""

    def __init__(self, path: Path, rate_hz: float | None = None):
        super().__init__(rate_hz)
        self._source = Source(path)

    def _images(self) -> Iterator[tuple[int, Decoded]]:
        for time_ns, frame in self._source.frames():
            yield BagOptions.start_ns + time_ns, lambda frame=frame: frame


class PatrolFootage(Footage):
    """The patrol or shift of a seed, the same one that `statekv-patrol make` writes as a bag."""

    def __init__(self, seed: int, steps: int, width: int = 320, height: int = 240, rate_hz: float | None = None,
                 make: Callable[[int, np.random.Generator], Patrol] = make_patrol):
        super().__init__(rate_hz)
        self._seed, self._size = seed, (width, height)
        self._patrol = make(steps, np.random.default_rng(seed))

    def _images(self) -> Iterator[tuple[int, Decoded]]:
        for time_ns, frame in patrol_images(self._patrol, self._seed, *self._size):
            yield BagOptions.start_ns + time_ns, frame


def open_footage(video: Video) -> Footage:
    """The footage of a video of a questions file.

    Raises:
        BagError, EvaluationError: there is no such source, or it cannot be read.
    """
    if video.source.startswith(('patrol:', 'shift:')):
        return _open_patrol(video)
    return open_path(video.folder / Path(video.source).expanduser(), video.topic, video.rate_hz)


def open_path(path: Path, topic: str = '', rate_hz: float | None = None) -> Footage:
    """The footage in a bag (folder, .mcap or .db3), a video file or a folder of images.

    Raises:
        BagError, EvaluationError: there is no such source, or it cannot be read.
    """
    is_bag = path.suffix in ('.mcap', '.db3') or (path.is_dir() and any(
        file.name == 'metadata.yaml' or file.suffix in ('.mcap', '.db3') for file in path.iterdir()))
    if is_bag:
        return BagFootage(path, topic, rate_hz)
    if topic:
        raise EvaluationError(f'{path} is not a bag, so it has no topic {topic!r}: leave the field "topic" out')
    return FileFootage(path, rate_hz)


def check_video(video: Video) -> tuple[Extent | None, list[str]]:
    """Look through a video's source, and hold its questions against it.

    Returns:
        What there is to watch (None if it cannot be read), and one line for each mistake.
    """
    try:
        footage = open_footage(video)
        extent = footage.extent() if video.exact else footage.glance()
    except (BagError, FrameError, EvaluationError, ParameterError) as error:
        return None, [f'{video.place}: {error}']
    errors = []
    for question in video.questions:
        for name, spans in (('valid', (question.valid,)), ('evidence', question.evidence)):
            errors += [f'{question.places[name]}: {list(span)} ends after the source, which lasts {extent.duration_s:g} s'
                       for span in spans if span[1] > extent.duration_s + 1e-6]
    return extent, errors


def _open_patrol(video: Video) -> PatrolFootage:
    if not (match := _PATROL.fullmatch(video.source)):
        raise EvaluationError(f'must look like patrol:seed=5,steps=64 or shift:seed=5,steps=3600,size=320x240, got '
                              f'{video.source!r}')
    kind, (seed, steps, width, height) = match[1], (int(part) if part else None for part in match.groups()[1:])
    least, make = (LEAST_STEPS, make_shift) if kind == 'shift' else (1, make_patrol)
    if steps < least or width == 0 or height == 0:
        raise EvaluationError(f'a {kind} has at least {least} step{"s" * (least > 1)} and one pixel, got {video.source!r}')
    return PatrolFootage(seed, steps, width or 320, height or 240, video.rate_hz, make)
