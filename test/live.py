"""A memory node in a process of its own, and a test's own place in its ROS domain. Nothing here stands in for ROS."""
import os
import re
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import cv2
import numpy as np
import rclpy
from diagnostic_msgs.msg import DiagnosticArray
from lifecycle_msgs.srv import ChangeState, GetState
from rclpy.action import ActionClient
from rclpy.client import Client
from rclpy.executors import SingleThreadedExecutor
from rclpy.qos import QoSProfile
from sensor_msgs.msg import CompressedImage, Image

from domains import new_domain
from statekv_ros.action import Ask
from statekv_ros.msg import Answer, FrameTiming
from statekv_ros.node.messages import to_ns, to_stamp
from statekv_ros.srv import Query, Reset
from statekv_ros.transport import use_shipped_profile
from warm import WarmPython

SECOND = 10**9
PATIENCE_S = 60.0       # a machine may be slow; no claim rests on this number


def environment(domain: int) -> dict[str, str]:
    """For a process in that domain, on this machine only."""
    return {**os.environ, 'ROS_DOMAIN_ID': str(domain), 'ROS_AUTOMATIC_DISCOVERY_RANGE': 'LOCALHOST', 'OMP_NUM_THREADS': '1',
            'PYTHONUNBUFFERED': '1'}


class NodeProcess:
    """`python -m statekv_ros.node` with parameters, and its log."""
    program = ('-m', 'statekv_ros.node')

    def __init__(self, folder: Path, domain: int, warm: bool = True, **parameters):
        """warm: begin with the libraries in memory; not where the beginning itself is on trial."""
        self.log_file = folder / f'node-{domain}-{time.monotonic_ns()}.log'
        arguments = [part for name, value in parameters.items() for part in ('-p', f'{name.replace("__", ".")}:={value}')]
        command = [*self.program, '--ros-args', *arguments]
        with self.log_file.open('w') as log:
            self.process = WarmPython(command, environment(domain), self.log_file) if warm else subprocess.Popen(
                [sys.executable, *command], env=environment(domain), stdout=log, stderr=subprocess.STDOUT)

    @property
    def log(self) -> str:
        return self.log_file.read_text()

    @property
    def alive(self) -> bool:
        return self.process.poll() is None

    def stop(self, number: int = signal.SIGINT, seconds: float = 10.0) -> tuple[int | None, float]:
        """Send a signal; exit code (None: had to be killed) and seconds until then."""
        begun = time.monotonic()
        if self.alive:
            self.process.send_signal(number)
        try:
            return self.process.wait(seconds), time.monotonic() - begun
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
            return None, time.monotonic() - begun


class Goal:
    """A goal of ~/ask through rclpy's own client.

    Attributes:
        feedback: what came so far.
        handle: rclpy's, once the goal is accepted; result: a future of the result's response.
    """

    def __init__(self, client: ActionClient, **fields):
        self.feedback: list[Ask.Feedback] = []
        self.handle = self.result = None
        self.rejected = False
        sent = client.send_goal_async(Ask.Goal(**fields), lambda message: self.feedback.append(message.feedback))
        sent.add_done_callback(self._accept)

    @property
    def done(self) -> bool:
        return self.rejected or self.result is not None and self.result.done()

    def _accept(self, future) -> None:
        self.handle = future.result()
        self.rejected = not self.handle.accepted
        if not self.rejected:
            self.result = self.handle.get_result_async()


class Graph:
    """A test's own node in a domain: publishes images, asks, and collects what the memory node publishes."""

    def __init__(self, domain: int):
        use_shipped_profile()
        os.environ.setdefault('ROS_AUTOMATIC_DISCOVERY_RANGE', 'LOCALHOST')
        self.context = rclpy.Context()
        rclpy.init(args=[], context=self.context, domain_id=domain)
        self.node = rclpy.create_node('test', context=self.context)
        self.executor = SingleThreadedExecutor(context=self.context)
        self.executor.add_node(self.node)
        self.timings: list[FrameTiming] = []
        self.answers: list[Answer] = []
        self.health: dict[str, tuple[int, str, dict[str, str]]] = {}
        self.health_count = self.health_ns = 0     # /diagnostics so far, and the node's time on the newest
        self._publishers = {}
        self.node.create_subscription(FrameTiming, '/statekv/timing', self.timings.append, QoSProfile(depth=100))
        self.node.create_subscription(Answer, '/statekv/answer', self.answers.append, QoSProfile(depth=100))
        self.node.create_subscription(DiagnosticArray, '/diagnostics', self._note, QoSProfile(depth=10))
        self.query = self.node.create_client(Query, '/statekv/query', qos_profile=QoSProfile(depth=100))
        self.reset = self.node.create_client(Reset, '/statekv/reset')
        self._asking: ActionClient | None = None
        self._changing: Client | None = None
        self._answered = False      # by the service, ever

    def close(self) -> None:
        self.executor.remove_node(self.node)    # first: nothing of it is then waited for while it is destroyed
        self.executor.shutdown(timeout_sec=0)
        if self._asking is not None:
            self._asking.destroy()
        self.node.destroy_node()
        rclpy.shutdown(context=self.context)

    def wait(self, until, what: str, seconds: float = PATIENCE_S):
        """Spin until `until()` is true; returns its value."""
        end = time.monotonic() + seconds
        while not (value := until()):
            if time.monotonic() > end:
                raise AssertionError(f'waited {seconds} s for {what}; health: {self.health}')
            self.executor.spin_once(0.05)
        return value

    def spin(self, seconds: float) -> None:
        """Let a span of time pass that is itself part of the claim."""
        end = time.monotonic() + seconds
        while (left := end - time.monotonic()) > 0:
            self.executor.spin_once(left)

    def publish(self, message, topic: str = '/front/image_raw') -> None:
        """Publish an image; the first on a topic waits for its subscriber."""
        if topic not in self._publishers:
            self._publishers[topic] = self.node.create_publisher(type(message), topic, QoSProfile(depth=10))
        publisher = self._publishers[topic]
        self.wait(lambda: publisher.get_subscription_count() > 0, f'a subscriber of {topic}')
        publisher.publish(message)

    def ask_later(self, question: str = 'is the door open?', **fields):
        """A future of the service's response."""
        self.wait(self.query.service_is_ready, 'the query service')
        return self.query.call_async(Query.Request(question=question, **fields))

    def response(self, future):
        self.wait(future.done, 'the response')
        return future.result()

    def ask(self, question: str = 'is the door open?', **fields) -> Query.Response:
        future = self.ask_later(question, **fields)
        if not self._answered:
            # ROS 2 calls a service ready before its server has found the client's reader; a reply at that moment is lost.
            self.executor.spin_until_future_complete(future, PATIENCE_S / 6)
            future = future if future.done() else self.ask_later(question, **fields)
        response = self.response(future)
        self._answered = True
        return response

    def goal(self, question: str = 'is the door open?', **fields) -> Goal:
        """A goal that has been sent."""
        if self._asking is None:
            deep = {f'{name}_service_qos_profile': QoSProfile(depth=100) for name in ('goal', 'result', 'cancel')}
            self._asking = ActionClient(self.node, Ask, '/statekv/ask', feedback_sub_qos_profile=QoSProfile(depth=1000), **deep)
        self.wait(self._asking.server_is_ready, 'the action')
        return Goal(self._asking, question=question, **fields)

    def result(self, goal: Goal) -> tuple[int, Ask.Result]:
        """A goal's status (action_msgs/GoalStatus) and result, once they are there."""
        self.wait(lambda: goal.done, 'the result')
        response = goal.result.result()
        return response.status, response.result

    def camera(self, name: str) -> dict[str, str]:
        """A camera's values on the next /diagnostics."""
        self.fresh_health()
        return self.health[name][2]

    def fresh_health(self) -> dict:
        """All statuses of a message on /diagnostics that was sent after this call began."""
        count = self.health_count + 2   # the first may be on its way already
        self.wait(lambda: self.health_count >= count, 'diagnostics')
        return self.health

    def wait_for_camera(self, name: str, **values) -> dict[str, str]:
        """Until /diagnostics shows these values for a camera, all at once."""
        wanted = {key: str(value) for key, value in values.items()}
        self.wait(lambda: name in self.health and wanted.items() <= self.health[name][2].items(), f'{name} {wanted}')
        return self.health[name][2]

    def wait_for_state(self, state: str) -> str:
        """Until the engine's status says this lifecycle state; returns its message."""
        self.wait(lambda: 'engine' in self.health and self.health['engine'][2]['state'] == state, f'state {state}')
        return self.health['engine'][1]

    def lifecycle(self, transition: int) -> bool:
        """Ask for a transition (lifecycle_msgs/Transition id) through the node's own service."""
        return self.response(self.lifecycle_later(transition)).success

    def lifecycle_later(self, transition: int):
        """A future of the response. All go through one client: DDS keeps the order of what one writer sends, not of several."""
        if self._changing is None:
            self._changing = self.node.create_client(ChangeState, '/statekv/change_state')
        self.wait(self._changing.service_is_ready, 'change_state')
        request = ChangeState.Request()
        request.transition.id = transition
        return self._changing.call_async(request)

    def lifecycle_state(self) -> str:
        client = self.node.create_client(GetState, '/statekv/get_state')
        self.wait(client.service_is_ready, 'get_state')
        return self.response(client.call_async(GetState.Request())).current_state.label

    def _note(self, message: DiagnosticArray) -> None:
        self.health_count += 1
        self.health_ns = to_ns(message.header.stamp)
        for status in message.status:
            level = status.level[0] if isinstance(status.level, bytes) else status.level
            self.health[status.name.removeprefix('statekv: ')] = (
                level, status.message, {value.key: value.value for value in status.values})


@contextmanager
def memory_node(folder: Path, model: str, ending: int = signal.SIGINT, **parameters):
    """A running node, ended by that signal, and a graph beside it; images are reliable and all sampled unless `parameters` say
    otherwise."""
    domain = new_domain()
    node = NodeProcess(folder, domain, **{'model': model, 'reliability': 'reliable', 'rate_hz': '1000.0', 'budget': 64,
                                          'diagnostics_period_s': '0.1', 'max_tokens': 6, **parameters})
    graph = Graph(domain)
    try:
        yield node, graph
    except BaseException:
        print(node.log)
        raise
    finally:
        graph.close()
        node.stop(ending)


def docs_program(file: Path, domain: int) -> subprocess.Popen:
    """The first program of a page, as it stands there, in a process of its own; its output is a pipe."""
    program = re.search(r'```python\n(.*?)```', file.read_text(), re.DOTALL)[1]
    return subprocess.Popen([sys.executable, '-c', program], env=environment(domain), text=True, stdout=subprocess.PIPE,
                            stderr=subprocess.STDOUT)


def image(stamp_ns: int, width: int = 64, height: int = 64, encoding: str = 'rgb8', seed: int = 0, **fields) -> Image:
    """A noise image with right sizes for `encoding`; `fields` overwrite what should be wrong."""
    channels = {'rgb8': 3, 'bgr8': 3, 'mono8': 1}.get(encoding, 3)
    pixels = np.random.default_rng(seed + stamp_ns % 1000).integers(0, 256, (height, width, channels), dtype=np.uint8)
    message = Image(width=width, height=height, encoding=encoding, step=width * channels, data=pixels.tobytes())
    message.header.stamp, message.header.frame_id = to_stamp(stamp_ns), 'camera_link'
    for name, value in fields.items():
        setattr(message, name, value)
    return message


def jpeg(stamp_ns: int, keep: float = 1.0) -> CompressedImage:
    """A jpeg of noise, of which only the part `keep` is sent."""
    pixels = np.random.default_rng(stamp_ns % 1000).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    data = cv2.imencode('.jpg', pixels)[1].tobytes()
    message = CompressedImage(format='jpeg', data=data[:int(len(data) * keep)])
    message.header.stamp = to_stamp(stamp_ns)
    return message
