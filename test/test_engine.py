"""The engine's promises on order and counts, with the real model and no clock: each test takes the turns itself."""
import os
import threading
import time
from types import SimpleNamespace

import pytest

from conftest import SECOND
from statekv_ros.errors import Code, FrameError, QuestionError
from statekv_ros.memory import VideoStream
from statekv_ros.node import engine as engine_module
from statekv_ros.node.diagnostics import OK, WARN, Diagnosis
from statekv_ros.node.engine import STOPPING, Camera, Engine
from statekv_ros.node.questions import Outcome, Question

QUESTION = 'where did you last see the red toolbox?'
# STATEKV_TEST_STEPS=7200: two hours at an image a second
SEEN_BEFORE = int(os.environ.get('STATEKV_TEST_STEPS', '1'))


class Bench:
    """An engine whose frames, steps and slices are written down in the order in which they happen."""

    def __init__(self, backbone, frames, names=('front',), slice_tokens=4, max_queued=16):
        self.events: list[tuple] = []
        self.outcomes: list[Outcome] = []
        self.errors: list[str] = []
        self._frames, self._sent = frames, dict.fromkeys(names, 0)
        cameras = [Camera(name, self._watched(VideoStream(backbone, 'statekv(40)'), name),
                          lambda message: (message.frame, message.header.frame_id)) for name in names]
        self.engine = Engine(cameras, lambda camera, report, waited_ms: None, lambda: slice_tokens, max_queued,
                             self.errors.append)

    def _watched(self, stream, name):
        step = stream.step

        def noted(frame, stamp_ns, preprocess_ms=0.0):
            self.events.append(('step', name, stamp_ns))
            return step(frame, stamp_ns, preprocess_ms)

        stream.step = noted
        return stream

    def frame(self, name='front'):
        """One image arrives."""
        number = self._sent[name]
        self._sent[name] += 1
        message = SimpleNamespace(frame=self._frames[number % len(self._frames)], header=SimpleNamespace(frame_id=name))
        stamp = (number + 1) * SECOND // 10
        self.events.append(('frame', name, stamp))
        self.engine.cameras[name].mailbox.put(message, stamp)

    def ask(self, text=QUESTION, cameras=None, timeout_s=600.0, **options) -> Question:
        question = Question(text, cameras or list(self.engine.cameras), {'max_tokens': 8, **options}, timeout_s,
                            self.outcomes.append)
        advance = question.advance

        def noted(tokens, steps):
            self.events.append(('slice', question, tokens))
            return advance(tokens, steps)

        question.advance = noted
        self.engine.ask(question)
        return question

    def rounds(self, until, limit=10000):
        for _ in range(limit):
            if until():
                return
            self.engine.run_round()
        raise AssertionError('the engine does not get there')

    def waits(self, name) -> list[list[str]]:
        """For each image of a camera: what the engine did between its arrival and its step."""
        found = []
        for index, event in enumerate(self.events):
            if event[0] == 'frame' and event[1] == name:
                between = []
                for later in self.events[index + 1:]:
                    if later == ('step', name, event[2]):
                        found.append(between)
                        break
                    if later[0] != 'frame':
                        between.append(later[0])
        return found


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


def test_stopping_in_mid_step_and_mid_answer_fails_what_waits_and_ends_the_thread(backbone, frames):
    """The stop arrives within a layer of a step, as it does in a running node."""
    bench = Bench(backbone, frames)
    stream, inside, go_on = bench.engine.cameras['front'].stream, threading.Event(), threading.Event()
    for _ in range(4):
        bench.frame()
        bench.engine.run_round()
    attend, steps = stream.attend, stream.steps

    def held(layer, *tensors):
        if layer == 1:
            inside.set()
            go_on.wait(30)
        return attend(layer, *tensors)

    stream.attend = held
    bench.ask(max_tokens=5000)
    bench.frame()
    bench.engine.run_round()
    bench.frame()
    bench.engine.start()
    assert inside.wait(30)
    stopper = threading.Thread(target=bench.engine.stop)
    stopper.start()
    while not bench.engine.stopping:
        stopper.join(0.01)
    go_on.set()
    stopper.join(30)
    assert not stopper.is_alive() and not bench.engine._thread.is_alive()
    assert [outcome.error for outcome in bench.outcomes] == [STOPPING]
    assert stream.steps == steps, 'the interrupted step left nothing behind'
    with pytest.raises(QuestionError, match='shutting down'):
        bench.ask()


def failing(stream, times: int) -> None:
    """Let the next steps of a stream fail in their second layer."""
    attend, left = stream.attend, [times]

    def attend_or_fail(layer, *tensors):
        if layer == 1 and left[0]:
            left[0] -= 1
            raise ZeroDivisionError('oops')
        return attend(layer, *tensors)

    stream.attend = attend_or_fail


@pytest.mark.parametrize('failures, failed, held', [(1, 1, 5), (2, 3, 4), (3, 4, 3)])
def test_every_frame_is_processed_or_failed_and_those_processed_are_held_whatever_steps_fail(failures, failed, held, backbone,
                                                                                             frames):
    bench = Bench(backbone, frames)
    camera = bench.engine.cameras['front']
    for number in range(2 + held + failed - 2):
        if number == 2:
            failing(camera.stream, failures)
        bench.frame()
        bench.engine.run_round()
        assert camera.frames_processed == camera.stream.frames
        assert camera.frames_processed + camera.frames_failed == number + 1
    assert (camera.failures, camera.frames_failed, camera.frames_processed) == (failures, failed, held)


def test_a_camera_whose_every_step_fails_tells_the_first_and_then_how_many_there_were(backbone, frames, monkeypatch):
    bench = Bench(backbone, frames)
    camera = bench.engine.cameras['front']

    def broken(message):
        raise ZeroDivisionError('oops')

    camera.decode = broken
    for _ in range(50):
        bench.frame()
        bench.engine.run_round()
    assert camera.failures == 50 and len(bench.errors) == 1
    monkeypatch.setattr(engine_module, '_TELL_EVERY_S', 0.0)
    bench.frame()
    bench.engine.run_round()
    assert len(bench.errors) == 2 and '50 times since' in bench.errors[1] and 'Traceback' in bench.errors[1]


@pytest.mark.parametrize('how', ['answered', 'timed out', 'failed'])
def test_a_callback_that_raises_is_called_once_and_the_next_question_has_its_turn(how, backbone, frames):
    bench, calls = Bench(backbone, frames), []
    bench.frame()
    bench.engine.run_round()

    def done(outcome):
        calls.append(outcome)
        raise ZeroDivisionError('oops')

    question = bench.ask(max_tokens=1, timeout_s=0.0 if how == 'timed out' else 600.0)
    question.done = done
    if how == 'failed':
        def broken(tokens, steps):
            raise KeyError('model')
        question.advance = broken
    bench.ask(max_tokens=1)
    for _ in range(100):
        try:
            bench.engine.run_round()
        except ZeroDivisionError:   # of the callback; the engine's thread logs it
            pass
    assert len(calls) == 1 and len(bench.outcomes) == 1 and not bench.outcomes[0].error
    assert not bench.engine.active


def test_a_callback_that_raises_leaves_no_other_untold_when_the_engine_stops(backbone, frames):
    bench = Bench(backbone, frames)
    bench.frame()
    bench.engine.run_round()

    def done(outcome):
        raise ZeroDivisionError('oops')

    bench.ask().done = done
    bench.ask()
    bench.engine.stop()
    assert [outcome.error for outcome in bench.outcomes] == [STOPPING]
    assert len(bench.errors) == 1 and 'ZeroDivisionError' in bench.errors[0]


def test_a_question_that_races_with_the_stop_is_refused_or_failed_and_so_is_a_reset(backbone, frames):
    bench, forgotten = Bench(backbone, frames), []
    lock = bench.engine._wake

    class StopsFirst:
        """The engine's lock, with a stop that comes just before it is got."""
        def __enter__(self):
            bench.engine._wake = lock
            bench.engine.stop()
            return lock.__enter__()

        def __exit__(self, *error):
            return lock.__exit__(*error)

        notify = lock.notify

    bench.engine._wake = StopsFirst()
    with pytest.raises(QuestionError, match='shutting down'):
        bench.ask()
    with pytest.raises(QuestionError, match='shutting down'):
        bench.engine.reset(['front'], lambda *told: forgotten.append(told))
    assert not bench.engine._inbox


def test_a_reset_that_waits_when_the_engine_stops_is_told_that_nothing_was_forgotten(backbone, frames):
    bench, forgotten = Bench(backbone, frames), []
    bench.engine.reset(['front'], lambda *told: forgotten.append(told))
    bench.engine.stop()
    assert forgotten == [(0, STOPPING)]


def test_questions_are_told_of_the_stop_also_when_the_engine_does_not_come_back_from_a_library_call(backbone, frames):
    bench, inside, go_on = Bench(backbone, frames), threading.Event(), threading.Event()

    def stuck(message):
        inside.set()
        go_on.wait(60)
        raise FrameError('at last')

    bench.frame()
    bench.engine.run_round()
    bench.ask()
    bench.engine.cameras['front'].decode = stuck
    bench.frame()
    bench.engine.start()
    assert inside.wait(30)
    assert not bench.engine.stop(timeout_s=0.01)
    assert [outcome.error for outcome in bench.outcomes] == [STOPPING]
    go_on.set()
    bench.engine._thread.join(30)
    assert not bench.engine._thread.is_alive() and len(bench.outcomes) == 1


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
    assert sum(event[0] == 'slice' for event in bench.events) == slices + 2, 'the others went on'
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
