"""The engine's promises on order and counts, with the real model and no clock: each test takes the turns itself."""
import os
import time

import pytest

from conftest import SECOND
from engine_bench import QUESTION, Bench, failing
from statekv_ros.errors import Code, FrameError, QuestionError
from statekv_ros.node.diagnostics import OK, WARN, Diagnosis
from statekv_ros.node.questions import Question

# STATEKV_TEST_STEPS=7200: two hours at an image a second
SEEN_BEFORE = int(os.environ.get('STATEKV_TEST_STEPS', '1'))


@pytest.mark.parametrize('names', [('front',), ('front', 'rear')])
def test_no_frame_waits_longer_than_one_step_and_one_slice_while_a_long_answer_is_decoded(names, backbone, frames,
                                                                                          monkeypatch):
    """A frame falls due at every possible moment: before each turn, and between any step and slice within one."""
    monkeypatch.setattr(backbone, 'stop_token_ids', frozenset())
    bench = Bench(backbone, frames, names, slice_tokens=2)
    for _ in range(SEEN_BEFORE):
        for name in names:
            bench.frame(name)
        bench.engine.run_round()
    bench.events.clear()
    sent = dict(bench._sent)
    bench.ask(max_tokens=200, cameras=[names[0]], answer_policy='sparse(64)')
    turns = 0
    while not bench.outcomes:
        # Images of the cameras arrive at different points of a round: while it is idle, in a slice, in another's step.
        if turns % 3 == 0:
            bench.frame(names[0])
        if turns % 3 == 1 and len(names) > 1:
            bench.frame(names[1])
        arriving = bench.engine.active[0] if bench.engine.active and turns % 3 == 2 else None
        if arriving is not None:
            advance = arriving.advance
            arriving.advance = lambda tokens, steps: (bench.frame(names[-1]), advance(tokens, steps))[1]
        bench.engine.run_round()
        if arriving is not None:
            arriving.advance = advance
        turns += 1
    bench.engine.run_round()
    answer = bench.outcomes[0].answers[0]
    assert (answer.result.answer_tokens, answer.result.finish_reason) == (200, 'length')
    assert answer.frame_steps_meanwhile > 10, 'frames must keep flowing while the answer is decoded'
    for name in names:
        waits = bench.waits(name)
        assert len(waits) == bench._sent[name] - sent[name] - bench.engine.cameras[name].mailbox.dropped > 20
        for between in waits:
            assert between.count('slice') <= 1 and between.count('step') <= 1, between
    slices = sum(event[0] == 'slice' for event in bench.events)
    assert slices <= turns, 'at most one slice a turn'


def test_frames_in_between_do_not_change_an_answer(backbone, frames):
    texts = []
    for watch_on in (False, True):
        bench = Bench(backbone, frames)
        for _ in range(6):
            bench.frame()
            bench.engine.run_round()
        bench.ask(max_tokens=30)
        bench.engine.run_round()
        while not bench.outcomes:
            if watch_on:
                bench.frame()
            bench.engine.run_round()
        texts.append(bench.outcomes[0].answers[0].result.token_ids)
    assert texts[0] == texts[1]


def test_questions_take_turns_and_both_are_answered(backbone, frames):
    bench = Bench(backbone, frames)
    for _ in range(4):
        bench.frame()
        bench.engine.run_round()
    first, second = bench.ask(max_tokens=20), bench.ask('is the door open?', max_tokens=20)
    bench.rounds(lambda: len(bench.outcomes) == 2)
    slices = [event[1] for event in bench.events if event[0] == 'slice']
    assert slices[:6] == [first, second] * 3
    assert not any(outcome.error for outcome in bench.outcomes)


def test_newest_frame_wins_and_the_replaced_ones_are_counted(backbone, frames):
    bench = Bench(backbone, frames)
    for _ in range(5):
        bench.frame()
    bench.engine.run_round()
    camera = bench.engine.cameras['front']
    assert (camera.mailbox.dropped, camera.frames_processed, camera.stream.last_stamp_ns) == (4, 1, 5 * SECOND // 10)


def test_several_cameras_give_one_answer_each_and_silent_ones_are_left_out(backbone, frames):
    bench = Bench(backbone, frames, ('front', 'rear', 'side'))
    for name in ('front', 'rear'):
        for _ in range(3):
            bench.frame(name)
            bench.engine.run_round()
    bench.ask()
    bench.rounds(lambda: bench.outcomes)
    assert [answer.camera for answer in bench.outcomes[0].answers] == ['front', 'rear']
    bench.ask(cameras=['side'])
    bench.rounds(lambda: len(bench.outcomes) == 2)
    assert "camera 'side': nothing has been seen" in bench.outcomes[1].error and not bench.outcomes[1].answers


def test_a_bad_frame_or_a_failing_step_stops_nothing(backbone, frames):
    bench = Bench(backbone, frames)
    camera = bench.engine.cameras['front']
    for _ in range(3):
        bench.frame()
        bench.engine.run_round()
    for error, count in ((FrameError('step is 3 bytes'), 'rejected'), (ZeroDivisionError('oops'), 'failures')):
        def broken(message, error=error):
            raise error
        good, camera.decode = camera.decode, broken
        bench.frame()
        bench.engine.run_round()
        camera.decode = good
        assert getattr(camera, count) == 1 and str(error) in camera.last_error
    assert len(bench.errors) == 1 and 'Traceback' in bench.errors[0]
    bench.frame()
    bench.ask()
    bench.rounds(lambda: bench.outcomes)
    assert bench.outcomes[0].answers[0].result.frames_covered == camera.frames_processed == 4


def test_a_question_that_fails_hurts_no_other(backbone, frames):
    bench = Bench(backbone, frames)
    bench.frame()
    bench.engine.run_round()
    bad, good = bench.ask(), bench.ask(max_tokens=3)

    def broken(tokens, steps):
        raise ZeroDivisionError('oops')
    bad.advance = broken
    bench.rounds(lambda: len(bench.outcomes) == 2)
    assert 'ZeroDivisionError: oops' in bench.outcomes[0].error
    assert not bench.outcomes[1].error and bench.outcomes[1].answers[0].result.answer_tokens > 0
    assert good not in bench.engine.active


def test_a_question_out_of_time_ends_with_what_it_has(backbone, frames):
    bench = Bench(backbone, frames)
    bench.frame()
    bench.engine.run_round()
    question = bench.ask(max_tokens=500)
    for _ in range(8):
        bench.engine.run_round()
    question.timeout_s = 0.0
    bench.engine.run_round()
    outcome = bench.outcomes[0]
    assert 'timeout_s' in outcome.error and outcome.answers[0].result.finish_reason == 'timeout'
    assert outcome.answers[0].result.answer_tokens > 0
    assert not bench.engine.active


def test_reset_happens_at_a_frame_boundary_and_ends_open_questions(backbone, frames):
    bench, forgotten = Bench(backbone, frames), []
    for _ in range(5):
        bench.frame()
        bench.engine.run_round()
    bench.ask(max_tokens=100)
    bench.engine.run_round()
    bench.engine.reset(['front'], lambda *told: forgotten.append(told))
    bench.rounds(lambda: bench.outcomes)
    assert forgotten == [(5, '')] and 'reset' in bench.outcomes[0].error


def test_too_many_questions_are_refused(backbone, frames):
    bench = Bench(backbone, frames, max_queued=2)
    bench.frame()
    bench.engine.run_round()
    bench.ask()
    bench.ask()
    with pytest.raises(QuestionError, match='max_queued_questions'):
        bench.ask()


def test_the_engines_status_warns_while_steps_fail_and_no_longer(backbone, frames):
    bench = Bench(backbone, frames)
    diagnosis = Diagnosis(bench.engine, {})
    for _ in range(3):
        bench.frame()
        bench.engine.run_round()
    assert diagnosis.engine('active', '').level == OK
    failing(bench.engine.cameras['front'].stream, 1)
    bench.frame()
    bench.engine.run_round()
    failed = diagnosis.engine('active', '')
    assert failed.level == WARN and '1 failed just now' in failed.message
    assert diagnosis.engine('active', '').level == OK


def test_a_question_that_somebody_ends_is_closed_before_the_next_slice_whoever_has_it(backbone, frames, monkeypatch):
    monkeypatch.setattr(backbone, 'stop_token_ids', frozenset())
    bench = Bench(backbone, frames)
    bench.frame()
    questions = [bench.ask(max_tokens=500) for _ in range(5)]
    bench.rounds(lambda: all(question._open and question._open[0][1].token_ids for question in questions))
    slices = sum(event[0] == 'slice' for event in bench.events)
    for number, question in enumerate((questions[3], questions[0])):
        question.end(Code.CANCELED, 'enough')
        bench.engine.run_round()
        outcome = bench.outcomes[number]
        assert (outcome.code, outcome.error, len(bench.engine.active)) == (Code.CANCELED, 'enough', 4 - number)
        assert outcome.answers[0].result.finish_reason == 'canceled' and outcome.answers[0].result.text
    assert sum(event[0] == 'slice' for event in bench.events) == slices + 4 + 3, 'the others went on, together'
    waiting = bench.ask(max_tokens=500)
    waiting.end(Code.NOT_ACTIVE, 'deactivated')
    waiting.end(Code.CANCELED, 'too late')
    bench.engine.run_round()
    assert (bench.outcomes[2].code, bench.outcomes[2].answers, len(bench.outcomes)) == (Code.NOT_ACTIVE, (), 3)


def test_a_question_that_is_begun_counts_as_waiting_at_every_moment(backbone, frames, monkeypatch):
    bench = Bench(backbone, frames, max_queued=1)
    bench.frame()
    bench.engine.run_round()
    question, begin = bench.ask(), Question.begin

    def begin_while_another_comes(self, *arguments):
        begin(self, *arguments)
        with pytest.raises(QuestionError, match='1 questions are waiting') as refused:
            bench.ask()
        assert refused.value.code is Code.QUEUE_FULL

    monkeypatch.setattr(Question, 'begin', begin_while_another_comes)
    bench.rounds(lambda: bench.outcomes)
    assert bench.outcomes[0].error == '' and question not in bench.engine.active


def test_progress_is_told_when_it_is_admitted_and_after_slices_but_takes_a_tenth_of_the_time_at_most(backbone, frames, monkeypatch):
    monkeypatch.setattr(backbone, 'stop_token_ids', frozenset())
    bench, told = Bench(backbone, frames), []
    bench.frame()
    bench.ask(max_tokens=400)
    watched = Question(QUESTION, ['front'], {'max_tokens': 40}, 600.0, bench.outcomes.append, told.append)
    bench.engine.ask(watched)
    bench.rounds(lambda: bench.outcomes)
    assert (told[0].place, told[0].text, told[0].camera) == (1, '', '')
    tokens = [progress.tokens for progress in told[1:]]
    assert tokens == sorted(tokens) and max(tokens) > 4 and told[-1].camera == 'front' and told[-1].looked_at
    assert bench.outcomes[0].answers[0].result.text.startswith(told[-1].text[:-1])

    slow = []
    dear = Question(QUESTION, ['front'], {'max_tokens': 40}, 600.0, bench.outcomes.append,
                    lambda progress: (slow.append(progress), time.sleep(0.05)))
    bench.engine.ask(dear)
    begun = time.perf_counter()
    bench.rounds(lambda: len(bench.outcomes) > 1)
    assert len(slow) <= 1 + (time.perf_counter() - begun) / 0.5
