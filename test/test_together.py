"""Several streams stepped as one batch remember what they would have remembered one by one."""
import random

import numpy as np
import pytest
import torch

from conftest import SECOND
from family_libraries import LIBRARIES
from statekv_ros.backbones import load_backbone
from statekv_ros.backbones.tiny import write_tiny_checkpoint
from statekv_ros.errors import FrameError, Interrupted
from statekv_ros.memory import StepReport, VideoStream
from statekv_ros.memory.together import PAUSE_S, Given, Together

POLICIES = ['statekv(40)', 'window(3)', 'full', 'none']
QUESTION = 'where did you last see the red toolbox?'


@pytest.fixture(scope='module')
def backbones(tmp_path_factory):
    base = tmp_path_factory.mktemp('together')
    return {family: load_backbone(str(write_tiny_checkpoint(base / family, family=family)), device='cpu', dtype='float32')
            for family in LIBRARIES}


def picture(seed: int, height: int = 64, width: int = 64) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 255, (height, width, 3), dtype=np.uint8)


def memory_of(stream: VideoStream) -> list[torch.Tensor]:
    """What is carried, in the order of the stream, and the detailed cache."""
    key, value, ordinal = stream.carried.copy()
    order = ordinal.sort(dim=-1)
    rows = order.indices[..., None].expand_as(key)
    return [order.values, key.gather(2, rows), value.gather(2, rows),
            *(part for view in stream.detailed.views() for part in (view.key, view.value))]


def assert_alike(ours: VideoStream, alone: VideoStream) -> None:
    assert (ours.frames, ours.steps, ours.segment, ours.next_position, ours.pending.stamps_ns) == \
        (alone.frames, alone.steps, alone.segment, alone.next_position, alone.pending.stamps_ns)
    for got, right in zip(memory_of(ours), memory_of(alone), strict=True):
        assert got.shape == right.shape and (got - right).double().norm() <= 1e-5 * right.double().norm()


class Pair:
    """Streams that are stepped together, and their twins that are stepped alone."""

    def __init__(self, backbone, policies: list[str], **options):
        self.together = Together()
        self.ours, self.alone = ([VideoStream(backbone, policy, **options) for policy in policies] for _ in range(2))

    def step(self, frames: dict[int, tuple[np.ndarray, int]]) -> list:
        """Frames and stamps by the streams' numbers; checks that both ways report alike."""
        told = self.together.step([Given(self.ours[number], *frame) for number, frame in frames.items()])
        for outcome, (number, frame) in zip(told, frames.items(), strict=True):
            try:
                right = self.alone[number].step(*frame)
            except FrameError as error:
                assert isinstance(outcome, FrameError) and str(outcome) == str(error)
                continue
            assert (outcome is None) == (right is None)
            if right is not None:
                for name in ('step', 'segment', 'first_stamp_ns', 'frames', 'step_tokens', 'state_tokens', 'detailed_tokens'):
                    assert getattr(outcome, name) == getattr(right, name), name
        return told

    def check(self) -> None:
        for ours, alone in zip(self.ours, self.alone):
            assert_alike(ours, alone)


def cameras_of(told: list) -> list[int]:
    return [outcome.cameras for outcome in told if isinstance(outcome, StepReport)]


@pytest.mark.parametrize('policy', POLICIES)
@pytest.mark.parametrize('family', LIBRARIES)
def test_streams_of_different_ages_are_stepped_as_one_and_remember_what_they_would_alone(family, policy, backbones):
    """Their texts differ by tokens, for they count frames or seconds."""
    backbone = backbones[family]
    pair, each = Pair(backbone, [policy] * 3), backbone.frames_per_step
    for count, active in ((14 * each, [0]), (2 * each, [0, 2]), (4 * each, [0, 1, 2])):
        for _ in range(count):
            told = pair.step({number: (picture(pair.ours[number].frames), (pair.ours[number].frames + 1) * SECOND)
                              for number in active})
        assert cameras_of(told) == [len(active)] * len(active)
        pair.check()
    tokens = {stream.detailed.steps()[-1].record.tokens for stream in pair.ours}
    assert (len(tokens) > 1) == (family in ('internvl', 'eagle2_5', 'qwen3_vl'))


@pytest.mark.parametrize('cameras', range(1, 9))
def test_any_number_of_streams_with_whatever_comes_between(cameras, backbone):
    """Sizes and policies mixed, pauses, half steps, clocks that go back, bad stamps, resets and questions."""
    dice = random.Random(cameras)
    pair = Pair(backbone, [dice.choice(POLICIES) for _ in range(cameras)])
    sizes, stamps = [(64, 64)] * cameras, [0] * cameras
    most = 0
    for turn in range(40):
        frames = {}
        for number in range(cameras):
            if dice.random() < .15:
                continue
            if dice.random() < .1:
                sizes[number] = dice.choice([(64, 64), (64, 96), (96, 64), (50, 70)])
            stamps[number] += dice.choice([0, SECOND // 2, SECOND // 2, SECOND // 2, 9 * SECOND])
            if dice.random() < .03:
                stamps[number] = SECOND // 3
            frames[number] = picture(1000 * number + turn, *sizes[number]), stamps[number]
        most = max([most, *cameras_of(pair.step(frames))])
        if dice.random() < .1:
            number = dice.randrange(cameras)
            assert pair.ours[number].reset() == pair.alone[number].reset()
            stamps[number] = 0
        if dice.random() < .1 and pair.ours[0].frames:
            ours, alone = (stream.answer(QUESTION, answer_policy='all', max_tokens=3) for stream in (pair.ours[0], pair.alone[0]))
            assert ours.token_ids == alone.token_ids
    pair.check()
    assert most > cameras // 3


@pytest.mark.parametrize('positions', ['lazy_shift', 'contiguous'])
@pytest.mark.parametrize('family, policy', [
    ('internvl', 'statekv(30)'), ('internvl', 'window(3)'), ('qwen2_5_vl', 'statekv(30)')])
def test_streams_that_move_their_positions_are_stepped_as_one(family, policy, positions, tmp_path):
    """A short trained context; one stream is older, so that each is moved at another moment."""
    backbone = load_backbone(str(write_tiny_checkpoint(tmp_path / 'short', family=family, max_position=200)), device='cpu',
                             dtype='float32')
    pair = Pair(backbone, [policy] * 2, positions=positions)
    for index in range(5 * backbone.frames_per_step):
        pair.step({0: (picture(index), (index + 1) * 20 * SECOND)})
    for index in range(30 * backbone.frames_per_step):
        told = pair.step({number: (picture(100 + index), (200 + index) * 20 * SECOND) for number in range(2)})
    assert cameras_of(told) == [2, 2] and min(stream.shift for stream in pair.ours) > 0
    pair.check()


def test_a_frame_that_is_refused_costs_no_other_stream_its_step(backbone):
    pair = Pair(backbone, ['statekv(40)'] * 3)
    for index in range(8):
        stamps = [(index + 1) * SECOND, SECOND, (index + 1) * SECOND]      # the second one's clock stands still
        told = pair.step({number: (picture(index), stamp) for number, stamp in enumerate(stamps)})
        assert isinstance(told[1], FrameError) == (index > 0)
    assert cameras_of(told) == [2, 2]
    pair.check()


def failing(stream: VideoStream, error: Exception):
    """Every step of a stream fails in its second layer; returns what mends it."""
    layers = [0]

    def fails() -> bool:
        layers[0] = (layers[0] + 1) % 2
        if not layers[0]:
            raise error
        return False

    stream.cancelled = fails
    return lambda: setattr(stream, 'cancelled', lambda: False)


def test_a_step_that_fails_costs_its_own_frame_alone_and_goes_alone_until_it_succeeds(backbone):
    pair = Pair(backbone, ['statekv(40)'] * 3)
    for index in range(6):
        pair.step({number: (picture(index), (index + 1) * SECOND) for number in range(3)})
    mend = failing(pair.ours[1], ZeroDivisionError('oops'))
    for index in range(6, 10):
        told = pair.together.step([Given(stream, picture(index), (index + 1) * SECOND) for stream in pair.ours])
        for number in (0, 2):
            pair.alone[number].step(picture(index), (index + 1) * SECOND)
        if index == 7:      # the batch failed, each was run alone
            assert [type(outcome).__name__ for outcome in told] == ['StepReport', 'ZeroDivisionError', 'StepReport']
            assert cameras_of(told) == [1, 1] and len(pair.ours[1].pending) == 1
        if index == 9:
            assert cameras_of(told) == [2, 2]
    mend()
    for index in range(10, 14):     # its steps are again those of two frames that the others' have
        told = pair.together.step([Given(stream, picture(index), (index + 1) * SECOND)
                                   for number, stream in enumerate(pair.ours) if number != 1 or index > 10])
        for number in (0, 2):
            pair.alone[number].step(picture(index), (index + 1) * SECOND)
    assert cameras_of(told) == [3, 3, 3] and pair.together.problem == ''
    for number in (0, 2):
        assert_alike(pair.ours[number], pair.alone[number])


def test_batches_that_fail_where_single_steps_do_not_are_left_off_for_a_while_and_told(backbone, monkeypatch):
    pair, clock = Pair(backbone, ['statekv(40)'] * 2), [0.0]
    pair.together = Together(lambda: clock[0])
    forward = type(backbone).forward

    def full(self, inputs, memory):
        if len(inputs.embeds) > 1:
            raise MemoryError('no room for two')
        return forward(self, inputs, memory)

    monkeypatch.setattr(type(backbone), 'forward', full)
    with pytest.warns(RuntimeWarning, match='cameras are stepped one by one.*MemoryError: no room for two'):
        for index in range(2):
            told = pair.step({number: (picture(index), (index + 1) * SECOND) for number in range(2)})
    assert cameras_of(told) == [1, 1] and 'tried again in 60 s' in pair.together.problem
    monkeypatch.setattr(type(backbone), 'forward', forward)
    for index in range(2, 6):
        told = pair.step({number: (picture(index), (index + 1) * SECOND) for number in range(2)})
        assert cameras_of(told) == [] or cameras_of(told) == [1 if index == 3 else 2] * 2
        clock[0] += PAUSE_S / 2
    pair.check()


def test_an_interrupted_batch_leaves_each_memory_as_it_was(backbone):
    pair = Pair(backbone, ['statekv(40)'] * 4)
    for index in range(7):
        pair.step({number: (picture(index), (index + 1) * SECOND) for number in range(3)})
    pair.step({3: (picture(6, 96, 64), 7 * SECOND)})
    before = [memory_of(stream) for stream in pair.ours]
    pair.ours[2].cancelled = lambda: True
    with pytest.raises(Interrupted):        # the fourth, of another size, did not come to its step
        pair.together.step([Given(stream, picture(7, *((96, 64) if number == 3 else ())), 8 * SECOND)
                            for number, stream in enumerate(pair.ours)])
    for stream, held in zip(pair.ours, before):
        assert all(torch.equal(now, then) for now, then in zip(memory_of(stream), held, strict=True))
        assert stream.pending.stamps_ns == [7 * SECOND], 'the frame that waited waits once more'


def test_a_memory_that_cannot_take_its_step_is_no_other_streams_trouble(backbone, monkeypatch):
    pair = Pair(backbone, ['statekv(40)'] * 2)
    for index in range(5):
        pair.step({number: (picture(index), (index + 1) * SECOND) for number in range(2)})
    monkeypatch.setattr(pair.ours[0].detailed, 'commit', lambda *_: 1 / 0)
    told = pair.together.step([Given(stream, picture(5), 6 * SECOND) for stream in pair.ours])
    assert isinstance(told[0], ZeroDivisionError) and told[1].cameras == 2
    assert (len(pair.ours[0].pending), pair.ours[0].steps, pair.ours[1].steps) == (1, 2, 3)
