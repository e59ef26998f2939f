"""Checks between frame steps, with a real model: who goes first, how much time they take, what they read."""
import time
from types import SimpleNamespace

import pytest

from conftest import SECOND
from statekv_ros.memory import VideoStream
from statekv_ros.node.camera import Camera
from statekv_ros.node.engine import Engine
from statekv_ros.node.questions import Question
from statekv_ros.node.watches.checks import Checks
from statekv_ros.node.watches.table import WatchTable
from statekv_ros.node.watches.watch import Definition


class Bench:
    """An engine with watches whose slices, steps and answers are written down in the order in which they happen."""

    def __init__(self, backbone, frames, share=1.0):
        self.events, self.alerts, self.said, self.saved = [], [], [], []
        self.share = share
        self._frames, self._shown = frames, 0
        self.stream = VideoStream(backbone, 'statekv(40)')
        camera = Camera('front', self.stream, lambda message: (message.frame, 'lens'))
        self.table = WatchTable(['front'], 10)
        self.checks = Checks(self.table, {'front': self.stream}, lambda: self.share, lambda: 3, self.alerts.append,
                             lambda: self.saved.append(len(self.table)), self.said.append)
        self.engine = Engine([camera], lambda *_: self.events.append('step'), lambda: 4, 16, self.said.append, checks=self.checks)
        advance = self.checks.advance

        def noted(tokens):
            worked = advance(tokens)
            self.events += ['check'] * worked
            return worked

        self.checks.advance = noted

    def watch(self, question='is the door open?', **fields):
        return self.table.add(Definition(**{
            'question': question, 'camera': 'front', 'condition': 'changes', 'every_steps': 1, 'every_s': 0.0, 'debounce': 1,
            'expires_s': 0.0, 'max_tokens': 6, 'answer_policy': 'last(4)', **fields}))

    def frames(self, count=2):
        """So many images, each watched."""
        for _ in range(count):
            self._shown += 1
            message = SimpleNamespace(frame=self._frames[self._shown % len(self._frames)])
            self.engine.cameras['front'].mailbox.put(message, self._shown * SECOND // 2)
            self.engine.run_round()

    def ask(self):
        done = []
        self.engine.ask(Question('where?', ['front'], {'max_tokens': 6}, 600.0, done.append))
        return done

    def idle(self):
        """Rounds until there is nothing to do, whatever has to be waited for."""
        while True:
            if not self.engine.run_round():
                if (wait := self.checks.wait_s()) is None:
                    return
                time.sleep(wait)


@pytest.fixture
def bench(backbone, frames):
    return Bench(backbone, frames)


def test_a_check_waits_for_a_question_even_when_it_has_begun(bench):
    watch = bench.watch()
    bench.frames()
    assert bench.events == ['step', 'check'] and watch.checks == 0
    done = bench.ask()
    while not done:
        bench.engine.run_round()
    assert bench.events == ['step', 'check'], 'no slice of the check while somebody asks'
    bench.idle()
    assert watch.checks == 1 and bench.events.count('check') > 2


def test_images_go_before_checks(bench):
    bench.watch()
    bench.frames(8)
    assert bench.events[:2] == ['step', 'check'] and max(map(len, ''.join(
        's' if event == 'step' else 'c' for event in bench.events).split('s'))) <= 2, 'a slice between two images at most'


def test_checks_take_no_more_than_their_share_of_the_time(backbone, frames):
    bench = Bench(backbone, frames, share=0.2)
    for number in range(4):
        bench.watch(f'door {number}?')
    begun = time.monotonic()
    for _ in range(10):
        bench.frames()
        bench.idle()
    slices, spent = bench.events.count('check'), bench.checks.spent_s
    # What came after the last slice was not waited for.
    assert slices > 40 and spent <= 0.2 * (time.monotonic() - begun) + spent / slices
    assert all(watch.checks == 10 for watch in bench.table.all())


def test_a_check_reads_whole_steps_alone_and_computes_no_frame(bench, monkeypatch):
    watch = bench.watch()
    bench.frames(4)
    bench.idle()
    monkeypatch.setattr(bench.stream.backbone, 'encode', None)      # whoever encodes a frame fails
    bench.watch('another?')
    bench.table.note_step('front', 2 * SECOND)
    bench.engine.cameras['front'].stream._intake.add(*_half(bench, 5 * SECOND // 2))
    assert len(bench.stream.pending) == 1
    bench.idle()
    assert bench.said == [] and watch.stamp_ns == 2 * SECOND and watch.failed == 0 and watch.checks == 3


def _half(bench, stamp_ns):
    """A frame without a partner, as the stream's intake takes it."""
    prepared, _ = bench.stream._intake.prepare(bench._frames[0], stamp_ns)
    return prepared, stamp_ns, 0.0


def test_an_answer_is_that_of_the_same_question_with_the_same_policy(bench):
    watch = bench.watch(answer_policy='last(2)')
    bench.frames(6)
    bench.idle()
    assert watch.text == bench.stream.answer('is the door open?', answer_policy='last(2)', max_tokens=6).text


def test_a_check_that_fails_is_told_and_counted_and_the_next_one_is_done(bench):
    failing, fine = bench.watch(), bench.watch('another?')
    bench.frames()
    bench.stream.reset()        # behind the engine's back, with the check of the first under way
    bench.idle()
    assert (failing.failed, failing.checks, failing.text) == (1, 0, '') and 'was reset' in failing.error
    assert fine.failed == 1 and 'nothing has been seen' in fine.error
    assert len(bench.said) == 1, 'of many in a row the first is told'
    bench.frames()
    bench.idle()
    assert all((watch.checks, watch.error) == (1, '') for watch in (failing, fine))


def test_a_watch_that_was_ended_costs_no_further_slice_and_a_reset_ends_the_check_of_its_camera(bench):
    watch = bench.watch()
    bench.frames()
    bench.table.remove(watch.id)
    count = bench.events.count('check')
    bench.idle()
    assert bench.events.count('check') == count == 1
    again = bench.watch()
    bench.frames()
    bench.engine.reset(['front'], lambda frames, error: bench.said.append(frames))
    bench.idle()
    assert bench.said == [4] and (again.checks, again.failed, again.text) == (0, 0, '')
    bench.frames()
    bench.idle()
    assert again.checks == 1


def test_what_counts_is_saved_at_most_once_a_second_and_at_the_end(bench):
    bench.watch(condition='matches .')
    for _ in range(5):
        bench.frames()
        bench.idle()
    assert len(bench.alerts) <= 5 and len(bench.saved) == 1
    bench.table.dirty = True
    bench.checks.save_changes(at_once=True)
    assert len(bench.saved) == 2
