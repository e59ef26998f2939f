"""32 goals of ~/ask at once, a third canceled, a third whose clients are killed, at any moment: the others get their answers."""
import os
import random
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from itertools import count
from pathlib import Path

from action_msgs.msg import GoalStatus

from campaign.peers import ASKING, PLANNER_S, Nursery
from campaign.record import Record
from campaign.resources import remove_ownerless, segments
from campaign.subject import REPLY_S, Broken, Subject
from live import Goal, image
from statekv_ros.errors import Code

WANTED = 12             # rounds
_LIVE, _CANCELED, _KILLED = 11, 10, 11      # goals of a round
_LONG = {'max_tokens': 5000, 'temperature': 50.0, 'timeout_s': REPLY_S / 2}
_LATEST_S = 2.5         # a goal is canceled, a client killed by then
_IMAGE_S = 0.1
_FIRST = 6              # rounds before memory is measured: Fast DDS keeps room for the peers that die in a lease of 20 s
_ROUND_MB = 5.0         # of that room that a round takes at first
_ENDED = {GoalStatus.STATUS_SUCCEEDED: Code.NONE, GoalStatus.STATUS_CANCELED: Code.CANCELED}


@dataclass
class _Sent:
    """A goal of this process. cancel_at: when it is to be canceled, of `time.monotonic`; 0: never."""
    goal: Goal
    cancel_at: float = 0.0
    canceled_at: float = 0.0
    since: float = field(default_factory=time.monotonic)


@dataclass
class _Planner:
    """A client to be killed so long after it has heard of its answer, or after half a minute."""
    after_s: float
    born: float = field(default_factory=time.monotonic)
    heard_at: float = 0.0

    def is_due(self, pid: int, now: float) -> bool:
        if not self.heard_at and Path(f'/proc/{pid}/comm').read_text().strip() == ASKING:
            self.heard_at = now
        return now > self.heard_at + self.after_s if self.heard_at else now > self.born + REPLY_S / 2


def run(record: Record) -> None:
    """All rounds against one node, which goes on watching."""
    with Subject(record, cameras='[front]', max_queued_questions=64) as subject:
        rounds = _Rounds(record, subject)
        try:
            with subject.judged(0, 'a goal alone, and the first rounds'):
                rounds.watch(1.0)
                rounds.settle([_Sent(subject.graph.goal('what is in view?'))])
                calm = subject.usage()
                for number in range(min(_FIRST, 1 + record.wanted // 3)):
                    if record.left_s > record.seconds / 2:
                        rounds.one(record.random(f'first {number}'))
                    else:
                        record.slack_mb += _ROUND_MB
                record.before = replace(calm, rss_mb=subject.usage().rss_mb)
            record.outcomes.clear()
            rounds.cancel_ms.clear()
            for number in record.numbers():
                with subject.judged(number, 'a round of 32 goals'):
                    rounds.one(record.random(number))
                if rounds.of is not subject.graph:
                    rounds.close()
                    rounds = _Rounds(record, subject)
        finally:
            rounds.close()
        if rounds.cancel_ms:
            ordered = sorted(rounds.cancel_ms)
            record.figures |= {'cancel_ms_p50': round(ordered[len(ordered) // 2]), 'cancel_ms_max': round(ordered[-1])}
        subject.conclude()


class _Rounds:
    """Goals of this process, and planners that are killed.

    Attributes:
        cancel_ms: from each request to cancel to the result.
    """

    def __init__(self, record: Record, subject: Subject):
        self._record, self._subject, self.of = record, subject, subject.graph
        self._nursery = Nursery(self.of.context.get_domain_id())
        self._stamps, self._sent_at = count(1), 0.0
        self._planners: dict[int, _Planner] = {}    # by pid
        self._left: set[Path] = set()
        self.cancel_ms: list[float] = []

    def one(self, rng: random.Random) -> None:
        """A round; afterwards the node answers nobody, within the time limit of the dead clients' goals."""
        kinds = ['live'] * _LIVE + ['canceled'] * _CANCELED + ['killed'] * _KILLED
        rng.shuffle(kinds)
        sent = []
        for kind in kinds:
            moment = time.monotonic() + rng.uniform(0, _LATEST_S)
            if kind == 'killed':
                self._planners[self._nursery.spawn('planner')] = _Planner(rng.uniform(0, _LATEST_S))
            elif kind == 'canceled':
                sent.append(_Sent(self.of.goal('what is in view?', **_LONG), moment))
            else:
                sent.append(_Sent(self.of.goal('what is in view?', max_tokens=rng.choice((1, 8, 40)), timeout_s=REPLY_S / 2)))
            self.of.executor.spin_once(0)
        self.settle(sent)
        self._go_on(lambda: not self._planners, 'clients to be killed')
        self._clear()
        ended = time.monotonic()
        self._go_on(lambda: self._subject.engine[2].get('active_questions') == '0', 'the goals of dead clients to end')
        lasted = round(time.monotonic() - ended, 1)
        self._record.figures['dead_goals_s_max'] = max(lasted, self._record.figures.get('dead_goals_s_max', 0))
        if lasted > 2 * PLANNER_S:
            raise Broken('goal of a dead client goes on', f'for {lasted} s; their time limit is {PLANNER_S:g} s')

    def settle(self, sent: list[_Sent]) -> None:
        """Cancel what is to be canceled, until each has its result."""
        waiting = list(sent)
        while waiting:
            self._go_on(lambda: any(entry.goal.done or self._is_due(entry) for entry in waiting), 'a result')
            for entry in filter(self._is_due, waiting):
                entry.goal.handle.cancel_goal_async()
                entry.canceled_at = time.monotonic()
            for entry in [entry for entry in waiting if entry.goal.done]:
                waiting.remove(entry)
                self._judge(entry)

    def watch(self, seconds: float) -> None:
        """Only images, for so long."""
        end = time.monotonic() + seconds
        self._go_on(lambda: time.monotonic() > end, 'time to pass')

    def close(self) -> None:
        """Kill all."""
        for pid in self._planners:
            self._kill(pid)
        self._planners.clear()
        self._nursery.close()
        self._clear()

    @staticmethod
    def _is_due(entry: _Sent) -> bool:
        return bool(entry.cancel_at and not entry.canceled_at and entry.goal.handle and time.monotonic() > entry.cancel_at)

    def _judge(self, entry: _Sent) -> None:
        if entry.goal.rejected:
            raise Broken('goal rejected', 'the node took no more')
        response = entry.goal.result.result()
        status, result = response.status, response.result
        succeeded = status == GoalStatus.STATUS_SUCCEEDED
        if status not in _ENDED or result.error_code != _ENDED[status] or result.success != succeeded:
            raise Broken('goal not as promised', f'status {status}, code {result.error_code}: {result.error_msg}')
        if status == GoalStatus.STATUS_CANCELED:
            if not entry.canceled_at:
                raise Broken('canceled by nobody', result.error_msg)
            self.cancel_ms.append((time.monotonic() - entry.canceled_at) * 1e3)
        self._record.note('answered' if succeeded else 'canceled')

    def _go_on(self, until: Callable[[], bool], what: str) -> None:
        """Until it is so, with images and kills."""
        def so() -> bool:
            now = time.monotonic()
            if now - self._sent_at >= _IMAGE_S:
                self._sent_at = now
                self.of.publish(image(next(self._stamps) * 10**8))
            for pid in [pid for pid, planner in self._planners.items() if planner.is_due(pid, now)]:
                self._record.note('client killed in mid-goal' if self._planners.pop(pid).heard_at else 'client killed before')
                self._kill(pid)
            return until()
        self._subject.wait(so, what)

    def _kill(self, pid: int) -> None:
        self._left |= segments(pid)
        os.kill(pid, signal.SIGKILL)

    def _clear(self) -> None:
        """Remove what the killed left in shared memory."""
        remove_ownerless(self._left)
        self._left.clear()
