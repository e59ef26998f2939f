"""Batches as recorded graphs: one recording for any cameras of that number, to the bit the eager batch."""
import gc
import weakref

import pytest
import torch

from conftest import SECOND
from family_libraries import LIBRARIES
from statekv_ros.backbones import load_backbone
from statekv_ros.backbones.tiny import write_tiny_checkpoint
from statekv_ros.memory import VideoStream
from statekv_ros.memory.graphs import StepGraphs
from statekv_ros.memory.together import Given, Together
from test_graphs import Rerun, failing, memory_of
from test_together import picture

BUDGET = 30


class Both:
    """Streams whose batches are recorded, and others whose batches are not; both see the same."""

    def __init__(self, backbone, count: int, record, policies: list[str] | None = None):
        self.each = backbone.frames_per_step
        self.recorded, self.eager = Together(), Together()
        self.recorded.graphs = StepGraphs(backbone, lambda: record, most=8)
        policies = policies or [f'statekv({BUDGET})'] * count
        self.streams = [[VideoStream(backbone, policy) for policy in policies] for _ in range(2)]
        for stream in self.streams[0]:
            stream.graphs = StepGraphs(backbone, Rerun)     # as on a GPU

    def steps(self, numbers: list[int], count: int = 1) -> None:
        for _ in range(count * self.each):
            for together, streams in zip((self.recorded, self.eager), self.streams):
                told = together.step([Given(streams[number], picture(10 * number + streams[number].frames),
                                            (streams[number].frames + 1) * SECOND // 2) for number in numbers])
        assert [report.cameras for report in told] == [len(numbers)] * len(numbers)

    def check(self) -> None:
        for ours, right in zip(*self.streams):
            assert all(torch.equal(a, b) for a, b in zip(memory_of(ours), memory_of(right), strict=True))


@pytest.fixture(scope='module', params=LIBRARIES)
def any_backbone(request, tmp_path_factory):
    folder = write_tiny_checkpoint(tmp_path_factory.mktemp('batches') / request.param, family=request.param)
    return load_backbone(str(folder), device='cpu', dtype='float32')


def test_replayed_batches_equal_eager_ones_bit_for_bit_whoever_is_in_them(any_backbone):
    record = Rerun()
    both = Both(any_backbone, 4, record)
    for numbers in ([0, 1, 2, 3], [0, 2], [1, 3], [3, 2, 0], [1, 2], [0, 1, 2, 3]):
        both.steps(numbers, 8)
        both.check()
    graphs = both.recorded.graphs
    shapes = record.recorded // 2
    # Three numbers of streams, and a token more where a text counts. Each shape was eager twice, and until states were full.
    assert graphs.off == '' and 3 <= shapes <= 9 and graphs.replays >= 6 * 8 - 2 * shapes - 6


def test_states_of_different_budgets_are_recorded_anew_when_another_is_the_longest(backbone):
    record = Rerun()
    both = Both(backbone, 3, record, ['statekv(20)', 'statekv(20)', 'statekv(44)'])
    for numbers in ([0, 2], [0, 1], [1, 2], [0, 1]):
        both.steps(numbers, 9)
        both.check()
    assert both.recorded.graphs.replays > 15


def test_streams_that_are_reset_are_not_held_by_a_recording(backbone):
    both = Both(backbone, 2, Rerun())
    both.steps([0, 1], 12)
    assert both.recorded.graphs.replays > 5
    state = weakref.ref(both.streams[0][0].carried)
    for streams in both.streams:
        streams[0].reset()
    gc.collect()
    assert state() is None
    both.steps([0, 1], 12)
    both.check()


@pytest.mark.filterwarnings('ignore:frame steps are not replayed')
def test_batches_that_cannot_be_recorded_run_eagerly_and_say_so(backbone):
    both = Both(backbone, 2, failing)
    both.steps([0, 1], 12)
    assert 'not permitted when stream is capturing' in both.recorded.problem and both.recorded.graphs.replays == 0
    both.check()


def test_a_batch_with_another_policy_among_it_is_not_recorded(backbone):
    record = Rerun()
    both = Both(backbone, 2, record, [f'statekv({BUDGET})', 'window(3)'])
    both.steps([0, 1], 12)
    assert record.recorded == 0
    both.check()


@pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a CUDA device')
def test_replayed_batches_equal_eager_ones_on_a_gpu(tmp_path):
    folder = str(write_tiny_checkpoint(tmp_path / 'gpu', family='qwen3_vl'))
    backbone = load_backbone(folder, device='cuda', dtype='float32')
    together = [Together(), Together()]
    streams = [[VideoStream(backbone, f'statekv({BUDGET})', cuda_graph=mode) for _ in range(4)] for mode in ('auto', 'off')]
    for turn in range(60):
        numbers = [0, 1, 2, 3] if turn < 30 else [turn // 2 % 4, (turn // 2 + 1) % 4]
        for each, mine in zip(together, streams):
            each.step([Given(mine[number], picture(turn + number), (turn + 1) * SECOND // 2) for number in numbers])
    assert together[0].problem == '' and together[0].graphs.replays > 15
    for ours, right in zip(*streams):
        for replayed, expected in zip(memory_of(ours)[3:], memory_of(right)[3:], strict=True):
            assert (replayed - expected).norm() <= 1e-3 * expected.norm()
