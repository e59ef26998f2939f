"""Restarts of a real node: killed at any moment it goes on where it stood, and what it cannot go on from it says."""
import os
import random
import signal
import subprocess
import time

import pytest

pytest.importorskip('rclpy', reason='rclpy is not installed')

from live import SECOND, Graph, NodeProcess, image, memory_node, new_domain  # noqa: E402
from statekv_ros.backbones.tiny import write_tiny_checkpoint  # noqa: E402
from statekv_ros.store import StoreReader  # noqa: E402

pytestmark = pytest.mark.timeout(300)
QUESTION = 'is the door open?'
OPTIONS = {'reliability': 'reliable', 'rate_hz': '1000.0', 'budget': 64, 'diagnostics_period_s': '0.1', 'max_tokens': 6,
           'cameras': '[front]'}


@pytest.fixture(scope='module')
def other_model_dir(tmp_path_factory):
    return str(write_tiny_checkpoint(tmp_path_factory.mktemp('other') / 'tiny', seed=1))


def held(graph: Graph) -> int:
    """Frames in the camera's memory, those forgotten or left on disk included."""
    values = graph.camera('front')
    return int(values['frames_held']) + int(values['frames_forgotten'])


def watch(graph: Graph, begin: int, end: int) -> None:
    """Images one by one, each watched before the next."""
    for index in range(begin, end):
        graph.publish(image((index + 1) * SECOND))
        graph.wait(lambda: held(graph) > index, f'frame {index}')


def test_killed_at_random_moments_it_starts_again_loses_at_most_one_step_and_answers_the_same(tiny_model_dir, tmp_path):
    seeded = random.Random(7)
    memory, domain = tmp_path / 'memory', new_domain()
    sent = 0
    for _ in range(6):
        node = NodeProcess(tmp_path, domain, model=tiny_model_dir, memory_dir=memory, **OPTIONS)
        graph = Graph(domain)
        try:
            graph.wait_for_state('active')
            before = held(graph)
            assert sent - 3 <= before <= sent, f'{sent} images were sent: a step of two, and one on its way, may be missing'
            sent = before
            if before:
                first = graph.ask(QUESTION)
                assert first.success and first.answer.text == answer_of(memory, tiny_model_dir)
            end = time.monotonic() + seeded.uniform(0.3, 2.0)   # the moment is the claim
            while time.monotonic() < end:
                graph.publish(image((sent + 1) * SECOND))
                sent += 1
                graph.wait(lambda: held(graph) >= sent, f'frame {sent}')
                graph.ask_later(QUESTION)       # an answer is under way
            graph.publish(image((sent + 1) * SECOND))
            sent += 1
            graph.spin(seeded.uniform(0.0, 0.05))
            node.stop(signal.SIGKILL)
        except BaseException:
            print(node.log)
            raise
        finally:
            graph.close()
            node.stop(signal.SIGKILL)
    assert sent > 6


def answer_of(memory, model: str) -> str:
    """What a stream that is restored here, beside the node, answers to the question."""
    from statekv_ros.backbones import load_backbone
    from statekv_ros.memory import VideoStream
    from statekv_ros.memory.saved.restoring import restore
    from statekv_ros.memory.saved.saving import Saving
    stream = VideoStream(load_backbone(model, 'cpu', 'float32'), 'statekv(64)', 'sparse(8192)')
    stream.saving = Saving()
    with StoreReader.look(memory) as store:
        restore(stream, store, 'front')
    return stream.answer(QUESTION, max_tokens=6).text
