"""Random and spoiled images over DDS, mixed with good ones; questions in between, and good images watched at the end."""
import random
import time

from rclpy.qos import QoSProfile
from sensor_msgs.msg import CompressedImage, Image

from campaign import pictures
from campaign.record import Record
from campaign.subject import REPLY_S, Broken, Subject
from statekv_ros.node.messages import to_stamp

WANTED = 20_000
_RAW, _COMPRESSED = ('raw0', 'raw1', 'raw2'), ('jpeg0', 'jpeg1', 'jpeg2')
# What is no message has topics of its own: it is not counted one by one, and the others' counts must be exact.
_GARBLED = {'raw9': False, 'jpeg9': True}
_QUESTION_EVERY = 200
_WARM_UP = 100              # good images per camera: the memory is at its bound then
_FIRST = 1500               # trials before memory is measured: their errors load code, their sizes shape the allocator
_PLACES = 3                 # of a camera's reader: its depth, and one more for the message on its way in
_PERIOD_NS = 10**7
_FIRST_NS = 10**12


def run(record: Record) -> None:
    """All trials against one node with eight cameras."""
    compressed = {f'{name}__topic': f'/{name}/image_raw/compressed' for name in ('jpeg0', 'jpeg1', 'jpeg2', 'jpeg9')}
    cameras = f'[{",".join((*_RAW, *_COMPRESSED, *_GARBLED))}]'
    # Counts on /diagnostics set the pace: each camera may have two images on their way.
    with Subject(record, cameras=cameras, diagnostics_period_s='0.02', **compressed) as subject:
        cameras = _Cameras(subject)
        with subject.judged(0, 'good images, and the largest of each kind'):
            _warm_up(record, cameras)
            record.before = subject.usage()
        number = 0
        for number in record.numbers():
            rng = record.random(number)
            name, message, given = any_image(rng, number)
            with subject.judged((max(0, number - 2 * len(cameras.sent)), number), f'{given}; or one of those before it'):
                cameras.send(name, message, record)
                if number % _QUESTION_EVERY == _QUESTION_EVERY - 1:
                    _ask(record, subject, number)
            if cameras.of is not subject.graph:
                cameras = _Cameras(subject)
        with subject.judged(number, 'good images after all others'):
            record.figures = cameras.totals()
            _watches_still(cameras)
        subject.conclude()


class _Cameras:
    """Publishers; each waits until the node has counted all but one of its images, so that none is lost on the way."""

    def __init__(self, subject: Subject):
        self.subject, self.of = subject, subject.graph
        self.sent = {name: 0 for name in (*_RAW, *_COMPRESSED)}
        self._publishers = {
            name: self.of.node.create_publisher(kind, f'/{name}/image_raw{ending}', QoSProfile(depth=10))
            for names, kind, ending in (((*_RAW, 'raw9'), Image, ''), ((*_COMPRESSED, 'jpeg9'), CompressedImage, '/compressed'))
            for name in names}
        self._stamp_ns = _FIRST_NS
        for name, publisher in self._publishers.items():
            subject.wait(lambda publisher=publisher: publisher.get_subscription_count(), f'a subscription of camera {name}')

    def count(self, name: str, *counters: str) -> int:
        """The sum of a camera's counters on the newest /diagnostics; 0 before the first."""
        values = self.of.health.get(name, (0, '', {}))[2]
        return sum(int(values.get(counter, 0)) for counter in counters)

    def send(self, name: str, message, record: Record | None = None) -> None:
        """Publish once the camera has room; the outcome of the one before is noted. Broken when that never arrives."""
        if name in self.sent:
            try:
                self.subject.wait(lambda: self.count(name, 'frames_in') >= self.sent[name] - 1, f'images of camera {name}')
            except Broken as broken:
                self.sent[name] = self.count(name, 'frames_in')
                if broken.args[0] == 'lost':
                    raise Broken('image not counted', broken.args[1]) from None
                raise
            self.sent[name] += 1
        if not isinstance(message, bytes) and not message.header.stamp.sec and not message.header.stamp.nanosec:
            self._stamp_ns += _PERIOD_NS
            message.header.stamp = to_stamp(self._stamp_ns)
        self._publishers[name].publish(message)
        self.of.executor.spin_once(0)
        if record is not None:
            error = self.of.health.get(name, (0, '', {'last_error': ''}))[2].get('last_error', '')
            record.note(f'camera last said: {error[:60]}' if error else 'no complaint')

    def fill(self, name: str, message: Image | CompressedImage) -> None:
        """Publish a message faster than the node takes it, until every place of its reader has held one. How many of them the
        node takes is open, so that the camera's count begins anew."""
        for _ in range(3):
            for _ in range(2 * _PLACES):
                self._stamp_ns += _PERIOD_NS
                message.header.stamp = to_stamp(self._stamp_ns)
                self._publishers[name].publish(message)
            self._quiet()
        self.sent[name] = self.count(name, 'frames_in')

    def settle(self) -> None:
        """Until all that was sent is counted and dealt with."""
        for name, sent in self.sent.items():
            self.subject.wait(lambda name=name, sent=sent: self.count(name, 'frames_in') >= sent, f'images of camera {name}')
        self._quiet()

    def _quiet(self) -> None:
        """Until the counters stand still."""
        counters = ('frames_in', 'frames_processed', 'rejected', 'dropped')
        end = time.monotonic() + REPLY_S
        while time.monotonic() < end:
            before = {name: self.count(name, *counters) for name in self.sent}
            self.of.fresh_health()
            self.of.spin(0.2)
            self.of.fresh_health()
            if before == {name: self.count(name, *counters) for name in self.sent}:
                return

    def totals(self) -> dict[str, int]:
        """The counters, over all cameras."""
        self.settle()
        counters = ('frames_in', 'frames_sampled', 'frames_processed', 'dropped', 'lost', 'rejected', 'failed_steps')
        return {counter: sum(self.count(name, counter) for name in (*self.sent, *_GARBLED)) for counter in counters} | {
            'sent': sum(self.sent.values())}


def any_image(rng: random.Random, number: int) -> tuple[str, Image | CompressedImage | bytes, str]:
    """Camera, message and words of a trial."""
    kind, raw = rng.random(), rng.random() < 0.55
    if kind < 0.04:
        name = rng.choice(list(_GARBLED))
        data, given = pictures.bad_serialised(rng, _GARBLED[name])
        return name, data, given
    name = (_RAW if raw else _COMPRESSED)[number % 3]
    if kind < 0.24:
        return name, pictures.good_image(number) if raw else pictures.good_compressed(number), 'a good image'
    message, given = pictures.bad_image(rng) if raw else pictures.bad_compressed(rng)
    if rng.random() < 0.06:
        message.header.stamp.sec, message.header.stamp.nanosec = bad = pictures.bad_stamp(rng, _FIRST_NS + number * _PERIOD_NS)
        given += f', stamp {bad}'
    return name, message, given


def _warm_up(record: Record, cameras: _Cameras) -> None:
    """All that the node, Fast DDS and the allocator keep for good is then as large as it ever becomes."""
    if record.wanted >= 1000:
        for name in cameras.sent:       # a stream's buffers grow to its largest frame, a reader's places to its largest message
            *others, largest = pictures.large_images() if name in _RAW else pictures.large_compressed()
            for message in others:
                cameras.send(name, message)
            cameras.fill(name, largest)
    for message in pictures.each_encoding():        # OpenCV starts a thread for some of them
        cameras.send('raw0', message)
    for number in range(min(_FIRST, record.wanted // 10)):
        name, message, _ = any_image(record.random(f'first {number}'), number)
        cameras.send(name, message)
        if number % _QUESTION_EVERY == _QUESTION_EVERY - 1:
            cameras.subject.ask()
    for seed in range(min(_WARM_UP, 2 + record.wanted // 20)):      # last: nothing large is held any more
        for name in cameras.sent:
            cameras.send(name, pictures.good_image(seed) if name in _RAW else pictures.good_compressed(seed))
    cameras.settle()


def _ask(record: Record, subject: Subject, number: int) -> None:
    begun = time.monotonic()
    response = subject.ask(camera=record.random(number).choice((*_RAW, *_COMPRESSED)))
    if not response.success:
        raise Broken('question refused', response.error)
    record.note('question answered')
    slowest = record.figures.get('slowest_answer_ms', 0)
    record.figures['slowest_answer_ms'] = max(slowest, round((time.monotonic() - begun) * 1e3))


def _watches_still(cameras: _Cameras) -> None:
    for name in cameras.sent:
        for seed in (1, 2):
            wanted = cameras.count(name, 'frames_processed') + 1
            cameras.send(name, pictures.good_image(seed) if name in _RAW else pictures.good_compressed(seed))
            cameras.subject.wait(lambda name=name, wanted=wanted: cameras.count(name, 'frames_processed') >= wanted,
                                 f'good images of camera {name} to be watched')
