"""Run the node: `python -m statekv_ros.node --ros-args ...`, `ros2 run statekv_ros statekv_node`."""
import os
import sys

from statekv_ros.node.allocator import use_one_arena
from statekv_ros.node.arguments import check_arguments
from statekv_ros.node.stop_signals import StopSignals
from statekv_ros.node.watchdog import Watchdog

_BEAT_S = 0.25          # also the longest time until a signal is seen
_ANSWER_S = 1.0         # on a stop, for the responses to those who wait


def main() -> None:
    """Spin the node until SIGINT or SIGTERM, then end the process; exit code 0 unless it failed.

    Nothing of ROS or torch is imported before signals are heard and somebody keeps watch.
    """
    use_one_arena()
    signals = StopSignals()
    check_arguments(sys.argv[1:])
    watchdog = Watchdog()
    _run(signals, watchdog)
    _end()


def _run(signals: StopSignals, watchdog: Watchdog) -> None:
    from statekv_ros.shm_leftovers import Freed, remove_dead_segments
    from statekv_ros.transport import ProfileSource, use_shipped_profile
    profile = use_shipped_profile()
    freed = Freed(0, 0) if profile.source is ProfileSource.OTHER else remove_dead_segments()

    import rclpy
    from rclpy.callback_groups import MutuallyExclusiveCallbackGroup
    from rclpy.clock import Clock, ClockType
    from rclpy.executors import ExternalShutdownException
    from rclpy.signals import SignalHandlerOptions

    from statekv_ros.node.cpu_threads import use_cpu_threads
    from statekv_ros.node.executor import LoggingExecutor
    from statekv_ros.node.memory_node import MemoryNode

    signals.hold()
    # rclpy's own handlers shut ROS down at once, and nobody could be answered any more.
    try:
        rclpy.init(signal_handler_options=SignalHandlerOptions.NO)
        executor, node = LoggingExecutor(), MemoryNode(profile)
    except RuntimeError as error:   # what follows --ros-args, most often; or security that cannot be had
        sys.exit(f'statekv-node: error: ROS cannot be started: {type(error).__name__}: {" ".join(str(error).split())}')
    executor.add_node(node)
    log = node.get_logger()
    if freed.segments:
        log.info(f'removed {freed.segments} Fast DDS segments of ended processes: {freed.bytes / 1e6:.0f} MB of shared memory')
    use_cpu_threads(node.get_parameter('cpu_threads').value)

    def beat() -> None:
        watchdog.beat('executor')
        watchdog.beat('engine', node.stuck_s())

    # In a group of its own: what others wait for must not look like a hang.
    node.create_timer(_BEAT_S, beat, callback_group=MutuallyExclusiveCallbackGroup(),
                      clock=Clock(clock_type=ClockType.STEADY_TIME))
    watchdog.set_limit(node.get_parameter('hang_limit_s').value)
    try:
        while not signals.requested:
            executor.run_once(log.error)
        node.stop()
        executor.answer_all(log.error, _ANSWER_S)
    except ExternalShutdownException:
        node.stop()
    executor.shutdown(timeout_sec=0)
    node.destroy_node()
    rclpy.try_shutdown()


def _end() -> None:
    """Leave at once: everything of ROS is closed, and taking a large model apart in Python would last seconds."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


if __name__ == '__main__':
    main()
