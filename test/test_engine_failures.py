"""What the engine promises when steps and callbacks fail, and when it is stopped."""
import threading

import pytest

from engine_bench import Bench, failing
from statekv_ros.errors import FrameError, QuestionError
from statekv_ros.node import camera as camera_module
from statekv_ros.node.engine import STOPPING


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
    monkeypatch.setattr(camera_module, '_TELL_EVERY_S', 0.0)
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
