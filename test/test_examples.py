"""The programs of docs/examples, each as a process of its own beside a real node, over DDS."""
import re
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip('rclpy', reason='rclpy is not installed')

from geometry_msgs.msg import PoseStamped  # noqa: E402
from rclpy.qos import DurabilityPolicy, QoSProfile  # noqa: E402

from live import SECOND, Graph, NodeProcess, environment, image, memory_node, new_domain  # noqa: E402
from statekv_ros.msg import FrameTiming, Watches  # noqa: E402
from statekv_ros.patrol.path import FRAME, odometry, pose_at  # noqa: E402
from statekv_ros.patrol.questions import Question, evidence_steps  # noqa: E402
from statekv_ros.patrol.video import patrol_frames  # noqa: E402
from statekv_ros.patrol.world import make_patrol  # noqa: E402
from statekv_ros.replay.bag_writer import BagOptions, write_bag  # noqa: E402

pytestmark = pytest.mark.timeout(240)
EXAMPLES = Path(__file__).resolve().parents[1] / 'docs' / 'examples'
STEPS = 24


def start(domain: int, name: str, *arguments: str, **options) -> subprocess.Popen:
    return subprocess.Popen([sys.executable, str(EXAMPLES / name), *arguments], env=environment(domain), text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE, **options)


def output(process: subprocess.Popen, code: int = 0) -> str:
    out, err = process.communicate(timeout=120)
    assert process.returncode == code, out + err
    return out if code == 0 else err


@pytest.fixture(scope='module')
def shift(tmp_path_factory):
    """A node that has watched a patrol of 24 s with odometry, the graph beside it, and the patrol."""
    folder = tmp_path_factory.mktemp('shift')
    patrol = make_patrol(STEPS, np.random.default_rng(5))
    write_bag(folder / 'bag', patrol_frames(patrol, 3, 64, 64), BagOptions(topic='/front/image_raw'), poses=odometry(STEPS * SECOND))
    parameters = {'cameras': '[front]', 'pose__topic': '/odom', 'budget': 144, 'evidence_frames': 3, 'max_tokens': 8}
    with memory_node(folder, 'patrol', **parameters) as (_, graph):
        graph.wait_for_state('active')
        played = subprocess.run([sys.executable, '-m', 'statekv_ros.replay.cli', 'play', str(folder / 'bag'), '--rate', '4'],
                                env=environment(graph.context.get_domain_id()), capture_output=True, text=True)
        assert played.returncode == 0, played.stderr
        graph.wait(lambda: int(graph.camera('front')['frames_processed']) > 2 * STEPS - 8, 'the patrol')
        yield graph, patrol


def test_every_example_is_run_here_and_named_in_the_docs():
    source, told = Path(__file__).read_text(), (EXAMPLES / 'README.md').read_text()
    for file in EXAMPLES.glob('*.py'):
        assert source.count(f"'{file.name}'") and f'({file.name})' in told, file.name


def test_find_and_go_sends_the_place_where_the_thing_was_seen(shift):
    graph, patrol = shift
    things = [sight.thing for sight in patrol.objects(STEPS - 1)]
    question = next(Question('when', thing) for thing in things if things.count(thing) == 1)
    goals, answered = [], len(graph.answers)
    process = start(graph.context.get_domain_id(), 'find_and_go.py', question.text, '--camera', 'front')
    # As late as a navigation that is being started: the pose is known before anybody listens.
    graph.wait(lambda: len(graph.answers) > answered, 'the answer')
    graph.node.create_subscription(PoseStamped, 'goal_pose', goals.append, QoSProfile(depth=10))
    graph.wait(lambda: goals and process.poll() is not None, 'a goal')
    printed = re.search(rf'going to x=(\S+) y=(\S+) in {FRAME!r}', output(process))
    [goal] = goals
    position = goal.pose.position
    assert printed and (float(printed[1]), float(printed[2])) == pytest.approx((position.x, position.y), abs=0.01)
    travelled = [pose_at(step * SECOND).position for step in evidence_steps(patrol, question, STEPS - 1)]
    assert min(abs(position.x - x) + abs(position.y - y) for x, y, _ in travelled) < 2.0, 'near where the thing was in view'


def test_find_and_go_says_why_there_is_no_goal(shift):
    graph, _ = shift
    process = start(graph.context.get_domain_id(), 'find_and_go.py', 'where is it?', '--camera', 'rear')
    graph.wait(lambda: process.poll() is not None, 'its end')
    assert "'rear'" in output(process, code=1)


def test_report_of_a_shift_has_a_row_for_every_stretch_and_question(shift):
    graph, _ = shift
    questions = 'what is in view?', 'which room are you in?'
    process = start(graph.context.get_domain_id(), 'report_of_a_shift.py', *questions, '--every', '8')
    graph.wait(lambda: process.poll() is not None, 'the report')
    report = output(process)
    rows = re.findall(r'^\| (\S+) - \S+ \| ([^|]+) \| ([^|*]+) \| (\S+) \| (\S+), (\S+) \|$', report, re.M)
    assert len(rows) == 2 * 3 and {question for _, question, *_ in rows} == set(questions), report
    assert all(answer.strip() for _, _, answer, *_ in rows)


def test_door_watcher_prints_a_line_and_keeps_a_picture_of_each_change(shift, tmp_path):
    graph, _ = shift
    process = start(graph.context.get_domain_id(), 'door_watcher.py', 'what is in view?', 'changes', '--pictures', str(tmp_path),
                    '--unwatch', preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_IGN))     # as a shell's background does
    lists = []
    latched = QoSProfile(depth=1, durability=DurabilityPolicy.TRANSIENT_LOCAL)
    graph.node.create_subscription(Watches, '/statekv/watches', lists.append, latched)
    graph.wait(lambda: lists and lists[-1].watches, 'the watch')
    begun = int(graph.camera('front')['frames_processed'])
    for count, (time_ns, pixels) in enumerate(patrol_frames(make_patrol(STEPS, np.random.default_rng(6)), 4, 64, 64), 1):
        message = image((STEPS + 10) * SECOND + time_ns, 64, 64)
        message.data = pixels.tobytes()
        graph.publish(message)
        graph.wait_for_camera('front', frames_processed=begun + count)
    graph.wait(lambda: lists[-1].watches[0].alerts, 'an alert')
    graph.wait(lambda: any(tmp_path.iterdir()), 'its picture')
    process.send_signal(signal.SIGINT)
    graph.wait(lambda: process.poll() is not None and not lists[-1].watches, 'its end')
    assert re.search(r"^watching, id \S+$.*^\d+: '.*' -> '.*'$", output(process), re.M | re.S)
    assert all(file.read_bytes().startswith(b'\xff\xd8') for file in tmp_path.iterdir())


def test_two_robots_answer_for_themselves(tiny_model_dir, tmp_path):
    domain = new_domain()

    class Robot(NodeProcess):
        def __init__(self, name: str):
            self.program = '-m', 'statekv_ros.node', '--ros-args', '-r', f'__ns:=/{name}'
            super().__init__(tmp_path, domain, model=tiny_model_dir, cameras='[front]', rate_hz='1000.0', reliability='reliable',
                             max_tokens=4, front__topic='front/image_raw')

    robots = {name: Robot(name) for name in ('robot_1', 'robot_2')}
    graph = Graph(domain)
    try:
        for name in robots:
            steps, stamps = [], iter(range(SECOND, 1000 * SECOND, SECOND))
            graph.node.create_subscription(FrameTiming, f'/{name}/statekv/timing', steps.append, QoSProfile(depth=10))
            graph.wait(lambda: graph.publish(image(next(stamps)), f'/{name}/front/image_raw') or steps, 'a step')
        process = start(domain, 'two_robots.py', 'is the door open?')
        graph.wait(lambda: process.poll() is not None, 'both answers')
        lines = output(process).splitlines()
        assert [line.split(':')[0] for line in lines] == list(robots) and all('no memory node' not in line for line in lines)
        robots['robot_2'].stop()
        process = start(domain, 'two_robots.py', 'is the door open?')
        graph.wait(lambda: process.poll() is not None, 'one answer')
        process.wait()
        assert process.returncode == 1
    finally:
        graph.close()
        for robot in robots.values():
            robot.stop()


def test_the_launch_file_of_two_robots_is_python():
    compile((EXAMPLES / 'two_robots.launch.py').read_text(), 'two_robots.launch.py', 'exec')
