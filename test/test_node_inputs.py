"""What reaches a camera's topic and is no image for it, and who else is on the graph: told and counted, by real publishers."""
import struct

import pytest
from rclpy.qos import qos_profile_sensor_data
from rclpy.serialization import serialize_message
from sensor_msgs.msg import CompressedImage, PointCloud2

from live import SECOND, NodeProcess, image, jpeg, memory_node
from statekv_ros.errors import FrameError
from statekv_ros.node.camera_input import header_stamp_ns

pytestmark = pytest.mark.timeout(300)


@pytest.fixture(scope='module')
def running(tmp_path_factory, tiny_model_dir):
    """A node with a camera per trouble."""
    with memory_node(tmp_path_factory.mktemp('node'), tiny_model_dir,
                     cameras='[front,compressed,cloud,unfit,silent,stamps]') as (node, graph):
        graph.wait_for_state('active')
        yield node, graph


@pytest.fixture
def graph(running):
    return running[1]


def message_of(graph, camera: str, words: str) -> str:
    """The camera's message on /diagnostics, once it has these words."""
    graph.wait(lambda: words in graph.health[camera][1], f'{words!r} of camera {camera}')
    return graph.health[camera][1]


def test_a_topic_that_nobody_publishes_is_told(graph):
    assert message_of(graph, 'silent', 'nobody').endswith('/silent/image_raw: nobody publishes it')


@pytest.mark.parametrize('camera, kind, remedy', [
    ('compressed', CompressedImage, 'set the parameter "compressed.transport" to compressed'),
    ('cloud', PointCloud2, 'set the parameter "cloud.topic" to a topic with images')])
def test_a_topic_of_another_type_is_told_with_both_types_and_the_remedy(camera, kind, remedy, graph):
    publisher = graph.node.create_publisher(kind, f'/{camera}/image_raw', 10)
    message = message_of(graph, camera, 'expected')
    assert f'sensor_msgs/msg/{kind.__name__} is published there, sensor_msgs/msg/Image was expected: {remedy}' in message
    graph.node.destroy_publisher(publisher)


def test_a_publisher_whose_quality_of_service_does_not_fit_is_told_with_the_remedy(graph):
    publisher = graph.node.create_publisher(type(image(SECOND)), '/unfit/image_raw', qos_profile_sensor_data)
    assert 'set the parameter "unfit.reliability" to best_effort' in message_of(graph, 'unfit', 'QoS does not fit')
    graph.node.destroy_publisher(publisher)


@pytest.mark.parametrize('damage', [lambda raw: raw[:40], lambda raw: raw[:8], lambda raw: b'\0' * 4,
                                    lambda raw: raw[:12] + b'\xff' * 4 + raw[16:]])
def test_a_message_that_cannot_be_read_is_rejected_and_counted(damage, graph):
    before = graph.camera('front')
    second = 2 + int(before['frames_in'])
    raw = damage(bytes(serialize_message(image(second * SECOND))))
    graph.publish(image((second - 1) * SECOND))
    graph.wait_for_camera('front', frames_held=int(before['frames_held']) + 1)
    graph._publishers['/front/image_raw'].publish(raw)
    after = graph.wait_for_camera('front', rejected=int(before['rejected']) + 1, frames_in=int(before['frames_in']) + 2)
    assert 'a message of' in after['last_error'] and 'no ' in after['last_error']


@pytest.mark.parametrize('seconds, nanoseconds', [(-1, 4 * 10**9), (2**31 - 1, 2**32 - 1), (-5, 0), (5, 10**9)])
def test_a_stamp_that_is_no_time_is_refused_and_named(seconds, nanoseconds, graph):
    message = image(SECOND)
    raw = bytearray(serialize_message(message))
    struct.pack_into('<iI', raw, 4, seconds, nanoseconds)
    graph.publish(message, '/stamps/image_raw')
    rejected = int(graph.camera('stamps')['rejected'])
    graph._publishers['/stamps/image_raw'].publish(bytes(raw))
    after = graph.wait_for_camera('stamps', rejected=rejected + 1)
    assert f'header stamp is no time ({seconds} s and {nanoseconds} ns)' in after['last_error']


@pytest.mark.parametrize('message', [image(7 * SECOND + 5), jpeg(2**31 * SECOND - 1)])
def test_the_stamp_is_read_from_a_serialized_image_in_either_byte_order(message):
    stamp = message.header.stamp
    raw = bytes(serialize_message(message))
    assert header_stamp_ns(raw) == stamp.sec * SECOND + stamp.nanosec
    big = b'\0\0' + raw[2:4] + struct.pack('>iI', stamp.sec, stamp.nanosec) + raw[12:]
    assert header_stamp_ns(big) == stamp.sec * SECOND + stamp.nanosec
    with pytest.raises(FrameError, match='11 bytes'):
        header_stamp_ns(raw[:11])


def test_two_nodes_of_one_name_notice_each_other(running, tiny_model_dir, tmp_path):
    node, graph = running
    twin = NodeProcess(tmp_path, graph.node.context.get_domain_id(), model=tiny_model_dir, autostart='false')
    try:
        graph.wait(lambda: '1 more node has the name /statekv' in node.log and '1 more node has the name /statekv' in twin.log,
                   'both logs')
        graph.wait(lambda: graph.health['engine'][0] == 1 and '1 more node has the name' in graph.health['engine'][1], 'a warning')
    finally:
        twin.stop()
    graph.wait(lambda: graph.fresh_health()['engine'][0] == 0, 'the warning gone with the twin')
    assert node.log.count('more node has the name') == 1
