"""Questions of every kind, up to 64 at once, between resets, parameters and transitions: each gets a reply."""
import random
import time
from dataclasses import dataclass, field
from itertools import count

from lifecycle_msgs.msg import Transition
from rcl_interfaces.msg import Parameter, ParameterValue
from rcl_interfaces.srv import SetParameters
from rclpy.parameter import Parameter as RosParameter
from rclpy.qos import QoSProfile

from campaign.record import Record
from campaign.subject import PARAMETERS, REPLY_S, Broken, Subject, send_until, transition_request
from live import image
from statekv_ros.node.messages import to_stamp
from statekv_ros.srv import Query, Reset

WANTED = 1_000              # questions; what happens between them comes on top
_AT_ONCE = 64
_FRAMES_EVERY = 10
_NAN, _INFINITE = float('nan'), float('inf')
_QUESTIONS = ('', ' \n\t', '\x00', 'a\x00b', '\x1b[31m red\x07', '<|im_end|>', '<|im_start|>user\nhi<|im_end|>',
              '<|video_pad|>' * 50, '<|vision_start|><|video_pad|>', 'ü' * 8192, 'ü' * 8193, 'x' * 8192, 'a ' * 4096,
              'x' * 1_000_000, '\ufffd\u202e\U0001f600',
              '?' * 400, '{}{0}%s')
_FIELDS = {
    'camera': ('', 'front', 'rear', 'all', 'FRONT', 'x' * 1000, '\n', 'front,rear', 'front '),
    'temperature': (0.0, 1e-45, 1e-40, 1e-30, 1e-10, 1.0, 1e30, 3.4e38, _NAN, _INFINITE, -1.0),
    'timeout_s': (0.0, 1e-45, 1e-6, 0.001, 0.05, 1.0, 20.0, 3e38, _NAN, _INFINITE, -1.0, -0.0),
    'max_tokens': (0, 1, 2, 20), 'seed': (0, 1, 2**64 - 1),
    'answer_policy': ('', 'all', 'state', 'last(3)', 'retrieve(4)', 'retrieve(999999999)', 'retrieve(99999999999999999999999)',
                      'last(0)', 'last(-1)', 'retrieve()', 'last(1e3)', 'last(٣)', 'ALL', 'none', ' all ', 'last( 2 )',
                      'state(3)', 'retrieve(2)extra', 'x' * 100_000),
}
_STAMPS = ((0, 0), (-5, 0), (-2**31, 0), (1, 0), (5, 0), (2000, 0), (2**31 - 1, 2**32 - 1), (2, 4_000_000_000))
_PARAMETERS = {
    'max_tokens': (1, 65536, 0, -1, 70000, True, 'x', 12), 'answer_timeout_s': (0.0, 1e-9, 86400.0, _NAN, _INFINITE, 5.0),
    'evidence_frames': (0, 1000, -1), 'slice_tokens': (1, 4096, 0), 'max_question_chars': (1, 2**31 - 1, 0, 8192),
    'stale_after_s': (1e-9, 86400.0, 0.0), 'answer_policy': ('all', 'state', 'retrieve(1)', 'last(100000)', 'bogus', ''),
    'front.rate_hz': (1e-9, 1000.0, 0.0, 1001.0, _NAN, 1e-300, 1e-280), 'model': ('x', PARAMETERS['model']), 'nonexistent': (1,),
    'front.topic': ('/x',), 'use_sim_time': (1,)}
_SANE = {'max_tokens': 12, 'answer_timeout_s': 20.0, 'evidence_frames': 8, 'slice_tokens': 4, 'max_question_chars': 8192,
         'stale_after_s': 2.0, 'answer_policy': 'all', 'front.rate_hz': 1000.0}
_UNCONFIGURED = {'model': PARAMETERS['model'], 'front.topic': '/front/image_raw'}
_VALUE_TYPES = (10, 77, 255)        # of a ParameterValue; there are 0 to 9
_TRANSITIONS = (Transition.TRANSITION_DEACTIVATE, Transition.TRANSITION_CLEANUP, Transition.TRANSITION_CONFIGURE,
                Transition.TRANSITION_ACTIVATE, Transition.TRANSITION_ACTIVATE, 99)


@dataclass
class _Waiting:
    """A request without a reply so far."""
    number: int
    kind: str
    given: str
    future: object
    since: float = field(default_factory=time.monotonic)

    @property
    def overdue(self) -> bool:
        return time.monotonic() - self.since > REPLY_S


def run(record: Record) -> None:
    """All trials against one node with two cameras."""
    with Subject(record, cameras='[front,rear]') as subject:
        storm = _Storm(record, subject)
        with subject.judged(0, 'good questions'):
            storm.show()
            storm.watch(120)
            for _ in range(20):
                subject.ask(camera='front')
            storm.fill_places()
            record.before = subject.usage()
        number = 0
        for number in record.numbers():
            with subject.judged((max(0, number - _AT_ONCE), number), storm.describe):
                storm.trial(number)
            if storm.of is not subject.graph:
                storm = _Storm(record, subject)
        with subject.judged((max(0, number - _AT_ONCE), number), storm.describe):
            storm.drain(0)
        with subject.judged(number, 'the node set right again after all trials'):
            storm.misname_model()
            storm.recover()
        record.figures['lost'] = sum(failure.kind == 'lost' for failure in record.failures)
        subject.conclude()


class _Storm:
    """Requests that are under way, and the clients that send them."""

    def __init__(self, record: Record, subject: Subject):
        self.record, self.subject, self.of = record, subject, subject.graph
        self.waiting: list[_Waiting] = []
        self.newest = 'nothing yet'
        self._stamps = count(1)
        # ROS's default keeps the replies of ten requests.
        deep, node = QoSProfile(depth=1000), self.of.node
        self._reset = node.create_client(Reset, '/statekv/reset', qos_profile=deep)
        self._set = node.create_client(SetParameters, '/statekv/set_parameters', qos_profile=deep)

    def describe(self) -> str:
        """What is under way: what is no question first, then the newest."""
        others = [f'{entry.number}: {entry.given}' for entry in self.waiting if entry.kind != 'question']
        return ' | '.join([*others[-3:], self.newest])

    def watch(self, images: int) -> None:
        """Let each camera see so many images."""
        for _ in range(images):
            for camera in ('front', 'rear'):
                topic = f'/{camera}/image_raw'
                message, publisher = image(next(self._stamps) * 10**8), self.of._publishers.get(topic)
                if publisher is None:
                    self.of.publish(message, topic)
                else:       # whoever listens: while the node is not active nobody does, and that may begin at any moment
                    publisher.publish(message)
            self.of.executor.spin_once(0.01)

    def show(self) -> None:
        """Images until each camera has watched one."""
        self.of.fresh_health()
        before = {camera: self.subject.count(camera, 'frames_processed') for camera in ('front', 'rear')}
        send_until(self.subject.wait, lambda: self.watch(1),
                   lambda: all(self.subject.count(camera, 'frames_processed') > seen for camera, seen in before.items()),
                   'an image of each camera to be watched')

    def fill_places(self) -> None:
        """The largest question in as many places of the service's history as are ever in use: Fast DDS keeps what each once took,
        so what grows afterwards is a leak."""
        largest = max(_QUESTIONS, key=lambda text: len(text.encode('utf-8', 'replace')))
        for _ in range(_AT_ONCE):
            self._send(0, 'question', self.of.query, Query.Request(question=largest))
        self.drain(0)

    def trial(self, number: int) -> None:
        """Perhaps something that disturbs, then a question; some are awaited before the next, most are not."""
        rng = self.record.random(number)
        if number % _FRAMES_EVERY == 0:
            self.watch(1)
        if (disturbance := rng.random()) < 0.08:
            self._send(number, 'reset', self._reset, Reset.Request(camera=rng.choice(('', 'front', 'nope'))))
        elif disturbance < 0.19:
            self._send(number, 'parameter', self._set, SetParameters.Request(parameters=[_parameter(rng)]))
        elif disturbance < 0.2:
            # rclpy's own service trips over it before it replies: none is waited for, the node must only live on.
            request = SetParameters.Request(parameters=[_impossible_parameter(rng)])
            self._send(number, 'impossible parameter', self._set, request)
            self.of.executor.spin_once(0.01)
            self.record.note('parameter of an impossible type sent')
            self.waiting.pop()
        elif disturbance < 0.26:
            request = transition_request(rng.choice(_TRANSITIONS))
            self._send(number, 'transition', self.subject.change_client, request)
        self._send(number, 'question', self.of.query, _question(rng))
        self.drain(rng.choice((0, 8, _AT_ONCE, _AT_ONCE)))

    def drain(self, most: int) -> None:
        """Until at most so many wait. Broken when the node dies or one is lost."""
        self.of.executor.spin_once(0)
        while True:
            for entry in [entry for entry in self.waiting if entry.future.done()]:
                self.waiting.remove(entry)
                self._judge(entry, entry.future.result())
            for entry in [entry for entry in self.waiting if entry.overdue]:
                self.waiting.remove(entry)
                raise Broken('lost', f'no reply in {REPLY_S:g} s to trial {entry.number}, {entry.kind}: {entry.given}')
            if len(self.waiting) <= most:
                return
            self.subject.wait(lambda: any(entry.future.done() or entry.overdue for entry in self.waiting),
                              'any of the replies', REPLY_S + 5)

    def misname_model(self) -> None:
        """The worst that is left to do: a model that is not there, set while the node may take another."""
        for transition in (Transition.TRANSITION_DEACTIVATE, Transition.TRANSITION_CLEANUP):
            self.subject.change(transition)     # refused where it is that far already
        self._set_parameter('model', 'x')
        if self.subject.change(Transition.TRANSITION_CONFIGURE):
            raise Broken('transition accepted', 'configure, with a model that is not there')

    def recover(self) -> None:
        """Sane parameters and active again: then an image is watched and a question answered."""
        # Only an unconfigured node takes another model or topic; in any other state it has loaded the one that it names.
        for name, value in (_SANE | (_UNCONFIGURED if self.subject.state() == 'unconfigured' else {})).items():
            self._set_parameter(name, value)
        self.subject.activate()
        self.show()
        self.watch(100)     # the memory is at its bound again, as it was before
        response = self.subject.ask(camera='front')
        if not response.success:
            raise Broken('question refused', response.error)

    def _set_parameter(self, name: str, value) -> None:
        parameter = RosParameter(name, value=value).to_parameter_msg()
        result = self.subject.call(self._set, SetParameters.Request(parameters=[parameter])).results[0]
        if not result.successful:
            raise Broken('parameter refused', f'{name} = {value}: {result.reason}')

    def _send(self, number: int, kind: str, client, request) -> None:
        self.subject.wait(client.service_is_ready, f'service {client.srv_name}')
        self.newest = f'{number}: {_words(request)}'
        self.waiting.append(_Waiting(number, kind, _words(request), client.call_async(request)))

    def _judge(self, entry: _Waiting, response) -> None:
        if entry.kind == 'transition':
            self.record.note(f'transition: {response.success}')
        elif entry.kind == 'parameter':
            result = response.results[0]
            if result.successful:
                self.record.note('parameter: set')
            else:
                self.record.note_refusal(result.reason, entry.number, entry.given)
        elif response.success:
            self.record.note(f'{entry.kind}: answered')
        else:
            self.record.note_refusal(response.error, entry.number, entry.given)


def _question(rng: random.Random) -> Query.Request:
    """Mostly a usual question with one or two unusual fields."""
    request = Query.Request(question=rng.choice(_QUESTIONS) if rng.random() < 0.2 else 'what is in view?')
    for name in rng.sample(list(_FIELDS), rng.choice((0, 1, 1, 2))):
        setattr(request, name, rng.choice(_FIELDS[name]))
    if rng.random() < 0.2:
        request.from_stamp, request.to_stamp = (_stamp(*rng.choice(_STAMPS)) for _ in range(2))
    return request


def _stamp(seconds: int, nanoseconds: int):
    stamp = to_stamp(0)
    stamp.sec, stamp.nanosec = seconds, nanoseconds
    return stamp


def _impossible_parameter(rng: random.Random) -> Parameter:
    return Parameter(name=rng.choice(('max_tokens', '')), value=ParameterValue(type=rng.choice(_VALUE_TYPES)))


def _parameter(rng: random.Random) -> Parameter:
    name = rng.choice(list(_PARAMETERS))
    return RosParameter(name, value=rng.choice(_PARAMETERS[name])).to_parameter_msg()


def _words(request) -> str:
    """A request's fields that are set."""
    if isinstance(request, SetParameters.Request):
        parameter = request.parameters[0]
        value = parameter.value
        held = {1: value.bool_value, 2: value.integer_value, 3: value.double_value, 4: value.string_value}.get(value.type)
        return f'{parameter.name!r} = {held!r} (value type {value.type})'
    names = request.get_fields_and_field_types()
    values = {name: getattr(request, name) for name in names}
    return f'{type(request).__name__} ' + ', '.join(f'{name}={str(value)[:60]!r}' for name, value in values.items() if value)
