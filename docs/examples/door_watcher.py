"""A door watcher: has the memory node watch for something, and prints a line each time it comes to hold.

    python door_watcher.py 'is the door open?' 'equals yes' --camera front

The node goes on watching when this program ends, and over its own restarts; `--unwatch` ends the watch with the program.
"""
import argparse
import signal
import sys
from pathlib import Path

import rclpy
from rclpy.node import Node
from rclpy.signals import SignalHandlerOptions
from rclpy.utilities import remove_ros_args

from statekv_ros.client import StateKVClient


class DoorWatcher(Node):
    """Nothing here waits: the watch is asked for, and alerts come to a callback."""

    def __init__(self, question: str, condition: str, camera: str, pictures: Path | None):
        super().__init__('door_watcher')
        self.pictures, self.id = pictures, ''
        self.memory = StateKVClient(node=self)
        asked = self.memory.watch_async(question, camera, condition, debounce=2)
        asked.add_done_callback(lambda future: self.begin(future.result()))

    def begin(self, response) -> None:
        if not response.success:
            self.get_logger().error(response.error)
            return
        self.id = response.id
        self.memory.on_alert(self.tell, response.id)
        print(f'watching, id {response.id}', flush=True)

    def tell(self, alert) -> None:
        """One line; and the picture of what the answer looked at, where there is a folder for it."""
        position = alert.pose.pose.position
        where = f', from x={position.x:.1f} y={position.y:.1f}' if alert.has_pose else ''
        print(f'{alert.last_stamp.sec}: {alert.text_before!r} -> {alert.text!r}{where}', flush=True)
        image = alert.evidence[0].image if alert.evidence else None
        if self.pictures is not None and image is not None and len(image.data):
            (self.pictures / f'{alert.last_stamp.sec}.jpg').write_bytes(bytes(image.data))


def main() -> int:
    parser = argparse.ArgumentParser(description='be told when answers to a question meet a condition')
    parser.add_argument('question')
    parser.add_argument('condition', help='changes, equals TEXT, matches REGEX, rises above NUMBER or falls below NUMBER')
    parser.add_argument('--camera', default='', help='name of a camera; not needed where there is one only')
    parser.add_argument('--pictures', type=Path, help='folder for pictures')
    parser.add_argument('--unwatch', action='store_true', help='end the watch with the program')
    arguments = parser.parse_args(remove_ros_args(sys.argv)[1:])
    # Ctrl-C ends the loop and not ROS, so that the watch can be ended afterwards; so does `kill -INT` of a shell's background job,
    # which begins with that signal ignored.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    rclpy.init(args=sys.argv, signal_handler_options=SignalHandlerOptions.NO)
    node = DoorWatcher(arguments.question, arguments.condition, arguments.camera, arguments.pictures)
    try:
        while True:
            rclpy.spin_once(node, timeout_sec=0.5)
    except KeyboardInterrupt:
        pass
    if arguments.unwatch and node.id:
        node.memory.unwatch(node.id)
    node.memory.close()
    node.destroy_node()
    rclpy.shutdown()
    return 0


if __name__ == '__main__':
    sys.exit(main())
