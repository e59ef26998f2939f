"""How many camera images arrive between two processes, and how late: shipped Fast DDS profile against the defaults."""
import argparse
import contextlib
import multiprocessing
import os
import time
from dataclasses import asdict, dataclass

import numpy as np
from rich.console import Console
from rich.progress import track

from statekv_ros.bench.sizes import parse_size
from statekv_ros.errors import ParameterError, StateKVError
from statekv_ros.terminal import narrow_table
from statekv_ros.transport import (PROFILE_VARIABLES, find_shipped_profile, profile_variable, shared_memory_problem,
                                   use_shipped_profile)

START_S = 60.0          # for two processes to import ROS and find each other, on a busy machine
DRAIN_S = 1.0           # after the last image was sent, for those under way
SENSOR_DATA_DEPTH = 5   # as in rclpy's qos_profile_sensor_data


@dataclass(frozen=True)
class Case:
    """One run: rgb8 images of width x height at rate_hz for `seconds`."""

    width: int
    height: int
    rate_hz: float
    seconds: float
    reliable: bool
    shipped_profile: bool


def run(args: argparse.Namespace) -> dict:
    """Measure every combination of size, profile and reliability.

    Returns:
        {'benchmark', 'cases': [{width, height, rate_hz, seconds, reliable, shipped_profile, sent, arrived, percent,
        latency_ms_p50, latency_ms_p95, subscriber_cpu_percent}], 'shared_memory_problem'}; latency is from before
        publish() in one process to the callback in the other.
    """
    sizes = [parse_size('--sizes', text) for text in args.sizes.split(',')]
    profiles = _choices('--profiles', args.profiles, {'shipped': True, 'default': False})
    reliabilities = _choices('--reliability', args.reliability, {'best_effort': False, 'reliable': True})
    if not (args.rate > 0 and args.seconds > 0 and args.rate * args.seconds >= 1):
        raise ParameterError(f'--rate and --seconds must be positive and give one image or more, got {args.rate} and '
                             f'{args.seconds}')
    cases = [Case(*size, args.rate, args.seconds, reliable, shipped)
             for size in sizes for shipped in profiles for reliable in reliabilities]
    rows = [asdict(case) | measure(case)
            for case in track(cases, 'sending images', console=Console(stderr=True), disable=args.json)]
    with _environment():
        use_shipped_profile()
        problem = shared_memory_problem(processes=2)
    result = {'benchmark': 'transport', 'cases': rows, 'shared_memory_problem': problem}
    if not args.json:
        _print(result)
    return result


def measure(case: Case) -> dict:
    """Run one case between two new processes; the numbers of `run` for it. Raises StateKVError if they fail to meet."""
    spawn = multiprocessing.get_context('spawn')
    topic = f'/statekv_bench_{os.getpid()}_{time.monotonic_ns()}'
    matched, sent_all = spawn.Event(), spawn.Event()
    reports, processes = [], []
    try:
        for work in (_subscribe, _publish):
            report, child_report = spawn.Pipe(duplex=False)
            process = spawn.Process(target=work, args=(case, topic, matched, sent_all, child_report), daemon=True)
            process.start()
            child_report.close()        # so that the death of the child ends the wait for its report
            reports.append(report)
            processes.append(process)
        received, cpu_percent = _report(reports[0], case, 'subscriber')
        sent = _report(reports[1], case, 'publisher')
    finally:
        for process in processes:
            process.join(DRAIN_S)
            if process.is_alive():
                process.kill()          # rclpy can hang on the way out; the report is in by then
                process.join()
    latency_ms = [(arrived_ns - stamp_ns) / 1e6 for stamp_ns, arrived_ns in received.items()] or [float('nan')]
    return {'sent': sent, 'arrived': len(received), 'percent': round(100 * len(received) / sent, 2),
            'latency_ms_p50': _json_number(np.percentile(latency_ms, 50)),
            'latency_ms_p95': _json_number(np.percentile(latency_ms, 95)),
            'subscriber_cpu_percent': round(cpu_percent, 1)}


def _publish(case: Case, topic: str, matched, sent_all, report) -> None:
    """In a process of its own: sends serialised images, stamped in place; reports how many."""
    with _ros(case) as node:
        from rclpy.serialization import serialize_message
        from sensor_msgs.msg import Image

        from statekv_ros.replay.cdr import restamped
        publisher = node.create_publisher(Image, topic, _qos(case))
        image = Image(width=case.width, height=case.height, encoding='rgb8', step=3 * case.width)
        image.data.frombytes(np.random.default_rng(0).bytes(3 * case.width * case.height))
        cdr = serialize_message(image)
        if not matched.wait(START_S):
            raise StateKVError('the subscriber did not find the publisher')
        while publisher.get_subscription_count() == 0:
            time.sleep(0.01)
        began_s, count = time.monotonic(), round(case.rate_hz * case.seconds)
        for index in range(count):
            time.sleep(max(0.0, began_s + index / case.rate_hz - time.monotonic()))
            publisher.publish(restamped(cdr, time.time_ns()))
        time.sleep(DRAIN_S)             # the images under way lie in this process's shared memory
        sent_all.set()
        report.send(count)


def _subscribe(case: Case, topic: str, matched, sent_all, report) -> None:
    """In a process of its own: receives messages as a node does; reports {stamp: arrival} in ns, and CPU percent."""
    with _ros(case) as node:
        from rclpy.event_handler import SubscriptionEventCallbacks
        from rclpy.executors import SingleThreadedExecutor
        from sensor_msgs.msg import Image
        received: dict[int, int] = {}

        def arrive(image: Image) -> None:
            received[image.header.stamp.sec * 10**9 + image.header.stamp.nanosec] = time.time_ns()

        node.create_subscription(Image, topic, arrive, _qos(case),
                                 event_callbacks=SubscriptionEventCallbacks(matched=lambda _: matched.set()))
        executor = SingleThreadedExecutor(context=node.context)
        executor.add_node(node)
        while not matched.is_set():
            executor.spin_once(timeout_sec=0.1)
        began_s, began_cpu_s = time.monotonic(), time.process_time()
        while not sent_all.is_set():
            executor.spin_once(timeout_sec=0.1)
        cpu = (time.process_time() - began_cpu_s) / (time.monotonic() - began_s)
        report.send((received, 100 * cpu))


@contextlib.contextmanager
def _ros(case: Case):
    """A node in a context of its own, under the profile of the case. Call in a fresh process only."""
    for name in PROFILE_VARIABLES:
        os.environ.pop(name, None)
    if case.shipped_profile:
        profile = find_shipped_profile()
        if profile is None:
            raise StateKVError('the shipped Fast DDS profile was not found: reinstall the package')
        os.environ[profile_variable()] = str(profile)
    import rclpy
    context = rclpy.Context()
    rclpy.init(args=[], context=context)
    node = rclpy.create_node('statekv_bench_transport', context=context, start_parameter_services=False)
    try:
        yield node
    finally:
        node.destroy_node()
        rclpy.try_shutdown(context=context)


def _qos(case: Case):
    from rclpy.qos import QoSProfile, ReliabilityPolicy
    reliability = ReliabilityPolicy.RELIABLE if case.reliable else ReliabilityPolicy.BEST_EFFORT
    return QoSProfile(depth=SENSOR_DATA_DEPTH, reliability=reliability)


def _report(connection, case: Case, who: str):
    try:
        if connection.poll(START_S + case.seconds + 2 * DRAIN_S):
            return connection.recv()
    except EOFError:
        pass
    raise StateKVError(f'the {who} gave no report: its error stands above, or the two processes could not find each '
                       'other (ROS_DOMAIN_ID, ROS_AUTOMATIC_DISCOVERY_RANGE, firewall)')


@contextlib.contextmanager
def _environment():
    before = dict(os.environ)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


def _choices(option: str, text: str, known: dict[str, bool]) -> list[bool]:
    names = [name.strip() for name in text.split(',')]
    if unknown := [name for name in names if name not in known]:
        raise ParameterError(f'{option} must be of {", ".join(known)}, got {", ".join(unknown)}')
    return [known[name] for name in names]


def _json_number(value: float) -> float | None:
    return round(float(value), 3) if np.isfinite(value) else None


def _print(result: dict) -> None:
    table = narrow_table('rgb8 images between two processes, by Fast DDS profile', 'size', 'profile', 'QoS', 'sent', 'arrived', '%',
                         'ms p50', 'ms p95', 'CPU %', text=3)
    for row in result['cases']:
        latencies = ('-' if row[key] is None else f'{row[key]:.1f}' for key in ('latency_ms_p50', 'latency_ms_p95'))
        table.add_row(f'{row["width"]}x{row["height"]}', 'shipped' if row['shipped_profile'] else 'default',
                      'reliable' if row['reliable'] else 'best-effort', str(row['sent']), str(row['arrived']),
                      f'{row["percent"]:.1f}', *latencies, f'{row["subscriber_cpu_percent"]:.0f}')
    Console().print(table)
    if result['shared_memory_problem']:
        Console().print(f'[yellow]{result["shared_memory_problem"]}[/]')
