"""What /diagnostics says of a device that computes more slowly than it could."""
import signal

import pytest
import torch

pytest.importorskip('rclpy', reason='rclpy is not installed')

from conftest import SECOND  # noqa: E402
from live import Graph, NodeProcess, image, new_domain  # noqa: E402
from statekv_ros.kernels import fitness  # noqa: E402
from statekv_ros.memory import VideoStream  # noqa: E402
from statekv_ros.memory.graphs import StepGraphs  # noqa: E402
from statekv_ros.memory.recorded_decode import DecodeGraphs  # noqa: E402
from statekv_ros.memory.together import Together  # noqa: E402
from statekv_ros.memory.warmup import WarmUp  # noqa: E402
from statekv_ros.node.accelerator import Accelerator  # noqa: E402

CUDA = torch.device('cuda', 0)
# A node whose frame steps should be recorded and cannot be.
PROGRAM = '''
import sys
from statekv_ros.memory import stream
from statekv_ros.memory.graphs import StepGraphs
from statekv_ros.node.__main__ import main


def record(function):
    raise RuntimeError('CUDA error: operation not permitted when stream is capturing')


stream.make_graphs = lambda mode, backbone, kind: StepGraphs(backbone, lambda: record)
sys.exit(main())
'''


class NoGraphsNode(NodeProcess):
    program = ('-c', PROGRAM)


@pytest.mark.timeout(300)
def test_a_node_tells_that_its_steps_are_not_replayed_and_when_that_is_tried_again(tiny_model_dir, tmp_path):
    domain = new_domain()
    node = NoGraphsNode(tmp_path, domain, model=tiny_model_dir, reliability='reliable', rate_hz='1000.0', budget=30,
                        diagnostics_period_s='0.1', cameras='[front]')
    graph = Graph(domain)
    try:
        graph.wait_for_state('active')
        assert graph.fresh_health()['engine'][1].startswith('active, 0 frame steps')
        for number in range(24):
            graph.publish(image((number + 1) * SECOND, seed=number))
            graph.wait(lambda: graph.health['front'][2]['frames_held'] == str(number + 1), f'frame {number}')
        level, message, _ = graph.fresh_health()['engine']
        assert level == 1 and 'camera front: frame steps are not replayed as CUDA graphs' in message
        assert 'not permitted when stream is capturing (failure 1 of 4; tried again in ' in message
        assert 'not replayed as CUDA graphs' in node.log
    finally:
        graph.close()
        node.stop(signal.SIGINT)


@pytest.mark.filterwarnings('ignore:.*is the naive one', 'ignore:.* are not replayed')
def test_missing_kernels_and_recordings_that_went_off_are_told_and_nothing_while_all_is_well(backbone, monkeypatch):
    monkeypatch.setattr(torch.cuda, 'get_device_capability', lambda device: (9, 0))
    fitness._unfit.cache_clear()
    fitness.forget_failures()
    streams = {name: VideoStream(backbone, 'statekv(30)') for name in ('front', 'rear')}
    streams['front'].graphs = StepGraphs(backbone, lambda: None)
    together = Together()
    accelerator = Accelerator(CUDA, streams, together, WarmUp(3.21, ('20 tokens',), 6, 8, ()))
    streams['front'].decodes, streams['rear'].decodes = DecodeGraphs(lambda: None), DecodeGraphs(lambda: None)
    streams['front'].decodes.replays, streams['rear'].decodes.replays = 3, 4
    assert accelerator.problem == '' and accelerator.facts() == {'attention': 'triton', 'warm_up_s': 3.2, 'replayed_steps': 0,
                                                                'replayed_tokens': 7}
    streams['front'].graphs._pauses.failed(RuntimeError('no'))
    streams['rear'].decodes.failed(RuntimeError('nor this'))
    fitness.note_failure('paged_attention', CUDA, RuntimeError('no'))
    assert accelerator.problem.count(';') >= 1
    with pytest.warns(RuntimeWarning, match='stepped one by one'):
        together._pause('MemoryError: no room')
    for words in ('paged_attention without its Triton kernel', 'camera front: frame steps are not replayed',
                  'camera rear: tokens of answers are not replayed as CUDA graphs but run eagerly, which is slower: RuntimeError',
                  'cameras are stepped one by one, which is slower: MemoryError: no room (tried again in 60 s)'):
        assert words in accelerator.problem
    assert accelerator.facts()['attention'] == 'naive'
    fitness.forget_failures()
    fitness._unfit.cache_clear()
    assert Accelerator(torch.device('cpu'), {}, Together(), None).facts() == {}
