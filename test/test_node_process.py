"""The node's process: its command line, signals at any moment, callbacks that raise, hangs, and what dead processes left."""
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

pytest.importorskip('rclpy', reason='rclpy is not installed')

from rcl_interfaces.msg import Parameter, ParameterValue  # noqa: E402
from rcl_interfaces.srv import SetParameters  # noqa: E402

from live import SECOND, Graph, NodeProcess, environment, image, memory_node, new_domain  # noqa: E402
from statekv_ros.node.arguments import own_arguments  # noqa: E402
from statekv_ros.node.watchdog import _Keeper  # noqa: E402
from statekv_ros.shm_leftovers import remove_dead_segments  # noqa: E402

pytestmark = pytest.mark.timeout(240)
SIGNALS = [signal.SIGINT, signal.SIGTERM]


def wait(until, what: str, seconds: float = 60.0):
    end = time.monotonic() + seconds
    while not (value := until()):
        assert time.monotonic() < end, f'waited {seconds} s for {what}'
        time.sleep(0.005)
    return value


# --- the command line -------------------------------------------------------------------------------------------------

CALL_MAIN = '''
import json, sys
from statekv_ros.node.__main__ import main
try:
    main()
except SystemExit as exit:
    print(json.dumps({'code': exit.code, 'heavy': sorted({'rclpy', 'torch', 'numpy'} & set(sys.modules))}))
'''


@pytest.mark.parametrize('argument,code', [('--help', 0), ('-h', 0), ('--helpp', 2), ('model:=patrol', 2)])
def test_help_and_unknown_arguments_are_answered_before_anything_heavy_is_loaded(argument, code):
    done = subprocess.run([sys.executable, '-c', CALL_MAIN, argument], text=True, capture_output=True, timeout=60)
    told, verdict = done.stdout.rpartition('{')[0], json.loads(done.stdout.splitlines()[-1])
    assert verdict == {'code': code, 'heavy': []}, done.stderr
    if code == 0:
        assert all(word in told for word in ('--ros-args', '--params-file', 'config/statekv.yaml', 'docs/reference/parameters.md'))
    else:
        assert argument in done.stderr and '--ros-args' in done.stderr and len(done.stderr.splitlines()) == 1


@pytest.mark.parametrize('given,own', [
    ('', ''), ('--ros-args -p a:=b', ''), ('x --ros-args -r a:=b -- y', 'x y'), ('--ros-args -- --ros-args -p a:=b', ''),
    ('--ros-args --help', ''), ('--helpp', '--helpp')])
def test_what_is_for_ros_is_told_from_what_is_not(given, own):
    assert own_arguments(given.split()) == own.split()


def test_ros_arguments_that_ros_refuses_are_an_error_without_a_traceback():
    done = subprocess.run([sys.executable, '-m', 'statekv_ros.node', '--ros-args', '--params-file', '/no/such.yaml'], text=True,
                          capture_output=True, timeout=120, env=environment(new_domain()))
    assert done.returncode == 1
    assert '/no/such.yaml' in done.stderr and 'Traceback' not in done.stderr


# --- signals ----------------------------------------------------------------------------------------------------------

def is_heard(node: NodeProcess, number: int) -> bool:
    """Whether the process catches this signal."""
    caught = re.search(r'SigCgt:\s*([0-9a-f]+)', Path(f'/proc/{node.process.pid}/status').read_text())
    return bool(int(caught[1], 16) >> (number - 1) & 1)


@pytest.mark.parametrize('number,loaded', [
    (signal.SIGTERM, ''), (signal.SIGINT, 'libtorch_cpu'), (signal.SIGINT, '_rclpy_pybind11'),
    (signal.SIGTERM, 'librmw_fastrtps_cpp'), (signal.SIGINT, 'fastdds_')])
def test_a_signal_at_any_moment_of_the_start_ends_the_node_cleanly(number, loaded, tmp_path):
    """The moments: handlers stand, libraries are being loaded, ROS is being started."""
    node = NodeProcess(tmp_path, new_domain(), warm=False)
    try:
        wait(lambda: is_heard(node, signal.SIGTERM), 'the handlers')
        wait(lambda: loaded in Path(f'/proc/{node.process.pid}/maps').read_text(), loaded)
        code, _ = node.stop(number, 30.0)
    finally:
        node.stop(signal.SIGKILL)
    assert code == 0 and 'Traceback' not in node.log, node.log


@pytest.mark.parametrize('number', SIGNALS)
def test_two_signals_at_once_end_the_node_as_one_does(number, tmp_path, tiny_model_dir):
    with memory_node(tmp_path, tiny_model_dir) as (node, graph):
        graph.wait_for_state('active')
        node.process.send_signal(number)
        node.process.send_signal(number)
        assert node.process.wait(30.0) == 0
        assert 'Traceback' not in node.log and 'watchdog' not in node.log, node.log


@pytest.mark.parametrize('number', SIGNALS)
def test_every_waiting_caller_gets_an_error_when_the_node_is_asked_to_stop(number, tmp_path, tiny_model_dir):
    with memory_node(tmp_path, tiny_model_dir, cameras='[front]') as (node, graph):
        graph.wait_for_state('active')
        for second in (1, 2):
            graph.publish(image(second * SECOND))
            graph.wait_for_camera('front', frames_processed=second)
        answers = [graph.ask_later('?' * 4000, max_tokens=60_000) for _ in range(14)]
        graph.wait(lambda: int(graph.health['engine'][2]['active_questions']) > 0, 'an answer under way')
        node.process.send_signal(number)
        responses = [graph.response(answer) for answer in answers]
        assert {(response.success, response.error) for response in responses} == {(False, 'the node is shutting down')}
        assert node.process.wait(30.0) == 0
        assert 'Traceback' not in node.log, node.log


# --- callbacks that raise ---------------------------------------------------------------------------------------------

def test_a_parameter_value_of_an_unknown_type_is_logged_once_and_the_node_goes_on(tmp_path, tiny_model_dir):
    with memory_node(tmp_path, tiny_model_dir) as (node, graph):
        graph.wait_for_state('active')
        client = graph.node.create_client(SetParameters, '/statekv/set_parameters')
        graph.wait(client.service_is_ready, 'set_parameters')
        value = ParameterValue(type=77)
        for _ in range(5):
            client.call_async(SetParameters.Request(parameters=[Parameter(name='max_tokens', value=value)]))
        graph.wait(lambda: 'a callback failed; the node goes on' in node.log, 'the log')
        assert graph.lifecycle_state() == 'active'
        assert node.log.count('Traceback') == 1 and '77' in node.log, 'each place in the code at most once in a while'
        assert node.stop()[0] == 0


# --- hangs ------------------------------------------------------------------------------------------------------------

HANGING_NODE = '''
import ctypes
from pathlib import Path
from statekv_ros.node.__main__ import main
from statekv_ros.node.engine import Engine
from statekv_ros.node.memory_node import MemoryNode

libc = ctypes.{library}(None)       # a PyDLL keeps Python's lock during a call
method = {owner}.{method}

def hanging(self, *arguments):
    if Path({now!r}).exists():
        print('hangs now', flush=True)
        mutex = ctypes.create_string_buffer(128)
        libc.pthread_mutex_lock(mutex)
        libc.pthread_mutex_lock(mutex)
    return method(self, *arguments)

{owner}.{method} = hanging
main()
'''
EXECUTOR, ENGINE = ('MemoryNode', '_diagnose'), ('Engine', 'run_round')


@pytest.fixture
def hanging(tmp_path, tiny_model_dir):
    """Starts nodes of which a part stands on a lock that nobody ever gives back."""
    started = []

    def hanging(part: tuple[str, str], library: str, **parameters) -> NodeProcess:
        now, domain = tmp_path / 'now', new_domain()

        class HangingNode(NodeProcess):
            program = ('-c', HANGING_NODE.format(library=library, owner=part[0], method=part[1], now=str(now)))

        node = HangingNode(tmp_path, domain, model=tiny_model_dir, cameras='[front]', reliability='reliable',
                           diagnostics_period_s=0.1, **parameters)
        started.append(node)
        graph = Graph(domain)
        try:
            graph.wait_for_state('active')
            now.touch()
            graph.publish(image(SECOND))        # an idle engine waits for work
            graph.wait(lambda: 'hangs now' in node.log, 'the hang')
        finally:
            graph.close()
        return node

    yield hanging
    for node in started:
        node.stop(signal.SIGKILL)


@pytest.mark.parametrize('library', ['PyDLL', 'CDLL'])
@pytest.mark.parametrize('part,words', [(EXECUTOR, 'its executor ran no callback'), (ENGINE, 'its engine finished no layer')])
def test_a_node_that_hangs_is_ended_with_its_stacks_in_the_log(part, words, library, hanging):
    node = hanging(part, library, hang_limit_s=3.0)
    assert node.process.wait(60.0) == -signal.SIGKILL, 'a code that respawn and systemd take for a failure'
    assert 'the node hangs' in node.log and words in node.log and 'hang_limit_s' in node.log, node.log
    assert re.search(r'File "<string>", line \d+ in hanging', node.log), 'the line that hangs'


def test_a_busy_engine_that_gets_on_and_an_idle_one_do_not_hang(tmp_path, tiny_model_dir):
    with memory_node(tmp_path, tiny_model_dir, cameras='[front]', hang_limit_s=2.0) as (node, graph):
        graph.wait_for_state('active')
        graph.spin(4.0)
        for second in (1, 2):
            graph.publish(image(second * SECOND))
            graph.wait_for_camera('front', frames_processed=second)
        begun = time.monotonic()
        while time.monotonic() - begun < 4.0:
            graph.ask(max_tokens=200)
        assert node.alive and 'watchdog' not in node.log, node.log


def test_hang_limit_of_zero_lets_a_node_hang_and_a_second_signal_still_ends_it(hanging):
    node = hanging(EXECUTOR, 'PyDLL', hang_limit_s=0.0)
    for number in (signal.SIGINT, signal.SIGTERM):
        assert node.alive
        node.process.send_signal(number)
        time.sleep(1.0)     # two signals at once count as one: the span between them is the claim
    assert node.process.wait(30.0) == -signal.SIGKILL
    assert 'asked to stop a second time' in node.log and 'in hanging' in node.log, node.log


def test_one_signal_ends_a_node_that_hangs(hanging):
    node = hanging(EXECUTOR, 'PyDLL')
    node.process.send_signal(signal.SIGTERM)
    assert node.process.wait(60.0) == -signal.SIGKILL
    assert 'did not stop within 8 s' in node.log, node.log


def test_a_second_signal_ends_a_node_that_waits_for_its_engine(hanging):
    node = hanging(ENGINE, 'CDLL', hang_limit_s=0.0)
    node.process.send_signal(signal.SIGINT)
    time.sleep(1.0)         # the executor now waits for an engine that does not come back
    node.process.send_signal(signal.SIGINT)
    assert node.process.wait(30.0) == 0, 'Python still runs: it was asked to stop, so this is no failure'


def test_a_node_that_a_debugger_holds_is_no_hang(tmp_path, tiny_model_dir):
    with memory_node(tmp_path, tiny_model_dir, hang_limit_s=2.0) as (node, graph):
        graph.wait_for_state('active')
        node.process.send_signal(signal.SIGSTOP)
        time.sleep(5.0)     # longer than the limit
        node.process.send_signal(signal.SIGCONT)
        graph.fresh_health()
        assert node.alive and 'watchdog' not in node.log, node.log


SLOW = """
import time
from statekv_ros.node.watchdog import Watchdog

watchdog = Watchdog()
watchdog.set_limit(2.0)
while True:
    for part in 'executor', 'engine':
        watchdog.beat(part)
    print('beat', flush=True)
    for _ in range(10):
        time.sleep(0.1)
"""


def test_a_node_that_goes_on_has_the_time_it_had_left():
    process = subprocess.Popen([sys.executable, '-c', SLOW], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    with process:
        process.stdout.readline()
        process.send_signal(signal.SIGSTOP)
        time.sleep(4.0)
        process.send_signal(signal.SIGCONT)
        # The next beat comes most of a second later: a second after the last one, as it counts.
        assert [process.stdout.readline() for _ in range(2)] == ['beat\n'] * 2, process.stderr.read()
        process.kill()


def watchers(node: int) -> list[int]:
    """Processes that keep watch over `node`."""
    children = Path(f'/proc/{node}/task/{node}/children').read_text().split()
    return [int(pid) for pid in children if Path(f'/proc/{pid}/comm').read_text() == 'statekv-watch\n']


@pytest.mark.parametrize('number', [signal.SIGKILL, signal.SIGINT])
def test_the_watchdog_goes_with_its_node(number, tmp_path):
    node = NodeProcess(tmp_path, new_domain(), autostart='false')
    try:
        [watcher] = wait(lambda: watchers(node.process.pid), 'the watchdog')
    finally:
        node.stop(number)
    wait(lambda: not Path(f'/proc/{watcher}').exists(), 'the end of the watchdog')


def test_a_node_that_goes_in_the_middle_of_a_turn_is_no_error_of_the_watchdog(capsys):
    gone = subprocess.Popen([sys.executable, '-c', ''])
    gone.wait()
    keeper = _Keeper(gone.pid, -1, -1)
    assert not keeper._is_stopped()
    keeper._end('the node hangs')
    assert 'the node hangs' in capsys.readouterr().err


# --- threads ----------------------------------------------------------------------------------------------------------

def test_pytorch_leaves_half_the_cores_unless_asked_otherwise_in_every_thread():
    program = '''
import threading, torch
from statekv_ros.node.cpu_threads import use_cpu_threads
for asked in (0, 3):
    said = use_cpu_threads(asked)
    thread = threading.Thread(target=lambda: print(said, torch.get_num_threads()))
    thread.start()
    thread.join()
'''
    without = {name: value for name, value in os.environ.items() if name != 'OMP_NUM_THREADS'}

    def said(**more: str) -> list[str]:
        return subprocess.run([sys.executable, '-c', program], env=without | more, text=True, check=True,
                              stdout=subprocess.PIPE).stdout.split()

    half = str(max(1, len(os.sched_getaffinity(0)) // 2))
    assert said() == [half, half, '3', '3']
    assert said(OMP_NUM_THREADS='1') == ['1', '1', '3', '3']


# --- what dead processes left -----------------------------------------------------------------------------------------

LIVING = '''
import rclpy
from statekv_ros.transport import use_shipped_profile
use_shipped_profile()
rclpy.init()
node = rclpy.create_node('living')
print('up', flush=True)
rclpy.spin(node)
'''


@pytest.fixture
def ros_process():
    """Starts real ROS processes; gives each with the Fast DDS segments that it made."""
    started = []

    def start() -> tuple[subprocess.Popen, set[Path]]:
        process = subprocess.Popen([sys.executable, '-c', LIVING], env=environment(new_domain()), stdout=subprocess.PIPE)
        started.append(process)
        assert process.stdout.readline() == b'up\n'
        maps = Path(f'/proc/{process.pid}/maps').read_text()
        segments = {Path(name) for name in re.findall(r'/dev/shm/fastdds_[0-9a-f]{16}', maps)}
        assert segments and all(Path(f'{segment}_el').exists() for segment in segments)
        return process, segments

    yield start
    for process in started:
        process.kill()
        process.wait()
        process.stdout.close()


def age(segments: set[Path]) -> None:
    """As if they had been there for long. From now on any node that starts removes the dead ones, other tests' too."""
    for segment in segments:
        os.utime(f'{segment}_el', (0, 0))


def test_segments_of_killed_processes_are_removed_and_those_of_living_ones_stay(ros_process):
    (dead, dead_segments), (_, living_segments) = ros_process(), ros_process()
    for segment in dead_segments:
        os.utime(f'{segment}_el')
    dead.kill()
    dead.wait()
    assert all(segment.exists() for segment in dead_segments)
    age(dead_segments | living_segments)
    freed = remove_dead_segments()
    assert not any(segment.exists() or Path(f'{segment}_el').exists() for segment in dead_segments)
    assert all(segment.exists() and Path(f'{segment}_el').exists() for segment in living_segments)
    assert freed.segments >= len(dead_segments) and freed.bytes > 60_000_000


def test_node_removes_them_when_it_starts_and_says_so(ros_process, tmp_path):
    for _ in range(10):     # where a node of another test was quicker, this one finds nothing to remove
        dead, segments = ros_process()
        dead.kill()
        dead.wait()
        age(segments)
        with memory_node(tmp_path, 'patrol', autostart='false') as (node, graph):
            assert graph.lifecycle_state() == 'unconfigured'
            assert not any(segment.exists() for segment in segments)
            if 'Fast DDS segments of ended processes' in node.log:
                return
    pytest.fail('no node said that it removed them')


def test_only_settled_lock_files_of_this_user_with_fast_dds_names_count(tmp_path):
    kept = ['fastdds_0123456789abcdef', 'other_0123456789abcdef_el', 'fastdds_port7000_el', 'fastdds_0123456789ABCDEF_el',
            'fastdds_0123456789abcdef0_el', 'sem.fastdds_port7000_mutex']
    for name in [*kept, 'fastdds_aaaaaaaaaaaaaaaa_el', 'fastrtps_bbbbbbbbbbbbbbbb_el', 'fastdds_cccccccccccccccc_el']:
        (tmp_path / name).touch()
        os.utime(tmp_path / name, (0, 0))
    os.utime(tmp_path / 'fastdds_cccccccccccccccc_el')       # its owner may just be about to lock it
    kept.append('fastdds_cccccccccccccccc_el')
    if os.getuid() == 0:
        (tmp_path / 'fastdds_dddddddddddddddd_el').touch()
        os.utime(tmp_path / 'fastdds_dddddddddddddddd_el', (0, 0))
        os.chown(tmp_path / 'fastdds_dddddddddddddddd_el', 65534, 65534)
        kept.append('fastdds_dddddddddddddddd_el')
    os.symlink(tmp_path / 'fastdds_0123456789abcdef', tmp_path / 'fastdds_eeeeeeeeeeeeeeee_el')
    kept.append('fastdds_eeeeeeeeeeeeeeee_el')
    assert remove_dead_segments(tmp_path).segments == 2
    assert {path.name for path in tmp_path.iterdir()} == set(kept)
    assert remove_dead_segments(tmp_path / 'nowhere').segments == 0
