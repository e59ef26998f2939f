"""Videos in lockstep are answered as they are alone, whatever the policy."""
import numpy as np
import pytest

from conftest import SECOND
from statekv_ros.backbones import load_backbone
from statekv_ros.backbones.tiny import write_tiny_checkpoint
from statekv_ros.errors import QuestionError
from statekv_ros.evaluation.lockstep import Lockstep, answer_together, video_of
from statekv_ros.memory import VideoStream
from statekv_ros.memory.policies import parse_answer_policy

VIDEOS, STEPS = 3, 6
QUESTIONS = ['is the door open?', 'is the door red?', 'is the door left?']


@pytest.fixture(scope='module', params=['qwen3_vl', 'qwen2_5_vl', 'internvl'])
def family(request, tmp_path_factory):
    folder = write_tiny_checkpoint(tmp_path_factory.mktemp('models') / request.param, family=request.param)
    return load_backbone(str(folder), device='cpu', dtype='float32')


@pytest.fixture(scope='module')
def videos() -> np.ndarray:
    """[videos, frames, 64, 64, 3]."""
    return np.random.default_rng(0).integers(0, 255, (VIDEOS, 2 * STEPS, 64, 64, 3), dtype=np.uint8)


def watched(backbone, frames, policy: str) -> VideoStream:
    stream = VideoStream(backbone, policy)
    for index, frame in enumerate(frames):
        stream.step(frame, SECOND + index * SECOND // 2)
    return stream


@pytest.mark.parametrize('prefill', ['full', 'statekv(7)', 'window(2)', 'rekv(40)', 'none'])
def test_lockstep_is_each_video_alone(family, videos, prefill):
    lengths = {len(family.tokenize_question(question)) for question in QUESTIONS}
    questions = QUESTIONS if len(lengths) == 1 else [QUESTIONS[0]] * VIDEOS
    lockstep = Lockstep(family, VIDEOS)
    together = watched(lockstep, np.concatenate(videos, axis=1), prefill)
    alone = [watched(family, video, prefill) for video in videos]
    heads = family.layout.kv_heads
    assert together.detailed_tokens == alone[0].detailed_tokens
    for row, stream in enumerate(alone):
        kept = together.carried.kept()[:, row * heads:(row + 1) * heads] if prefill.startswith('statekv') else None
        if kept is not None:
            assert kept.sort().values.equal(stream.carried.kept().sort().values)
    for policy in ('all', 'state', 'last(3)'):
        if policy == 'state' and prefill == 'none':
            continue
        told, tokens = answer_together(together, questions, parse_answer_policy(policy), max_tokens=4)
        answers = [stream.answer(question, answer_policy=policy, max_tokens=4) for stream, question in zip(alone, questions)]
        assert told == [answer.text for answer in answers] and {answer.context_tokens for answer in answers} == {tokens}


@pytest.mark.parametrize('prefill', ['full', 'statekv(7)'])
def test_one_video_of_a_lockstep_can_be_asked_alone(family, videos, prefill):
    together = watched(Lockstep(family, VIDEOS), np.concatenate(videos, axis=1), prefill)
    for row, video in enumerate(videos):
        stream, part = watched(family, video, prefill), video_of(together, row)
        for policy in ('all', 'retrieve(2)', 'rekv(2)', 'last(3)'):
            told, alone = (memory.answer(QUESTIONS[row], answer_policy=policy, max_tokens=3) for memory in (part, stream))
            assert told.token_ids == alone.token_ids
            assert [e.first_stamp_ns for e in told.evidence] == [e.first_stamp_ns for e in alone.evidence]


def test_vision_is_looked_at_once_for_all_policies(family, videos, monkeypatch):
    lockstep, calls = Lockstep(family, VIDEOS), []
    plain = family.embed_step
    monkeypatch.setattr(family, 'embed_step', lambda *arguments: calls.append(1) or plain(*arguments))
    for prefill in ('full', 'window(1)'):
        watched(lockstep, np.concatenate(videos, axis=1), prefill)
    assert len(calls) == 2 * STEPS // family.frames_per_step


def test_questions_of_different_length_are_refused(family, videos):
    stream = watched(Lockstep(family, VIDEOS), np.concatenate(videos, axis=1), 'full')
    with pytest.raises(QuestionError, match='equally many tokens'):
        answer_together(stream, ['a?', 'what is that over there?', 'a?'], parse_answer_policy('all'))
