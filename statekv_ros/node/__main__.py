"""Run the node: `python -m statekv_ros.node --ros-args ...`, `ros2 run statekv_ros statekv_node`."""
import os
import sys
import threading
import time

import rclpy
from rclpy.executors import ExternalShutdownException, SingleThreadedExecutor

from statekv_ros.transport import use_shipped_profile

_FORCED_EXIT_S = 4.0


def main() -> None:
    """Spin the node until SIGINT or SIGTERM, then end the process; exit code 0 unless it failed."""
    profile = use_shipped_profile()
    rclpy.init()
    threading.Thread(target=_leave_in_time, daemon=True).start()
    from statekv_ros.node.memory_node import MemoryNode
    executor = SingleThreadedExecutor()
    node = MemoryNode(profile)
    executor.add_node(node)
    try:
        executor.spin()
    except (KeyboardInterrupt, ExternalShutdownException):
        pass
    except Exception:
        # A signal between two waits makes rclpy trip over its own shutdown; an error before it is one.
        if rclpy.ok():
            raise
    finally:
        node.stop()
        executor.shutdown(timeout_sec=0)
        node.destroy_node()
        rclpy.try_shutdown()
    _end()


def _leave_in_time() -> None:
    """A library call that loads or runs a large model cannot be interrupted; it must not keep the process alive."""
    while rclpy.ok():
        time.sleep(0.2)
    time.sleep(_FORCED_EXIT_S)
    _end()


def _end() -> None:
    """Leave at once: everything of ROS is closed, and taking a large model apart in Python would last seconds."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


if __name__ == '__main__':
    main()
