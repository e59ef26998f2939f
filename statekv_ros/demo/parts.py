"""The parts of the demo that run beside it: child processes, and what the node publishes while it works."""
import contextlib
import os
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from rich.text import Text

from statekv_ros.errors import StateKVError

CAMERA = 'front'
STOP_S = 10.0
PAGE_S = 60.0


class Watcher:
    """Collects the node's FrameTiming messages and its diagnostics of the camera while the client spins.

    Attributes:
        steps: every FrameTiming.
        health: the camera's newest values on /diagnostics.
    """

    def __init__(self, client):
        from diagnostic_msgs.msg import DiagnosticArray
        from rclpy.qos import QoSProfile
        from statekv_ros.msg import FrameTiming
        self.steps: list = []
        self.health: dict[str, str] = {}
        self._client = client
        self._subscriptions = [
            client.node.create_subscription(FrameTiming, '/statekv/timing', self.steps.append, QoSProfile(depth=100)),
            client.node.create_subscription(DiagnosticArray, '/diagnostics', self._note_health, QoSProfile(depth=10))]

    def wait(self, seconds: float, runs: Callable[[], bool]) -> bool:
        """Wait for the node's first diagnostics; False when they do not come in that time, or it no longer runs.

        What was subscribed to before them comes by then too. Images sent earlier can be steps whose timing nobody receives.
        """
        end = time.monotonic() + seconds
        while not self.health and time.monotonic() < end and runs():
            self._client.spin_for(.1)
        return bool(self.health)

    def watch(self, seconds: float) -> Text:
        """Receive messages for a while; a line on the newest step."""
        self._client.spin_for(seconds)
        if not self.steps:
            return Text('waiting for the first frame step ...')
        step, recent = self.steps[-1], [s.total_ms for s in self.steps[-10:]]
        missed = ''.join(f' · {count} {what}' for count, what in ((step.dropped, 'dropped'), (step.lost, 'lost')) if count)
        return Text(f'frames {step.frames_processed}/{step.frames_sampled} · step {statistics.median(recent):.1f} ms · '
                    f'state {step.state_tokens}/{step.budget} · cache {step.detailed_bytes / 1e6:.1f} MB{missed}')

    def close(self) -> None:
        """Receive nothing any more."""
        for subscription in self._subscriptions:
            self._client.node.destroy_subscription(subscription)

    def drain(self) -> None:
        """Go on until two diagnostics in a row (a second apart) say the same."""
        before = None
        while before is None or before != self.health:
            before = self.health
            while self.health is before:
                self._client.spin_for(0.1)

    def _note_health(self, message) -> None:
        for status in message.status:
            if status.name.endswith(f': {CAMERA}'):
                self.health = {value.key: value.value for value in status.values if value.key != 'silent_s'}


@contextlib.contextmanager
def process(*arguments: str, log: Path):
    """A child process of this Python, which has its `log`; asked to stop with SIGINT at the end, killed if it does not."""
    # Several processes share few cores here: threads that wait for each other cost a small model more than they give.
    environment = {'OMP_NUM_THREADS': '1', **os.environ}
    with log.open('w') as output:
        child = subprocess.Popen([sys.executable, *arguments], stdout=output, stderr=subprocess.STDOUT, env=environment)
        child.log = log
        try:
            yield child
        finally:
            if child.poll() is None:
                child.send_signal(signal.SIGINT)
            try:
                child.wait(STOP_S)
            except subprocess.TimeoutExpired:
                child.kill()
                child.wait()


@contextlib.contextmanager
def page(log: Path):
    """The node's web page (`statekv-view`), in a process of its own; the line that says its address. Raises StateKVError."""
    with process('-m', 'statekv_ros.view', log=log) as view:
        end = time.monotonic() + PAGE_S
        while 'http' not in log.read_text():
            if view.poll() is not None or time.monotonic() > end:
                raise StateKVError(f'the page cannot be served: {log.read_text().strip()}')
            time.sleep(0.1)
        yield log.read_text().splitlines()[-1]


def linger(client, node: subprocess.Popen) -> None:
    """Until Ctrl-C, or the node ends."""
    from rclpy.executors import ExternalShutdownException
    with contextlib.suppress(KeyboardInterrupt, ExternalShutdownException):
        while node.poll() is None:
            client.spin_for(0.5)
