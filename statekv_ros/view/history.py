"""Questions and answers, those of this page's browsers and of all others that the node answered."""
import threading
from collections import deque
from dataclasses import dataclass

from statekv_ros.client import Asking, Reply, Result
from statekv_ros.msg import Answer
from statekv_ros.view.facts import Looked, looked_at, printable, to_ns

MOST = 10_000       # the oldest goes

_ENDINGS = {Result.SUCCEEDED: 'answered', Result.CANCELED: 'canceled', Result.TIMEOUT: 'out of time'}


@dataclass(eq=False)
class Record:
    """A question and what came of it so far.

    Attributes:
        state: 'waiting', 'answering', 'answered', 'canceled', 'out of time' or 'failed'.
        error: a sentence where it was not answered.
        looked: the frame steps that the answer looked at, greatest share first.
        own: whether this page asked it.
    """
    number: int
    question: str
    camera: str
    state: str = 'waiting'
    text: str = ''
    error: str = ''
    note: str = ''
    looked: tuple[Looked, ...] = ()
    own: bool = True
    asking: Asking | None = None

    @property
    def over(self) -> bool:
        return self.state not in ('waiting', 'answering')


class History:
    """Newest first; at most `MOST`. From any thread.

    Attributes:
        version: another number after each change.
    """

    def __init__(self):
        self.version = 0
        self._records: deque[Record] = deque(maxlen=MOST)
        self._number = 0
        self._known: deque[tuple] = deque(maxlen=200)   # answers that came, to tell those that come twice
        self._asked: list[Record] = []      # by this page, and not over
        self._unclear: deque[Answer] = deque(maxlen=100)     # heard meanwhile: theirs, or others'
        self._lock = threading.RLock()

    def __len__(self) -> int:
        return len(self._records)

    def page(self, number: int, size: int) -> list[Record]:
        """The records of one page, from 0, the newest first."""
        with self._lock:
            end = len(self._records) - number * size
            return [self._records[index] for index in range(end - 1, max(-1, end - size - 1), -1)]

    def newest(self) -> Record | None:
        with self._lock:
            return self._records[-1] if self._records else None

    def begin(self, question: str, camera: str) -> Record:
        """A question that this page asks."""
        with self._lock:
            self._asked.append(record := Record(0, printable(question), camera))
            return self._add(record)

    def grow(self, record: Record, text: str) -> None:
        """More of its answer is there."""
        with self._lock:
            if not record.over:
                record.state, record.text = 'answering', printable(text)
                self.version += 1

    def end(self, record: Record, reply: Reply) -> None:
        """It is over."""
        with self._lock:
            self._known.extend(map(_key, (reply.answer, *reply.answers)))
            record.state, record.error, record.asking = _ENDINGS.get(reply.result, 'failed'), printable(reply.error), None
            self._fill(record, reply.answer)
            self.version += 1
            self._asked.remove(record)
            unclear = list(self._unclear)
            self._unclear.clear()
            for answer in unclear:
                self.hear(answer)

    def hear(self, answer: Answer) -> None:
        """An answer on ~/answer: of somebody else's question, unless the page knows it. Where the page asks the same and waits, its
        own reply will tell."""
        with self._lock:
            key, question = _key(answer), printable(answer.question)
            if key in self._known:
                return
            if any(record.question.strip() == question.strip() for record in self._asked):
                self._unclear.append(answer)
                return
            self._known.append(key)
            record = Record(0, question, answer.camera, 'answered', own=False)
            self._fill(record, answer)
            self._add(record)

    def _fill(self, record: Record, answer: Answer) -> None:
        record.text, record.looked = printable(answer.text) or record.text, looked_at(answer.evidence)
        if answer.frames_covered:
            words = [f'{answer.timing.total_ms:.0f} ms', f'{answer.frames_covered} frames', printable(answer.answer_policy, 40)]
            record.note = ' · '.join(words + ['demonstration model'] * answer.demonstration_model)

    def _add(self, record: Record) -> Record:
        with self._lock:
            self._number += 1
            record.number = self._number
            self._records.append(record)
            self.version += 1
            return record


def _key(answer: Answer) -> tuple:
    return answer.camera, answer.question, to_ns(answer.header.stamp), answer.text
