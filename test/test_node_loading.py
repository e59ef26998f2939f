"""A node whose model takes long to load, and transitions that fail: it answers meanwhile, tells why, and leaks nothing."""
import fcntl
import os
import shutil
import signal
from pathlib import Path

import pytest
from lifecycle_msgs.msg import Transition

from rclpy.lifecycle import TransitionCallbackReturn

from live import SECOND, NodeProcess, image, memory_node
from test_parameters import context, given, profile, start  # noqa: F401  (fixtures of nodes in this process)

pytestmark = pytest.mark.timeout(300)
CLASHING = {'cameras': '[a,b]', 'a__topic': '/x', 'b__topic': '/x', 'b__transport': 'compressed'}


class SlowFile:
    """A file whose reader waits in `open` until the test lets it on: the test holds a lease on it (fcntl(2), at most 45 s)."""

    def __init__(self, file: Path):
        signal.signal(signal.SIGIO, signal.SIG_IGN)     # tells that somebody waits; so does `is_read`
        self._file = os.open(file, os.O_RDWR)
        fcntl.fcntl(self._file, fcntl.F_SETLEASE, fcntl.F_WRLCK)

    def is_read(self) -> bool:
        """Whether somebody waits for it."""
        return fcntl.fcntl(self._file, fcntl.F_GETLEASE) != fcntl.F_WRLCK

    def come(self, content: bytes | None = None) -> None:
        """Let the readers on, to what the file has or to another content."""
        if content is not None:
            os.ftruncate(self._file, 0)
            os.pwrite(self._file, content, 0)
        fcntl.fcntl(self._file, fcntl.F_SETLEASE, fcntl.F_UNLCK)
        os.close(self._file)


@pytest.fixture
def slow(tiny_model_dir, tmp_path) -> tuple[str, SlowFile]:
    """A checkpoint whose loading stops halfway, after the weights, and the file that it waits for."""
    folder = Path(shutil.copytree(tiny_model_dir, tmp_path / 'slow'))
    return str(folder), SlowFile(folder / 'tokenizer_config.json')


def test_while_a_model_loads_the_node_tells_how_long_and_answers_all_its_services(slow, tmp_path):
    model, file = slow
    with memory_node(tmp_path, model, cameras='[front]') as (node, graph):
        graph.wait(file.is_read, 'the loading')
        graph.wait_for_state('configuring')
        assert graph.fresh_health()['engine'][1].startswith(f'loading model {model!r} for ')
        before = float(graph.health['engine'][2]['loading_s'])
        assert float(graph.fresh_health()['engine'][2]['loading_s']) > before
        assert graph.lifecycle_state() == 'configuring'
        response = graph.ask()
        assert not response.success and 'is loading model' in response.error
        response = graph.response(graph.reset.call_async(graph.reset.srv_type.Request()))
        assert not response.success and 'is loading model' in response.error
        file.come()
        graph.wait_for_state('active')
        graph.publish(image(SECOND))
        graph.wait_for_camera('front', frames_held=1)


def test_what_is_asked_for_while_a_model_loads_takes_effect_when_it_is_there(slow, tmp_path):
    model, file = slow
    with memory_node(tmp_path, model, cameras='[front]', autostart='false') as (node, graph):
        wanted = [graph.lifecycle_later(Transition.TRANSITION_CONFIGURE)]
        graph.wait(file.is_read, 'the loading')
        wanted += [graph.lifecycle_later(transition) for transition in (Transition.TRANSITION_ACTIVATE,
                                                                      Transition.TRANSITION_DEACTIVATE,
                                                                      Transition.TRANSITION_CLEANUP)]
        graph.fresh_health()
        assert graph.lifecycle_state() == 'configuring' and not any(future.done() for future in wanted)
        file.come()
        assert all(graph.response(future).success for future in wanted)
        assert graph.lifecycle_state() == 'unconfigured' and graph.health['engine'][0] == 0


def test_a_configure_that_fails_late_is_answered_with_failure_and_the_reason_is_told(slow, tmp_path):
    model, file = slow
    with memory_node(tmp_path, model, cameras='[front]', autostart='false') as (node, graph):
        configured = graph.lifecycle_later(Transition.TRANSITION_CONFIGURE)
        graph.wait(file.is_read, 'the loading')
        file.come(b'{"tokenizer_class": [')
        assert not graph.response(configured).success
        assert graph.lifecycle_state() == 'unconfigured'
        level, message, values = graph.fresh_health()['engine']
        assert level == 2 and model in message and values['state'] == 'unconfigured', message
        assert message in node.log and message in graph.ask().error


@pytest.mark.parametrize('number', [signal.SIGINT, signal.SIGTERM])
def test_a_signal_while_a_model_loads_ends_the_node_cleanly(number, slow, tmp_path):
    model, file = slow
    with memory_node(tmp_path, model, cameras='[front]') as (node, graph):
        graph.wait(file.is_read, 'the loading')
        graph.wait_for_state('configuring')
        code, _ = node.stop(number)
        assert code == 0 and 'Traceback' not in node.log and 'ERROR' not in node.log, node.log


def threads(node: NodeProcess) -> int:
    return len(os.listdir(f'/proc/{node.process.pid}/task'))


def test_an_activation_that_fails_is_told_and_leaves_nothing_open_however_often_it_is_tried(tiny_model_dir, tmp_path):
    with memory_node(tmp_path, tiny_model_dir, **CLASHING) as (node, graph):
        graph.wait_for_state('inactive')
        level, message, _ = graph.fresh_health()['engine']
        assert level == 2 and 'topic /x of camera b' in message and '"b.transport"' in message, message
        graph.wait(lambda: 'autostart ended: the node is inactive' in node.log, 'the log')
        assert 'cannot be activated: topic /x of camera b' in node.log
        assert graph.node.count_subscribers('/x') == 0
        assert not graph.lifecycle(Transition.TRANSITION_ACTIVATE)
        before = threads(node)
        for _ in range(5):
            assert graph.lifecycle(Transition.TRANSITION_CLEANUP) and graph.lifecycle(Transition.TRANSITION_CONFIGURE)
            assert not graph.lifecycle(Transition.TRANSITION_ACTIVATE) and graph.lifecycle_state() == 'inactive'
        assert threads(node) == before
        graph.wait(lambda: graph.node.count_subscribers('/x') == 0, 'no subscription that was left')


@pytest.mark.parametrize('transition', ['deactivate', 'cleanup'])
def test_a_transition_that_breaks_halfway_frees_everything_and_tells(transition, start, tiny_model_dir):  # noqa: F811
    node = start(*given(model=tiny_model_dir, device='cpu'))
    assert node.trigger_configure() == node.trigger_activate() == TransitionCallbackReturn.SUCCESS
    if transition == 'cleanup':
        assert node.trigger_deactivate() == TransitionCallbackReturn.SUCCESS
    engine, [source] = node._engine, node._inputs
    close = source.close

    def broken() -> None:
        source.close = close
        raise ZeroDivisionError('oops')

    source.close = broken
    assert getattr(node, f'trigger_{transition}')() == TransitionCallbackReturn.ERROR
    assert node._state == 'unconfigured' and 'oops' in node._reason
    assert node._engine is None and not engine._thread.is_alive()
    assert node.trigger_configure() == node.trigger_activate() == TransitionCallbackReturn.SUCCESS
    assert node._reason == ''


def test_a_model_is_never_loaded_over_an_engine_that_runs(start, tiny_model_dir):  # noqa: F811
    node = start(*given(model=tiny_model_dir, device='cpu'))
    node._load()
    first = node._engine
    node._load()
    assert not first._thread.is_alive() and node._engine._thread.is_alive()
