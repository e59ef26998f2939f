"""Bags made from videos and images: whole, or not at all."""
import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import cv2
import numpy as np
import pytest
from rosbags.highlevel import AnyReader

from bag_samples import CLIP, STORAGES, bag, clip_frames  # noqa: F401
from statekv_ros.errors import BagError
from statekv_ros.images import decode_compressed, decode_image
from statekv_ros.replay.bag_options import BagOptions
from statekv_ros.replay.bag_reader import bag_info, choose_topics, read_images
from statekv_ros.replay.bag_writer import write_bag
from statekv_ros.replay.cli import main
from statekv_ros.replay.sources import Source

PERIOD_NS = 40_000_000          # of the clip: 25 frames per second


def limit_file_size() -> None:
    """No file of the process may grow beyond 4 MB: writing more fails as on a full disk."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 22, 1 << 22))


def picture(index: int, width: int = 16, height: int = 12) -> np.ndarray:
    return np.full((height, width, 3), index, np.uint8)


def image_folder(folder: Path, names: list[str]) -> Path:
    folder.mkdir()
    for index, name in enumerate(names):
        assert cv2.imwrite(str(folder / name), picture(10 * index))
    return folder


def test_video_becomes_a_bag_with_its_pictures_and_times(bag):
    images = list(read_images(bag))
    assert [image.stamp_ns for image in images] == [10**9 + k * PERIOD_NS for k in range(10)]
    assert all(image.log_ns == image.stamp_ns and image.topic == '/camera/image_raw' for image in images)
    for image, expected in zip(images, clip_frames(10), strict=True):
        np.testing.assert_array_equal(decode_image(image.message()), expected)
    assert images[0].message().header.frame_id == 'camera'


def test_rclpy_understands_the_bytes_in_the_bag(bag):
    serialization = pytest.importorskip('rclpy.serialization', reason='rclpy is not installed')
    from sensor_msgs.msg import Image
    image = next(read_images(bag))
    message = serialization.deserialize_message(image.cdr, Image)
    assert (message.width, message.height, message.encoding, message.header.stamp.sec) == (640, 272, 'rgb8', 1)
    np.testing.assert_array_equal(decode_image(message), clip_frames(1)[0])


def test_other_readers_find_a_complete_bag(bag):
    with AnyReader([bag]) as reader:
        (connection,) = reader.connections
        assert (connection.msgcount, connection.msgtype) == (10, 'sensor_msgs/msg/Image')
        assert reader.duration == 9 * PERIOD_NS + 1
        assert connection.ext.offered_qos_profiles[0].reliability.name == 'RELIABLE'


def test_jpeg_topic_is_compressed_as_ros_expects(tmp_path):
    assert main(['make', str(CLIP), str(tmp_path / 'bag'), '--encoding', 'jpeg', '--max-frames', '3']) == 0
    topics = choose_topics(bag_info(tmp_path / 'bag'), None)
    assert topics == {'/camera/image_raw/compressed': 'sensor_msgs/msg/CompressedImage'}
    for image, expected in zip(read_images(tmp_path / 'bag'), clip_frames(3), strict=True):
        difference = np.abs(decode_compressed(image.message()).astype(int) - expected)
        assert difference.mean() < 4


@pytest.mark.parametrize('rate_hz,count,chosen', [(5, 50, [0, 5, 10, 15]), (10, 100, [0, 2, 5, 7]),
                                                  (50, 500, [0, 0, 1, 1])])
def test_rate_takes_the_picture_on_show_at_each_tick(rate_hz, count, chosen):
    source = Source(CLIP, rate_hz=rate_hz)
    assert source.expected_frames() == count
    times_ns, pictures = zip(*Source(CLIP, rate_hz=rate_hz, max_frames=4).frames())
    assert list(times_ns) == [k * 10**9 // rate_hz for k in range(4)]
    originals = [shown for _, shown in Source(CLIP, max_frames=16).frames()]
    assert all((shown == originals[index]).all() for shown, index in zip(pictures, chosen, strict=True))


def test_rate_keeps_the_length_of_the_video():
    times_ns = [time_ns for time_ns, _ in Source(CLIP, rate_hz=7, size=(16, 8)).frames()]
    assert len(times_ns) == 70 and 9.8e9 < times_ns[-1] < 10e9


def test_folder_is_read_in_the_order_of_its_numbers(tmp_path):
    folder = image_folder(tmp_path / 'images', ['frame1.png', 'frame2.png', 'frame10.png', 'Frame9.jpg'])
    (folder / 'notes.txt').write_text('no image')
    write_bag(tmp_path / 'bag', Source(folder, rate_hz=4).frames(), BagOptions(start_ns=5 * 10**9))
    images = list(read_images(tmp_path / 'bag'))
    assert [image.stamp_ns for image in images] == [5_000_000_000, 5_250_000_000, 5_500_000_000, 5_750_000_000]
    assert [int(decode_image(image.message()).mean()) for image in images] == [0, 10, 30, 20]


def test_size_frame_id_topic_and_stamp_are_as_asked(tmp_path):
    out = tmp_path / 'new' / 'bag'
    assert main(['make', str(CLIP), str(out), '--size', '64x48', '--frame-id', 'front_optical', '--topic', '/front/rgb',
                 '--start-stamp', '1700000000.123456789', '--max-frames', '2', '--storage', 'sqlite3']) == 0
    image = next(read_images(out))
    message = image.message()
    assert (message.width, message.height, message.step) == (64, 48, 192)
    assert (image.topic, message.header.frame_id) == ('/front/rgb', 'front_optical')
    assert image.stamp_ns == 1700000000123456789


def test_existing_bag_stays_unless_it_may_be_overwritten(tmp_path, capsys):
    out = tmp_path / 'bag'
    write_bag(out, [(0, picture(1))])
    assert main(['make', str(CLIP), str(out), '--max-frames', '2']) == 2
    assert '--overwrite' in capsys.readouterr().err and bag_info(out).messages == 1
    assert main(['make', str(CLIP), str(out), '--max-frames', '2', '--overwrite']) == 0
    assert bag_info(out).messages == 2 and os.listdir(tmp_path) == ['bag']


def test_folder_that_is_no_bag_is_never_overwritten(tmp_path):
    precious = tmp_path / 'thesis'
    precious.mkdir()
    (precious / 'chapter1.tex').write_text('...')
    with pytest.raises(BagError, match='thesis.*not a bag'):
        write_bag(precious, [(0, picture(1))], BagOptions(overwrite=True))
    assert (precious / 'chapter1.tex').exists()


@pytest.mark.parametrize('failure', [BagError('no'), KeyboardInterrupt(), MemoryError()])
def test_failure_half_way_leaves_nothing_and_keeps_the_old_bag(tmp_path, failure):
    def frames():
        yield 0, picture(1)
        raise failure
    write_bag(tmp_path / 'old', [(0, picture(7))])
    for out, overwrite in ((tmp_path / 'new', False), (tmp_path / 'old', True)):
        with pytest.raises(type(failure)):
            write_bag(out, frames(), BagOptions(overwrite=overwrite))
    assert os.listdir(tmp_path) == ['old'] and bag_info(tmp_path / 'old').messages == 1


@pytest.mark.parametrize('number', [signal.SIGINT, signal.SIGTERM])
def test_signal_half_way_leaves_nothing(tmp_path, number):
    command = [sys.executable, '-m', 'statekv_ros.replay.cli', 'make', str(CLIP), str(tmp_path / 'bag'),
               '--rate', '20000', '--size', '8x8']
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    try:
        deadline = time.monotonic() + 60
        while not any(file.stat().st_size > 10**6 for file in tmp_path.glob('.bag.partial-*/bag/bag.mcap')):
            assert process.poll() is None and time.monotonic() < deadline, 'writing did not begin'
            time.sleep(0.01)
        process.send_signal(number)
        _, stderr = process.communicate(timeout=60)
    finally:
        process.kill()
    assert (process.returncode, stderr) == (130, 'statekv-bag make: interrupted\n')
    assert os.listdir(tmp_path) == []


def test_a_killed_maker_leaves_nothing_that_the_next_one_does_not_clear_away(tmp_path):
    command = [sys.executable, '-m', 'statekv_ros.replay.cli', 'make', str(CLIP), str(tmp_path / 'bag'),
               '--rate', '20000', '--size', '8x8']
    killed, alive = [subprocess.Popen(command, stderr=subprocess.PIPE) for _ in range(2)]
    try:
        deadline = time.monotonic() + 60
        while len(begun := list(tmp_path.glob('.bag.partial-*/bag/bag.mcap'))) < 2:
            assert time.monotonic() < deadline, 'writing did not begin'
            time.sleep(0.01)
        killed.kill()
        killed.wait()
        write_bag(tmp_path / 'bag', [(0, picture(1))])
        left = [file for file in begun if file.exists()]
        assert len(left) == 1 and alive.poll() is None      # what another one is writing stays
    finally:
        for process in (killed, alive):
            process.kill()
            process.communicate()
    write_bag(tmp_path / 'bag', [(0, picture(2))], BagOptions(overwrite=True))
    assert os.listdir(tmp_path) == ['bag']


def test_a_maker_killed_while_it_overwrites_costs_no_bag(tmp_path):
    write_bag(tmp_path / 'bag', [(0, picture(7))])
    (tmp_path / '.bag.partial-x').mkdir()
    (tmp_path / 'bag').rename(tmp_path / '.bag.partial-x/bag.old')      # killed between its two moves
    with pytest.raises(BagError, match='bag exists'):
        write_bag(tmp_path / 'bag', [(0, picture(1))])
    assert os.listdir(tmp_path) == ['bag'] and next(read_images(tmp_path / 'bag')).message().data[0] == 7


@pytest.mark.parametrize('storage', STORAGES)
def test_full_disk_is_one_clear_line_and_leaves_nothing(tmp_path, storage):
    done = subprocess.run([sys.executable, '-m', 'statekv_ros.replay.cli', 'make', str(CLIP), str(tmp_path / 'bag'),
                           '--storage', storage], stderr=subprocess.PIPE, text=True, preexec_fn=limit_file_size)
    assert done.returncode == 2 and done.stderr.count('\n') == 1, done.stderr
    assert f'{tmp_path / "bag"} cannot be written' in done.stderr and os.listdir(tmp_path) == []


def test_sources_that_cannot_be_read_are_one_clear_line_and_exit_code_2(tmp_path, capfd):
    (tmp_path / 'text.mp4').write_text('not a video')
    (tmp_path / 'cut.mp4').write_bytes(CLIP.read_bytes()[:100_000])
    (tmp_path / 'empty').mkdir()
    image_folder(tmp_path / 'corrupt', ['a.png', 'b.png'])
    (tmp_path / 'corrupt' / 'b.png').write_bytes(b'\x89PNG\r\n\x1a\n half a picture')
    cases = {'missing.mp4': 'does not exist', 'text.mp4': 'cannot be read', 'cut.mp4': 'cannot be read',
             'empty': 'has no images', 'corrupt': 'b.png is cut off'}
    for name, said in cases.items():
        assert main(['make', str(tmp_path / name), str(tmp_path / 'out')]) == 2
        error = capfd.readouterr().err
        assert str(tmp_path / name) in error and said in error and error.count('\n') == 1, error
        assert not (tmp_path / 'out').exists() and not list(tmp_path.glob('.out*'))


@pytest.mark.parametrize('options,said', [
    (dict(rate_hz=0.0), 'rate'), (dict(rate_hz=float('nan')), 'rate'), (dict(max_frames=0), 'max frames'),
    (dict(size=(0, 5)), 'size')])
def test_bad_source_options_are_refused(options, said):
    with pytest.raises(BagError, match=said):
        Source(CLIP, **options)


@pytest.mark.parametrize('arguments,said', [
    ('--rate 1e-12', 'got 1e-12'), ('--rate 1e-320', 'got 1e-320'), ('--rate 1e300', 'got 1e+300'),
    ('--rate 1e-9', 'raise --rate'), ('--start-stamp 2147483647.9', 'lower --start-stamp'),
    ('--start-stamp 1e400', 'start stamp'),
    ('--size 100000x100000', 'got 100000x100000'), ('--size 99999999999999999999x1', 'got 99999999999999999999x1'),
    ('--topic /1a', "'/1a'"), ('--topic /a//b', "'/a//b'"), ('--topic /a-b', "'/a-b'"),
    (f'--topic /{"a" * 247}', '247 characters'),
    ('--frame-id a\udcffb', r"'a\udcffb'"), ('--frame-id a\0b', r"'a\x00b'")], ids=ascii)
def test_numbers_and_names_that_no_bag_can_hold_are_one_clear_line_and_exit_code_2(tmp_path, capfd, arguments, said):
    pictures = image_folder(tmp_path / 'pictures', ['1.png', '2.png', '3.png', '4.png'])
    assert main(['make', str(pictures), str(tmp_path / 'bag'), *arguments.split(' ')]) == 2
    error = capfd.readouterr().err
    assert error.startswith('statekv-bag make: ') and said in error and error.count('\n') == 1, error
    assert os.listdir(tmp_path) == ['pictures']


def test_a_name_that_the_file_system_refuses_is_one_clear_line(tmp_path, capfd):
    assert main(['make', str(image_folder(tmp_path / 'pictures', ['1.png'])), str(tmp_path / ('n' * 300))]) == 2
    error = capfd.readouterr().err
    assert 'cannot be written' in error and error.count('\n') == 1, error


@pytest.mark.parametrize('options,said', [
    (dict(topic='camera'), "'camera'"), (dict(storage='zip'), "'zip'"), (dict(encoding='gif'), "'gif'"),
    (dict(jpeg_quality=0), 'from 1 to 100, got 0'), (dict(start_ns=0), 'start stamp'), (dict(start_ns=2**62), 'start')])
def test_bad_bag_options_are_refused(options, said):
    with pytest.raises(BagError, match=said):
        BagOptions(**options)
