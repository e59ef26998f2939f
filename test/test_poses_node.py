"""Poses in a real node: real odometry and localisation messages, what comes late, what is no pose, a question cut by place, and
all of it after SIGKILL."""
import importlib.util
import math
import signal
import time

import pytest

pytest.importorskip('rclpy', reason='rclpy is not installed')

from geometry_msgs.msg import PointStamped, PoseStamped, PoseWithCovarianceStamped, TransformStamped  # noqa: E402
from nav_msgs.msg import Odometry  # noqa: E402
from rclpy.qos import QoSProfile, qos_profile_sensor_data  # noqa: E402
from std_msgs.msg import String  # noqa: E402

from live import SECOND, image, memory_node  # noqa: E402
from statekv_ros.action import Ask  # noqa: E402
from statekv_ros.errors import Code  # noqa: E402
from statekv_ros.node.messages import to_ns, to_stamp  # noqa: E402

pytestmark = pytest.mark.timeout(300)
MS = 10**6
PERIOD_NS = 20 * MS
NAN = float('nan')
WARN = 1


class Robot:
    """Publishes where it is: on the x axis, a metre a second, turning 0.1 rad a second."""

    def __init__(self, graph, kind=Odometry, qos=QoSProfile(depth=10), frame: str = 'odom', topic: str = '/odom'):
        self.graph, self.kind, self.frame = graph, kind, frame
        self.publisher = graph.node.create_publisher(kind, topic, qos)
        self.now_ns = 0

    def tell(self, stamp_ns: int, x: float | None = None, yaw: float | None = None, **fields) -> None:
        """One pose; `fields`: frame_id, and numbers of its quaternion."""
        message = self.kind()
        pose = message.pose if self.kind is PoseStamped else message.pose.pose
        yaw = 0.1 * stamp_ns / SECOND if yaw is None else yaw
        message.header.stamp, message.header.frame_id = to_stamp(stamp_ns), fields.pop('frame_id', self.frame)
        pose.position.x = stamp_ns / SECOND if x is None else x
        pose.orientation.z, pose.orientation.w = math.sin(yaw / 2), math.cos(yaw / 2)
        for name, value in fields.items():
            setattr(pose.orientation, name, value)
        self.publisher.publish(message)

    def drive(self, until_ns: int) -> None:
        """At 50 Hz up to that stamp, and until all of it has been taken in."""
        self.graph.wait(lambda: self.publisher.get_subscription_count() > 0, 'a subscriber of the pose')
        before, told = int(self.graph.camera('pose')['received']), 0
        while self.now_ns < until_ns:
            self.now_ns += PERIOD_NS
            self.tell(self.now_ns)
            told += 1
            time.sleep(0.0005)      # as fast as anybody sends poses
        self.graph.wait(lambda: int(self.graph.health['pose'][2]['received']) == before + told, f'{told} poses')


def watch(graph, *stamps_ns: int, frames: int = 0) -> None:
    """Images one by one; `frames`: held before."""
    for count, stamp_ns in enumerate(stamps_ns, frames + 1):
        graph.publish(image(stamp_ns))
        graph.wait_for_camera('front', frames_held=count)


def near(x: float, frame: str = 'odom') -> PointStamped:
    message = PointStamped()
    message.header.frame_id, message.point.x = frame, x
    return message


def evidence(graph, **fields) -> list[tuple[int, float | None]]:
    """Second of the last frame and x of each step that an answer looked at, oldest first."""
    response = graph.ask(**fields)
    assert response.success, response.error
    return sorted((to_ns(step.last_stamp) // SECOND, round(step.pose.pose.position.x, 6) if step.has_pose else None)
                  for step in response.answer.evidence)


def problem(graph, words: str) -> dict[str, str]:
    """The pose's values, once its status warns with these words."""
    graph.wait(lambda: 'pose' in graph.health and words in graph.health['pose'][1] and graph.health['pose'][0] == WARN, words)
    return graph.health['pose'][2]


@pytest.mark.parametrize('kind, given, qos', [
    (Odometry, 'odometry', QoSProfile(depth=10)), (Odometry, 'auto', qos_profile_sensor_data),
    (PoseStamped, 'auto', QoSProfile(depth=10)), (PoseWithCovarianceStamped, 'pose_with_covariance', QoSProfile(depth=10))])
def test_answer_carries_the_pose_at_the_stamp_of_its_evidence_from_any_message(tiny_model_dir, tmp_path, kind, given, qos):
    with memory_node(tmp_path, tiny_model_dir, cameras='[front]', pose__topic='/odom', pose__type=given) as (node, graph):
        robot = Robot(graph, kind, qos)
        graph.wait_for_state('active')
        robot.drive(5 * SECOND)
        watch(graph, SECOND + 7 * MS, 2 * SECOND + 7 * MS, 3 * SECOND + 7 * MS, 4 * SECOND + 7 * MS)
        response = graph.ask(max_tokens=3)
        [first, second] = sorted(response.answer.evidence, key=lambda step: to_ns(step.last_stamp))
        for step, stamp_ns in ((first, 2 * SECOND + 7 * MS), (second, 4 * SECOND + 7 * MS)):
            assert step.has_pose and step.pose.header.frame_id == 'odom'
            assert to_ns(step.pose.header.stamp) == to_ns(step.last_stamp) == stamp_ns
            assert step.pose.pose.position.x == pytest.approx(stamp_ns / SECOND, abs=1e-6), 'between two that are 20 ms apart'
            q = step.pose.pose.orientation
            assert (q.x, q.y) == (0, 0) and 2 * math.atan2(q.z, q.w) == pytest.approx(0.1 * stamp_ns / SECOND, abs=1e-6)
        assert response.answer.has_pose and response.answer.pose == response.answer.evidence[0].pose
        assert graph.health['pose'][2]['steps_without_pose'] == '0' and graph.health['pose'][0] == 0
        names = {Odometry: 'odometry', PoseStamped: 'pose', PoseWithCovarianceStamped: 'pose_with_covariance'}
        assert graph.health['pose'][2]['source'] == f'/odom ({names[kind]})'
        goal = graph.goal(max_tokens=60)
        _, result = graph.result(goal)
        assert result.answer.has_pose and all(step.has_pose for told in goal.feedback for step in told.evidence)
        assert 'Traceback' not in node.log


@pytest.fixture(scope='module')
def driven(tmp_path_factory, tiny_model_dir):
    """A node whose robot went 12 m and was seen from there twelve times, and the robot."""
    with memory_node(tmp_path_factory.mktemp('driven'), tiny_model_dir, cameras='[front]', pose__topic='/odom') as (node, graph):
        robot = Robot(graph)
        graph.wait_for_state('active')
        robot.drive(13 * SECOND)
        watch(graph, *(second * SECOND for second in range(1, 13)))
        yield node, graph, robot
        assert 'Traceback' not in node.log, node.log


def test_question_is_cut_to_what_was_seen_around_a_point_by_service_and_action(driven):
    _, graph, _ = driven
    assert evidence(graph) == [(second, float(second)) for second in range(2, 13, 2)]
    assert evidence(graph, near=near(6.0), within_m=2.5) == [(4, 4.0), (6, 6.0), (8, 8.0)]
    assert evidence(graph, near=near(6.0), within_m=2.5, from_stamp=to_stamp(5 * SECOND)) == [(6, 6.0), (8, 8.0)]
    assert evidence(graph, near=near(6.0)) == evidence(graph), 'within_m is 0: not cut'
    _, result = graph.result(graph.goal(near=near(6.0), within_m=2.5, max_tokens=3))
    assert (result.answer.frames_covered, to_ns(result.answer.first_stamp)) == (6, 3 * SECOND)


@pytest.mark.parametrize('fields, code, words', [
    ({'near': near(1.0, 'map'), 'within_m': 2.0}, Code.UNKNOWN_FRAME, "in frame 'map': there are poses in odom"),
    ({'near': near(1.0, ''), 'within_m': 2.0}, Code.UNKNOWN_FRAME, 'near.header.frame_id is empty'),
    ({'near': near(NAN), 'within_m': 2.0}, Code.INVALID_ARGUMENT, 'near must be a point of finite numbers'),
    ({'near': near(math.inf), 'within_m': 2.0}, Code.INVALID_ARGUMENT, 'near must be a point of finite numbers'),
    ({'near': near(1.0), 'within_m': -1.0}, Code.INVALID_ARGUMENT, 'within_m must be 0'),
    ({'near': near(1.0), 'within_m': NAN}, Code.INVALID_ARGUMENT, 'within_m must be 0'),
    ({'near': near(1.0), 'within_m': math.inf}, Code.INVALID_ARGUMENT, 'within_m must be 0'),
    ({'near': near(99.0), 'within_m': 2.0}, Code.NOTHING_SEEN, 'the nearest was seen 87.00 m away'),
    ({'near': near(6.0), 'within_m': 2.0, 'answer_policy': 'state'}, Code.INVALID_ARGUMENT, 'place')])
def test_place_that_cannot_be_is_refused_with_a_code_and_a_sentence(driven, fields, code, words):
    _, graph, _ = driven
    response = graph.ask(**fields)
    assert (response.success, response.error_code) == (False, code) and words in response.error
    assert graph.result(graph.goal(**fields))[1].error_code == code == getattr(Ask.Result, code.name)


@pytest.mark.parametrize('told, words', [
    ({'x': NAN}, 'not finite'), ({'x': math.inf}, 'not finite'), ({'w': NAN}, 'not finite'),
    ({'z': 0.0, 'w': 0.0}, 'no orientation'), ({'frame_id': ''}, 'empty header.frame_id'), ({'stamp_ns': 0}, 'header stamp 0 ns'),
    ({'stamp_ns': 13 * SECOND}, 'two nodes publish')])
def test_message_that_is_no_pose_is_counted_and_said_and_the_next_one_counts(driven, told, words):
    _, graph, robot = driven
    before = graph.camera('pose')
    robot.tell(**{'stamp_ns': robot.now_ns + MS, **told})
    values = problem(graph, words)
    assert int(values['refused']) == int(before['refused']) + 1 and words in values['last_error']
    robot.drive(robot.now_ns + PERIOD_NS)


def test_jump_of_the_frame_is_said_and_steps_keep_the_pose_they_had(driven):
    """Last but one of these: it adds steps."""
    _, graph, robot = driven
    held = int(graph.camera('front')['frames_held'])
    before = evidence(graph)
    stamp_ns = 20 * SECOND
    robot.tell(stamp_ns, x=-500.0)
    assert 'by ' in problem(graph, 'the pose jumped')['newest_jump'] and graph.health['pose'][2]['jumps'] == '1'
    watch(graph, stamp_ns - SECOND, stamp_ns, frames=held)
    assert evidence(graph) == [*before, (20, -500.0)]


def test_frame_waits_for_no_pose_and_steps_without_one_are_said(driven):
    """The robot is silent: the steps go on as fast, without a pose."""
    _, graph, robot = driven
    held = int(graph.camera('front')['frames_held'])
    watch(graph, 30 * SECOND, 31 * SECOND, frames=held)
    values = problem(graph, 'just now have no pose: the newest pose is of stamp 20.000 s')
    assert int(values['steps_without_pose']) == 1 and (31, None) in evidence(graph)
    assert (31, None) not in evidence(graph, near=near(0.0), within_m=9000.0), 'outside every place'
    for stamp_ns in (31 * SECOND - 10 * MS, 31 * SECOND + 10 * MS):     # under load poses come after their images
        robot.tell(stamp_ns)
    graph.wait(lambda: graph.health['pose'][2]['steps_without_pose'] == '0', 'a pose that is told later')
    assert (31, 31.0) in evidence(graph) and (31, 31.0) in evidence(graph, near=near(31.0), within_m=1.0)


def test_poses_come_back_after_a_kill_as_they_were_then(tiny_model_dir, tmp_path):
    parameters = {'cameras': '[front]', 'pose__topic': '/odom', 'memory_dir': tmp_path / 'memory'}
    with memory_node(tmp_path, tiny_model_dir, signal.SIGKILL, **parameters) as (_, graph):
        robot = Robot(graph, frame='map')
        graph.wait_for_state('active')
        robot.drive(7 * SECOND)
        watch(graph, *(second * SECOND for second in range(1, 9)))
        robot.drive(9 * SECOND)     # one pose is told after its step, and on disk before the next image is taken
        watch(graph, 9 * SECOND, frames=8)
        before, answer = evidence(graph), graph.ask(max_tokens=3).answer
    assert before == [(2, 2.0), (4, 4.0), (6, 6.0), (8, 8.0), (9, 9.0)], 'the last frame waits for its partner'
    for life in range(2):
        with memory_node(tmp_path, tiny_model_dir, signal.SIGKILL, **parameters) as (node, graph):
            graph.wait_for_state('active')
            again = graph.ask(max_tokens=3).answer
            assert evidence(graph) == before and again.evidence == answer.evidence and again.pose == answer.pose
            assert evidence(graph, near=near(4.0, 'map'), within_m=2.1) == [(2, 2.0), (4, 4.0), (6, 6.0)]
            problem(graph, 'no pose yet from /odom: nobody publishes /odom')
            assert 'Traceback' not in node.log


def test_memory_without_poses_says_so_to_a_question_about_a_place(tiny_model_dir, tmp_path):
    with memory_node(tmp_path, tiny_model_dir, cameras='[front]') as (_, graph):
        graph.wait_for_state('active')
        watch(graph, SECOND, 2 * SECOND)
        answer = graph.ask(max_tokens=3).answer
        assert not answer.has_pose and answer.pose == PoseStamped() and not answer.evidence[0].has_pose
        response = graph.ask(near=near(1.0), within_m=2.0)
        assert response.error_code == Code.UNKNOWN_FRAME and '"pose.topic"' in response.error
        assert 'pose' not in graph.fresh_health()


def test_frame_that_is_not_the_one_wanted_and_a_topic_of_another_type_are_said(tiny_model_dir, tmp_path):
    parameters = {'cameras': '[front]', 'pose__topic': '/odom', 'pose__target_frame': 'map'}
    with memory_node(tmp_path, tiny_model_dir, **parameters) as (_, graph):
        graph.wait_for_state('active')
        stranger = graph.node.create_publisher(String, '/odom', 10)
        problem(graph, 'std_msgs/msg/String is published on /odom')
        graph.node.destroy_publisher(stranger)
        robot = Robot(graph)
        graph.wait(lambda: robot.publisher.get_subscription_count() > 0, 'a subscriber')
        robot.tell(SECOND)
        assert problem(graph, "a pose is in frame 'odom', 'map' was expected")['refused'] == '1'
        robot.tell(2 * SECOND, frame_id='map')
        graph.wait(lambda: graph.health['pose'][2]['received'] == '1', 'a pose in the frame')


@pytest.mark.skipif(importlib.util.find_spec('tf2_ros') is not None, reason='tf2_ros is installed')
def test_tf2_that_is_asked_for_and_missing_is_said_and_the_node_lives_unconfigured(tiny_model_dir, tmp_path):
    with memory_node(tmp_path, tiny_model_dir, cameras='[front]', pose__target_frame='map') as (node, graph):
        reason = graph.wait(lambda: 'tf2_ros' in (said := graph.health.get('engine', (0, ''))[1]) and said, 'the reason')
        assert 'pose.target_frame' in reason and 'pose.topic' in reason and graph.lifecycle_state() == 'unconfigured'
        assert graph.ask().error_code == Code.NOT_CONFIGURED and 'tf2_ros' in graph.ask().error
        assert 'Traceback' not in node.log


with_tf2 = pytest.mark.skipif(importlib.util.find_spec('tf2_ros') is None,
                              reason='tf2_ros is not installed: there is no wheel of it')


class Tree:
    """map -> base_link -> camera_link through tf2's own broadcasters: the robot on the x axis, the camera 0.25 m before it."""

    def __init__(self, graph):
        from tf2_ros import StaticTransformBroadcaster, TransformBroadcaster
        self.graph = graph
        self.still, self.moving = StaticTransformBroadcaster(graph.node), TransformBroadcaster(graph.node)
        graph.wait(lambda: graph.node.count_subscribers('/tf') and graph.node.count_subscribers('/tf_static'), 'a listener')

    def mount(self) -> None:
        self.still.sendTransform(self._link(SECOND, 'base_link', 'camera_link', 0.25))

    def drive(self, since_ns: int, until_ns: int, metres_a_second: float = 1.0) -> None:
        """At 50 Hz; its place follows from the stamp."""
        for stamp_ns in range(since_ns, until_ns, PERIOD_NS):
            self.link(stamp_ns, 'map', 'base_link', metres_a_second * stamp_ns / SECOND)
            self.graph.spin(0.001)

    def link(self, stamp_ns: int, parent: str, child: str, x: float = 0.0) -> None:
        self.moving.sendTransform(self._link(stamp_ns, parent, child, x))

    @staticmethod
    def _link(stamp_ns: int, parent: str, child: str, x: float):
        message = TransformStamped(child_frame_id=child)
        message.header.stamp, message.header.frame_id = to_stamp(stamp_ns), parent
        message.transform.translation.x, message.transform.rotation.w = x, 1.0
        return message


@with_tf2
def test_tf2_tells_the_pose_of_the_cameras_own_frame_and_says_where_the_tree_has_none(tiny_model_dir, tmp_path):
    with memory_node(tmp_path, tiny_model_dir, cameras='[front]', pose__target_frame='map') as (node, graph):
        graph.wait_for_state('active')
        tree = Tree(graph)
        watch(graph, SECOND // 2, SECOND)
        problem(graph, "poses refused: no pose of 'camera_link' in 'map', says tf2:")
        tree.mount()
        tree.drive(SECOND, 5 * SECOND)
        watch(graph, 2 * SECOND, 3 * SECOND, frames=2)
        assert evidence(graph) == [(1, 1.25), (3, 3.25)], 'the first one was told after its step'
        watch(graph, 60 * SECOND, 61 * SECOND, frames=4)
        problem(graph, 'just now have no pose: the newest transform from camera_link to map is 55.02 s older than the image')
        tree.link(62 * SECOND, 'base_link', 'odom')
        tree.link(62 * SECOND, 'odom', 'base_link')
        for second in range(62, 82, 2):     # until the links have come, in what order ever
            watch(graph, second * SECOND, (second + 1) * SECOND, frames=second - 56)
            if 'contains a loop' in (said := graph.camera('pose')['last_error']):
                break
        assert said == "no pose of 'camera_link' in 'map', says tf2: The tf tree is invalid because it contains a loop."
        assert 'Traceback' not in node.log


@with_tf2
def test_transforms_of_a_bag_that_begins_again_count_and_those_of_its_first_run_no_more(tiny_model_dir, tmp_path):
    """tf2 alone mixes both runs, and ignores a second one that begins more than 30 s earlier."""
    with memory_node(tmp_path, tiny_model_dir, cameras='[front]', pose__target_frame='map') as (node, graph):
        graph.wait_for_state('active')
        tree = Tree(graph)
        tree.mount()
        tree.drive(100 * SECOND, 103 * SECOND)
        watch(graph, 101 * SECOND, 102 * SECOND)
        for run, since_ns in enumerate((60 * SECOND, 58 * SECOND), 1):
            tree.drive(since_ns, since_ns + 3 * SECOND, metres_a_second=-float(run))
            watch(graph, since_ns + SECOND, since_ns + 2 * SECOND, frames=2 * run)
        assert evidence(graph) == [(60, -119.75), (62, -61.75), (102, 102.25)]
        assert graph.fresh_health()['pose'][2]['steps_without_pose'] == '0' and 'TF_OLD_DATA' not in node.log
