"""Bags read again, whatever state they are in."""
import dataclasses
import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings, strategies as st
from rosbags.rosbag2 import CompressionFormat, CompressionMode, StoragePlugin, Writer
from rosbags.typesys import Stores, get_typestore

from bag_samples import bag, clip_frames  # noqa: F401
from statekv_ros.errors import BagError, FrameError
from statekv_ros.images import decode_image
from statekv_ros.replay.bag_reader import bag_info, choose_topics, read_images, watchable_topics
from statekv_ros.replay.cdr import header_stamp_ns, restamped
from statekv_ros.replay.cli import main


@pytest.fixture
def copy(bag, tmp_path) -> Path:
    """A copy of the bag to break."""
    return Path(shutil.copytree(bag, tmp_path / 'broken'))


def storage_file(bag: Path) -> Path:
    return next(file for file in bag.iterdir() if file.suffix in ('.mcap', '.db3'))


def write_camera(bag: Path, encodings: dict[str, str]) -> None:
    """One image of 2 x 2 pixels for each topic, in its encoding."""
    store = get_typestore(Stores.ROS2_KILTED)
    kind, bytes_per_pixel = 'sensor_msgs/msg/Image', {'rgb8': 3, '16UC1': 2}
    header = store.types['std_msgs/msg/Header'](store.types['builtin_interfaces/msg/Time'](1, 0), 'camera')
    with Writer(bag, version=9, storage_plugin=StoragePlugin.MCAP) as writer:
        for topic, encoding in encodings.items():
            step = 2 * bytes_per_pixel[encoding]
            image = store.types[kind](header, 2, 2, encoding, 0, step, np.zeros(2 * step, np.uint8))
            writer.write(writer.add_connection(topic, kind, typestore=store), 10**9, store.serialize_cdr(image, kind))


def write_other_topic(bag: Path, messages: int) -> None:
    store = get_typestore(Stores.ROS2_KILTED)
    with Writer(bag, version=9, storage_plugin=StoragePlugin.MCAP) as writer:
        connection = writer.add_connection('/chatter', 'std_msgs/msg/String', typestore=store)
        for index in range(messages):
            text = store.types['std_msgs/msg/String'](data='hello')
            writer.write(connection, index, store.serialize_cdr(text, 'std_msgs/msg/String'))


def test_info_prints_topics_and_json(bag, capsys):
    assert main(['info', str(bag)]) == 0
    assert '/camera/image_raw' in capsys.readouterr().out
    assert main(['info', str(bag), '--json']) == 0
    info = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert info['topics'] == [{'name': '/camera/image_raw', 'type': 'sensor_msgs/msg/Image', 'count': 10}]
    assert (info['messages'], info['duration_s'], info['complete']) == (10, 0.36, True)


def test_storage_file_alone_can_be_read(bag):
    assert len(list(read_images(storage_file(bag)))) == 10


@pytest.mark.parametrize('mode', [CompressionMode.FILE, CompressionMode.MESSAGE])
def test_compressed_bags_are_read_and_their_damage_is_said(bag, tmp_path, mode):
    store = get_typestore(Stores.ROS2_KILTED)
    writer = Writer(tmp_path / 'packed', version=9, storage_plugin=StoragePlugin.MCAP)
    writer.set_compression(mode, CompressionFormat.ZSTD)
    originals = list(read_images(bag))
    with writer:
        connection = writer.add_connection('/camera/image_raw', originals[0].type, typestore=store)
        for image in originals:
            writer.write(connection, image.log_ns, image.cdr)
    assert list(read_images(tmp_path / 'packed')) == originals
    file = next(file for file in (tmp_path / 'packed').iterdir() if file.suffix in ('.mcap', '.zstd'))
    os.truncate(file, file.stat().st_size // 2)
    for allowed in (False, True):
        with pytest.raises(BagError, match='packed'):
            read_images(tmp_path / 'packed', allow_truncated=allowed)


def test_stamp_is_read_and_changed_in_both_byte_orders():
    store = get_typestore(Stores.ROS2_KILTED)
    header = store.types['std_msgs/msg/Header'](
        stamp=store.types['builtin_interfaces/msg/Time'](sec=3, nanosec=999_999_999), frame_id='x')
    for little in (True, False):
        cdr = bytes(store.serialize_cdr(header, 'std_msgs/msg/Header', little_endian=little))
        assert header_stamp_ns(cdr) == 3_999_999_999
        changed = store.deserialize_cdr(restamped(cdr, 7_000_000_005), 'std_msgs/msg/Header')
        assert (changed.stamp.sec, changed.stamp.nanosec, changed.frame_id) == (7, 5, 'x')


def test_missing_bag_and_other_files_are_errors_that_name_the_path(tmp_path):
    (tmp_path / 'note.txt').write_text('x')
    (tmp_path / 'folder').mkdir()
    for name, said in {'none': 'does not exist', 'note.txt': 'not a bag', 'folder': 'not a bag'}.items():
        with pytest.raises(BagError, match=f'{name}.*{said}|{name} is {said}'):
            read_images(tmp_path / name)


def test_truncated_bag_is_an_error_that_names_the_file_and_what_is_left(copy):
    file = storage_file(copy)
    os.truncate(file, int(file.stat().st_size * 0.7))
    with pytest.raises(BagError) as error:
        read_images(copy)
    left = list(read_images(copy, allow_truncated=True))
    assert 4 <= len(left) < 10
    assert str(file) in str(error.value) and f'{len(left)} messages' in str(error.value)
    assert '--allow-truncated' in str(error.value)
    originals = clip_frames(len(left))
    assert all((decode_image(a.message()) == b).all() for a, b in zip(left, originals, strict=True))
    info = bag_info(copy, allow_truncated=True)
    assert not info.complete and info.messages == len(left)


def test_bag_cut_to_nothing_readable_says_so(copy):
    file = storage_file(copy)
    os.truncate(file, 1000)
    for allowed in (False, True):
        with pytest.raises(BagError, match=f'{file.name}.*nothing of it can be read'):
            read_images(copy, allow_truncated=allowed)


def test_empty_storage_file_is_an_error_that_names_it(copy):
    os.truncate(storage_file(copy), 0)
    with pytest.raises(BagError, match=r'broken/.*is empty \(0 bytes\)'):
        read_images(copy)


def test_missing_metadata_is_an_error_with_the_command_that_makes_it(copy):
    (copy / 'metadata.yaml').unlink()
    with pytest.raises(BagError, match='broken has no metadata.yaml.*ros2 bag reindex -s (mcap|sqlite3)'):
        read_images(copy)


@pytest.mark.parametrize('text', ['', 'rosbag2_bagfile_information: {version: 9}', '{: not yaml [', 'a list', '[1, 2]',
                                  'rosbag2_bagfile_information: 3', '\x00\x01'])
def test_corrupt_metadata_is_an_error_with_the_command_that_renews_it(copy, text):
    (copy / 'metadata.yaml').write_text(text)
    with pytest.raises(BagError, match='broken has a metadata.yaml that does not fit.*ros2 bag reindex'):
        read_images(copy)


def test_missing_storage_file_is_an_error(copy):
    storage_file(copy).unlink()
    with pytest.raises(BagError, match='broken is not a bag'):
        read_images(copy)


def test_bag_without_images_lists_the_topics_it_has(tmp_path):
    write_other_topic(tmp_path / 'bag', messages=3)
    with pytest.raises(BagError, match=r'no images.*/chatter \(std_msgs/msg/String, 3\)'):
        choose_topics(bag_info(tmp_path / 'bag'), None)
    assert bag_info(tmp_path / 'bag').messages == 3


def test_bag_without_messages_is_an_error(tmp_path):
    write_other_topic(tmp_path / 'bag', messages=0)
    with pytest.raises(BagError, match='holds no messages'):
        choose_topics(bag_info(tmp_path / 'bag'), None)


def test_unknown_topic_is_an_error_that_lists_the_image_topics(bag):
    with pytest.raises(BagError, match='no images on /rear/image_raw; its image topics: /camera/image_raw'):
        read_images(bag, ['/rear/image_raw'])


def test_topics_of_depth_cannot_be_watched_and_the_reason_is_told(tmp_path):
    write_camera(tmp_path / 'bag', {'/front/image_raw': 'rgb8', '/depth/image_raw': '16UC1'})
    watchable, refused = watchable_topics(bag_info(tmp_path / 'bag'))
    assert watchable == {'/front/image_raw': 'sensor_msgs/msg/Image'}
    assert list(refused) == ['/depth/image_raw'] and "'16UC1': depth" in refused['/depth/image_raw']
    write_camera(tmp_path / 'deep', {'/depth/image_raw': '16UC1'})
    with pytest.raises(BagError, match="deep has no images that can be watched: /depth/image_raw: .*'16UC1'"):
        watchable_topics(bag_info(tmp_path / 'deep'))


def test_an_image_whose_bytes_are_damaged_is_an_error_that_names_bag_topic_and_stamp(bag):
    image = next(read_images(bag))
    for damaged in (image.cdr[:40], image.cdr[:12] + b'\xff\xff\xff\x7f' + image.cdr[16:],
                    image.cdr[:16] + b'\xff' * 6 + image.cdr[22:]):
        with pytest.raises(BagError, match=f'{bag} is damaged: .* on /camera/image_raw with header stamp 1.000000000 s'):
            dataclasses.replace(image, cdr=damaged).message()


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(part=st.floats(0, 1, exclude_max=True), allowed=st.booleans())
def test_bag_cut_anywhere_gives_a_bag_error_or_a_true_beginning(bag, tmp_path, part, allowed):
    broken = Path(shutil.copytree(bag, tmp_path / 'cut', dirs_exist_ok=True))
    file = storage_file(broken)
    os.truncate(file, int(file.stat().st_size * part))
    try:
        left = list(read_images(broken, allow_truncated=allowed))
    except BagError:
        return
    assert allowed and left == list(read_images(bag))[:len(left)]


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(places=st.lists(st.floats(0, 1, exclude_max=True), min_size=1, max_size=30), value=st.integers(0, 255))
def test_damaged_bytes_raise_nothing_but_bag_errors(bag, tmp_path, places, value):
    broken = Path(shutil.copytree(bag, tmp_path / 'damaged', dirs_exist_ok=True))
    file = storage_file(broken)
    size = file.stat().st_size
    with file.open('r+b') as data:
        for place in [*places, 0.9999, 0.0001]:     # the index and the header too
            data.seek(int(place * size))
            data.write(bytes([value]))
    try:
        for image in read_images(broken):
            assert image.frame().dtype == np.uint8
    except (BagError, FrameError):
        pass
