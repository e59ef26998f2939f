"""The node itself, killed with SIGKILL at any moment while it watches and answers, and begun again on its memory folder."""
import random
import signal
import time

import torch

from campaign.record import Record
from campaign.subject import PARAMETERS, Broken
from live import SECOND, Graph, NodeProcess, image, new_domain
from statekv_ros.backbones import load_backbone
from statekv_ros.images import decode_image
from statekv_ros.memory import VideoStream
from statekv_ros.memory.saved.restoring import restore
from statekv_ros.memory.saved.saving import Saving
from statekv_ros.store import StoreReader

WANTED = 200
_QUESTION = 'what is in view?'
_LONGEST_S = 2.0        # of watching before the kill
_DOMAINS = 8            # in turn: a lock that a killed process left in shared memory spoils a domain for a while
_PARAMETERS = {**PARAMETERS, 'cameras': '[front]', 'device_cache_mb': 0}


def run(record: Record) -> None:
    """A trial is one life of the node."""
    torch.set_num_threads(1)     # as the node has: with more, sums differ in their last bit
    memory, domains = record.folder / 'memory', [new_domain() for _ in range(_DOMAINS)]
    reference, sent = _NeverStopped(), 0
    for number in record.numbers():
        node = NodeProcess(record.folder, domains[number % _DOMAINS], **_PARAMETERS, memory_dir=memory)
        graph = Graph(domains[number % _DOMAINS])
        try:
            sent = _live(record, graph, reference, sent, record.random(number))
        except (Broken, AssertionError) as error:
            kind, detail = error.args if isinstance(error, Broken) else ('does not start or watch', str(error))
            record.fail(kind, (0, number), f'killed {number} times', f'{detail}\n{node.log[-3000:]}')
            return
        finally:
            node.stop(signal.SIGKILL)
            graph.close()
    with StoreReader.look(memory) as store:
        if damaged := store.check():
            record.fail_whole('damaged', damaged[0])
        reference.compare(record, store)


def _live(record: Record, graph: Graph, reference: '_NeverStopped', sent: int, rng: random.Random) -> int:
    """Begin, look at what came back, watch for a while; the number of images sent in all."""
    graph.wait_for_state('active')
    back = _seen(graph)
    # The last image was on its way; the one before it may have completed the step of two that was in progress.
    if not max(0, sent - 3) <= back <= sent:
        raise Broken('lost more than a step', f'{back} frames are back of {sent} images sent')
    record.note(f'frames lost: {"none" if back == sent else "in flight or of the step in progress"}')
    if back:
        said, right = graph.ask(_QUESTION, max_tokens=6).answer.text, reference.answer(back)
        if right is not None and said != right:
            raise Broken('another answer', f'{said!r} after the restart, {right!r} without one')
        record.note('same answer' if right is not None else 'answer not compared: frames are missing until they are sent again')
    end = time.monotonic() + rng.uniform(0.3, _LONGEST_S)
    while time.monotonic() < end:
        graph.publish(_picture(back))
        back += 1
        graph.wait(lambda: _seen(graph) >= back, f'frame {back}')
        graph.ask_later(_QUESTION)      # an answer is under way when it is killed
    graph.publish(_picture(back))
    graph.spin(rng.uniform(0.0, 0.05))
    return back + 1


def _picture(number: int):
    """The image that is number `number` of all that is ever sent; a lost one is sent again."""
    return image((number + 1) * SECOND, seed=number)


def _seen(graph: Graph) -> int:
    values = graph.camera('front')
    return int(values['frames_held']) + int(values['frames_forgotten'])


class _NeverStopped:
    """A stream in this process that sees the same images."""

    def __init__(self):
        self._stream, self._fed = _stream(), 0

    def answer(self, frames: int) -> str | None:
        """Its answer after so many images; None when it has seen more by now."""
        self._feed(frames)
        return self._stream.answer(_QUESTION, max_tokens=6).text if self._fed == frames else None

    def compare(self, record: Record, store: StoreReader) -> None:
        """What is on disk must be its memory, to the bit."""
        back = _stream()
        back.saving = Saving()
        frames = restore(back, store, 'front').frames
        self._feed(frames)
        if self._fed > frames:
            record.note('memory not compared: frames are missing')
            return
        same = [torch.equal(one, other) for one, other in zip(back.carried.copy(), self._stream.carried.copy(), strict=True)]
        for one, other in zip(back.detailed.views(), self._stream.detailed.views(), strict=True):
            same += [torch.equal(one.key, other.key), torch.equal(one.value, other.value)]
        record.figures['frames'] = frames
        if not all(same):
            record.fail_whole('not equal to the bit', f'{same.count(False)} of {len(same)} tensors after {frames} frames')

    def _feed(self, frames: int) -> None:
        while self._fed < frames:
            self._stream.step(decode_image(_picture(self._fed)), (self._fed + 1) * SECOND)
            self._fed += 1


def _stream() -> VideoStream:
    return VideoStream(load_backbone(PARAMETERS['model'], 'cpu'), f'statekv({PARAMETERS["budget"]})', 'sparse(8192)')
