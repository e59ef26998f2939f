"""`statekv-health`: exit code 0 while a node is in a lifecycle state, for containers and supervisors."""
import argparse
import math
import sys
import time

NOT_THERE = 1
STATES = ('unconfigured', 'inactive', 'active')


def main(argv: list[str] | None = None) -> int:
    """Ask once; 0: the node is in that state, 1: it is not, or does not answer; one line says which."""
    parser = argparse.ArgumentParser(prog='statekv-health', description=__doc__)
    parser.add_argument('--node', default='/statekv', metavar='NAME', help='full name of the node; default: %(default)s')
    parser.add_argument('--state', choices=STATES, default='active', help='default: %(default)s')
    parser.add_argument('--timeout', type=_seconds, default=10.0, metavar='SECONDS', help='default: %(default)g')
    args = parser.parse_args(argv)
    found = _state(args.node, args.timeout)
    print(f'{args.node}: {found or f"no answer within {args.timeout:g} s"}')
    return 0 if found == args.state else NOT_THERE


def _state(name: str, timeout_s: float) -> str | None:
    """The node's lifecycle state; None without an answer."""
    from statekv_ros.transport import use_shipped_profile
    use_shipped_profile()

    import rclpy
    from lifecycle_msgs.srv import GetState
    from rclpy.executors import SingleThreadedExecutor
    end, context = time.monotonic() + timeout_s, rclpy.Context()
    rclpy.init(args=[], context=context)
    node = rclpy.create_node('statekv_health', context=context, start_parameter_services=False, enable_rosout=False)
    try:
        client = node.create_client(GetState, f'{name.rstrip("/")}/get_state')
        if not client.wait_for_service(timeout_s):
            return None
        future = client.call_async(GetState.Request())
        rclpy.spin_until_future_complete(node, future, SingleThreadedExecutor(context=context), max(0.0, end - time.monotonic()))
        return future.result().current_state.label if future.done() else None
    finally:
        node.destroy_node()
        rclpy.shutdown(context=context)


def _seconds(text: str) -> float:
    value = float(text)
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f'must be a positive number of seconds, got {text!r}')
    return value


if __name__ == '__main__':
    sys.exit(main())
