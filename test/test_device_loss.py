"""A GPU that is lost while the node runs: the engine ends, the node configures itself again, once, and goes on where it stood."""
import shutil
import signal
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip('rclpy', reason='rclpy is not installed')

from lifecycle_msgs.msg import Transition  # noqa: E402

from conftest import SECOND  # noqa: E402
from live import Graph, NodeProcess, image, new_domain  # noqa: E402
from statekv_ros.errors import Code, FrameError, QuestionError  # noqa: E402
from statekv_ros.memory import VideoStream  # noqa: E402
from statekv_ros.node.device_loss import free_device_memory, is_lost  # noqa: E402
from statekv_ros.node.camera import Camera  # noqa: E402
from statekv_ros.node.engine import Engine  # noqa: E402
from statekv_ros.node.questions import Question  # noqa: E402

pytestmark = pytest.mark.timeout(300)
CUDA = torch.device('cuda', 1)
LOST = RuntimeError('CUDA error: an illegal memory access was encountered')
# A node that computes on the CPU and loses its "GPU" whenever it sees an image of 96 pixels' height.
PROGRAM = '''
import sys
from statekv_ros.memory import VideoStream
from statekv_ros.node import memory_node
from statekv_ros.node.__main__ import main

take_in = VideoStream.take_in


def lose(stream, frame, *arguments):
    if frame.shape[0] == 96:
        raise RuntimeError('CUDA error: an illegal memory access was encountered')
    return take_in(stream, frame, *arguments)


VideoStream.take_in = lose
memory_node.is_lost = lambda device, error: 'CUDA error' in str(error)
sys.exit(main())
'''


@pytest.mark.parametrize('error', [LOST, RuntimeError('cuBLAS error: CUBLAS_STATUS_EXECUTION_FAILED')])
def test_the_device_itself_says_whether_it_is_lost(error, monkeypatch):
    asked = []

    def answers(device):
        asked.append(device)

    def fails(device):
        asked.append(device)
        raise getattr(torch, 'AcceleratorError', RuntimeError)('CUDA error: an illegal memory access was encountered')

    monkeypatch.setattr(torch.cuda, 'synchronize', answers)
    assert not is_lost(CUDA, error)
    monkeypatch.setattr(torch.cuda, 'synchronize', fails)
    assert is_lost(CUDA, error) and asked == [CUDA, CUDA]
    assert not is_lost(torch.device('cpu'), error)
    assert not is_lost(CUDA, FrameError('not an image')) and not is_lost(CUDA, torch.OutOfMemoryError('full')) and len(asked) == 2


def test_memory_that_a_lost_device_cannot_take_back_is_no_obstacle(monkeypatch):
    def fails():
        raise LOST

    told = []
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: True)
    monkeypatch.setattr(torch.cuda, 'empty_cache', fails)
    free_device_memory(told.append)
    assert 'illegal memory access' in told[0]


@pytest.mark.parametrize('where', ['step', 'slice', 'begin'])
def test_an_engine_whose_device_is_lost_ends_and_tells_those_that_wait(where, backbone, frames, monkeypatch):
    stream, losses, outcomes, errors = VideoStream(backbone, 'statekv(40)'), [], [], []
    for index in range(4):
        stream.step(frames[index], (index + 1) * SECOND)
    camera = Camera('front', stream, lambda message: (message, 'camera_link'))
    engine = Engine([camera], lambda *report: None, lambda: 4, 16, errors.append)
    engine.is_lost, engine.on_lost = lambda error: error is LOST, losses.append

    def fails(*arguments, **options):
        raise LOST

    questions = [Question('is the door open?', ['front'], {'max_tokens': 8}, 600.0, outcomes.append) for _ in range(2)]
    if where == 'step':
        monkeypatch.setattr(stream, 'take_in', fails)
        camera.mailbox.put(frames[5], 6 * SECOND)
    elif where == 'begin':
        monkeypatch.setattr(stream, 'begin_answer', fails)
    else:
        monkeypatch.setattr(questions[0], 'advance', fails)
    for question in questions:
        engine.ask(question)
    engine.start()
    engine._thread.join(60)
    assert not engine._thread.is_alive() and engine.stuck_s() == 0, 'nor is it taken for one that hangs'
    assert losses == ['RuntimeError: CUDA error: an illegal memory access was encountered']
    assert len(outcomes) == 2 and all('illegal memory access' in outcome.error for outcome in outcomes)
    with pytest.raises(QuestionError, match='the GPU was lost .*illegal memory access.*diagnostics') as refused:
        engine.ask(questions[0])
    assert refused.value.code == Code.NOT_CONFIGURED
    assert engine.stop()


class LosingNode(NodeProcess):
    program = ('-c', PROGRAM)


@pytest.fixture
def losing(tmp_path, tiny_model_dir):
    """A node that loses its device when told, with its memory on disk, and a graph beside it."""
    model = shutil.copytree(tiny_model_dir, tmp_path / 'model')
    domain = new_domain()
    node = LosingNode(tmp_path, domain, model=model, reliability='reliable', rate_hz='1000.0', budget=64,
                      diagnostics_period_s='0.1', max_tokens=6, cameras='[front]', memory_dir=tmp_path / 'memory')
    graph = Graph(domain)
    try:
        yield SimpleNamespace(node=node, graph=graph, model=Path(model))
    except BaseException:
        print(node.log)
        raise
    finally:
        graph.close()
        node.stop(signal.SIGINT)


def watch(graph: Graph, begin: int, end: int) -> None:
    for number in range(begin, end):
        graph.publish(image((number + 1) * SECOND, seed=number))
        graph.wait(lambda: graph.health['front'][2]['frames_held'] == str(number + 1), f'frame {number}')


def lose(graph: Graph, number: int) -> None:
    graph.publish(image((number + 1) * SECOND, 96, 96))


def status(graph: Graph) -> tuple[int, str, dict]:
    return graph.health.get('engine', (0, '', {}))


def test_a_node_that_loses_its_gpu_goes_on_with_what_is_on_disk_and_stays_inactive_the_second_time(losing):
    graph = losing.graph
    graph.wait_for_state('active')
    watch(graph, 0, 6)
    lose(graph, 6)
    graph.wait(lambda: 'configured again' in status(graph)[1] and status(graph)[2]['state'] == 'active', 'the node to come back')
    level, message, _ = graph.fresh_health()['engine']
    assert level == 1 and 'illegal memory access' in message and 'the memory goes on where it stood on disk' in message
    assert graph.health['front'][2]['frames_held'] == '6'
    assert graph.ask().success
    watch(graph, 6, 8)
    lose(graph, 8)
    graph.wait(lambda: 'a second time within 600 s' in status(graph)[1], 'the second loss')
    level, message, values = graph.fresh_health()['engine']
    assert level == 2 and values['state'] == graph.lifecycle_state() == 'inactive'
    refused = graph.ask()
    assert not refused.success and 'the GPU was lost' in refused.error
    # Who has looked after the GPU gets all of it back.
    for transition in (Transition.TRANSITION_CLEANUP, Transition.TRANSITION_CONFIGURE, Transition.TRANSITION_ACTIVATE):
        assert graph.lifecycle(transition)
    graph.wait_for_state('active')
    watch(graph, 8, 9)


def test_a_node_that_cannot_be_configured_again_says_so_and_lives_on(losing):
    graph = losing.graph
    graph.wait_for_state('active')
    watch(graph, 0, 2)
    shutil.rmtree(losing.model)
    lose(graph, 2)
    graph.wait(lambda: 'start the node again' in status(graph)[1], 'the refusal')
    level, message, values = graph.fresh_health()['engine']
    assert level == 2 and values['state'] == 'unconfigured'
    assert 'does not exist' in message and 'goes on where it stood' in message
    assert losing.node.alive and 'configuring again failed' in losing.node.log
