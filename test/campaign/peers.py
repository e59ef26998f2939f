"""Peers of the node to be killed: `python -m campaign.peers DOMAIN` forks one for each line on its input and prints its pid.

Forked from a process that has imported everything, a peer is up within a fraction of a second; hundreds are possible.
"""
import os
import random
import signal
import subprocess
import sys
from pathlib import Path

import rclpy
from diagnostic_msgs.msg import DiagnosticArray
from rclpy.qos import qos_profile_sensor_data
from sensor_msgs.msg import Image

from live import PATIENCE_S, environment, image
from statekv_ros.client import StateKVClient
from statekv_ros.msg import Answer, FrameTiming
from statekv_ros.srv import Query
from statekv_ros.transport import use_shipped_profile

_TOPICS = {'/diagnostics': DiagnosticArray, '/statekv/timing': FrameTiming, '/statekv/answer': Answer}
KINDS = ('caller', 'caller', 'subscriber', 'camera')
PLANNER_S = 5.0     # time limit of a planner's goal
ASKING = 'asking'   # a planner's name for the system, once it has heard of its answer


class Nursery:
    """The process that peers are forked from."""

    def __init__(self, domain: int):
        paths = os.pathsep.join((str(Path(__file__).parents[1]), os.environ.get('PYTHONPATH', '')))
        self._process = subprocess.Popen([sys.executable, '-m', 'campaign.peers', str(domain)], stdin=subprocess.PIPE,
                                         stdout=subprocess.PIPE, text=True, env={**environment(domain), 'PYTHONPATH': paths})

    def spawn(self, kind: str) -> int:
        """A new peer's pid."""
        self._process.stdin.write(f'{kind}\n')
        self._process.stdin.flush()
        return int(self._process.stdout.readline())

    def close(self) -> None:
        """End it; peers must be gone already."""
        self._process.stdin.close()
        self._process.wait(PATIENCE_S)


def main() -> None:
    """Fork until the input ends."""
    domain = int(sys.argv[1])
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)       # the kernel reaps them
    use_shipped_profile()
    for line in sys.stdin:
        pid = os.fork()
        if pid == 0:
            _live(line.strip(), domain)
        print(pid, flush=True)


def _live(kind: str, domain: int) -> None:
    """Be that peer until killed."""
    rclpy.init(args=[], domain_id=domain)
    node = rclpy.create_node(f'{kind}_{os.getpid()}')
    if kind == 'subscriber':
        for topic, message in _TOPICS.items():
            node.create_subscription(message, topic, lambda _: None, 10)
        rclpy.spin(node)
    elif kind == 'camera':
        publisher = node.create_publisher(Image, '/front/image_raw', qos_profile_sensor_data)
        message = image(10**9, 640, 480)
        while True:
            message.header.stamp = node.get_clock().now().to_msg()
            publisher.publish(message)
            rclpy.spin_once(node, timeout_sec=0.05)
    elif kind == 'planner':
        memory = StateKVClient(node=node)
        memory.ask_async('what is in view?', timeout_s=PLANNER_S, max_tokens=5000, temperature=50.0,
                         on_text=lambda _: Path('/proc/self/comm').write_text(ASKING))
        memory.spin_for(PATIENCE_S)
    else:
        client = node.create_client(Query, '/statekv/query')
        client.wait_for_service()
        while True:
            request = Query.Request(question='what is in view?', max_tokens=random.choice((1, 8, 40)), temperature=2.0)
            rclpy.spin_until_future_complete(node, client.call_async(request), timeout_sec=PATIENCE_S)


if __name__ == '__main__':
    main()
