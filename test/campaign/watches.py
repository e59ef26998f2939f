"""Standing questions about patrols, whose every change is known: what is told, how late, what is not and what is false; and what
frame steps cost with watches and without, a few steps each in turn."""
import time
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from rclpy.qos import DurabilityPolicy, QoSProfile

from campaign.record import Record
from campaign.subject import Broken, Subject
from live import SECOND, image
from statekv_ros.msg import Alert, Watches
from statekv_ros.node.messages import to_ns
from statekv_ros.patrol.questions import Question, answer_at
from statekv_ros.patrol.video import patrol_frames
from statekv_ros.patrol.world import Patrol, make_patrol
from statekv_ros.srv import Unwatch, Watch

WANTED = 20             # patrols
_STEPS, _SIDE = 32, 64
_BLOCK, _BLOCKS = 4, 6   # steps with watches or without, and how many such blocks for each patrol
_PACE_S, _SLOWEST_S = 0.25, 4.0     # for a step of one second: as long as checks take, within these
_SHARE = 0.5            # of the time: a busy machine is to come through
_LATEST = 2             # steps behind the truth
_TOLD = 0.9             # of what was to be told, where every check was done
_APART_NS = 1000 * SECOND           # between two plays


@dataclass(frozen=True)
class _Wanted:
    """A watch, and what is to be told of it: steps in which its condition comes to hold, with the answer then."""
    question: Question
    condition: str
    answer_policy: str
    events: tuple[tuple[int, str], ...]


def run(record: Record) -> None:
    """A trial is a patrol with three watches; afterwards frame steps are timed."""
    with Subject(record, cameras='[front]', device_cache_mb=0, evidence_frames=3, max_tokens=8,
                 diagnostics_period_s='0.1', watch_share=_SHARE) as subject:
        plays = _Plays(subject)
        with subject.judged(0, 'the first steps'):
            plays.time_steps(_patrol(record, -1), 2)
        record.before = subject.usage()
        totals = dict.fromkeys(('to_be_told', 'told', 'missed', 'false', 'skipped', 'checks'), 0)
        for number in record.numbers():
            patrol = _patrol(record, number)
            wanted = _wanted(patrol, np.random.default_rng([record.seed, number, 1]))
            with subject.judged(number, f'patrol {number}'):
                for name, count in plays.play(patrol, wanted).items():
                    totals[name] += count
                record.note('played')
            if plays.of is not subject.graph:
                plays = _Plays(subject)
        record.figures |= totals
        with subject.judged(0, 'frame steps with watches and without'):
            record.figures |= plays.time_steps(_patrol(record, -1), _BLOCKS * record.trials)
        if not totals['skipped'] and totals['told'] < _TOLD * totals['to_be_told']:
            record.fail_whole('too little was told', f'{totals}')
        record.slack_mb += 10.0     # for the longer memory of a patrol
        subject.conclude()


class _Plays:
    """Plays patrols into the node and listens.

    Attributes:
        of: the graph that it does so through.
    """

    def __init__(self, subject: Subject):
        self._subject, self._graph, self._number, self._sent = subject, subject.graph, 0, 0
        self.of = subject.graph
        self._alerts: list[Alert] = []
        self._lists: list[Watches] = []
        latched = QoSProfile(depth=1, durability=DurabilityPolicy.TRANSIENT_LOCAL)
        self._graph.node.create_subscription(Alert, '/statekv/alert', self._alerts.append, QoSProfile(depth=100))
        self._graph.node.create_subscription(Watches, '/statekv/watches', self._lists.append, latched)
        self._watch = self._graph.node.create_client(Watch, '/statekv/watch')
        self._unwatch = self._graph.node.create_client(Unwatch, '/statekv/unwatch')

    def play(self, patrol: Patrol, wanted: list[_Wanted]) -> dict[str, int]:
        """A patrol from a memory that is empty: what came of it."""
        self._number += 1
        begin_ns = self._number * _APART_NS
        self._forget()
        ids = self._begin(wanted)
        self._alerts.clear()
        self._graph.timings.clear()
        for time_ns, pixels in patrol_frames(patrol, self._number, _SIDE, _SIDE):
            begun = time.monotonic()
            self._show(begin_ns + time_ns, pixels)
            while time.monotonic() < begun + _SLOWEST_S / 2 and not self._is_checked(begin_ns + time_ns, len(ids)):
                self._graph.executor.spin_once(0.01)
        self._subject.wait(lambda: self._is_checked(begin_ns + _STEPS * SECOND - SECOND // 2, len(ids)),
                           'the last checks')
        self._graph.spin(_PACE_S)
        states = {state.id: state for state in self._lists[-1].watches} if ids else {}
        found = {'checks': sum(states[id].checks for id in ids), 'skipped': sum(states[id].skipped for id in ids)}
        if ids:
            self._judge_counts(states, ids)
            self._subject.call(self._unwatch, Unwatch.Request(id='all'))
        return found | _compare(ids, self._alerts, begin_ns)

    def time_steps(self, patrol: Patrol, blocks: int) -> dict[str, float]:
        """What a frame step costs with three watches and without, a block of steps each in turn, in ms; without the first of each
        block, which no check came before."""
        self._number += 1
        step_ms: dict[bool, list[float]] = {True: [], False: []}
        frames = list(patrol_frames(patrol, self._number, _SIDE, _SIDE))
        wanted = _wanted(patrol, np.random.default_rng(self._number))
        for block in range(blocks):
            if block % _BLOCKS == 0:    # what is held grows, and is no leak
                self._forget()
            if block % 2:
                self._begin(wanted)
            self._graph.timings.clear()
            for index in range(2 * _BLOCK):
                time_ns = (block * _BLOCK * SECOND) + index * SECOND // 2
                self._show(self._number * _APART_NS + time_ns, frames[(2 * _BLOCK * block + index) % len(frames)][1])
            self._subject.wait(lambda: len(self._graph.timings) >= _BLOCK, 'the steps of a block')
            step_ms[bool(block % 2)] += [timing.total_ms for timing in self._graph.timings[1:]]
            if block % 2:
                self._subject.call(self._unwatch, Unwatch.Request(id='all'))
        self._forget()
        without, with_watches = (_percentiles(step_ms[watching]) for watching in (False, True))
        return {'timed_steps': len(step_ms[True]), 'step_ms_p50_p95_without': without, 'step_ms_p50_p95_with': with_watches,
                'p95_ratio': round(with_watches[1] / without[1], 3)}

    def _forget(self) -> None:
        self._subject.call(self._graph.reset, self._graph.reset.srv_type.Request())

    def _begin(self, wanted: Iterable[_Wanted]) -> dict[str, _Wanted]:
        """Have these watched; by id."""
        ids = {}
        for entry in wanted:
            response = self._subject.call(self._watch, Watch.Request(
                question=entry.question.text, condition=entry.condition, answer_policy=entry.answer_policy))
            if not response.success:
                raise Broken('watch refused', response.error)
            ids[response.id] = entry
        return ids

    def _show(self, stamp_ns: int, pixels: np.ndarray) -> None:
        """A frame, until it is in the memory: where one takes another's place, steps are of other pairs than the patrol's."""
        self._sent += 1
        message = image(stamp_ns, _SIDE, _SIDE)
        message.data = pixels.tobytes()
        self._graph.publish(message)
        self._graph.spin(_PACE_S / 2)
        self._subject.wait(lambda: self._subject.count('front', 'frames_processed') >= self._sent, f'frame {self._sent}')

    def _is_checked(self, stamp_ns: int, watches: int) -> bool:
        """Whether all watches have answers that read this; only the second frame of a step is there to be read."""
        if not watches or stamp_ns % SECOND == 0:
            return True
        states = self._lists[-1].watches if self._lists else []
        return len(states) == watches and all(to_ns(state.stamp) >= stamp_ns for state in states)

    def _judge_counts(self, states: dict, ids: dict) -> None:
        steps = len(self._graph.timings)
        for id in ids:
            state = states[id]
            if state.failed or not steps - 1 <= state.checks + state.skipped <= steps + 1:
                raise Broken('checks do not add up', f'{steps} frame steps, {state}')
            if state.alerts != sum(alert.id == id for alert in self._alerts):
                raise Broken('lost', f'{state.alerts} alerts, of which not all came: {state}')


def _patrol(record: Record, number: int) -> Patrol:
    return make_patrol(_STEPS, np.random.default_rng([record.seed, number + 1]))


def _wanted(patrol: Patrol, random: np.random.Generator) -> list[_Wanted]:
    """What is in view, which room it is in, and whether a thing was seen that comes later."""
    things = sorted({sight.thing for sight in patrol.objects(_STEPS - 1)})
    thing = things[int(random.integers(len(things)))] if things else (0, 0)
    return [_of(patrol, Question('now'), 'changes', 'last(4)'), _of(patrol, Question('here'), 'changes', 'state'),
            _of(patrol, Question('exist', thing), 'equals yes', 'sparse(8192)')]


def _of(patrol: Patrol, question: Question, condition: str, policy: str) -> _Wanted:
    truth = [answer_at(patrol, question, step) for step in range(_STEPS)]
    if condition == 'changes':
        events = [(step, truth[step]) for step in range(1, _STEPS) if truth[step] != truth[step - 1]]
    else:
        events = [(truth.index('yes'), 'yes')] if 'yes' in truth else []
    return _Wanted(question, condition, policy, tuple(events))


def _percentiles(step_ms: list[float]) -> tuple[float, float]:
    return tuple(round(float(np.percentile(step_ms, p)), 2) for p in (50, 95))


def _compare(ids: dict[str, _Wanted], alerts: list[Alert], begin_ns: int) -> dict[str, int]:
    """What was to be told, what was within two steps, what was not, and what was told that is not so."""
    to_be_told = told = false = 0
    for id, wanted in ids.items():
        left = list(wanted.events)
        to_be_told += len(left)
        for alert in alerts:
            if alert.id != id:
                continue
            step = (to_ns(alert.since) - begin_ns) // SECOND
            match = next((event for event in left if event[1] == alert.text and event[0] <= step <= event[0] + _LATEST), None)
            if match is None:
                false += 1
            else:
                left.remove(match)
                told += 1
    return {'to_be_told': to_be_told, 'told': told, 'missed': to_be_told - told, 'false': false}
