"""A standing question: what is asked and how often, when it is due, and what its answers have come to."""
import math
import time
from dataclasses import dataclass, field

from statekv_ros.conditions import Condition, parse_condition, plain
from statekv_ros.errors import Code, QuestionError, quoted
from statekv_ros.memory import AnswerResult, parse_answer_policy

MOST_TOKENS = 1024      # of an answer
MOST_STEPS = 10**9
MOST_DEBOUNCE = 1000
MOST_SECONDS = 10.0**9


@dataclass(frozen=True)
class Definition:
    """What somebody wants to be told.

    Attributes:
        condition: as `parse_condition` reads it.
        every_steps: frame steps of the camera between two checks; 0: `every_s`, seconds of header time, counts.
        debounce: checks in a row in which the condition must hold, and must not before it can hold anew.
        expires_s: seconds from its making until it ends by itself; 0: never.
    """
    question: str
    camera: str
    condition: str
    every_steps: int
    every_s: float
    debounce: int
    expires_s: float
    max_tokens: int
    answer_policy: str

    def __post_init__(self):
        """
        Raises:
            QuestionError: a value that cannot work; says which, and what was expected.
            PolicyError: unknown answer policy.
        """
        if not self.question.strip():
            raise QuestionError('question is empty: ask something')
        for name, value, most in (('every_s', self.every_s, MOST_SECONDS), ('expires_s', self.expires_s, MOST_SECONDS),
                                  ('every_steps', self.every_steps, MOST_STEPS), ('debounce', self.debounce, MOST_DEBOUNCE),
                                  ('max_tokens', self.max_tokens, MOST_TOKENS)):
            least = name in ('debounce', 'max_tokens')
            if not least <= value <= most:      # NaN is neither
                raise QuestionError(f'{name} must be a number from {least:g} to {most:g}, got {value}')
        if bool(self.every_steps) == bool(self.every_s):
            raise QuestionError(f'either every_steps or every_s must be 0, got {self.every_steps} steps and {self.every_s} s')
        parse_answer_policy(self.answer_policy)
        parse_condition(self.condition)

    @property
    def asks(self) -> tuple[str, str, int, str]:
        """What watches that share a check have in common."""
        return self.camera, self.question, self.max_tokens, self.answer_policy


@dataclass(frozen=True)
class Alert:
    """A condition has come to hold.

    Attributes:
        before: for a change the answer that held until then, else the newest one that did not meet the condition; '' where there
            was none.
        since_ns: newest header stamp of the first check in the row in which it held.
    """
    id: str
    definition: Definition
    before: str
    since_ns: int
    result: AnswerResult


@dataclass(eq=False)
class Watch:
    """A definition on its way.

    Attributes:
        id: a number for those that were asked for, a name for those of the configuration.
        ends_at: of the machine's clock (`time.time`); infinite: never.
        text, stamp_ns: newest answer, and the newest header stamp that it read.
        reference: the answer that counts as the one before; '' before the first.
        holding: the condition holds, and this was told.
        checks, skipped, failed, alerts: counts; see msg/WatchState.msg.
        due: when it became due, in the order of all that become due; None: it is not.
        checked: when its newest check began, in the order of all checks.
        behind: something was skipped for the newest check.
        error: why it is not checked, or why the newest check failed.
    """
    id: str
    definition: Definition
    configured: bool = False
    ends_at: float = math.inf
    text: str = ''
    stamp_ns: int = 0
    reference: str = ''
    holding: bool = False
    checks: int = 0
    skipped: int = 0
    failed: int = 0
    alerts: int = 0
    due: int | None = None
    checked: int = -1
    behind: bool = False
    error: str = ''
    _condition: Condition = field(init=False)
    _steps_left: int = 1
    _due_ns: int | None = None
    _step_ns: int = 0
    _skipped_now: bool = False
    _row: int = 0       # checks in a row that say otherwise than what counts
    _row_text: str = ''
    _since_ns: int = 0

    def __post_init__(self):
        self._condition = parse_condition(self.definition.condition)

    def renew(self) -> None:
        """It expires as late as one made now."""
        self.ends_at = time.time() + self.definition.expires_s if self.definition.expires_s else math.inf

    def note_step(self, stamp_ns: int, moment: int) -> None:
        """A frame step of its camera is in the memory. moment: counts all steps, of all cameras."""
        if self.definition.every_steps:
            self._steps_left -= 1
            is_due = self._steps_left <= 0
            if is_due:
                self._steps_left = self.definition.every_steps
        else:       # stamps that went back begin anew
            is_due = self._due_ns is None or stamp_ns >= self._due_ns or stamp_ns < self._step_ns
            if is_due:
                self._due_ns = stamp_ns + int(self.definition.every_s * 1e9)
        self._step_ns = stamp_ns
        if is_due and self.due is None:
            self.due = moment
        elif is_due:
            self.skipped += 1
            self._skipped_now = self.behind = True

    def begin_check(self) -> None:
        """It is being checked: what becomes due meanwhile is due anew."""
        self.due, self.behind, self._skipped_now = None, self._skipped_now, False

    def holds(self, text: str) -> bool:
        """Whether this answer meets the condition."""
        return self._condition.holds(self.reference, text)

    def take(self, result: AnswerResult, holds: bool) -> tuple[Alert | None, bool]:
        """A check's answer, and what `holds` said of it: an alert, or None; and whether what counts has changed."""
        text, stamp_ns = result.text, result.last_stamp_ns
        self.text, self.stamp_ns, self.error = text, stamp_ns, ''
        self.checks += 1
        before = self.reference
        if holds == self.holding:
            self._row = 0
        elif self._row and not (self._condition.of_change and plain(text) != plain(self._row_text)):
            self._row += 1
        else:
            self._row, self._row_text, self._since_ns = 1, text, stamp_ns
        turned = self._row >= self.definition.debounce
        if turned:
            self._row, self.holding = 0, holds and not self._condition.of_change
            self.alerts += holds
        # A change is from what counted until then, all else from the newest answer that did not meet the condition.
        if self._condition.of_change and (turned or not before) or not self._condition.of_change and not holds:
            self.reference = text
        alert = Alert(self.id, self.definition, before, self._since_ns, result) if turned and holds else None
        return alert, turned or plain(before) != plain(self.reference)

    def fail(self, reason: str) -> None:
        """A check ended without an answer."""
        self.failed += 1
        self.error = reason

    def forget_answers(self) -> None:
        """As if it were new: what its camera saw is forgotten."""
        self.text = self.reference = ''
        self.stamp_ns, self.holding, self.due, self._row, self._due_ns, self._steps_left = 0, False, None, 0, None, 1


def define(cameras: list[str], default_policy: str, default_tokens: int, *, question: str, camera: str, condition: str,
           every_steps: int, every_s: float, debounce: int, expires_s: float, max_tokens: int, answer_policy: str) -> Definition:
    """A definition with what stands for its zeros and empty texts filled in.

    Raises:
        QuestionError, PolicyError: a value that cannot work, or a camera that there is not.
    """
    if camera == '' and len(cameras) == 1:
        camera, = cameras
    if camera not in cameras:
        raise QuestionError(f'unknown camera {quoted(camera)}: a watch is of one camera, {" or ".join(cameras)}', Code.UNKNOWN_CAMERA)
    return Definition(question.strip(), camera, condition.strip(), every_steps or (0 if every_s else 1), every_s, debounce or 1,
                      expires_s, max_tokens or min(default_tokens, MOST_TOKENS), answer_policy or default_policy)
