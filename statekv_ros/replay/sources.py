"""Pictures with times, from a video file or a folder of images: what a bag is made of."""
import math
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
from PIL import Image as PillowImage, ImageOps

from statekv_ros.errors import BagError
from statekv_ros.images import MAX_PIXELS
from statekv_ros.replay.bag_options import FOLDER_RATE_HZ, check_rate

IMAGE_SUFFIXES = ('.png', '.jpg', '.jpeg', '.bmp', '.tif', '.tiff', '.webp', '.ppm', '.pgm')
# FFmpeg's own lines on broken videos: the BagError says it. Read when OpenCV opens the first video.
os.environ.setdefault('OPENCV_FFMPEG_LOGLEVEL', '-8')


def check_size(width: int, height: int) -> None:
    """Raises BagError for pictures of no pixels, or of more than the node accepts."""
    if not (width > 0 and height > 0 and width * height <= MAX_PIXELS):
        raise BagError(f'size must be positive, WIDTHxHEIGHT, and at most {MAX_PIXELS} pixels in all, got {width}x{height}')


@dataclass(frozen=True)
class Source:
    """A video file or a folder of images, opened lazily by `frames`.

    rate_hz: pictures per second of video time. None: every picture of a video at its own time, or FOLDER_RATE_HZ for a
        folder. For a video, picture k is the one on show at k / rate_hz seconds: a lower rate leaves pictures out, a
        higher one shows some twice. A folder's pictures are all used, 1 / rate_hz seconds apart.
    size: (width, height) to resize to, None for the original size.
    """

    path: Path
    rate_hz: float | None = None
    size: tuple[int, int] | None = None
    max_frames: int | None = None

    def __post_init__(self):
        if not self.path.exists():
            raise BagError(f'source {self.path} does not exist: give a video file or a folder of images')
        if self.rate_hz is not None:
            check_rate(self.rate_hz)
        if self.max_frames is not None and self.max_frames < 1:
            raise BagError(f'max frames must be at least 1, got {self.max_frames}')
        if self.size is not None:
            check_size(*self.size)

    def frames(self) -> Iterator[tuple[int, np.ndarray]]:
        """(time since the start in ns, picture uint8 [height, width, 3] RGB). Raises BagError on unreadable input."""
        pictures = self._folder() if self.path.is_dir() else self._video()
        for index, (time_ns, picture) in enumerate(pictures):
            if index == self.max_frames:
                return
            if self.size is not None and picture.shape[1::-1] != self.size:
                picture = cv2.resize(picture, self.size, interpolation=cv2.INTER_AREA)
            yield time_ns, picture

    def expected_frames(self) -> int | None:
        """How many pictures `frames` will give, for progress bars; None where a video does not say."""
        if self.path.is_dir():
            count = len(_image_files(self.path))
        else:
            capture = _open_video(self.path)
            count, video_rate = capture.get(cv2.CAP_PROP_FRAME_COUNT), capture.get(cv2.CAP_PROP_FPS)
            capture.release()
            if count <= 0 or video_rate <= 0:
                return None
            count = math.ceil(count / video_rate * self.rate_hz - 1e-6) if self.rate_hz else int(count)
        return min(count, self.max_frames or count)

    def _folder(self) -> Iterator[tuple[int, np.ndarray]]:
        files = _image_files(self.path)
        if not files:
            raise BagError(f'folder {self.path} has no images ({", ".join(IMAGE_SUFFIXES)})')
        rate_hz = self.rate_hz or FOLDER_RATE_HZ
        for index, file in enumerate(files):
            yield round(index * 1e9 / rate_hz), _read_image(file)

    def _video(self) -> Iterator[tuple[int, np.ndarray]]:
        if self.rate_hz is None:
            yield from _video_frames(self.path)
            return
        # Sample and hold, like a camera of rate_hz that looks at the playing video.
        shown, tick = None, 0
        for time_ns, picture in _video_frames(self.path):
            while shown is not None and (due := round(tick * 1e9 / self.rate_hz)) < time_ns:
                yield due, shown
                tick += 1
            shown, shown_ns = picture, time_ns
        # The last picture stays on show for one more period of the video.
        end_ns = shown_ns + _period_ns(self.path)
        while (due := round(tick * 1e9 / self.rate_hz)) < end_ns:
            yield due, shown
            tick += 1


def _image_files(folder: Path) -> list[Path]:
    """Images in reading order: frame2 comes before frame10."""
    def order(file: Path) -> list:
        return [int(part) if part.isdigit() else part.lower() for part in re.split(r'(\d+)', file.name)]
    return sorted((f for f in folder.iterdir() if f.suffix.lower() in IMAGE_SUFFIXES and f.is_file()), key=order)


def _read_image(file: Path) -> np.ndarray:
    """uint8 [height, width, 3] RGB, upright. Pillow, because it refuses files that were cut off."""
    try:
        with PillowImage.open(file) as image:
            if image.mode.startswith(('I', 'F')):
                raise BagError(f'image {file} holds one wide number per pixel (mode {image.mode!r}, depth?), not a '
                               'picture: take it out of the folder')
            return np.asarray(ImageOps.exif_transpose(image).convert('RGB'))
    except BagError:
        raise
    except Exception as error:  # Pillow's decoders raise OSError, SyntaxError, ValueError, struct.error, ...
        raise BagError(f'image {file} is cut off, corrupt, or not an image ({error}): repair it or take it out of the '
                       'folder') from error


def _open_video(path: Path) -> cv2.VideoCapture:
    capture = cv2.VideoCapture(str(path))
    if not capture.isOpened():
        raise BagError(f'video {path} cannot be read: it is cut off, not a video, or has a codec that OpenCV lacks '
                       '(convert it: ffmpeg -i IN -c:v libx264 OUT.mp4)')
    return capture


def _period_ns(path: Path) -> int:
    capture = _open_video(path)
    rate_hz = capture.get(cv2.CAP_PROP_FPS)
    capture.release()
    return round(1e9 / rate_hz) if math.isfinite(rate_hz) and rate_hz > 0 else 40_000_000


def _video_frames(path: Path) -> Iterator[tuple[int, np.ndarray]]:
    """(time in ns, picture RGB) of every picture; times are the video's own, so that a variable rate is kept."""
    capture = _open_video(path)
    period_ns = _period_ns(path)
    first_ns, last_ns, count = None, -1, 0
    try:
        while True:
            read, picture = capture.read()
            if not read:
                break
            stated_ns = round(capture.get(cv2.CAP_PROP_POS_MSEC) * 1e6)
            first_ns = stated_ns if first_ns is None else first_ns
            time_ns = stated_ns - first_ns
            if count and time_ns <= last_ns:        # containers without times: count periods
                time_ns = last_ns + period_ns
            yield time_ns, cv2.cvtColor(picture, cv2.COLOR_BGR2RGB)
            last_ns, count = time_ns, count + 1
    finally:
        capture.release()
    if not count:
        raise BagError(f'video {path} has no frames that can be read: it is cut off or has a codec that OpenCV lacks')
