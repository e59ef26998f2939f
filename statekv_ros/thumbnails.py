"""Frames become small JPEGs."""
import cv2
import numpy as np

# Bytes of a pixel by quality: 240 frames of five clips of real footage, 160 pixels wide.
_QUALITIES = 1, 10, 30, 50, 70, 80, 90, 95, 100
_BYTES_PER_PIXEL = .06, .09, .13, .16, .20, .24, .34, .46, .86
_TALLEST = 2        # widths


def thumbnail_size(height: int, width: int, most_width: int) -> tuple[int, int]:
    """Height and width of the thumbnail of a frame: at most `most_width` pixels wide and twice as tall, never larger than the
    frame, of its aspect ratio."""
    scale = min(1.0, most_width / width, _TALLEST * most_width / height)
    return max(1, round(height * scale)), max(1, round(width * scale))


def shrink(frame: np.ndarray, most_width: int) -> np.ndarray:
    """A frame in the size of its thumbnail.

    Args:
        frame: uint8 [height, width, 3].
    """
    height, width = thumbnail_size(*frame.shape[:2], most_width)
    # Halves are what OpenCV averages fastest by far: 0.6 ms rather than 10 for 720p.
    while frame.shape[0] % 2 == frame.shape[1] % 2 == 0 and frame.shape[0] >= 2 * height and frame.shape[1] >= 2 * width:
        frame = cv2.resize(frame, (frame.shape[1] // 2, frame.shape[0] // 2), interpolation=cv2.INTER_AREA)
    return frame if frame.shape[:2] == (height, width) else cv2.resize(frame, (width, height), interpolation=cv2.INTER_AREA)


def make_thumbnail(frame: np.ndarray, most_width: int, quality: int) -> bytes:
    """The thumbnail of a frame as JPEG.

    Args:
        frame: uint8 [height, width, 3] RGB.
        quality: of the JPEG, 1 to 100.
    """
    small = cv2.cvtColor(shrink(frame, most_width), cv2.COLOR_RGB2BGR)
    return cv2.imencode('.jpg', small, [cv2.IMWRITE_JPEG_QUALITY, quality])[1].tobytes()


def open_thumbnail(jpeg: bytes) -> np.ndarray:
    """What `make_thumbnail` made, as uint8 [height, width, 3] RGB."""
    return cv2.cvtColor(cv2.imdecode(np.frombuffer(jpeg, np.uint8), cv2.IMREAD_COLOR), cv2.COLOR_BGR2RGB)


def likely_bytes(height: int, width: int, most_width: int, quality: int) -> int:
    """What the thumbnail of a camera's frame has, going by real footage; a half or twice of it is nothing unusual."""
    height, width = thumbnail_size(height, width, most_width)
    return round(height * width * np.interp(quality, _QUALITIES, _BYTES_PER_PIXEL))
