"""Standing questions of a real node over DDS, with the patrol model: alerts, lists, refusals, restarts, the client."""
import re
import signal
import threading
import time
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip('rclpy', reason='rclpy is not installed')

import rclpy  # noqa: E402
from diagnostic_msgs.msg import DiagnosticArray  # noqa: E402
from rclpy.executors import SingleThreadedExecutor  # noqa: E402
from rclpy.qos import DurabilityPolicy, QoSProfile  # noqa: E402

from live import SECOND, Graph, docs_program, image, memory_node, new_domain  # noqa: E402
from statekv_ros.client import StateKVClient, WatchRefused, WouldBlock  # noqa: E402
from statekv_ros.errors import Code  # noqa: E402
from statekv_ros.msg import Alert, Watches  # noqa: E402
from statekv_ros.node.messages import to_ns  # noqa: E402
from statekv_ros.node.watches.kept import FILE  # noqa: E402
from statekv_ros.patrol.render import render  # noqa: E402
from statekv_ros.patrol.world import COLOURS, SHAPES, Step, View  # noqa: E402
from statekv_ros.srv import Unwatch, Watch  # noqa: E402

pytestmark = pytest.mark.timeout(300)

ROOT = Path(__file__).resolve().parents[1]
SIDE = 64
WARN = 1
BALL, BOX = 'red ball', 'blue box'


def view(name: str) -> Step:
    """A patrol's step that shows it."""
    if name == 'nothing':
        return Step(View.EMPTY, 0, 0, -1, 0)
    colour, shape = name.split()
    return Step(View.OBJECT, SHAPES.index(shape), COLOURS.index(colour), 0, 0)


class Watcher:
    """Shows a node views of a patrol, a second each, and hears of its watches."""

    def __init__(self, node, graph: Graph):
        self.node, self.graph, self.shown, self._sent = node, graph, 0, 0
        self.alerts: list[Alert] = []
        self.lists: list[Watches] = []
        latched = QoSProfile(depth=1, durability=DurabilityPolicy.TRANSIENT_LOCAL)
        graph.node.create_subscription(Alert, '/statekv/alert', self.alerts.append, QoSProfile(depth=100))
        graph.node.create_subscription(Watches, '/statekv/watches', self.lists.append, latched)
        self._watch = graph.node.create_client(Watch, '/statekv/watch', qos_profile=QoSProfile(depth=1000))
        self._unwatch = graph.node.create_client(Unwatch, '/statekv/unwatch')

    def later(self, question: str = 'what is in view?', **fields):
        self.graph.wait(self._watch.service_is_ready, 'the watch service')
        return self._watch.call_async(Watch.Request(question=question, **{'condition': 'changes', **fields}))

    def watch(self, question: str = 'what is in view?', **fields) -> Watch.Response:
        return self.graph.response(self.later(question, **fields))

    def unwatch(self, id: str) -> Unwatch.Response:
        self.graph.wait(self._unwatch.service_is_ready, 'the unwatch service')
        return self.graph.response(self._unwatch.call_async(Unwatch.Request(id=id)))

    def show(self, *names: str, checked: bool = True) -> None:
        """Each for a second, two frames; checked: every watch has its answer before the next."""
        for name in names:
            for half, pixels in enumerate(render(view(name), np.random.default_rng(self.shown), SIDE, SIDE)):
                message = image((self.shown + 1) * SECOND + half * SECOND // 2, SIDE, SIDE)
                message.data = pixels.tobytes()
                self.graph.publish(message)
                self._sent += 1
                self.graph.wait_for_camera('front', frames_processed=self._sent)
            self.shown += 1
            if checked:
                self.graph.wait(lambda: all(to_ns(state.stamp) == self.shown * SECOND + SECOND // 2 for state in self.list()),
                                'every check')

    def list(self) -> list:
        return self.lists[-1].watches if self.lists else []

    def listed(self, count: int) -> dict:
        """The list by id, once it has so many watches."""
        self.graph.wait(lambda: self.lists and len(self.list()) == count, f'{count} watches; {self.list()}')
        return {state.id: state for state in self.list()}


@pytest.fixture
def running(tmp_path):
    """begin(**parameters) -> Watcher of a node on one memory folder; each ends the one before with that signal."""
    ends = []

    def begin(ending=signal.SIGKILL, model='patrol', **parameters) -> Watcher:
        end()
        made = memory_node(tmp_path, model, ending, cameras='[front]', memory_dir=tmp_path / 'memory', budget=144, max_tokens=8,
                           watch_share='1.0', **parameters)
        ends.append(made)
        watcher = Watcher(*made.__enter__())
        watcher.graph.wait_for_state('active')
        return watcher

    def end():
        while ends:
            ends.pop().__exit__(None, None, None)
    yield begin
    end()


def test_a_change_is_told_with_what_was_and_is_and_where_it_was_seen(running):
    watcher = running()
    changes, ball = watcher.watch().id, watcher.watch(condition=f'equals {BALL}', debounce=2).id
    watcher.show('nothing', BALL, BALL, BOX)
    watcher.graph.wait(lambda: len(watcher.alerts) == 3, 'the alerts: they come over a topic of their own')
    by_id = {id: [alert for alert in watcher.alerts if alert.id == id] for id in (changes, ball)}
    assert [(alert.text_before, alert.text, to_ns(alert.since) // SECOND) for alert in by_id[changes]] == [
        ('nothing', BALL, 2), (BALL, BOX, 4)]
    [held] = by_id[ball]
    assert (held.text_before, held.text, to_ns(held.since), to_ns(held.last_stamp)) == (
        'nothing', BALL, 2.5 * SECOND, 3.5 * SECOND)
    first = by_id[changes][0]
    assert (first.question, first.camera, first.condition) == ('what is in view?', 'front', 'changes')
    assert first.header.frame_id == 'camera_link' and first.demonstration_model and not first.has_pose
    assert to_ns(first.evidence[0].last_stamp) == 2.5 * SECOND and first.evidence[0].share > 0.5
    picture = first.evidence[0].image
    assert bytes(picture.data[:2]) == b'\xff\xd8' and picture.header.stamp == first.evidence[0].last_stamp
    assert not any(len(evidence.image.data) for evidence in first.evidence[1:])
    listed = watcher.listed(2)
    assert (listed[changes].text, listed[changes].checks, listed[changes].alerts) == (BOX, 4, 2)
    assert all(state.keeps_up and state.skipped == 0 and not state.error for state in listed.values())
    level, message, values = watcher.graph.fresh_health()['watches']
    assert (level, values['checks'], values['alerts'], values['skipped']) == (0, '8', '3', '0'), message


def test_watches_answers_and_what_held_outlive_the_process_and_a_reset_forgets_the_answers_alone(running):
    watcher = running()
    changes, ball = watcher.watch(expires_s=1000.0).id, watcher.watch(condition=f'equals {BALL}').id
    assert watcher.unwatch(watcher.watch('gone?').id).ended == 1
    watcher.show('nothing', BALL)
    time.sleep(1.1)                 # answers are written once a second
    watcher.show(BALL)
    shown = watcher.shown
    for ending in (signal.SIGKILL, signal.SIGINT):
        watcher = running(ending)
        listed = watcher.listed(2)
        assert (listed[changes].text, listed[ball].alerts) == (BALL, 1) and to_ns(listed[changes].expires) > time.time() * SECOND
    watcher.shown = shown
    watcher.show(BOX)
    watcher.graph.wait(lambda: watcher.alerts, 'the alert: it comes over a topic of its own')
    [alert] = watcher.alerts
    assert (alert.id, alert.text_before, alert.text) == (changes, BALL, BOX), 'and the ball, which was told, is not told again'
    graph = watcher.graph
    graph.wait(graph.reset.service_is_ready, 'the reset service')
    assert graph.response(graph.reset.call_async(graph.reset.srv_type.Request())).success
    graph.wait(lambda: {state.text for state in watcher.list()} == {''}, 'forgotten answers')
    watcher.show(BALL)
    graph.wait(lambda: len(watcher.alerts) == 2, 'an alert')
    assert watcher.alerts[1].id == ball and watcher.alerts[1].text_before == '', 'the first answer is no change'


def test_another_model_keeps_the_watches_an_unreadable_file_is_told_and_the_node_lives(running, tmp_path, tiny_model_dir):
    watcher = running()
    watcher.watch()
    watcher.show('nothing')
    watcher = running(model=tiny_model_dir)
    assert [state.text for state in watcher.listed(1).values()] == ['']
    assert '1 watches of' in watcher.node.log and 'another model' in watcher.node.log
    watcher.node.stop()
    (tmp_path / 'memory' / FILE).write_bytes(b'{"format": 1')
    watcher = running()
    assert watcher.listed(0) == {} and 'cannot be read' in watcher.node.log
    assert watcher.watch().success


@pytest.mark.parametrize('fields, code, words', [
    ({'question': ' '}, Code.INVALID_ARGUMENT, 'question is empty'),
    ({'question': 'x' * 9000}, Code.INVALID_ARGUMENT, '"max_question_chars"'),
    ({'camera': 'rear'}, Code.UNKNOWN_CAMERA, "unknown camera 'rear'"),
    ({'camera': 'all'}, Code.UNKNOWN_CAMERA, 'a watch is of one camera, front'),
    ({'condition': ''}, Code.INVALID_CONDITION, 'condition must be'),
    ({'condition': 'matches (a'}, Code.INVALID_CONDITION, 'missing )'),
    ({'condition': 'rises above nan'}, Code.INVALID_CONDITION, 'finite number'),
    ({'every_s': -1.0}, Code.INVALID_ARGUMENT, 'every_s must be a number from 0'),
    ({'every_s': float('nan')}, Code.INVALID_ARGUMENT, 'every_s must be a number from 0'),
    ({'every_s': 1.0, 'every_steps': 1}, Code.INVALID_ARGUMENT, 'either every_steps or every_s'),
    ({'expires_s': float('inf')}, Code.INVALID_ARGUMENT, 'expires_s must be a number from 0'),
    ({'debounce': 10**6}, Code.INVALID_ARGUMENT, 'debounce must be a number from 1'),
    ({'max_tokens': 10**6}, Code.INVALID_ARGUMENT, 'max_tokens must be a number from 1'),
    ({'answer_policy': 'last(0)'}, Code.INVALID_ARGUMENT, 'last')])
def test_what_cannot_work_gets_a_code_and_a_sentence(shared, fields, code, words):
    response = shared.watch(**{'question': 'what is in view?', **fields})
    assert (response.success, response.error_code, response.id) == (False, code, '') and words in response.error


@pytest.fixture(scope='module')
def shared(tmp_path_factory):
    """A node that keeps nothing, with a standing question of its parameters."""
    parameters = {'watch.view.question': 'what is in view?', 'watch.view.condition': f'equals {BALL}', 'max_watches': 40}
    with memory_node(tmp_path_factory.mktemp('watches'), 'patrol', cameras='[front]', budget=144, max_tokens=8,
                     watches='[view]', **parameters) as running:
        watcher = Watcher(*running)
        watcher.graph.wait_for_state('active')
        yield watcher
        assert watcher.node.alive and 'Traceback' not in watcher.node.log, watcher.node.log


def test_codes_of_the_services_are_the_nodes():
    for name in ('Watch', 'Unwatch'):
        constants = dict(re.findall(r'^uint16 ([A-Z_]+)=(\d+)', (ROOT / f'srv/{name}.srv').read_text(), re.MULTILINE))
        assert constants and all(int(value) == Code[key] for key, value in constants.items())


def test_a_configured_watch_is_there_from_the_start_and_may_be_ended(shared):
    assert shared.listed(1)['view'].configured      # it is known what to wait for from now on
    shared.show('nothing', BALL)
    shared.graph.wait(lambda: shared.alerts, 'an alert')
    assert [(alert.id, alert.text) for alert in shared.alerts] == [('view', BALL)]
    assert shared.unwatch('view').ended == 1
    response = shared.unwatch('view')
    assert (response.success, response.error_code) == (False, Code.UNKNOWN_WATCH) and 'unknown watch' in response.error


def test_of_a_thousand_watches_those_past_the_bound_are_refused_and_the_node_watches_and_answers_on(shared):
    shared.unwatch('all')
    told = []
    shared.graph.node.create_subscription(DiagnosticArray, '/diagnostics', lambda message: told.extend(
        (status.level, status.message) for status in message.status if status.name.endswith(': watches')), QoSProfile(depth=10))
    responses = [shared.graph.response(future) for future in [shared.later(f'did you see {number}?') for number in range(1000)]]
    refused = [response for response in responses if not response.success]
    assert len(refused) == 960 and {response.error_code for response in refused} == {Code.TOO_MANY_WATCHES}
    assert all('"max_watches"' in response.error for response in refused)
    shared.listed(40)
    for _ in range(4):
        shared.show(BOX, checked=False)
    assert shared.graph.ask('what is in view?').answer.text == BOX
    shared.graph.wait(lambda: any(level == bytes([WARN]) and 'of 40 watches do not keep up' in message
                                  and '"watch_share"' in message for level, message in told), 'a warning')
    assert any(state.skipped and not state.keeps_up for state in shared.listed(40).values())
    assert shared.unwatch('all').ended == 40 and shared.listed(0) == {}


def test_a_watch_ends_by_itself(shared):
    shared.unwatch('all')
    id = shared.watch(expires_s=0.5).id
    assert id in shared.listed(1)
    shared.listed(0)
    assert f'watch {id} has ended' in shared.node.log


# --- the client -------------------------------------------------------------------------------------------------------

@pytest.fixture
def in_domain(shared):
    """rclpy in this process, in the node's domain."""
    rclpy.init(args=[], domain_id=shared.graph.context.get_domain_id())
    yield
    rclpy.try_shutdown()


@pytest.fixture
def new_domain_alone():
    """rclpy in this process, in a domain without any node."""
    rclpy.init(args=[], domain_id=new_domain())
    yield
    rclpy.try_shutdown()


def test_client_watches_hears_of_it_and_ends_it(shared, in_domain):
    shared.show('nothing', checked=False)
    with StateKVClient() as memory:
        heard, others = [], []
        id = memory.watch('what is in view?', condition=f'matches ^{BALL}$')
        shared.show('nothing', BALL, checked=False)
        shared.graph.wait(lambda: any(alert.id == id for alert in shared.alerts), 'the alert')
        stop = memory.on_alert(others.append, id)
        stop()
        memory.on_alert(others.append, 'another')
        memory.on_alert(heard.append, id)       # it hears what came before, too
        end = time.monotonic() + 60
        while not heard and time.monotonic() < end:
            memory.spin_for(0.1)
        assert [(alert.id, alert.text) for alert in heard] == [(id, BALL)] and others == []
        assert memory.unwatch(id) == 1
        with pytest.raises(WatchRefused, match='unknown watch') as error:
            memory.unwatch(id)
        assert error.value.error_code == Code.UNKNOWN_WATCH
        with pytest.raises(WatchRefused, match='condition must be') as error:
            memory.watch('open?', condition='open')
        assert error.value.error_code == Code.INVALID_CONDITION
        for fields in ({'question': 7}, {'every_s': -1}, {'debounce': 1.5}, {'max_tokens': -1}, {'condition': None}):
            with pytest.raises(ValueError, match=next(iter(fields))):
                memory.watch(**{'question': 'open?', **fields})


def test_client_inside_a_node_waits_in_no_callback_and_hears_alerts_there(shared, in_domain):
    node, refusals, responses, heard = rclpy.create_node('planner'), [], [], []
    memory = StateKVClient(node=node)
    memory.on_alert(heard.append)

    def plan():
        if refusals:
            return
        for call in (lambda: memory.watch('what is in view?'), lambda: memory.unwatch('1')):
            with pytest.raises(WouldBlock) as error:
                call()
            refusals.append(str(error.value))
        memory.watch_async('what is in view?', condition=f'equals {BOX}').add_done_callback(
            lambda future: responses.append(future.result()))

    executor = SingleThreadedExecutor()
    executor.add_node(node)
    node.create_timer(0.05, plan)
    thread = threading.Thread(target=executor.spin)
    thread.start()
    try:
        shared.graph.wait(lambda: responses, 'the response')
        assert len(refusals) == 2 and responses[0].success
        shared.show('nothing', BOX, checked=False)
        shared.graph.wait(lambda: heard, 'an alert')
        assert heard[0].id == responses[0].id and heard[0].text == BOX
        ended = memory.unwatch_async(responses[0].id)
        shared.graph.wait(ended.done, 'its end')
        assert ended.result().ended == 1
    finally:
        executor.shutdown()
        thread.join()
        memory.close()
        node.destroy_node()


def test_the_program_of_the_docs_prints_the_alert(shared):
    shared.unwatch('all')
    process = docs_program(ROOT / 'docs/watching.md', shared.graph.context.get_domain_id())
    try:
        shared.listed(1)
        shared.show('nothing', BALL, checked=False)
        out, _ = process.communicate(timeout=60)
        assert process.returncode == 0 and f'nothing -> {BALL}' in out, out
        shared.listed(0)
    finally:
        process.kill()


def test_without_a_node_a_program_is_told_and_a_callback_too(new_domain_alone):
    with StateKVClient() as memory:
        with pytest.raises(WatchRefused, match="no memory node 'statekv'"):
            memory.watch('what is in view?', timeout_s=0.3)
        future = memory.watch_async('what is in view?', timeout_s=0.3)
        memory.spin_for(1.0)
        assert future.done() and not future.result().success and 'no memory node' in future.result().error
