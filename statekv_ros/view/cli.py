"""`statekv-view`: the page of a live memory node, served to browsers."""
import argparse
import socket
import sys

PORT = 8600


def make_parser() -> argparse.ArgumentParser:
    """What may be told it; further arguments (`--ros-args ...`) are ROS's."""
    parser = argparse.ArgumentParser(
        prog='statekv-view', description='A web page of a live memory node: what it sees and remembers, questions and answers.')
    parser.add_argument('--memory', default='statekv', help='name of the memory node, with its namespace if it has one; '
                                                            'default: %(default)s')
    parser.add_argument('--host', default='127.0.0.1', help='address to listen at; with any other than this machine\'s own, a '
                                                            'token is made up and needed; default: %(default)s')
    parser.add_argument('--port', type=int, default=PORT, help='default: %(default)s')
    return parser


def main(argv: list[str] | None = None) -> int:
    """Serve until SIGINT or SIGTERM; returns the exit code."""
    arguments = sys.argv[1:] if argv is None else argv
    own = arguments[:arguments.index('--ros-args')] if '--ros-args' in arguments else arguments
    args = make_parser().parse_args(own)
    problem = _problem(args.host, args.port)
    if problem:
        print(f'statekv-view: error: {problem}', file=sys.stderr)
        return 1
    try:
        import nicegui  # noqa: F401
    except ModuleNotFoundError:
        print("statekv-view: error: NiceGUI is not installed: pip install 'statekv_ros[view]'", file=sys.stderr)
        return 1
    import rclpy
    from rclpy.exceptions import InvalidTopicNameException
    from rclpy.signals import SignalHandlerOptions
    from rclpy.validate_topic_name import validate_topic_name

    from statekv_ros.view.listener import Listener
    from statekv_ros.view.server import serve
    try:
        validate_topic_name(args.memory)
    except InvalidTopicNameException as error:
        print(f'statekv-view: error: --memory {args.memory!r} is no name of a node: {error}', file=sys.stderr)
        return 1
    rclpy.init(args=arguments, signal_handler_options=SignalHandlerOptions.NO)
    listener = Listener(args.memory)
    try:
        return serve(listener, args.host, args.port)
    finally:
        listener.close()


def _problem(host: str, port: int) -> str:
    """Why nothing can listen there, or ''."""
    if not 0 < port < 65536:
        return f'--port must be 1 to 65535, got {port}'
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind, protocol) as trial:
            trial.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            trial.bind(address)
    except OSError as error:
        return f'cannot listen at {host} port {port}: {error.strerror or error}; choose others with --host and --port'
    return ''
