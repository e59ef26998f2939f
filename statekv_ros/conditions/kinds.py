"""What answers may be held to: one function and one line in a table for each kind."""
import math
import re
from collections.abc import Callable
from dataclasses import dataclass

from statekv_ros.conditions.pattern import Pattern
from statekv_ros.errors import Code, QuestionError, quoted

MOST_CHARS = 300        # of a condition
_NUMBER = re.compile(r'[-+]?(?:\d{1,30}(?:\.\d{1,30})?|\.\d{1,30})')
_NUMBER_CHARS = 1000    # of an answer in which one is looked for

# Whether an answer meets the condition, given the newest answer that counted before, '' where there was none.
Holds = Callable[[str, str], bool]


@dataclass(frozen=True)
class Condition:
    """A condition that can be used.

    Attributes:
        text: as it was given.
        holds: `holds(before, now)`, of two answers.
        of_change: whether it is about two answers; then the one that held before stays until the new one has held long enough.
    """
    text: str
    holds: Holds
    of_change: bool = False


def plain(answer: str) -> str:
    """An answer as it is compared: without case, a full stop at the end, and spaces around or in a row."""
    return ' '.join(answer.casefold().split()).rstrip('.').rstrip()


def number_in(answer: str) -> float | None:
    """The first number in an answer ('there are 3' is 3); None where there is none."""
    found = _NUMBER.search(answer[:_NUMBER_CHARS])
    return None if found is None else float(found[0])


def changes(_: str) -> Holds:
    """The answer is another one than before; the first one is no change."""
    return lambda before, now: bool(before) and plain(before) != plain(now)


def equals(argument: str) -> Holds:
    """The answer is this text."""
    wanted = plain(_required(argument, 'equals', 'a text, as in "equals yes"'))
    return lambda before, now: plain(now) == wanted


def matches(argument: str) -> Holds:
    """The pattern is found in the answer."""
    pattern = Pattern(_required(argument, 'matches', 'a pattern, as in "matches red|blue"'))
    return lambda before, now: pattern.search(now)


def rises_above(argument: str) -> Holds:
    """The number in the answer is greater."""
    limit = _number(argument, 'rises above')
    return lambda before, now: (number := number_in(now)) is not None and number > limit


def falls_below(argument: str) -> Holds:
    """The number in the answer is less."""
    limit = _number(argument, 'falls below')
    return lambda before, now: (number := number_in(now)) is not None and number < limit


KINDS: dict[str, Callable[[str], Holds]] = {
    'changes': changes, 'equals': equals, 'matches': matches, 'rises above': rises_above, 'falls below': falls_below}
_KIND = re.compile(rf'\s*({"|".join(KINDS)})(?:\s+(.*?))?\s*'.replace(' ', r'\s+'), re.IGNORECASE | re.DOTALL)
_EXAMPLES = '"changes", "equals TEXT", "matches REGEX", "rises above NUMBER" or "falls below NUMBER"'


def parse_condition(text: str) -> Condition:
    """Read a condition: one of `KINDS`, and what it needs behind a space.

    Raises:
        QuestionError: it cannot be read; with the code INVALID_CONDITION, and what is possible.
    """
    if len(text) > MOST_CHARS:
        raise QuestionError(f'condition has {len(text)} characters, {MOST_CHARS} are allowed: shorten it', Code.INVALID_CONDITION)
    found = _KIND.fullmatch(text)
    kind = ' '.join(found[1].casefold().split()) if found else ''
    if found and bool(found[2]) <= (kind != 'changes'):     # which needs nothing more
        return Condition(text.strip(), KINDS[kind](found[2] or ''), kind == 'changes')
    raise QuestionError(f'condition must be {_EXAMPLES}, got {quoted(text)}', Code.INVALID_CONDITION)


def _required(argument: str, kind: str, expected: str) -> str:
    if not argument:
        raise QuestionError(f'condition "{kind}" needs {expected}', Code.INVALID_CONDITION)
    return argument


def _number(argument: str, kind: str) -> float:
    try:
        number = float(argument)
    except ValueError:
        number = math.nan
    if not math.isfinite(number):
        raise QuestionError(f'condition "{kind}" needs a finite number, as in "{kind} 3", got {argument!r}',
                            Code.INVALID_CONDITION)
    return number
