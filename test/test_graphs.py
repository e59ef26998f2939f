"""Frame steps as recorded graphs: to the bit the eager stream, bounded, and eager again for a while when something is wrong.

Without a GPU the recorder is a stand-in that runs the function again on its fixed memory: all but CUDA's own part.
"""
import gc
import time
import warnings
import weakref

import numpy as np
import pytest
import torch

from conftest import SECOND
from family_libraries import LIBRARIES
from statekv_ros.backbones import TokenInputs, load_backbone
from statekv_ros.backbones.tiny import write_tiny_checkpoint
from statekv_ros.errors import Interrupted, ParameterError
from statekv_ros.memory import VideoStream
from statekv_ros.memory.graphs import StepGraphs, make_commits, make_graphs
from statekv_ros.memory.pauses import PAUSES_S
from statekv_ros.memory.recorded_commit import CommitGraphs

BUDGET = 30


def tensors_of(result) -> list[torch.Tensor]:
    """The tensors that a recorded function computed (positions come from its input)."""
    if isinstance(result, TokenInputs):
        return [result.embeds, *(level for levels in result.extra.values() for level in levels)]
    return list(result) if isinstance(result, tuple) else [] if result is None else [result]


class Rerun:
    """Records by keeping the function; nothing is in its result before the first replay.

    Attributes:
        recorded: functions so far.
        error: added to all results of replays.
    """

    def __init__(self, error: float = 0.0):
        self.recorded, self.error = 0, error

    def __call__(self, function):
        result = function()
        self.recorded += 1
        for tensor in tensors_of(result):
            tensor.fill_(torch.nan if tensor.is_floating_point() else -10**9)

        def replay():
            for tensor, new in zip(tensors_of(result), tensors_of(function())):
                tensor.copy_(new + (self.error if new.is_floating_point() else int(self.error > 0)))

        return replay, result


@pytest.fixture(scope='module')
def backbones(tmp_path_factory):
    base = tmp_path_factory.mktemp('graphs')
    return {family: load_backbone(str(write_tiny_checkpoint(base / family, family=family)), device='cpu')
            for family in LIBRARIES}


def graphed(backbone, record=None, most: int = 4, now=time.monotonic, **options) -> VideoStream:
    stream = VideoStream(backbone, f'statekv({BUDGET})', **options)
    stream.graphs = StepGraphs(backbone, (lambda: record) if record else Rerun, most, now)
    stream.commits = CommitGraphs(Rerun, most)
    return stream


def eager(backbone, **options) -> VideoStream:
    return VideoStream(backbone, f'statekv({BUDGET})', cuda_graph='off', **options)


def watch(stream: VideoStream, frames, steps: range) -> list[int]:
    """Step tokens of steps of two frames a second."""
    reports = [stream.step(frames[index % len(frames)], (index + 1) * SECOND // 2)
               for index in range(steps.start * stream.backbone.frames_per_step, steps.stop * stream.backbone.frames_per_step)]
    return [report.step_tokens for report in reports if report]


def memory_of(stream: VideoStream) -> list[torch.Tensor]:
    """All that a stream remembers: the state by slots, and the detailed cache."""
    views = stream.detailed.views()
    return [*stream.carried.copy(), *(part for view in views for part in (view.key, view.value))]


def assert_same(one: VideoStream, other: VideoStream) -> None:
    assert all(torch.equal(a, b) for a, b in zip(memory_of(one), memory_of(other), strict=True))


@pytest.mark.parametrize('family, positions', [*((family, 'lazy_shift') for family in LIBRARIES), ('qwen3_vl', 'native'),
                                               ('internvl', 'contiguous')])
def test_40_replayed_steps_equal_eager_ones_bit_for_bit(family, positions, backbones, frames):
    record = Rerun()
    ours, right = graphed(backbones[family], record, positions=positions), eager(backbones[family], positions=positions)
    tokens = watch(ours, frames, range(40))
    assert tokens == watch(right, frames, range(40))
    assert_same(ours, right)
    if positions == 'contiguous':  # each step turns a copy of its keys: another place each time
        assert ours.graphs.replays == record.recorded == ours.commits.replays == 0
        return
    shapes = len(set(tokens))  # the text of a step counts frames or seconds
    assert (shapes > 1) == (family not in ('qwen2_5_vl', 'llava_onevision'))
    # Two recordings for a shape; steps fill the state, then a shape comes once eagerly and once to be recorded.
    assert ours.graphs.off == '' and 0 < record.recorded <= 2 * shapes
    assert 40 - 2 * shapes - 6 <= ours.graphs.replays < 40
    assert 40 - 3 * shapes - 6 <= ours.commits.replays < 40 and ours.commits.problem == ''


def test_keys_moved_between_steps_are_moved_under_a_recording_too(tmp_path, frames):
    """A short trained context: lazy_shift re-indexes the state every few steps, and the model is given shifted positions."""
    folder = write_tiny_checkpoint(tmp_path / 'short', family='internvl', max_position=200)
    backbone = load_backbone(str(folder), device='cpu')
    ours, right = graphed(backbone), eager(backbone)
    for stream in (ours, right):
        watch(stream, frames, range(30))
    assert ours.shift > 0 and ours.graphs.replays > 15
    assert_same(ours, right)


def test_recordings_are_bounded_and_the_one_unused_for_longest_goes(backbone, frames):
    sizes = [(64, 64), (64, 96), (96, 64)]
    pictures = {size: np.resize(frames[3], (*size, 3)) for size in sizes}
    ours, right, index = graphed(backbone, most=2), eager(backbone), 0
    held = []
    for size in [*sizes, *sizes[1:], sizes[0], sizes[2]]:
        for _ in range(6 if held else 12):  # the first ones fill the state
            index += 1
            for stream in (ours, right):
                stream.step(pictures[size], index * SECOND // 50)
        held.append((ours.graphs.recorded, ours.graphs.replays))
    assert [recorded for recorded, _ in held] == [1, 2, 2, 2, 2, 2, 2]
    gained = np.diff([replays for _, replays in held])
    # Of three steps of a size the first two are eager when it is new, and none when it is held.
    assert gained.tolist() == [1, 1, 3, 3, 1, 3]
    assert_same(ours, right)


def failing(function):
    raise RuntimeError('operation not permitted when stream is capturing')


@pytest.mark.parametrize('record, reason', [
    (failing, 'not permitted when stream is capturing'), (Rerun(error=.1), 'differs'), (Rerun(error=torch.nan), 'differs')])
def test_a_stream_that_cannot_be_recorded_says_so_once_and_runs_eagerly(record, reason, backbone, frames):
    ours, right = graphed(backbone, record), eager(backbone)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter('always')
        watch(ours, frames, range(25))
    assert [str(warning.message) for warning in caught if 'CUDA graphs' in str(warning.message)] == [
        f'frame steps are not replayed as CUDA graphs but run eagerly, which is slower: {ours.graphs.off} (failure 1 of 4; tried '
        'again in 60 s)']
    assert reason in ours.graphs.off and ours.graphs.recorded == ours.graphs.replays == 0
    watch(right, frames, range(25))
    assert_same(ours, right)


@pytest.mark.filterwarnings('ignore:frame steps are not replayed')
def test_recording_that_fails_is_tried_again_after_a_while_and_not_for_ever(backbone, frames):
    tries, clock = [], [0.0]

    def record(function):
        tries.append(clock[0])
        failing(function)

    ours, right = graphed(backbone, record, now=lambda: clock[0]), eager(backbone)
    watch(ours, frames, range(12)), watch(right, frames, range(12))
    step = 12
    for count, pause_s in enumerate(PAUSES_S, 1):
        assert f'(failure {count} of 4; tried again in {pause_s:.0f} s)' in ours.graphs.problem
        for wait_s, message in ((pause_s - 1, 'tried again in 1 s'), (1.0, '')):
            clock[0] += wait_s
            assert message in ours.graphs.problem and bool(message) == bool(ours.graphs.problem)
            watch(ours, frames, range(step, step + 4)), watch(right, frames, range(step, step + 4))
            step += 4
        assert len(tries) == count + 1
    assert 'failure 4 of 4; not tried again' in ours.graphs.problem
    ours.reset(), right.reset()
    clock[0] += 10**9
    watch(ours, frames, range(12)), watch(right, frames, range(12))
    assert len(tries) == 4, 'nor after a reset'
    assert_same(ours, right)


@pytest.mark.filterwarnings('ignore:frame steps are not replayed')
def test_after_a_failure_that_passes_steps_are_recorded_again(backbone, frames):
    clock, rerun = [0.0], Rerun()
    ours = graphed(backbone, lambda function: rerun(function) if clock[0] else failing(function), now=lambda: clock[0])
    right = eager(backbone)
    watch(ours, frames, range(12)), watch(right, frames, range(12))
    clock[0] = PAUSES_S[0]
    watch(ours, frames, range(12, 24)), watch(right, frames, range(12, 24))
    assert ours.graphs.replays > 5 and ours.graphs.problem == ''
    assert_same(ours, right)


def failing_to_move():
    """A recorder whose second recording cannot be made."""
    rerun = Rerun()
    return lambda function: failing(function) if rerun.recorded else rerun(function)


@pytest.mark.parametrize('make, reason', [
    (lambda: failing, 'not permitted'), (failing_to_move, 'not permitted'), (lambda: Rerun(error=1.0), 'differs from the eager one')])
def test_selection_that_cannot_be_recorded_says_so_once_and_leaves_the_steps_as_they_are(make, reason, backbone, frames):
    ours, right = graphed(backbone), eager(backbone)
    ours.commits = CommitGraphs(make)
    with pytest.warns(RuntimeWarning, match=f'the selection .* runs eagerly: .*{reason}') as caught:
        watch(ours, frames, range(25))
    watch(right, frames, range(25))
    assert len(caught) == 1 and reason in ours.commits.problem
    assert ours.commits.replays == 0 and ours.graphs.replays > 10 and ours.graphs.problem == ''
    assert_same(ours, right)


def test_all_recordings_gone_a_new_recorder_is_taken_for_the_next(backbone, frames):
    """The pool of a recorder dies with its recordings: torch may record none in it any more."""
    made = []

    def record_while_alive():
        recorded = []

        def record(function):
            again, result = Rerun()(function)
            assert not recorded or any(reference() is not None for reference in recorded), 'use_count > 0'
            recorded.append(weakref.ref(again))
            return again, result

        made.append(record)
        return record

    stream = VideoStream(backbone, f'statekv({BUDGET})')
    stream.graphs = StepGraphs(backbone, record_while_alive)
    for _ in range(2):
        watch(stream, frames, range(12))
        assert stream.graphs.off == '' and stream.graphs.recorded
        stream.reset()
        gc.collect()
    assert len(made) == 2


def test_an_interrupted_replay_leaves_the_memory_as_it_was(backbone, frames):
    stop = [False]
    ours, right = graphed(backbone, cancelled=lambda: stop[0]), eager(backbone)
    watch(ours, frames, range(10)), watch(right, frames, range(10))
    before, replays = memory_of(ours), ours.graphs.replays
    stop[0] = True
    with pytest.raises(Interrupted):
        watch(ours, frames, range(10, 11))
    stop[0] = False
    assert all(torch.equal(a, b) for a, b in zip(before, memory_of(ours), strict=True)) and ours.graphs.replays == replays
    right.step(frames[20], 21 * SECOND // 2)     # the one that waited for its partner still waits
    watch(ours, frames, range(11, 14)), watch(right, frames, range(11, 14))
    assert_same(ours, right)


def test_a_stream_that_was_reset_begins_anew(backbone, frames):
    ours, right = graphed(backbone), eager(backbone)
    watch(ours, frames, range(12))
    ours.reset()
    assert ours.graphs.recorded == 0
    watch(ours, frames, range(9)), watch(right, frames, range(9))
    assert_same(ours, right)


def test_answers_between_replayed_steps_disturb_nothing(backbone, frames):
    ours, right = graphed(backbone), eager(backbone)
    for step in range(14):
        for stream in (ours, right):
            watch(stream, frames, range(step, step + 1))
        stream_answers = [stream.answer('is the door open?', max_tokens=3).token_ids for stream in (ours, right)]
        assert stream_answers[0] == stream_answers[1]
    assert ours.graphs.replays > 5
    assert_same(ours, right)


def test_graphs_are_for_steps_on_a_gpu_that_repeat(backbone):
    stream = VideoStream(backbone, 'statekv(20)')
    assert stream.graphs is stream.commits is None, 'a CPU has no graphs'
    assert make_commits(StepGraphs(backbone, Rerun), backbone.device).replays == 0
    with pytest.raises(ParameterError, match="cuda_graph must be auto or off, got 'yes'"):
        make_graphs('yes', backbone, 'statekv')


@pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a CUDA device')
@pytest.mark.parametrize('family', LIBRARIES)
def test_replayed_steps_equal_eager_ones_on_a_gpu(family, tmp_path, frames):
    folder = str(write_tiny_checkpoint(tmp_path / family, family=family))
    backbone = load_backbone(folder, device='cuda', dtype='float32')
    ours, right = (VideoStream(backbone, f'statekv({BUDGET})', cuda_graph=mode) for mode in ('auto', 'off'))
    assert right.graphs is None
    tokens = watch(ours, frames, range(40))
    assert watch(right, frames, range(40)) == tokens
    assert ours.graphs.off == '' and ours.graphs.replays >= 40 - 2 * len(set(tokens)) - 6
    assert ours.commits.problem == '' and ours.commits.replays >= 40 - 3 * len(set(tokens)) - 6
    for replayed, expected in zip(memory_of(ours)[3:], memory_of(right)[3:], strict=True):
        assert (replayed - expected).norm() <= 1e-3 * expected.norm()
