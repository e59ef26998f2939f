"""What a class of the campaign did: trials, kinds of outcome, failures with their reproduction, resources."""
import random
import re
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path

from campaign.resources import Usage
from campaign.samples import Samples

MOST_FAILURES = 100     # a class that fails this often has said what it had to say
_MOST_OUTCOMES = 200     # kinds that are told one by one
_DETAIL_CHARS = 4000    # room for where every thread of a hung node stands
_RAW_ERROR = re.compile(r'^[A-Za-z_.]*(Error|Exception|Interrupt)\b')


@dataclass(frozen=True)
class Failure:
    """One broken promise, and how to see it again.

    Attributes:
        kind: a few words, the same for the same kind of failure.
        trials: first and last trial that may have caused it.
        given: the input of the trial, described.
        detail: what happened instead.
        command: runs those trials again.
    """
    kind: str
    trials: tuple[int, int]
    given: str
    detail: str
    command: str


@dataclass
class Record:
    """The books of one class; `run(record)` of its module fills them.

    Attributes:
        wanted: trials to run; fewer when `seconds` are over or too much fails.
        only: these trials alone, from an earlier run's reproduction.
        folder: for logs and files of the trials.
        slack_mb: how much resident memory may grow.
        samples: minute by minute, of a class that lasts.
    """
    name: str
    seed: int
    wanted: int
    seconds: float
    folder: Path
    only: range | None = None
    slack_mb: float = 5.0
    trials: int = 0
    outcomes: Counter = field(default_factory=Counter)
    failures: list[Failure] = field(default_factory=list)
    figures: dict = field(default_factory=dict)
    samples: Samples | None = None
    before: Usage | None = None
    after: Usage | None = None
    begun: float = field(default_factory=time.monotonic)
    ended: float | None = None

    @property
    def left_s(self) -> float:
        """Seconds of the time limit that are left."""
        return self.begun + self.seconds - time.monotonic()

    @property
    def passed(self) -> bool:
        """Nothing failed, and something was tried."""
        return self.trials > 0 and not self.failures

    def numbers(self) -> Iterator[int]:
        """The trials' numbers, until all are done, the time is over or too much has failed."""
        for number in self.only if self.only is not None else range(self.wanted):
            if self.left_s <= 0 or len(self.failures) >= MOST_FAILURES:
                return
            yield number
            self.trials += 1

    def random(self, number: int | str) -> random.Random:
        """The random numbers of one trial: the same whatever was tried before it."""
        return random.Random(f'{self.name} {self.seed} {number}')

    def note(self, outcome: str) -> None:
        """Count an outcome that is as promised; figures and folders in its text do not make it another kind."""
        self.outcomes[re.sub(r'-?\d[\d.e+-]*', 'N', outcome.replace(f'{self.folder}/', ''))[:100]] += 1

    def note_refusal(self, sentence: str, number: int, given: str) -> None:
        """Count a refusal; an empty one, or an exception's bare text, breaks the promise of a sentence."""
        if not sentence.strip():
            self.fail('refused without a reason', number, given, 'the error text is empty')
        elif _RAW_ERROR.match(sentence):
            self.fail('raw error', number, given, sentence)
        else:
            self.note(f'refused: {sentence}')

    def fail(self, kind: str, trials: int | tuple[int, int], given: str, detail: str) -> None:
        """Write down a broken promise."""
        first, last = trials if isinstance(trials, tuple) else (trials, trials)
        span = f'{first}' if first == last else f'{first}-{last}'
        self.failures.append(Failure(kind, (first, last), given[:600], detail.strip()[-_DETAIL_CHARS:],
                                     f'python test/campaign {self.name} --seed {self.seed} --only {span}'))

    def fail_whole(self, kind: str, detail: str) -> None:
        """Write down a broken promise that no single trial stands for."""
        self.failures.append(Failure(kind, (0, max(0, self.trials - 1)), 'all trials together', detail.strip()[-_DETAIL_CHARS:],
                                     f'python test/campaign {self.name} --seed {self.seed} --trials {self.trials}'))

    def judge_resources(self) -> None:
        """Threads and files as before, resident memory within the slack."""
        if self.before is None or self.after is None:
            return
        for what in ('threads', 'fds'):
            then, now = getattr(self.before, what), getattr(self.after, what)
            if now > then:
                self.fail_whole(f'{what} leak', f'{then} before, {now} after {self.trials} trials')
        if (grown := self.after.rss_mb - self.before.rss_mb) > self.slack_mb:
            self.fail_whole('memory leak', f'{self.before.rss_mb} MB before, {self.after.rss_mb} MB after {self.trials} '
                            f'trials: {grown:.1f} MB more, {self.slack_mb:g} are allowed')

    def as_dict(self) -> dict:
        """For JSON."""
        return {'class': self.name, 'passed': self.passed, 'trials': self.trials,
                'wanted': len(self.only) if self.only is not None else self.wanted, 'seed': self.seed,
                'seconds': round((self.ended or time.monotonic()) - self.begun, 1),
                'outcomes': self._most_common(), 'kinds_of_failure': dict(Counter(f.kind for f in self.failures)),
                'failures': [asdict(failure) for failure in self.failures], 'figures': self.figures,
                'samples': self.samples.rows if self.samples else [],
                'before': self.before and asdict(self.before), 'after': self.after and asdict(self.after)}

    def _most_common(self) -> dict[str, int]:
        """Kinds of outcome with their counts; what is left of very many as one."""
        told = dict(self.outcomes.most_common(_MOST_OUTCOMES))
        left = self.outcomes.total() - sum(told.values())
        return told | ({f'{len(self.outcomes) - len(told)} other kinds': left} if left else {})
