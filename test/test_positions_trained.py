"""What positions do to a model that knows something: an old fact stays readable, four times past the trained context."""
import numpy as np
import pytest
import torch

from conftest import SECOND
from statekv_ros.backbones import load_backbone
from statekv_ros.evaluation.lockstep import Lockstep, video_of
from statekv_ros.memory import VideoStream
from statekv_ros.patrol.questions import Question, answer_at, ask
from statekv_ros.patrol.video import patrol_frames
from statekv_ros.patrol.world import make_patrol

VIDEOS, FACTS_S = 6, 20                 # facts are planted in the first seconds
KINDS = ('exist', 'first', 'last', 'before', 'after', 'count')


@pytest.fixture(scope='module')
def backbone():
    return load_backbone('patrol', device='cpu', dtype='float32')


@pytest.fixture(scope='module')
def patrols(backbone):
    """Patrols of four times the trained context, and questions about their beginnings with true answers."""
    steps = 4 * backbone.max_position // 7 + 1
    made, asked = [], []
    for seed in range(VIDEOS):
        random = np.random.default_rng(31_000 + seed)
        made.append(make_patrol(steps, random))
        pairs = [(question, answer_at(made[-1], question, FACTS_S - 1)) for kind in KINDS
                 if (question := ask(made[-1], kind, FACTS_S - 1, random, hard=True)) is not None]
        asked.append(pairs)
    return made, asked


def right_share(stream: VideoStream, asked: list[list[tuple[Question, str]]]) -> float:
    """Answers about the beginning, each video alone, from the steps of the beginning."""
    right = []
    for row, pairs in enumerate(asked):
        video = video_of(stream, row)
        for question, truth in pairs:
            answer = video.answer(question.text, span=(None, SECOND * (FACTS_S + 1) - 1), max_tokens=6)
            assert answer.frames_covered == 2 * FACTS_S
            right.append(answer.text == truth)
    assert len(right) > 5 * VIDEOS / 2
    return float(np.mean(right))


def test_an_old_fact_stays_readable_four_times_past_the_trained_context(backbone, patrols):
    made, asked = patrols
    shown = [*zip(*(patrol_frames(patrol, seed, 64, 64) for seed, patrol in enumerate(made)))]
    lockstep = Lockstep(backbone, VIDEOS)
    largest, fresh, old = {}, {}, {}
    plain = backbone.forward
    try:
        for positions in ('lazy_shift', 'contiguous'):
            seen: list[int] = []

            def forward(inputs, memory):
                seen.append(int(inputs.positions.max()))
                hidden = plain(inputs, memory)
                assert torch.isfinite(hidden).all()
                return hidden

            backbone.forward = forward
            stream = VideoStream(lockstep, 'statekv(36)', positions=positions)
            for number, row in enumerate(shown):
                stream.step(np.concatenate([frame for _, frame in row]), SECOND + row[0][0])
                if number == 2 * FACTS_S - 1:
                    fresh[positions] = right_share(stream, asked)
            old[positions] = right_share(stream, asked)
            largest[positions] = max(seen)
            assert stream.next_position > 4 * backbone.max_position
    finally:
        backbone.forward = plain
    assert largest['lazy_shift'] < backbone.max_position and largest['contiguous'] < backbone.max_position
    print({'fresh': fresh, 'old': old})
    # Nothing holds for native, which depends on the model: one with a rope base of 1e4 fell from 78 to 47 % here, this one from
    # 94 to 89.
    for positions in ('lazy_shift', 'contiguous'):
        assert fresh[positions] > .7 and old[positions] > fresh[positions] - .15, (fresh, old)
