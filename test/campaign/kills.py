"""Callers, subscribers and cameras, killed with SIGKILL at any moment, while the node goes on watching and answering."""
import os
import random
import signal
import time
from dataclasses import replace
from pathlib import Path

from campaign.peers import KINDS, Nursery
from campaign.record import Record
from campaign.resources import remove_ownerless, segments
from campaign.subject import REPLY_S, Broken, Subject
from live import Graph, image

WANTED = 300
_ALIVE = 6              # peers at once
_LONGEST_S = 0.5        # between two kills
_IMAGE_S = 0.033
_FIRST_KILLS = 120       # before memory is measured: half a minute of them, and a lease is 20 s
_WARM_UP_S = 15.0
_CLEAR_EVERY = 50
_SILENCE_S = 30.0       # of /diagnostics, that means a frozen node


def run(record: Record) -> None:
    """All trials against one node; a trial kills one peer."""
    with Subject(record, cameras='[front]', reliability='best_effort', max_queued_questions=64) as subject:
        with subject.judged(0, 'images and questions without any other peer'):
            witness = _Witness(record, subject)
            witness.go_on(2.0)
            calm = subject.usage()
        crowd = _Crowd(record, subject.graph)
        with subject.judged(0, 'peers that nobody kills'):      # their larger images and many questions are no leak
            witness.go_on(min(_WARM_UP_S, record.wanted / 4))
        # Fast DDS holds what it knew of a dead peer until its lease ends, and keeps the room for it: as many as die in a lease.
        with subject.judged(0, 'the first peers killed'):
            for number in range(min(_FIRST_KILLS, record.wanted // 4)):
                witness.go_on(_LONGEST_S / 2)
                crowd.kill_one(record.random(f'first {number}'))
            record.before = replace(calm, rss_mb=subject.usage().rss_mb)
        try:
            for number in record.numbers():
                with subject.judged(number, crowd.newest):
                    witness.go_on(record.random(number).uniform(0.05, _LONGEST_S))
                if witness.of is not subject.graph:
                    crowd.close()
                    witness, crowd = _Witness(record, subject), _Crowd(record, subject.graph)
                crowd.kill_one(record.random(number))
                if number % _CLEAR_EVERY == _CLEAR_EVERY - 1:
                    crowd.clear()
        finally:
            crowd.close()
        with subject.judged(max(0, record.trials - 1), 'images and questions after all kills'):
            witness.go_on(4.0)
            witness.finish()
        subject.conclude()


class _Crowd:
    """Peers that live until they are killed; for each one killed another is born."""

    def __init__(self, record: Record, graph: Graph):
        self._record, self.newest = record, 'no peer killed so far'
        self._nursery = Nursery(graph.context.get_domain_id())
        self._left: set[Path] = set()
        rng = record.random('crowd')
        self._peers = [self._born(rng) for _ in range(_ALIVE)]

    def kill_one(self, rng: random.Random) -> None:
        """Any of them, whatever it is doing."""
        kind, pid = self._peers.pop(rng.randrange(len(self._peers)))
        self._kill(pid)
        self.newest = f'a {kind} killed'
        self._record.note(self.newest)
        self._peers.append(self._born(rng))

    def clear(self) -> None:
        """Remove what the killed left in shared memory: the machine's memory is not the campaign's to fill."""
        freed = remove_ownerless({file for file in self._left if file.exists()}) / 2**20
        before = self._record.figures.get('left_in_shared_memory_mb', 0)
        self._record.figures['left_in_shared_memory_mb'] = round(before + freed, 1)

    def close(self) -> None:
        """Kill all."""
        for _, pid in self._peers:
            self._kill(pid)
        self._nursery.close()
        self.clear()

    def _born(self, rng: random.Random) -> tuple[str, int]:
        kind = rng.choice(KINDS)
        return kind, self._nursery.spawn(kind)

    def _kill(self, pid: int) -> None:
        self._left |= segments(pid)
        os.kill(pid, signal.SIGKILL)


class _Witness:
    """Publishes images and asks one question after the other: each must be answered, and /diagnostics must not fall silent."""

    def __init__(self, record: Record, subject: Subject):
        self._record, self._subject, self.of = record, subject, subject.graph
        self._asked = None
        self._asked_at = self._sent_at = 0.0

    def go_on(self, seconds: float) -> None:
        """For so long."""
        graph, end, seen, seen_at = self.of, time.monotonic() + seconds, self.of.health_count, time.monotonic()
        while (now := time.monotonic()) < end:
            if now - self._sent_at >= _IMAGE_S:
                self._sent_at = now
                graph.publish(image(time.time_ns()))
            if self._asked is None:
                self._ask()
            elif self._asked.done():
                self._settle()
            elif now - self._asked_at > REPLY_S:
                self._asked = None
                raise Broken('lost', f'no reply in {REPLY_S:g} s')
            graph.executor.spin_once(0.01)
            if graph.health_count > seen:
                seen, seen_at = graph.health_count, now
            gap = self._record.figures.get('longest_silence_ms', 0)
            self._record.figures['longest_silence_ms'] = max(gap, round((now - seen_at) * 1e3))
            if not self._subject.node.alive:
                raise Broken('death', f'the node ended with exit code {self._subject.node.process.returncode}')
            if now - seen_at > _SILENCE_S:
                raise Broken('hang', f'no /diagnostics in {_SILENCE_S:g} s')

    def finish(self) -> None:
        """Wait for the last answer."""
        if self._asked is not None:
            self._subject.wait(self._asked.done, 'the last answer')
            self._settle()

    def _ask(self) -> None:
        self._asked, self._asked_at = self.of.ask_later('what is in view?'), time.monotonic()

    def _settle(self) -> None:
        response, self._asked = self._asked.result(), None
        self._record.note('question answered' if response.success else f'refused: {response.error}')
        slowest = self._record.figures.get('slowest_answer_ms', 0)
        self._record.figures['slowest_answer_ms'] = max(slowest, round((time.monotonic() - self._asked_at) * 1e3))
