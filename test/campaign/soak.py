"""Hours of a robot's day, or minutes of it: 40 images a second, a question each second, nothing that grows."""
import statistics
import time

from rclpy.qos import QoSProfile, ReliabilityPolicy
from sensor_msgs.msg import Image

from campaign.record import Record
from campaign.resources import usage
from campaign.subject import REPLY_S, Broken, Subject, send_until
from live import image
from statekv_ros.node.messages import to_stamp

WANTED = None           # a trial is a second, and there are as many as the time allows
_HZ = 40
_PICTURES = 10
_FIRST_NS = 10**12
_FIRST = 6              # images that are sent one by one: their gaps tell the node the period, and from then on what is lost
_WARM_UP_S = 60         # or a quarter of the time: the memory is at its bound and the allocator has seen all there is
_END_S = 15.0           # kept back for what comes after the last second
_QUESTIONS = ('what is in view?', 'what colour was the first cone?', 'in which room was the blue box?')


def run(record: Record) -> None:
    """One node until the time is over."""
    if record.wanted is None:
        record.wanted = max(8, int(record.left_s - _END_S))
    warm_up = min(_WARM_UP_S, record.wanted // 4)
    with Subject(record, cameras='[front]', reliability='best_effort') as subject:
        watch = _Watch(record, subject)
        number = 0
        for number in record.numbers():
            if number == warm_up:
                record.before = subject.usage()
            with subject.judged((0, number), f'second {number} of {record.wanted}'):
                watch.second(number)
            if watch.of is not subject.graph:
                watch = _Watch(record, subject)
        with subject.judged(number, 'all counters at the end'):
            watch.finish()
        record.figures |= watch.figures(warm_up)
        subject.conclude()


class _Watch:
    """The camera, the caller and the books."""

    def __init__(self, record: Record, subject: Subject):
        self.record, self.subject, self.of = record, subject, subject.graph
        self._pictures = [image(k, 256, 192, seed=k) for k in range(_PICTURES)]
        self._publisher = self.of.node.create_publisher(
            Image, '/front/image_raw', QoSProfile(depth=5, reliability=ReliabilityPolicy.BEST_EFFORT))
        subject.wait(self._publisher.get_subscription_count, 'a subscription of the camera')
        self._sent, self._asked = 0, []
        self._step_ms: list[float] = []
        self._answer_ms: list[float] = []
        self._memory: list[tuple[float, float]] = []        # seconds, MB
        self._begun = time.monotonic()
        for watched in range(1, _FIRST + 1):
            send_until(subject.wait, self._send, lambda: subject.count('front', 'frames_processed') >= watched,
                       f'image {watched} to be watched')
        self._unheard = self._sent - _FIRST     # as many may have been sent before both sides knew each other

    def second(self, number: int) -> None:
        """A second's images and one question."""
        begun = time.monotonic()
        self._asked.append((begun, self.of.ask_later(_QUESTIONS[number % len(_QUESTIONS)])))
        for k in range(_HZ):
            self._send()
            while (left := begun + (k + 1) / _HZ - time.monotonic()) > 0:
                self.of.executor.spin_once(left)
                self._collect()
            if not self.subject.node.alive:
                raise Broken('death', f'the node ended with exit code {self.subject.node.process.returncode}')
        self._step_ms += [timing.total_ms for timing in self.of.timings]
        self.of.timings.clear()
        self.of.answers.clear()
        self._memory.append((time.monotonic() - self._begun, usage(self.subject.node.process.pid).rss_mb))

    def finish(self) -> None:
        """The last answers, and counters that add up."""
        self.subject.wait(lambda: self._collect() or not self._asked, 'the last answers')
        self.of.spin(1.0)
        counts = {key: int(self.of.camera('front')[key]) for key in
                  ('frames_in', 'frames_sampled', 'frames_processed', 'dropped', 'lost', 'rejected', 'failed_steps')}
        self.record.figures['counters'] = counts | {'sent': self._sent}
        dealt_with = sum(counts[key] for key in ('frames_processed', 'dropped', 'rejected', 'failed_steps'))
        unheard = self._sent - counts['frames_in'] - counts['lost']
        if counts['frames_sampled'] != dealt_with or not 0 <= unheard <= self._unheard:
            raise Broken('counters that do not add up', f'sent {self._sent}, of the first {self._unheard} may not have been '
                         f'heard: {counts}')

    def figures(self, warm_up: int) -> dict:
        """Medians of the first and the last fifth, and the slope of the memory after the warm-up."""
        figures = {}
        for name, values in (('step', self._step_ms), ('answer', self._answer_ms)):
            fifth = max(1, len(values) // 5)
            if values:
                figures |= {f'{name}_ms_p50_first': round(statistics.median(values[:fifth]), 1),
                            f'{name}_ms_p50_last': round(statistics.median(values[-fifth:]), 1)}
        later = self._memory[warm_up:]
        if len(later) > 1:
            slope = statistics.linear_regression(*zip(*later)).slope
            figures['rss_slope_mb_per_hour'] = round(slope * 3600, 1)
        return figures

    def _send(self) -> None:
        message = self._pictures[self._sent % _PICTURES]
        message.header.stamp = to_stamp(_FIRST_NS + self._sent * 10**9 // _HZ)
        self._publisher.publish(message)
        self._sent += 1

    def _collect(self) -> None:
        now = time.monotonic()
        for entry in self._asked[:]:
            begun, future = entry
            if future.done():
                self._asked.remove(entry)
                self._answer_ms.append((now - begun) * 1e3)
                response = future.result()
                if response.success:
                    self.record.note('question answered')
                else:
                    raise Broken('question refused', response.error)
            elif now - begun > REPLY_S:
                self._asked.remove(entry)
                raise Broken('lost', f'no reply in {REPLY_S:g} s')
