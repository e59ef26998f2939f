"""Frames of a video file with their times, one after the other: an hour of video is never in memory at once."""
import importlib.util
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from fractions import Fraction

import numpy as np

from statekv_ros.errors import BagError, ParameterError

_START_NS = 10**9       # header stamp of a video's first frame: 0 would be none
_AT_ONCE = 16           # frames that decord decodes in one call


def check_video(path: str) -> None:
    """Look at a video's head, whichever decoder will read it.

    Raises:
        BagError: it cannot be opened, or has no pictures.
    """
    import av
    try:
        with av.open(path) as container:
            if container.streams.video:
                return
    except (OSError, ValueError) as error:      # FFmpeg's errors are one of these
        raise BagError(f'video {path} cannot be read: {_line(error)}') from error
    raise BagError(f'video {path} has no pictures')


class VideoFile(ABC):
    """One video.

    Attributes:
        frames: how many it has; rate_hz: mean frames per second.

    Raises:
        BagError: it cannot be opened, or has no pictures.
    """

    def __init__(self, path: str):
        self.path = path
        try:
            self.frames, self.rate_hz = self._extent()
        except Exception as error:      # each library raises what it likes
            raise BagError(f'video {path} cannot be read: {_line(error)}') from error
        if self.frames < 1 or not self.rate_hz or self.rate_hz <= 0:
            raise BagError(f'video {path} has no pictures, or does not say how many to a second')

    def read(self, indices: Sequence[int]) -> Iterator[tuple[int, np.ndarray]]:
        """(header stamp in ns, uint8 [height, width, 3] RGB) of the frames of these numbers, which must ascend. Frame n stands
        n / rate_hz seconds after the first.

        Raises:
            BagError: the video cannot be read any further, or ends more than a second before it says.
        """
        index = -1
        try:
            for index, picture in self._decode(indices):
                yield _START_NS + round(index * 10**9 / self.rate_hz), picture
        except Exception as error:
            raise BagError(f'video {self.path} cannot be read past frame {index}: {_line(error)}') from error
        if index < indices[-1] - max(1, self.rate_hz):
            raise BagError(f'video {self.path} is cut off: it says that it has {self.frames} frames, but none can be read past '
                           f'frame {index}')

    @abstractmethod
    def _extent(self) -> tuple[int, Fraction | float]:
        """Frames, and frames per second."""

    @abstractmethod
    def _decode(self, indices: Sequence[int]) -> Iterator[tuple[int, np.ndarray]]:
        """(number, picture) of these frames, as far as there are."""


class AvVideo(VideoFile):
    """Read by PyAV, as the harness does unless it is told otherwise: every frame is decoded, to the last one wanted."""

    def _extent(self) -> tuple[int, Fraction]:
        import av
        with av.open(self.path) as container:
            stream = container.streams.video[0]
            # Matroska and WebM do not say: count what would be decoded, without decoding it.
            return stream.frames or sum(packet.size > 0 for packet in container.demux(video=0)), stream.average_rate

    def _decode(self, indices: Sequence[int]) -> Iterator[tuple[int, np.ndarray]]:
        import av
        wanted, last = set(map(int, indices)), int(indices[-1])
        with av.open(self.path) as container:
            container.streams.video[0].thread_type = 'AUTO'
            for index, frame in enumerate(container.decode(video=0)):
                if index in wanted:
                    yield index, frame.to_ndarray(format='rgb24')
                if index == last:
                    return


class DecordVideo(VideoFile):
    """Read by decord, which seeks: faster where few frames of a long video are wanted."""

    def _extent(self) -> tuple[int, float]:
        reader = self._open()
        return len(reader), reader.get_avg_fps()

    def _decode(self, indices: Sequence[int]) -> Iterator[tuple[int, np.ndarray]]:
        reader = self._open()
        for first in range(0, len(indices), _AT_ONCE):
            some = [int(index) for index in indices[first:first + _AT_ONCE]]
            yield from zip(some, reader.get_batch(some).asnumpy())

    def _open(self):
        import decord
        return decord.VideoReader(self.path, ctx=decord.cpu(0), num_threads=1)


DECODERS = {'av': AvVideo, 'decord': DecordVideo}


def require_decoder(name: str) -> None:
    """Raises ParameterError when its package is not installed."""
    if importlib.util.find_spec(name) is None:
        raise ParameterError(f'decoder={name} needs the package {name}, which is not installed: pip install {name}, or choose '
                             f'one of {", ".join(DECODERS)}')


def _line(error: BaseException) -> str:
    return ' '.join(str(error).split())[:200] or type(error).__name__
