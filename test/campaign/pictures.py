"""Images that no camera should send, and those that none can: each with words that describe it."""
import io
import random
import struct
import zlib
from functools import cache

import numpy as np
from PIL import Image as Picture
from PIL import PngImagePlugin
from rclpy.serialization import serialize_message
from sensor_msgs.msg import CompressedImage, Image

from campaign.mutation import cut_short, flipped
from statekv_ros.images import ENCODINGS

_ODD_ENCODINGS = ('8UC1000', 'rgba', 'nv24', '16UC1', '32FC1', '64FC4', '', 'RGB8', ' rgb8', 'rgb8\n', 'ünïcödé',
                  '\U0001f4a9', 'rgb8\x00x', 'x' * 100_000, "'; drop", '{0}%s')
_FORMATS = ('jpeg', 'jpg', 'png', '', 'rgb8; jpeg compressed bgr8', 'rgb8; jpeg compressed rgb8', '16UC1; compressedDepth',
            '32FC1; compressedDepth png', ';;;;', 'ü\U0001f4a9', 'jpeg' * 10_000)
_FRAME_IDS = ('camera', '', 'ü' * 50, 'x' * 70_000, 'a\x00b')
_SIDES = (0, 1, 2, 63, 64, 8192, 8193, 32768, 65536, 2**31 - 1, 2**31, 2**32 - 1)
_SIZES = ((1, 1), (2, 2), (3, 3), (64, 48), (65, 47), (1, 300), (300, 1), (2, 500), (500, 2), (320, 240), (641, 3), (31, 31))
_LARGE = ((2580, 2580, 'rgb8'), (8192, 41, 'mono8'), (41, 8192, 'mono8'), (65536, 330, 'mono8'), (60_000, 1, 'mono8'))
# What takes a decoder a second or more comes seldom: one in so many.
_HEAVY_ONE_IN = 400


def good_image(seed: int, size: int = 64) -> Image:
    """A picture of noise."""
    pixels = np.random.default_rng(seed).integers(0, 256, (size * 3 // 4, size, 3), dtype=np.uint8)
    return Image(width=size, height=size * 3 // 4, encoding='rgb8', step=3 * size, data=pixels.tobytes())


def good_compressed(seed: int) -> CompressedImage:
    """The same as a JPEG."""
    return CompressedImage(format='jpeg', data=_files()['jpeg'] if seed % 2 else _files()['png'])


def bad_image(rng: random.Random) -> tuple[Image, str]:
    """An Image whose size, step, length, encoding or frame id may all be wrong."""
    encoding = rng.choice((*ENCODINGS, *_ODD_ENCODINGS))
    kind = rng.random()
    if rng.randrange(_HEAVY_ONE_IN) == 0:
        width, height, encoding = rng.choice(_LARGE)
        step = width * (3 if encoding == 'rgb8' else 1)
        data = bytes(step * height)
    elif kind < 0.6:        # nearly right
        width, height = rng.choice(_SIZES)
        layout = ENCODINGS.get(encoding)
        pixel = layout.channels * layout.sample_bytes if layout else rng.choice((1, 2, 3))
        step = max(0, width * pixel + rng.choice((0, 0, 0, 1, 7, -1, 64)))
        rows = height * layout.rows_per_height[0] // layout.rows_per_height[1] if layout else height
        data = rng.randbytes(max(0, step * rows + rng.choice((0, 0, 0, 0, -1, 1, -step, 1000))))
    else:                   # a header of garbage
        width, height, step = (rng.choice((*_SIDES, rng.randrange(2**32))) for _ in range(3))
        data = rng.randbytes(rng.choice((0, 1, 100, 3072)))
    message = Image(width=width, height=height, encoding=encoding, step=step, is_bigendian=rng.choice((0, 1, 255)), data=data)
    message.header.frame_id = rng.choice(_FRAME_IDS)
    return message, (f'Image {width} x {height} {encoding[:20]!r}, step {step}, {len(data)} bytes, is_bigendian '
                     f'{message.is_bigendian}, frame_id {message.header.frame_id[:5]!r}')


def bad_compressed(rng: random.Random) -> tuple[CompressedImage, str]:
    """A CompressedImage that may be spoiled, of another kind, or a bomb."""
    heavy = rng.randrange(_HEAVY_ONE_IN) == 0
    name = rng.choice(('png 8000', 'jpeg 8000') if heavy else list(_files()))
    data, what = (_large_files() if heavy else _files())[name], 'whole'
    kind = rng.random()
    if kind < 0.3 and not heavy:
        data, what = flipped(data, rng)
    elif kind < 0.5 and not heavy:
        data, what = cut_short(data, rng)
    elif kind < 0.55 and not heavy:
        data, what = rng.randbytes(rng.choice((0, 1, 8, 2000))), 'replaced by random bytes'
    message = CompressedImage(format=rng.choice(_FORMATS), data=data)
    message.header.frame_id = rng.choice(_FRAME_IDS)
    return message, f'CompressedImage {name} ({len(data)} bytes, {what}), format {message.format[:40]!r}'


def bad_serialised(rng: random.Random, compressed: bool) -> tuple[bytes, str]:
    """Bytes in the place of a serialised image."""
    message = good_compressed(0) if compressed else good_image(0, 32)
    message.header.frame_id = 'camera'
    data, kind = serialize_message(message), rng.random()
    if kind < 0.5:
        data, what = flipped(data, rng, 0, 64)
    elif kind < 0.8:
        data, what = cut_short(data, rng)
    elif kind < 0.9:
        place = rng.choice(range(12, 48, 4))
        value = rng.choice((0, 2**31 - 1, 2**31, 2**32 - 1))
        data, what = data[:place] + struct.pack('<I', value) + data[place + 4:], f'{value} at {place}'
    else:
        data, what = rng.randbytes(rng.choice((0, 1, 4, 12, 60))), 'random'
    return data, f'serialised {type(message).__name__}, {what}: {data[:64].hex()}'


def bad_stamp(rng: random.Random, now_ns: int) -> tuple[int, int]:
    """Seconds and nanoseconds that a header stamp should not hold."""
    second = now_ns // 10**9
    return rng.choice(((0, 0), (-1, 0), (-2**31, 0), (2**31 - 1, 999_999_999), (2**31 - 1, 2**32 - 1), (5, 2**32 - 1),
                       (max(0, second - rng.randrange(900)), 1), (second + 10**6, 3), (0, 1)))


def each_encoding() -> list[Image]:
    """A right image of 320 x 240 for every encoding that can be watched."""
    messages = []
    for name, layout in ENCODINGS.items():
        step, rows = 320 * layout.channels * layout.sample_bytes, 240 * layout.rows_per_height[0] // layout.rows_per_height[1]
        messages.append(Image(width=320, height=240, encoding=name, step=step, data=bytes(step * rows)))
    return messages


def large_images() -> list[Image]:
    """Whole images of every large size, the one of the most bytes last."""
    messages = []
    for width, height, encoding in _LARGE:
        step = width * (3 if encoding == 'rgb8' else 1)
        messages.append(Image(width=width, height=height, encoding=encoding, step=step, data=bytes(step * height)))
        messages[-1].header.frame_id = max(_FRAME_IDS, key=len)
    return sorted(messages, key=lambda message: len(message.data))


def large_compressed() -> list[CompressedImage]:
    """The compressed images of many pixels, the one of the most bytes last."""
    messages = [CompressedImage(format=max(_FORMATS, key=len), data=data) for data in _large_files().values()]
    for message in messages:
        message.header.frame_id = max(_FRAME_IDS, key=len)
    return sorted(messages, key=lambda message: len(message.data))


@cache
def _files() -> dict[str, bytes]:
    """Small files of all kinds by name."""
    picture = Picture.fromarray(np.random.default_rng(1).integers(0, 256, (48, 64, 3), dtype=np.uint8))
    text = PngImagePlugin.PngInfo()
    text.add_text('a', 'A' * 3_000_000, zip=True)
    jpeg = _encoded(picture, 'JPEG')
    frame = jpeg.find(b'\xff\xc0')
    return {
        'jpeg': jpeg, 'png': _encoded(picture, 'PNG'), 'progressive': _encoded(picture, 'JPEG', progressive=True),
        'exif': _encoded(picture, 'JPEG', exif=b'Exif\x00\x00' + bytes(range(256)) * 16),
        **{f'{mode} jpeg': _encoded(picture.convert(mode), 'JPEG') for mode in ('L', 'CMYK')},
        **{f'{mode} png': _encoded(picture.convert(mode), 'PNG') for mode in ('P', 'RGBA', 'LA', '1', 'I;16')},
        'animated png': _encoded(picture, 'PNG', save_all=True, append_images=[picture] * 3),
        'png with 3 MB of text': _encoded(picture, 'PNG', pnginfo=text),
        **{kind: _encoded(picture, kind) for kind in ('GIF', 'WEBP', 'TIFF', 'BMP', 'MPO')},
        'thin png': _encoded(Picture.new('RGB', (8192, 3)), 'PNG'),
        'png of 60000 x 60000': _png(60_000, 60_000), 'png of 11000 x 11000': _png(11_000, 11_000),
        'png of 2^31 x 2^31': _png(2**31 - 1, 2**31 - 1), 'png of 0 x 5': _png(0, 5), 'png of 8192 x 8192': _png(8192, 8192),
        'png of 16 bits': _png(16, 16, 16, zlib.compress(bytes(16 * (16 * 6 + 1)))),
        'jpeg of 65535 x 65535': jpeg[:frame + 5] + b'\xff' * 4 + jpeg[frame + 9:]}


@cache
def _large_files() -> dict[str, bytes]:
    black = Picture.new('RGB', (8000, 8000))
    return {'png 8000': _encoded(black, 'PNG'), 'jpeg 8000': _encoded(black, 'JPEG')}


def _encoded(picture: Picture.Image, kind: str, **options) -> bytes:
    out = io.BytesIO()
    picture.save(out, kind, **options)
    return out.getvalue()


def _png(width: int, height: int, depth: int = 8, pixels: bytes = b'') -> bytes:
    """A PNG whose header says this size, whatever it holds."""
    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack('>I', len(data)) + name + data + struct.pack('>I', zlib.crc32(name + data))
    return (b'\x89PNG\r\n\x1a\n' + chunk(b'IHDR', struct.pack('>IIBBBBB', width, height, depth, 2, 0, 0, 0))
            + chunk(b'IDAT', pixels or zlib.compress(bytes(1000))) + chunk(b'IEND', b''))
