"""Images become RGB frames, or a FrameError that says what is wrong; never anything else."""
import array
import io
import zlib
from types import SimpleNamespace

import cv2
import numpy as np
import pytest
from hypothesis import given, settings, strategies as st
from PIL import Image as PillowImage
from sensor_msgs.msg import CompressedImage, Image

from statekv_ros.backbones.pixels import PixelSpec, SquareSpec, prepare
from statekv_ros.errors import FrameError
from statekv_ros.images import ENCODINGS, LARGEST_MAX_PIXELS, MAX_PIXELS, decode_compressed, decode_image

EIGHT_BIT = ['rgb8', 'bgr8', 'rgba8', 'bgra8', 'mono8']
BAYER = ['bayer_rggb8', 'bayer_bggr8', 'bayer_gbrg8', 'bayer_grbg8']


def image(data: np.ndarray, encoding: str, width: int, height: int, padding: int = 0, big_endian: bool = False):
    """A real message. data: uint8 [rows, bytes per row] without padding; the padding is filled with noise."""
    noise = np.random.default_rng(7).integers(0, 256, (len(data), padding), np.uint8)
    padded = np.hstack([data, noise])
    message = Image(encoding=encoding, width=width, height=height, step=padded.shape[1], is_bigendian=int(big_endian))
    message.data = array.array('B', padded.tobytes())
    return message


def random_image(encoding: str, width: int, height: int, seed: int = 0, **options):
    layout = ENCODINGS[encoding]
    rows = height * layout.rows_per_height[0] // layout.rows_per_height[1]
    row_bytes = width * layout.channels * layout.sample_bytes
    data = np.random.default_rng(seed).integers(0, 256, (rows, row_bytes), np.uint8)
    return image(data, encoding, width, height, **options)


def compressed(rgb: np.ndarray, suffix: str, format_text: str) -> CompressedImage:
    buffer = io.BytesIO()
    PillowImage.fromarray(rgb).save(buffer, suffix, **({'quality': 95} if suffix == 'JPEG' else {}))
    message = CompressedImage(format=format_text)
    message.data = array.array('B', buffer.getvalue())
    return message


def photo(width: int = 64, height: int = 48) -> np.ndarray:
    """A smooth colour picture, red to the right, green downwards, so that JPEG keeps it well and no side is equal."""
    x, y = np.meshgrid(np.linspace(0, 255, width), np.linspace(0, 255, height))
    return np.stack([x, y, np.full_like(x, 40)], axis=-1).astype(np.uint8)


# --- what a picture looks like after decoding ---------------------------------------------------------------------

def test_colour_channels_land_where_rgb_has_them():
    red = {'rgb8': [200, 10, 20], 'bgr8': [20, 10, 200], 'rgba8': [200, 10, 20, 9], 'bgra8': [20, 10, 200, 9],
           '8UC3': [20, 10, 200], '8UC4': [20, 10, 200, 9]}
    for encoding, pixel in red.items():
        row = np.tile(np.array(pixel, np.uint8), 4)[None]
        frame = decode_image(image(row, encoding, 4, 1))
        assert frame.tolist() == [[[200, 10, 20]] * 4], encoding


def test_frame_is_contiguous_uint8_rgb_for_every_encoding():
    for encoding in ENCODINGS:
        frame = decode_image(random_image(encoding, 8, 6, padding=3))
        assert (frame.shape, frame.dtype, frame.flags.c_contiguous) == ((6, 8, 3), np.uint8, True), encoding


@pytest.mark.parametrize('encoding', EIGHT_BIT + BAYER + ['yuv422', 'yuv422_yuy2', 'uyvy', 'yuyv'])
def test_unpadded_pictures_equal_those_of_rosbags_image(encoding):
    oracle = pytest.importorskip('rosbags.image', reason='rosbags-image is not installed')
    message = random_image(encoding, 34, 21 if encoding in EIGHT_BIT else 20)
    expected = oracle.image_to_cvimage(message, 'rgb8')
    if expected.ndim == 2:
        expected = np.repeat(expected[:, :, None], 3, axis=2)
    np.testing.assert_array_equal(decode_image(message), expected)


@pytest.mark.parametrize('encoding', BAYER)
def test_bayer_mosaic_of_a_flat_colour_gives_that_colour(encoding):
    colour = {'r': 180, 'g': 90, 'b': 30}
    pattern = encoding.removeprefix('bayer_')[:4]
    tile = np.array([[colour[pattern[0]], colour[pattern[1]]], [colour[pattern[2]], colour[pattern[3]]]], np.uint8)
    frame = decode_image(image(np.tile(tile, (6, 8)), encoding, 16, 12))
    assert (frame == [180, 90, 30]).all()
    assert (decode_image(image(np.repeat(np.tile(tile, (6, 8)), 2, axis=1), f'bayer_{pattern}16', 16, 12))
            == [180, 90, 30]).all()


@pytest.mark.parametrize('encoding', ['nv12', 'nv21'])
def test_semi_planar_yuv_gives_the_colour_back(encoding):
    rgb = np.full((8, 8, 3), (200, 60, 30), np.uint8)
    planar = cv2.cvtColor(rgb, cv2.COLOR_RGB2YUV_I420)                      # [12, 8]: Y, then U, then V
    u, v = planar[8:10].reshape(4, 4), planar[10:12].reshape(4, 4)
    first, second = (u, v) if encoding == 'nv12' else (v, u)
    data = np.vstack([planar[:8], np.stack([first, second], axis=-1).reshape(4, 8)])
    assert np.abs(decode_image(image(data, encoding, 8, 8, padding=5)).astype(int) - rgb).max() <= 4


def test_sixteen_bit_samples_respect_the_byte_order():
    samples = np.array([[0x1234, 0xFF00, 0x00FF]], np.uint16)
    little = image(samples.astype('<u2').view(np.uint8), 'mono16', 3, 1)
    big = image(samples.astype('>u2').view(np.uint8), 'mono16', 3, 1, big_endian=True)
    expected = [[[0x12] * 3, [0xFF] * 3, [0] * 3]]
    assert decode_image(little).tolist() == decode_image(big).tolist() == expected


def test_byte_order_does_not_touch_eight_bit_pictures():
    for encoding in EIGHT_BIT + BAYER:
        np.testing.assert_array_equal(decode_image(random_image(encoding, 8, 6, big_endian=True)),
                                      decode_image(random_image(encoding, 8, 6)))


def test_rgb_pixels_are_not_copied():
    message = random_image('rgb8', 16, 8)
    assert np.shares_memory(decode_image(message), np.frombuffer(message.data, np.uint8))


def test_resolution_may_change_from_image_to_image():
    sizes = [(64, 48), (32, 20), (128, 96), (64, 48)]
    assert [decode_image(random_image('bgr8', w, h)).shape for w, h in sizes] == [(h, w, 3) for w, h in sizes]


@settings(max_examples=120, deadline=None)
@given(encoding=st.sampled_from(sorted(ENCODINGS)), half_width=st.integers(2, 20), half_height=st.integers(2, 20),
       padding=st.integers(1, 40), seed=st.integers(0, 2**16), big_endian=st.booleans())
def test_padding_of_rows_never_changes_the_picture(encoding, half_width, half_height, padding, seed, big_endian):
    size = (2 * half_width, 2 * half_height)
    plain = random_image(encoding, *size, seed=seed, big_endian=big_endian)
    padded = random_image(encoding, *size, seed=seed, big_endian=big_endian, padding=padding)
    np.testing.assert_array_equal(decode_image(plain), decode_image(padded))


# --- bad images ---------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('change,said', [
    (dict(width=0), ['0 x 48', 'positive']),
    (dict(height=0), ['64 x 0', 'positive']),
    (dict(step=191), ['step is 191', '192', 'rgb8']),
    (dict(step=0), ['step is 0']),
    (dict(height=49), ['9216 bytes', '49 rows', '9408']),
    (dict(width=2**32 - 1, height=2**32 - 1, step=2**32 - 1), [str(2**32 - 1), str(MAX_PIXELS)]),
    (dict(encoding='rgb9'), ["'rgb9'", 'bgr8', 'yuv422']),
    (dict(encoding=''), ["''", 'rgb8']),
    (dict(encoding='16UC1'), ["'16UC1'", 'depth', 'colour']),
    (dict(encoding='32FC1'), ["'32FC1'", 'depth', 'colour']),
    (dict(encoding='yuv422', width=63), ['63 x 48', 'even']),
    (dict(encoding='nv12', height=31), ['64 x 31', 'even']),
    (dict(encoding='bayer_rggb8', width=64, height=2), ['64 x 2', 'at least 3']),
])
def test_bad_header_is_refused_with_value_and_remedy(change, said):
    message = random_image('rgb8', 64, 48)
    for field, value in change.items():
        setattr(message, field, value)
    with pytest.raises(FrameError) as error:
        decode_image(message)
    assert all(words in str(error.value) for words in said), str(error.value)


def test_short_and_empty_data_are_refused():
    message = random_image('rgb8', 64, 48)
    message.data = message.data[:-1]
    with pytest.raises(FrameError, match='9215 bytes.*9216'):
        decode_image(message)
    message.data = array.array('B')
    with pytest.raises(FrameError, match='0 bytes'):
        decode_image(message)


@settings(max_examples=300, deadline=None)
@given(encoding=st.one_of(st.sampled_from([*sorted(ENCODINGS), '16UC1', '32FC1']), st.text(max_size=12)),
       width=st.one_of(st.integers(0, 12), st.integers(0, 2**32 - 1)),
       height=st.one_of(st.integers(0, 12), st.integers(0, 2**32 - 1)),
       step=st.one_of(st.integers(0, 64), st.integers(0, 2**32 - 1)),
       big_endian=st.integers(0, 255), data=st.binary(max_size=600))
def test_random_headers_raise_nothing_but_frame_errors(encoding, width, height, step, big_endian, data):
    message = SimpleNamespace(encoding=encoding, width=width, height=height, step=step, is_bigendian=big_endian,
                              data=array.array('B', data))
    try:
        frame = decode_image(message)
    except FrameError:
        return
    assert frame.shape == (height, width, 3)


# --- compressed images --------------------------------------------------------------------------------------------

@pytest.mark.parametrize('suffix,format_text', [
    ('JPEG', 'jpeg'), ('JPEG', 'rgb8; jpeg compressed bgr8'), ('JPEG', 'bgr8; jpeg compressed bgr8'), ('JPEG', ''),
    ('JPEG', 'jpg'), ('PNG', 'png'), ('PNG', 'rgb8; png compressed bgr8')])
def test_jpeg_and_png_give_the_picture_back(suffix, format_text):
    frame = decode_compressed(compressed(photo(), suffix, format_text))
    assert frame.shape == (48, 64, 3) and frame.flags.c_contiguous
    assert np.abs(frame.astype(int) - photo()).max() <= (12 if suffix == 'JPEG' else 0)


def test_swapped_channels_are_swapped_back_when_the_format_says_so():
    swapped = np.ascontiguousarray(photo()[:, :, ::-1])
    np.testing.assert_array_equal(decode_compressed(compressed(swapped, 'PNG', 'rgb8; png compressed rgb8')), photo())


def test_grey_jpeg_becomes_three_equal_channels():
    frame = decode_compressed(compressed(photo()[:, :, 0], 'JPEG', 'mono8; jpeg compressed '))
    assert frame.shape == (48, 64, 3) and (frame == frame[:, :, :1]).all()


@pytest.mark.parametrize('suffix', ['JPEG', 'PNG'])
def test_cut_off_picture_is_refused_wherever_it_was_cut(suffix):
    whole = compressed(photo(), suffix, suffix.lower())
    for length in sorted({2, 10, *range(20, len(whole.data) - 2, 37)}):
        cut = CompressedImage(format=whole.format, data=whole.data[:length])
        with pytest.raises(FrameError, match='corrupt|neither'):
            decode_compressed(cut)


def test_empty_compressed_image_is_refused():
    with pytest.raises(FrameError, match='no data'):
        decode_compressed(CompressedImage(format='jpeg'))


def test_other_formats_are_refused_by_their_bytes():
    with pytest.raises(FrameError, match="'h264'.*neither JPEG nor PNG.*00 00 00 01.*publish JPEG or PNG"):
        decode_compressed(CompressedImage(format='h264', data=array.array('B', b'\0\0\0\1gB' + bytes(40))))


@pytest.mark.parametrize('format_text', ['16UC1; png compressed ', '16UC1; compressedDepth png',
                                         '32FC1; compressedDepth'])
def test_compressed_depth_is_refused(format_text):
    with pytest.raises(FrameError, match='depth.*colour'):
        decode_compressed(compressed(photo()[:, :, 0], 'PNG', format_text))


@pytest.mark.parametrize('kind', ['encoding', 'depth encoding', 'depth format', 'no data', 'corrupt', 'cut off', '16 bits'])
def test_an_error_quotes_only_the_start_of_a_long_text_of_the_message(kind):
    text = 'x' * 40_000
    png = [cv2.imencode('.png', np.zeros((40, 40), sample))[1].tobytes() for sample in (np.uint8, np.uint16)]
    message = {'encoding': Image(encoding=text), 'depth encoding': Image(encoding=f'16UC1{text}'),
               'depth format': CompressedImage(format=f'16UC1{text}', data=png[0]), 'no data': CompressedImage(format=text),
               'corrupt': CompressedImage(format=text, data=b'xyz'), 'cut off': CompressedImage(format=text, data=png[0][:-30]),
               '16 bits': CompressedImage(format=text, data=png[1])}[kind]
    with pytest.raises(FrameError, match='x{40}') as error:
        (decode_image if isinstance(message, Image) else decode_compressed)(message)
    assert len(str(error.value)) < 700


def test_sixteen_bit_png_is_refused_as_depth_whatever_its_format_says():
    with pytest.raises(FrameError, match='depth.*colour'):
        decode_compressed(compressed(photo()[:, :, 0].astype(np.uint16), 'PNG', 'png'))


def test_absurd_size_in_a_png_header_is_refused_before_memory_is_taken():
    message = compressed(photo(), 'PNG', 'png')
    data = bytearray(message.data)
    data[16:24] = (60000).to_bytes(4, 'big') * 2
    data[29:33] = zlib.crc32(data[12:29]).to_bytes(4, 'big')
    message.data = array.array('B', bytes(data))
    with pytest.raises(FrameError, match='60000 x 60000|absurdly large'):
        decode_compressed(message)


def test_cameras_of_8_megapixels_pass_and_a_few_bytes_of_many_pixels_do_not():
    for width, height in ((3840, 2160), (3264, 2448), (4096, 3072)):
        assert width * height <= MAX_PIXELS < LARGEST_MAX_PIXELS
    message = compressed(np.zeros((8000, 8000, 3), np.uint8), 'PNG', 'png')
    assert len(message.data) < 200_000
    with pytest.raises(FrameError, match=f'8000 x 8000.*{MAX_PIXELS}.*"max_image_pixels"'):
        decode_compressed(message)


@pytest.mark.parametrize('suffix', ['JPEG', 'PNG'])
def test_pictures_past_the_bound_are_refused_whatever_brings_them(suffix):
    raw, packed = random_image('rgb8', 64, 48), compressed(photo(), suffix, '')
    for decode, message in ((decode_image, raw), (decode_compressed, packed)):
        assert decode(message, max_pixels=64 * 48).shape == (48, 64, 3)
        with pytest.raises(FrameError, match='64 x 48.*3071.*"max_image_pixels"'):
            decode(message, max_pixels=64 * 48 - 1)


def detailed(width: int, height: int) -> np.ndarray:
    """A photo with a texture that a camera might see."""
    y, x = np.mgrid[:height, :width]
    waves = 40 * np.sin(x / 9) * np.cos(y / 7)
    return np.clip(photo(width, height) + waves[..., None], 0, 255).astype(np.uint8)


SPECS = [PixelSpec(16, 2, 2, 64 * 64, 448 * 448), PixelSpec(14, 2, 2, 4096, 6144), SquareSpec(448), SquareSpec(224)]


@pytest.mark.parametrize('spec', SPECS)
@pytest.mark.parametrize('width,height', [(3840, 2160), (1281, 721), (1920, 1080), (1000, 2996), (640, 480), (4000, 216)])
def test_a_large_jpeg_is_decoded_small_but_never_below_twice_what_the_model_sees(width, height, spec):
    message = compressed(detailed(width, height), 'JPEG', 'jpeg')
    small, whole = decode_compressed(message, frame_size=spec.frame_size), decode_compressed(message)
    scale = round(whole.shape[0] / small.shape[0])
    assert scale in (1, 2, 4, 8) and small.shape == (height / scale, width / scale, 3)
    seen = spec.frame_size(height, width)
    assert scale == 1 or all(side >= 2 * wanted for side, wanted in zip(small.shape, seen))
    if (width, height) == (3840, 2160):
        assert scale > 1
    of_small, of_whole = prepare(small, spec), prepare(whole, spec)
    assert of_small.shape == of_whole.shape == (*seen, 3)
    difference = np.abs(of_small.astype(int) - of_whole)
    assert difference.mean() < 1.5 and np.percentile(difference, 99) < 12, (difference.mean(), np.percentile(difference, 99))


def test_a_cut_off_jpeg_is_refused_also_where_it_would_be_decoded_small():
    whole = compressed(detailed(1920, 1080), 'JPEG', 'jpeg')
    cut = CompressedImage(format='jpeg', data=whole.data[:len(whole.data) // 2])
    with pytest.raises(FrameError, match='corrupt'):
        decode_compressed(cut, frame_size=SquareSpec(224).frame_size)


def test_a_png_is_decoded_whole():
    frame = decode_compressed(compressed(photo(1920, 1080), 'PNG', ''), frame_size=SquareSpec(224).frame_size)
    np.testing.assert_array_equal(frame, photo(1920, 1080))


@settings(max_examples=150, deadline=None)
@given(magic=st.sampled_from([b'', b'\xff\xd8\xff', b'\x89PNG\r\n\x1a\n']), tail=st.binary(min_size=1, max_size=200),
       format_text=st.text(max_size=20))
def test_random_compressed_bytes_raise_nothing_but_frame_errors(magic, tail, format_text):
    with pytest.raises(FrameError):
        decode_compressed(SimpleNamespace(format=format_text, data=array.array('B', magic + tail)))


@settings(max_examples=60, deadline=None)
@given(suffix=st.sampled_from(['JPEG', 'PNG']),
       changes=st.lists(st.tuples(st.floats(0, 1), st.integers(0, 255)), min_size=1, max_size=6))
def test_flipped_bytes_give_a_picture_or_a_frame_error(suffix, changes):
    message = compressed(photo(), suffix, '')
    for place, value in changes:
        message.data[int(place * (len(message.data) - 1))] = value
    try:
        assert decode_compressed(message).ndim == 3
    except FrameError:
        pass
