"""Rounds through the lifecycle, activations that fail, and signals at any moment of a node's life."""
import random
import re
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

from lifecycle_msgs.msg import Transition

from campaign.record import Record
from campaign.subject import PARAMETERS, Broken, Subject, send_until
from live import PATIENCE_S, Graph, NodeProcess, image, new_domain

WANTED = 100
_CONFIGURE, _CLEANUP, _ACTIVATE, _DEACTIVATE = (getattr(Transition, f'TRANSITION_{name}')
                                                for name in ('CONFIGURE', 'CLEANUP', 'ACTIVATE', 'DEACTIVATE'))
_WARM_UP = 10           # rounds
_ERROR = 2              # of DiagnosticStatus
_ERROR_SHOWN_S = 10.0   # on /diagnostics, which comes 20 times a second
_EXIT_S = 10.0
_QUESTIONS = 8
_LONG_QUESTION = 'what is in view? ' + 'x ' * 100


def run(record: Record) -> None:
    """Rounds with a well node, activations of one that cannot activate, and nodes that get a signal."""
    # Two message types on one topic: the second subscription raises.
    two_types = {'cameras': '[a,b]', 'a__topic': '/x', 'b__topic': '/x', 'b__transport': 'compressed', 'autostart': 'false'}
    with Subject(record, cameras='[front]') as well, Subject(record, **two_types) as ill, _graph_for_signals() as graph:
        with well.judged(0, 'rounds of the warm-up'):
            for warm_up in range(min(_WARM_UP, 2 + record.wanted // 10)):
                _round(record, well, record.random(f'warm-up {warm_up}'))
        well_before = well.usage()
        with ill.judged(0, 'failing activations of the warm-up'):
            for _ in range(2):
                _fail_to_activate(record, ill)
        ill_before = ill.usage()
        for number in record.numbers():
            rng = record.random(number)
            kind = rng.choices(('round', 'failing activation', 'signal'), (0.55, 0.35, 0.1))[0]
            if kind == 'round':
                with well.judged(number, 'deactivate, cleanup, configure, activate, with images and questions'):
                    _round(record, well, rng)
            elif kind == 'failing activation':
                with ill.judged(number, 'two cameras of different message types on one topic: configure, activate'):
                    _fail_to_activate(record, ill)
            else:
                _signal(record, number, rng, graph)
        record.before = ill_before
        ill.conclude()
        record.figures['failing_activations'] = {'before': asdict(ill_before), 'after': record.after and asdict(record.after)}
        record.before, record.after = well_before, None
        well.conclude()


def _round(record: Record, subject: Subject, rng: random.Random) -> None:
    """From active to active; the memory is new then, watches and answers."""
    under_way = [subject.graph.ask_later('what is in view?', max_tokens=200, temperature=2.0) for _ in range(rng.randrange(4))]
    if rng.random() < 0.2 and subject.change(_ACTIVATE):
        raise Broken('transition accepted', 'activate, while active')
    _change(subject, _DEACTIVATE, 'deactivate')
    subject.ask()       # answered while inactive: by what is remembered, or that nothing is
    under_way += [subject.graph.ask_later('what is in view?') for _ in range(rng.randrange(4))]
    _change(subject, _CLEANUP, 'cleanup')
    for future in under_way:
        subject.wait(future.done, 'the reply to a question asked before cleanup')
    if (response := subject.ask()).success or 'not configured' not in response.error:
        raise Broken('answer without a model', f'after cleanup: success {response.success}, {response.error!r}')
    _change(subject, _CONFIGURE, 'configure')
    subject.wait_for_engine('inactive')
    _change(subject, _ACTIVATE, 'activate')
    subject.wait_for_engine('active')
    for watched in (1, 2):
        send_until(subject.wait, lambda: subject.graph.publish(image(time.time_ns())),
                   lambda: subject.count('front', 'frames_processed') >= watched, f'image {watched} to be watched')
    if not (response := subject.ask()).success:
        raise Broken('question refused', f'after a round: {response.error}')
    record.note('round')


def _fail_to_activate(record: Record, subject: Subject) -> None:
    """Not active afterwards, with the reason on /diagnostics; a question gets a sentence."""
    if subject.state() == 'inactive':
        _change(subject, _CLEANUP, 'cleanup after a failed activation')
    _change(subject, _CONFIGURE, 'configure')
    subject.wait_for_engine('inactive')
    if subject.change(_ACTIVATE):
        raise Broken('transition accepted', 'activate, with two message types on one topic')
    subject.wait(lambda: subject.state() in ('unconfigured', 'inactive'), 'end of the failed activation')
    try:
        subject.wait(lambda: subject.engine[0] == _ERROR, 'level ERROR', _ERROR_SHOWN_S)
    except Broken as broken:
        if broken.args[0] == 'lost':
            raise Broken('silent failure', f'activation failed; the engine on /diagnostics after {_ERROR_SHOWN_S:g} s: '
                         f'{subject.engine}') from None
        raise
    if (response := subject.ask()).success or not response.error:
        raise Broken('answer without a model', f'after a failed activation: success {response.success}, {response.error!r}')
    record.note('failing activation told')


def _change(subject: Subject, transition: int, name: str) -> None:
    if not subject.change(transition):
        raise Broken('transition refused', f'{name}; health: {subject.engine}')


@contextmanager
def _graph_for_signals() -> Iterator[Graph]:
    graph = Graph(new_domain())
    try:
        yield graph
    finally:
        graph.close()


def _signal(record: Record, number: int, rng: random.Random, graph: Graph) -> None:
    """A node that gets SIGINT or SIGTERM while it starts, or with questions waiting: it ends cleanly, and each gets a reply."""
    sent, ready, delay_s = rng.choice((signal.SIGINT, signal.SIGTERM)), rng.random() < 0.5, rng.uniform(0, 3)
    given = f'{sent.name} {"with questions waiting" if ready else f"{delay_s:.2f} s after rclpy was imported"}'
    graph.health.clear()
    node = NodeProcess(record.folder, graph.context.get_domain_id(), warm=ready, **PARAMETERS, cameras='[front]')
    futures = []
    try:
        if ready:
            graph.wait_for_state('active')
            send_until(graph.wait, lambda: graph.publish(image(time.time_ns())),
                       lambda: int(graph.health['front'][2]['frames_processed']) > 0, 'an image to be watched')
            futures = [graph.ask_later(_LONG_QUESTION, max_tokens=200, temperature=50.0) for _ in range(_QUESTIONS)]
            graph.wait(lambda: graph.health['engine'][2].get('active_questions', '0') != '0' or futures[0].done(), 'questions')
        else:
            graph.wait(lambda: not node.alive or 'rclpy' in Path(f'/proc/{node.process.pid}/maps').read_text(), 'rclpy')
            graph.spin(delay_s)
        code, seconds = node.stop(sent, _EXIT_S)
        if code != 0:
            record.fail('unclean end', number, given, f'exit code {code} after {seconds:.1f} s\n{node.log[-800:]}')
        elif 'Traceback' in node.log:
            record.fail('traceback on a signal', number, given, node.log[-1200:])
        graph.spin(1.0)     # the node is gone; what it sent before is here
        if lost := sum(not future.done() for future in futures):
            record.fail('questions without a reply on a signal', number, given, f'{lost} of {len(futures)}')
        for future in (future for future in futures if future.done()):
            response = future.result()
            record.note('question on a signal: ' + ('answered' if response.success else f'refused: {response.error}'))
        record.note(re.sub(r' \d.*', ' while starting', f'signal: {given}'))
    except AssertionError as error:
        record.fail('lost', number, given, f'{error}\n{node.log[-800:]}')
    finally:
        node.stop(signal.SIGKILL, PATIENCE_S)
