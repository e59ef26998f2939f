"""Regular expressions with a limit on their time: Python's own may take years over a few dozen characters, and hold up every
thread meanwhile."""
import math
import re

import regex

from statekv_ros.errors import Code, QuestionError

MOST_CHARS = 200        # of a pattern
TEXT_CHARS = 256        # of a text; what stands behind is not looked at
_TIMEOUT_S = 0.05
# The library writes a repeat out, and one within another as often: of all of a pattern's, multiplied.
_MOST_REPEATS = 1000
_REPEAT = re.compile(r'\{(\d*),?(\d*)\}')


class Pattern:
    """`search(text)`: whether the pattern is found anywhere in the text, whatever the case of letters."""

    def __init__(self, text: str):
        """
        Raises:
            QuestionError: it is no pattern, or too long a one.
        """
        if len(text) > MOST_CHARS:
            raise _refusal(text, f'it has {len(text)} characters, {MOST_CHARS} are allowed')
        repeats = math.prod(max(int(number or 1) for number in found.groups()) or 1 for found in _REPEAT.finditer(text))
        if repeats > _MOST_REPEATS:
            raise _refusal(text, f'its repeats in braces make {repeats} together, {_MOST_REPEATS} are allowed')
        self._text = text
        try:
            self._pattern = regex.compile(text, regex.IGNORECASE | regex.DOTALL)
        except (regex.error, OverflowError, RecursionError) as error:
            raise _refusal(text, str(error) or type(error).__name__) from error

    def search(self, text: str) -> bool:
        """Whether it is found in the first `TEXT_CHARS` characters.

        Raises:
            QuestionError: it takes longer than 50 ms to say.
        """
        try:
            return self._pattern.search(text[:TEXT_CHARS], timeout=_TIMEOUT_S) is not None
        except TimeoutError as error:
            raise _refusal(self._text, f'looking for it in {text[:40]!r} takes more than {_TIMEOUT_S * 1e3:g} ms') from error
        except MemoryError as error:
            raise _refusal(self._text, f'looking for it in {text[:40]!r} takes too much memory') from error


def _refusal(text: str, why: str) -> QuestionError:
    shown = text if len(text) <= 80 else f'{text[:77]}...'
    return QuestionError(f'{shown!r} is not a pattern that can be used: {why}', Code.INVALID_CONDITION)
