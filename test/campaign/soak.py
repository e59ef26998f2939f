"""Hours of a robot's day, or minutes of it: a looped bag at 40 images a second, a question each second, standing questions,
resets, a camera that pauses, and nothing that grows."""
import time

import numpy as np
from rclpy.qos import DurabilityPolicy, QoSProfile, ReliabilityPolicy
from sensor_msgs.msg import Image

from campaign.record import Record
from campaign.samples import Samples
from campaign.subject import REPLY_S, Broken, Subject, send_until
from statekv_ros.msg import Alert, Watches
from statekv_ros.patrol.video import patrol_frames
from statekv_ros.patrol.world import make_patrol
from statekv_ros.replay.bag_reader import bag_info, choose_topics, iterate_images
from statekv_ros.replay.bag_writer import BagOptions, write_bag
from statekv_ros.replay.cdr import restamped
from statekv_ros.srv import Reset, Watch

WANTED = None           # a trial is a second, and there are as many as the time allows
_HZ = 40
_FIRST_NS = 10**12
_FIRST = 6              # images that are sent one by one: their gaps tell the node the period, and from then on what is lost
_WARM_UP_S = 60         # or a quarter of the time: the memory is at its bound and the allocator has seen all there is
_END_S = 15.0           # kept back for what comes after the last second
_LOOP_S, _RESET_S, _PAUSE_S, _SAMPLE_S = 60, 150, 300, 60    # how often; or twice in a shorter soak, and five samples
_WAITING = 8            # questions at once: a machine that is busy with other things catches up
_EMPTY_S = 5.0          # after a reset a question may find nothing to read
_PAUSE = 4              # seconds without an image
_AT_A_SEAM = _HZ // 4   # images: where stamps go back or pause, what is lost cannot be seen from their gaps
_SIDE = 128
_QUESTIONS = ('what is in view?', 'what colour was the first cone?', 'in which room was the blue box?')
_WATCHES = (('what is in view?', 'changes', 'last(4)'), ('which room is this?', 'changes', 'state'),
            ('was there a red cone?', 'equals yes', 'sparse(8192)'))


def run(record: Record) -> None:
    """One node until the time is over."""
    if record.wanted is None:
        record.wanted = max(8, int(record.left_s - _END_S))
    warm_up = min(_WARM_UP_S, record.wanted // 4)
    images = _bag(record)
    with Subject(record, cameras='[front]', reliability='best_effort', watch_share=0.5) as subject:
        day = _Day(record, subject, images)
        record.samples = Samples(min(_SAMPLE_S, max(1, record.wanted // 5)))
        number = 0
        for number in record.numbers():
            if number == warm_up:
                record.before = subject.usage()
            with subject.judged((0, number), f'second {number} of {record.wanted}'):
                day.second(number)
            if day.of is not subject.graph:
                day = _Day(record, subject, images)
        with subject.judged(number, 'all counters at the end'):
            day.finish()
        record.figures |= record.samples.slopes(warm_up) | {'loops': day.loops, 'pauses': day.pauses, 'resets': day.resets}
        subject.conclude()


def _bag(record: Record) -> list[bytes]:
    """A patrol as a bag, read back as its player does: serialised images, for a minute or half of the time."""
    count = _HZ * _often(_LOOP_S, record)
    patrol = make_patrol((count + 1) // 2, np.random.default_rng(record.seed))
    write_bag(record.folder / 'bag', patrol_frames(patrol, record.seed, _SIDE, _SIDE), BagOptions(topic='/front/image_raw'))
    info = bag_info(record.folder / 'bag')
    return [image.cdr for image in iterate_images(info, choose_topics(info, None))]


def _often(seconds: int, record: Record) -> int:
    return max(1, min(seconds, record.wanted // 2))


class _Day:
    """The camera, the caller, the standing questions and their books."""

    def __init__(self, record: Record, subject: Subject, images: list[bytes]):
        self.record, self.subject, self.of = record, subject, subject.graph
        self.loops = self.pauses = self.resets = 0
        self._images, self._at, self._stamp_ns = images, 0, _FIRST_NS
        self._alerts: list[Alert] = []
        self._lists: list[Watches] = []
        node = self.of.node
        self._publisher = node.create_publisher(Image, '/front/image_raw',
                                                QoSProfile(depth=5, reliability=ReliabilityPolicy.BEST_EFFORT))
        latched = QoSProfile(depth=1, durability=DurabilityPolicy.TRANSIENT_LOCAL)
        node.create_subscription(Watches, '/statekv/watches', self._lists.append, latched)
        node.create_subscription(Alert, '/statekv/alert', self._alerts.append, QoSProfile(depth=100))
        self._watch = node.create_client(Watch, '/statekv/watch')
        subject.wait(self._publisher.get_subscription_count, 'a subscription of the camera')
        self._sent, self._asked, self._resetting, self._reset_at, self._pausing = 0, [], None, 0.0, False
        for watched in range(1, _FIRST + 1):
            send_until(subject.wait, self._send, lambda: subject.count('front', 'frames_processed') >= watched,
                       f'image {watched} to be watched')
        self._unheard = self._sent - _FIRST     # as many may have been sent before both sides knew each other
        for question, condition, policy in _WATCHES:
            response = subject.call(self._watch, Watch.Request(question=question, condition=condition, answer_policy=policy,
                                                               every_s=1.0))
            if not response.success:
                raise Broken('watch refused', response.error)
        for question in _QUESTIONS:     # one of everything before the node is measured
            subject.ask(question)
        self._reset()
        subject.wait(lambda: self._collect() or self._resetting is None, 'a reset')
        seen = subject.count('front', 'frames_processed')
        send_until(subject.wait, self._send, lambda: subject.count('front', 'frames_processed') > seen,
                   'an image after the reset')

    def second(self, number: int) -> None:
        """A second's images and one question."""
        begun = time.monotonic()
        pausing = number % _often(_PAUSE_S, self.record) in range(1, 1 + min(_PAUSE, self.record.wanted // 5))
        if pausing and not self._pausing:
            self.pauses += 1
        self._pausing = pausing
        if len(self._asked) < _WAITING:
            self._asked.append((begun, self.of.ask_later(_QUESTIONS[number % len(_QUESTIONS)])))
        else:
            self.record.note('not asked: others wait')
        if number % _often(_RESET_S, self.record) == _often(_RESET_S, self.record) - 1:
            self._reset()
        for k in range(_HZ):
            if pausing:
                self._pass_by()
            else:
                self._send()
            while (left := begun + (k + 1) / _HZ - time.monotonic()) > 0:
                self.of.executor.spin_once(left)
                self._collect()
            if not self.subject.node.alive:
                raise Broken('death', f'the node ended with exit code {self.subject.node.process.returncode}')
        self.record.samples.note_steps(timing.total_ms for timing in self.of.timings)
        self.of.timings.clear()
        self.of.answers.clear()
        del self._lists[:-1]
        self.record.samples.tick(self.subject.node.process.pid)

    def finish(self) -> None:
        """The last answers, counters that add up, and watches whose every alert came."""
        self.subject.wait(lambda: self._collect() or not self._asked, 'the last answers')
        self.of.spin(1.0)
        counts = {key: int(self.of.camera('front')[key]) for key in
                  ('frames_in', 'frames_sampled', 'frames_processed', 'dropped', 'lost', 'rejected', 'failed_steps')}
        self.record.figures['counters'] = counts | {'sent': self._sent}
        dealt_with = sum(counts[key] for key in ('frames_processed', 'dropped', 'rejected', 'failed_steps'))
        unheard = self._sent - counts['frames_in'] - counts['lost']
        unseen = self._unheard + _AT_A_SEAM * (self.loops + self.pauses)
        if counts['frames_sampled'] != dealt_with or not 0 <= unheard <= unseen:
            raise Broken('counters that do not add up', f'sent {self._sent}, of which {unseen} may be neither heard nor '
                         f'counted as lost: {counts}')
        self.subject.wait(lambda: sum(state.alerts for state in self._lists[-1].watches) == len(self._alerts), 'every alert')
        watches = self._lists[-1].watches
        self.record.figures['watches'] = {
            state.question: {'checks': state.checks, 'alerts': state.alerts} for state in watches}
        if len(watches) != len(_WATCHES) or not all(state.checks for state in watches):
            raise Broken('watches that are not checked', f'{watches}')

    def _reset(self) -> None:
        self._resetting, self._reset_at = self.of.reset.call_async(Reset.Request(camera='front')), time.monotonic()
        self.resets += 1

    def _send(self) -> None:
        self._publisher.publish(restamped(self._images[self._at], self._stamp_ns))
        self._sent += 1
        self._pass_by()

    def _pass_by(self) -> None:
        """On to the next image; after the last the bag begins again, and stamps go back."""
        self._at, self._stamp_ns = self._at + 1, self._stamp_ns + 10**9 // _HZ
        if self._at == len(self._images):
            self._at, self._stamp_ns, self.loops = 0, _FIRST_NS, self.loops + 1

    def _collect(self) -> None:
        now = time.monotonic()
        if self._resetting is not None and self._resetting.done():
            if not (response := self._resetting.result()).success:
                raise Broken('reset refused', response.error)
            self._resetting = None
        for entry in self._asked[:]:
            begun, future = entry
            if future.done():
                self._asked.remove(entry)
                response = future.result()
                if response.success:
                    self.record.samples.note_answer((now - begun) * 1e3)
                    self.record.note('question answered')
                elif begun <= self._reset_at + _EMPTY_S:
                    self.record.note(f'over a reset: {response.error}')
                else:
                    raise Broken('question refused', response.error)
            elif now - begun > REPLY_S:
                self._asked.remove(entry)
                raise Broken('lost', f'no reply in {REPLY_S:g} s')
