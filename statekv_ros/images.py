"""Image messages become frames: uint8 [height, width, 3] RGB.

Headers are checked here, before OpenCV or cv_bridge sees the bytes: they trust them, and show a shifted or half grey picture
where `step`, the byte order or the length of the data is not what they assume. Then cv_bridge converts, where a distribution
has it and it makes the same pixels of an encoding as OpenCV does, which else does it. Not every cv_bridge does: compiled for
another NumPy it cannot be loaded, the one on PyPI counts nine channels in rgb8 beside OpenCV 5, and some encodings it lacks.
"""
import io
import sys
from collections.abc import Callable
from functools import lru_cache
from typing import Any, NamedTuple

import cv2
import numpy as np
from PIL import Image as PillowImage

from statekv_ros.errors import FrameError

# Larger pictures are refused unless the user raises the bound: a model sees a fraction of this, and while a picture of few
# bytes and many pixels is decoded, no question is answered.
MAX_PIXELS = 4096 * 3072
# The bound can be no higher: far above any camera on a robot, and where Pillow begins to warn.
LARGEST_MAX_PIXELS = 1 << 26


class Encoding(NamedTuple):
    """How one encoding of sensor_msgs/Image lies in memory, and how it becomes RGB."""

    channels: int                   # samples per pixel in one row of the (first) plane
    to_rgb: int | None = None       # OpenCV conversion code; None: it is RGB
    sample_bytes: int = 1
    rows_per_height: tuple = (1, 1)  # (rows of data, rows of picture)
    even: str = ''                  # sides that must be even: '', 'width' or 'width and height'
    minimum_side: int = 1           # pixels


def _bayer(code: int, sample_bytes: int = 1) -> Encoding:
    # OpenCV's demosaicing leaves pictures of one or two rows or columns black.
    return Encoding(1, code, sample_bytes, minimum_side=3)


_UYVY = Encoding(2, cv2.COLOR_YUV2RGB_UYVY, even='width')
_YUY2 = Encoding(2, cv2.COLOR_YUV2RGB_YUY2, even='width')

ENCODINGS = {
    'rgb8': Encoding(3),
    'bgr8': Encoding(3, cv2.COLOR_BGR2RGB),
    'rgba8': Encoding(4, cv2.COLOR_RGBA2RGB),
    'bgra8': Encoding(4, cv2.COLOR_BGRA2RGB),
    'mono8': Encoding(1, cv2.COLOR_GRAY2RGB),
    # OpenCV's own type names. Images without a named encoding come from OpenCV, where colour is BGR.
    '8UC1': Encoding(1, cv2.COLOR_GRAY2RGB),
    '8UC3': Encoding(3, cv2.COLOR_BGR2RGB),
    '8UC4': Encoding(4, cv2.COLOR_BGRA2RGB),
    # 16 bits per sample, full scale 65535. The upper byte is what an 8 bit model can use.
    'rgb16': Encoding(3, None, 2),
    'bgr16': Encoding(3, cv2.COLOR_BGR2RGB, 2),
    'rgba16': Encoding(4, cv2.COLOR_RGBA2RGB, 2),
    'bgra16': Encoding(4, cv2.COLOR_BGRA2RGB, 2),
    'mono16': Encoding(1, cv2.COLOR_GRAY2RGB, 2),
    # ROS names a mosaic by its first row, OpenCV by the second pixels of its second row.
    'bayer_rggb8': _bayer(cv2.COLOR_BayerBG2RGB),
    'bayer_bggr8': _bayer(cv2.COLOR_BayerRG2RGB),
    'bayer_gbrg8': _bayer(cv2.COLOR_BayerGR2RGB),
    'bayer_grbg8': _bayer(cv2.COLOR_BayerGB2RGB),
    'bayer_rggb16': _bayer(cv2.COLOR_BayerBG2RGB, 2),
    'bayer_bggr16': _bayer(cv2.COLOR_BayerRG2RGB, 2),
    'bayer_gbrg16': _bayer(cv2.COLOR_BayerGR2RGB, 2),
    'bayer_grbg16': _bayer(cv2.COLOR_BayerGB2RGB, 2),
    'yuv422': _UYVY,
    'uyvy': _UYVY,
    'yuv422_yuy2': _YUY2,
    'yuyv': _YUY2,
    'nv12': Encoding(1, cv2.COLOR_YUV2RGB_NV12, rows_per_height=(3, 2), even='width and height'),
    'nv21': Encoding(1, cv2.COLOR_YUV2RGB_NV21, rows_per_height=(3, 2), even='width and height'),
}

# Distances or bare numbers: a picture of them would have to be invented.
_DEPTH_PREFIXES = ('16UC', '16SC', '32SC', '32FC', '64FC', '8SC')
_DEPTH_REMEDY = ('depth and raw-number images cannot be watched; point the camera at a colour or grey topic, '
                 'for example .../color/image_raw or .../rgb/image_raw')


def decode_image(msg, max_pixels: int = MAX_PIXELS) -> np.ndarray:
    """The picture in a sensor_msgs/Image as uint8 [height, width, 3] RGB, C-contiguous.

    max_pixels: bound on height x width of the picture.

    Padded rows (`step`) and both byte orders are handled. The result may share memory with `msg.data`, and is
    read-only where that is. Works on rclpy's messages and on those that rosbags deserialises.

    Raises FrameError when size, step, data or encoding cannot be right, naming the value and the remedy.
    """
    name, layout = _known_encoding(msg.encoding)
    width, height = int(msg.width), int(msg.height)
    _check_size(width, height, name, layout, max_pixels)
    row_bytes = width * layout.channels * layout.sample_bytes
    step = int(msg.step)
    if step < row_bytes:
        raise FrameError(
            f'step is {step} bytes, but a row of {width} {name!r} pixels takes {row_bytes}: '
            'the camera driver must set step to the bytes from one row to the next')
    rows = height * layout.rows_per_height[0] // layout.rows_per_height[1]
    data = np.frombuffer(msg.data, np.uint8) if len(msg.data) else np.empty(0, np.uint8)
    if data.size < rows * step:
        raise FrameError(
            f'data has {data.size} bytes, but {rows} rows of step {step} ({width} x {height} {name!r}) take '
            f'{rows * step}: the image was cut off, or the driver set a wrong height or step')
    pixels = data[:rows * step].reshape(rows, step)[:, :row_bytes]
    if layout.sample_bytes == 2:
        pixels = pixels[:, 0 if msg.is_bigendian else 1::2]     # the upper byte of each sample
    shape = (rows, width) if layout.channels == 1 else (rows, width, layout.channels)
    pixels = np.ascontiguousarray(pixels).reshape(shape)
    if layout.to_rgb is None:
        return pixels
    try:
        return _to_rgb(pixels, name, width, height)
    except (cv2.error, TypeError) as error:     # cv_bridge's own is a TypeError
        raise FrameError(f'image of encoding {name!r} and shape {shape} cannot become RGB: {error}') from error


def decode_compressed(msg, max_pixels: int = MAX_PIXELS,
                      frame_size: Callable[[int, int], tuple[int, int]] | None = None) -> np.ndarray:
    """The picture in a sensor_msgs/CompressedImage (JPEG or PNG) as uint8 [height, width, 3] RGB, C-contiguous.

    Args:
        max_pixels: bound on height x width of the picture, looked at before it is decoded.
        frame_size: from the height and width of a picture to those that the model sees. A JPEG of four times that size or
            more is decoded at a half, a quarter or an eighth of its own, in less than half of the time; None: always whole.

    The bytes decide what it is; `format` only tells depth from colour, and the channel order that was compressed.
    Pillow decodes because it refuses cut-off data, where OpenCV 4 returns a partly grey picture.

    Raises FrameError for empty, cut-off or corrupt data, for other formats, for depth and for too many pixels.
    """
    source, _, compression = str(msg.format).partition(';')
    source = source.strip()
    if source.startswith(_DEPTH_PREFIXES) or 'compressedDepth' in msg.format:
        raise FrameError(f'compressed image has format {_quoted(msg.format)}: {_DEPTH_REMEDY}')
    data = memoryview(msg.data).cast('B') if len(msg.data) else b''
    if not len(data):
        raise FrameError(f'compressed image of format {_quoted(msg.format)} has no data: '
                         'check the camera driver, and that the whole message arrives')
    picture = _open_compressed(data, msg.format)
    width, height = picture.size
    if width * height > max_pixels:
        raise FrameError(_too_large(width, height, max_pixels))
    if picture.mode.startswith(('I', 'F')):
        raise FrameError(f'compressed image of format {_quoted(msg.format)} has mode {picture.mode!r} (one wide number per '
                         f'pixel): {_DEPTH_REMEDY}')
    if frame_size is not None and picture.format == 'JPEG':
        _leave_out_detail(picture, frame_size)
    try:
        rgb = np.asarray(picture.convert('RGB'))
    except Exception as error:  # Pillow's decoders raise OSError, SyntaxError, ValueError, struct.error, zlib.error...
        raise FrameError(f'compressed image of format {_quoted(msg.format)} ({len(data)} bytes, {width} x {height}) is cut '
                         f'off or corrupt: {error}') from error
    if 'compressed rgb' in compression:
        # image_transport's convention: the encoder was handed RGB where it takes BGR, so red and blue are swapped.
        rgb = rgb[:, :, ::-1]
    return np.ascontiguousarray(rgb)


class _Checked(NamedTuple):
    """A message after its checks, as cv_bridge reads one: rows without padding, one byte a sample."""
    encoding: str
    width: int
    height: int
    step: int
    data: np.ndarray
    is_bigendian: bool = sys.byteorder == 'big'     # cv_bridge looks at it even where a sample is one byte


def _to_rgb(pixels: np.ndarray, name: str, width: int, height: int) -> np.ndarray:
    """uint8 pixels of an encoding as RGB, by cv_bridge or OpenCV."""
    bridge = bridge_for(name)
    if bridge is None:
        return cv2.cvtColor(pixels, ENCODINGS[name].to_rgb)
    return _by_bridge(bridge, pixels, name, width, height)


def _by_bridge(bridge: Any, pixels: np.ndarray, name: str, width: int, height: int) -> np.ndarray:
    # Of 16 bits only the upper byte is left: cv_bridge would scale them by 255 / 65535, which is at most one level apart.
    checked = _Checked(name.replace('16', '8'), width, height, pixels.strides[0], pixels)
    return np.ascontiguousarray(bridge.imgmsg_to_cv2(checked, 'rgb8'))


@lru_cache(maxsize=None)
def bridge_for(name: str) -> Any:
    """cv_bridge's CvBridge where it makes of an encoding what OpenCV does; None where OpenCV is to do it."""
    layout, side = ENCODINGS[name], 32
    bridge = _bridge()
    if bridge is None or layout.to_rgb is None:
        return None
    rows = side * layout.rows_per_height[0] // layout.rows_per_height[1]
    shape = (rows, side) if layout.channels == 1 else (rows, side, layout.channels)
    probe = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    try:
        made = _by_bridge(bridge, probe, name, side, side)
    except Exception:   # it does not know the encoding, or does not work here at all
        return None
    return bridge if np.array_equal(made, cv2.cvtColor(probe, layout.to_rgb)) else None


@lru_cache(maxsize=None)
def _bridge() -> Any:
    try:
        from cv_bridge import CvBridge
        return CvBridge()
    except Exception:   # not installed, or compiled for another NumPy or OpenCV: what it then raises is not foreseeable
        return None


def _quoted(text: str) -> str:
    """A foreign text for an error: errors are repeated on /diagnostics, and a format may be any number of characters."""
    return repr(text[:64])


def _known_encoding(encoding: str) -> tuple[str, Encoding]:
    name = str(encoding).strip()
    if name in ENCODINGS:
        return name, ENCODINGS[name]
    if name.startswith(_DEPTH_PREFIXES):
        raise FrameError(f'image has encoding {_quoted(name)}: {_DEPTH_REMEDY}')
    raise FrameError(f'image has unknown encoding {_quoted(name)}; let the driver publish one of: {", ".join(ENCODINGS)}')


def _check_size(width: int, height: int, name: str, layout: Encoding, max_pixels: int) -> None:
    if width == 0 or height == 0:
        raise FrameError(f'image is {width} x {height} pixels: width and height must be positive, '
                         'check that the camera delivers pictures')
    if width * height > max_pixels:
        raise FrameError(_too_large(width, height, max_pixels))
    if (layout.even and width % 2) or (layout.even == 'width and height' and height % 2):
        raise FrameError(f'image is {width} x {height} pixels, but {name!r} needs an even {layout.even}')
    if min(width, height) < layout.minimum_side:
        raise FrameError(f'image is {width} x {height} pixels, but {name!r} needs at least '
                         f'{layout.minimum_side} x {layout.minimum_side}')


def _too_large(width: int, height: int, max_pixels: int) -> str:
    return (f'image is {width} x {height} pixels, more than the {max_pixels} that are accepted: the header is wrong, or let '
            'the driver publish smaller pictures, or raise the parameter "max_image_pixels"')


def _leave_out_detail(picture: PillowImage.Image, frame_size: Callable[[int, int], tuple[int, int]]) -> None:
    """Have a JPEG decoded at the smallest scale that keeps twice the model's height and width, as Pillow's own thumbnails do,
    and the same frame for the model: a side that the scale does not divide would be rounded up, and the picture stretched."""
    width, height = picture.size
    wanted = frame_size(height, width)
    for scale in (8, 4, 2):
        smaller = height // scale, width // scale
        whole = height % scale == width % scale == 0
        if whole and all(side >= 2 * seen for side, seen in zip(smaller, wanted)) and frame_size(*smaller) == wanted:
            picture.draft(None, smaller[::-1])
            return


def _open_compressed(data, format_text: str) -> PillowImage.Image:
    """Header only, no pixels yet. Other formats than JPEG and PNG stay closed: fewer parsers for foreign bytes."""
    try:
        return PillowImage.open(io.BytesIO(data), formats=('JPEG', 'PNG'))
    except PillowImage.UnidentifiedImageError as error:
        raise FrameError(f'compressed image of format {_quoted(format_text)} is neither JPEG nor PNG (first bytes: '
                         f'{bytes(data[:8]).hex(" ")}): let the driver publish JPEG or PNG') from error
    except PillowImage.DecompressionBombError as error:
        raise FrameError(f'compressed image of format {_quoted(format_text)} is absurdly large: {error}') from error
    except Exception as error:  # damaged headers raise whatever the parser trips over
        raise FrameError(f'compressed image of format {_quoted(format_text)} has a corrupt header: {error}') from error
