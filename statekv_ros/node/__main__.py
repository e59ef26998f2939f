"""Run the node: `python -m statekv_ros.node --ros-args ...`, `ros2 run statekv_ros statekv_node`."""
import os
import sys
import threading

import rclpy
from rclpy.executors import ExternalShutdownException, SingleThreadedExecutor

from statekv_ros.transport import use_shipped_profile

FORCED_EXIT_S = 4.5


def main() -> int:
    """Spin the node until SIGINT or SIGTERM; returns the exit code."""
    profile = use_shipped_profile()
    rclpy.init()
    # A library call that loads or runs a large model cannot be interrupted; it must not keep the process alive.
    rclpy.get_default_context().on_shutdown(_leave_in_time)
    from statekv_ros.node.memory_node import MemoryNode
    executor = SingleThreadedExecutor()
    node = MemoryNode(profile)
    executor.add_node(node)
    try:
        executor.spin()
    except (KeyboardInterrupt, ExternalShutdownException):
        pass
    finally:
        node.stop()
        executor.shutdown(timeout_sec=0)
        node.destroy_node()
        rclpy.try_shutdown()
    return 0


def _leave_in_time() -> None:
    timer = threading.Timer(FORCED_EXIT_S, lambda: os._exit(0))
    timer.daemon = True
    timer.start()


if __name__ == '__main__':
    sys.exit(main())
