"""An engine whose turns a test takes itself, with the real model and no clock."""
from types import SimpleNamespace

from conftest import SECOND
from statekv_ros.memory import VideoStream
from statekv_ros.node.camera import Camera
from statekv_ros.node.engine import Engine
from statekv_ros.node.questions import Outcome, Question

QUESTION = 'where did you last see the red toolbox?'


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
        take_in = stream.take_in

        def noted(frame, stamp_ns, preprocess_ms=0.0):
            self.events.append(('step', name, stamp_ns))
            return take_in(frame, stamp_ns, preprocess_ms)

        stream.take_in = noted
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
        next_answer = question.next_answer      # of a slice of its own as of one that it shares

        def noted(steps):
            self.events.append(('slice', question))
            return next_answer(steps)

        question.next_answer = noted
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


def failing(stream, times: int) -> None:
    """Let the next steps of a stream fail in their second layer."""
    cancelled, left, layers = stream.cancelled, [times], [0]

    def cancelled_or_fails() -> bool:
        layers[0] += left[0] > 0
        if layers[0] == 2:
            left[0], layers[0] = left[0] - 1, 0
            raise ZeroDivisionError('oops')
        return cancelled()

    stream.cancelled = cancelled_or_fails
