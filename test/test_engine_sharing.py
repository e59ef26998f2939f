"""Questions that wait at the same moment share passes in the engine, and frames wait no longer for it."""
import pytest

from engine_bench import Bench
from statekv_ros.errors import Code, ModelError
from statekv_ros.memory.answering import shared

QUESTIONS = ('where did you last see the red toolbox?', 'is the door open?', 'what is on the table?')


@pytest.fixture
def passes(monkeypatch):
    """How many answers each shared pass was for, one after the other."""
    rows, decode = [], shared.decode
    monkeypatch.setattr(shared, 'decode', lambda answerings: (rows.append(len(answerings)), decode(answerings))[1])
    return rows


def bench_of(backbone, frames, names=('front',), seen=6, **options) -> Bench:
    bench = Bench(backbone, frames, names, **options)
    for _ in range(seen):
        for name in names:
            bench.frame(name)
        bench.engine.run_round()
    return bench


def said(bench, outcome) -> tuple:
    answer, = outcome.answers
    return answer.camera, answer.result.token_ids, [evidence.first_stamp_ns for evidence in answer.result.evidence]


@pytest.mark.parametrize('policy', ['sparse(40)', 'all'])
def test_questions_of_two_cameras_are_answered_as_alone_in_fewer_passes(policy, backbone, frames, monkeypatch, passes):
    monkeypatch.setattr(backbone, 'stop_token_ids', frozenset())
    asked = [(question, [('front', 'rear')[number % 2]]) for number, question in enumerate(QUESTIONS)]
    alone = bench_of(backbone, frames, ('front', 'rear'))
    for number, (question, cameras) in enumerate(asked):
        alone.ask(question, cameras, max_tokens=30, answer_policy=policy)
        alone.rounds(lambda: len(alone.outcomes) > number)
    assert passes == []
    bench = bench_of(backbone, frames, ('front', 'rear'))
    for question, cameras in asked:
        bench.ask(question, cameras, max_tokens=30, answer_policy=policy)
    bench.engine.run_round()
    while len(bench.outcomes) < len(asked):
        bench.frame('front')    # watching goes on
        bench.engine.run_round()
    assert sorted(said(bench, outcome) for outcome in bench.outcomes) == sorted(said(alone, each) for each in alone.outcomes)
    assert passes.count(3) > 15 and len(passes) < 45, 'of 90 tokens'


@pytest.mark.parametrize('slice_tokens', [1, 4])
def test_no_frame_waits_for_more_tokens_than_one_question_would_take_or_one_of_each(slice_tokens, backbone, frames, monkeypatch):
    """A frame falls due at every possible moment, however many questions share a slice."""
    monkeypatch.setattr(backbone, 'stop_token_ids', frozenset())
    bench = bench_of(backbone, frames, slice_tokens=slice_tokens)
    forward = type(backbone).forward

    def noted(self, inputs, memory):
        if hasattr(memory, 'carried'):      # a frame step
            return forward(self, inputs, memory)
        bench.frame()
        bench.events.append(('tokens', inputs.embeds.shape[0] * max(1, inputs.tokens / 4)))     # of a question four for one
        return forward(self, inputs, memory)

    monkeypatch.setattr(type(backbone), 'forward', noted)
    for question in QUESTIONS:
        bench.ask(question, max_tokens=20, answer_policy='last(2)')
    bench.rounds(lambda: len(bench.outcomes) == 3)
    bench.engine.run_round()
    waited = {}
    for index, event in enumerate(bench.events):
        if event[0] == 'frame':
            for later in bench.events[index + 1:]:
                if later[0] == 'step':      # the newest wins: whoever's step it is, an image went in
                    break
                waited[index] = waited.get(index, 0) + (later[1] if later[0] == 'tokens' else 0)
    assert len(waited) > 25 and max(waited.values()) <= max(slice_tokens, len(QUESTIONS))
    assert list(waited.values()).count(3) > 10, 'or nothing was shared'


def test_one_that_fails_is_canceled_or_runs_out_of_time_leaves_the_others(backbone, frames, monkeypatch, passes):
    monkeypatch.setattr(backbone, 'stop_token_ids', frozenset())
    bench = bench_of(backbone, frames)
    questions = [bench.ask(question, max_tokens=60) for question in (*QUESTIONS, QUESTIONS[0])]
    bench.rounds(lambda: passes and passes[-1] == 4)

    def broken(token, logits):
        raise ModelError('oops')

    questions[0]._open[0][1].take = broken
    questions[1].end(Code.CANCELED, 'enough')
    bench.rounds(lambda: len(bench.outcomes) == 2)
    questions[2].timeout_s = 0.0
    bench.engine.run_round()
    canceled, failed, late = bench.outcomes
    assert (canceled.code, failed.error, late.code) == (Code.CANCELED, 'oops', Code.TIMEOUT)
    assert canceled.answers[0].result.token_ids and late.answers[0].result.token_ids and failed.answers == ()
    assert list(bench.engine.active) == [questions[3]] and bench.errors == []
    bench.rounds(lambda: len(bench.outcomes) == 4)
    assert bench.outcomes[3].error == '' and bench.outcomes[3].answers[0].result.answer_tokens == 60


def test_a_callback_that_raises_keeps_nobody_that_shared_the_slice_from_hearing(backbone, frames, monkeypatch, passes):
    monkeypatch.setattr(backbone, 'stop_token_ids', frozenset())
    bench, calls = bench_of(backbone, frames), []

    def done(outcome):
        calls.append(outcome)
        raise ZeroDivisionError('oops')

    questions = [bench.ask(QUESTIONS[0], max_tokens=25) for _ in range(3)]
    questions[1].done = done
    bench.rounds(lambda: len(bench.outcomes) == 2 and calls)
    assert passes[-1] == 3 and len(calls) == 1 and not bench.engine.active
    assert all(outcome.error == '' for outcome in bench.outcomes) and 'ZeroDivisionError' in bench.errors[0]


def test_progress_of_those_that_share_says_who_is_before_them(backbone, frames, monkeypatch, passes):
    monkeypatch.setattr(backbone, 'stop_token_ids', frozenset())
    bench, told = bench_of(backbone, frames), []
    questions = [bench.ask(question, max_tokens=80) for question in QUESTIONS]
    questions[2].on_progress = lambda progress: told.append((len(passes) and passes[-1], progress.place))
    bench.rounds(lambda: bench.outcomes)
    assert (3, 0) in told and max(place for rows, place in told if rows == 3) <= 1
