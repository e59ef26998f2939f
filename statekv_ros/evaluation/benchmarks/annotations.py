"""JSON of other people's data sets, read field by field: every mistake is noted with its place before any is reported."""
import json
import math
import re
from pathlib import Path
from typing import Any

from statekv_ros.errors import EvaluationError

_CLOCK = re.compile(r'(\d+):([0-5]?\d)(?::([0-5]?\d))?')


class Entry:
    """One value and where it stands (`questions_real.json: [12].questions[0].answer`).

    The methods that read it note a mistake in `errors` and return None, or an empty list, when it is of another type. Fields
    that nobody asks for are no mistake: result files keep what models answered beside the questions.
    """

    def __init__(self, value: Any, file: Path, field: str, errors: list[str]):
        self._value, self._file, self._field, self._errors = value, file, field, errors

    @property
    def place(self) -> str:
        return f'{self._file}: {self._field}' if self._field else str(self._file)

    def complain(self, what: str) -> None:
        """Note a mistake here."""
        self._errors.append(f'{self.place}: {what}')

    @property
    def is_list(self) -> bool:
        return isinstance(self._value, list)

    def has(self, *names: str) -> bool:
        """Whether this is an object with one of these fields."""
        return isinstance(self._value, dict) and any(name in self._value for name in names)

    @property
    def first(self) -> 'Entry':
        """The first item of a list, or what else it is; no mistake is noted."""
        return Entry(self._value[0], self._file, f'{self._field}[0]', self._errors) if self.is_list and self._value else self

    def field(self, name: str) -> 'Entry':
        """A field of an object; where there is none, that is a mistake, and all that is read from it is None."""
        if not isinstance(self._value, dict):
            if self._value is not _MISSING:
                self.complain(f'must be an object with the field {name!r}, got {self._shown()}')
        elif name not in self._value:
            self.complain(f'lacks the field {name!r}')
        else:
            return Entry(self._value[name], self._file, f'{self._field}.{name}'.lstrip('.'), self._errors)
        return Entry(_MISSING, self._file, self._field, self._errors)

    def items(self, least: int = 1) -> 'list[Entry]':
        """Items of a list with at least so many."""
        if isinstance(self._value, list) and len(self._value) >= least:
            return [Entry(value, self._file, f'{self._field}[{index}]', self._errors) for index, value in enumerate(self._value)]
        self._must(f'be a list with at least {least} item{"s" * (least > 1)}')
        return []

    def text(self) -> str | None:
        """A string that is not empty."""
        return self._value.strip() if isinstance(self._value, str) and self._value.strip() else self._must('be text')

    def number(self) -> float | None:
        """A finite number of at least 0."""
        number = not isinstance(self._value, bool) and isinstance(self._value, (int, float)) and math.isfinite(self._value)
        return float(self._value) if number and self._value >= 0 else self._must('be a number of at least 0')

    def index(self, count: int) -> int | None:
        """A whole number below `count`."""
        whole = isinstance(self._value, int) and not isinstance(self._value, bool) and 0 <= self._value < count
        return self._value if whole else self._must(f'be a whole number from 0 to {count - 1}')

    def one_of(self, known: tuple[str, ...]) -> str | None:
        """One of some words."""
        return self._value if self._value in known else self._must(f'be one of {", ".join(known)}')

    def clock_s(self) -> float | None:
        """Seconds of a time like 00:03:10 or 03:10."""
        if match := _CLOCK.fullmatch(self._value.strip()) if isinstance(self._value, str) else None:
            return float(sum(int(part) * 60 ** power for power, part in enumerate(reversed([p for p in match.groups() if p]))))
        return self._must('be a time like 00:03:10')

    def _must(self, what: str) -> None:
        if self._value is not _MISSING:     # which has been said
            self.complain(f'must {what}, got {self._shown()}')

    def _shown(self) -> str:
        return 'an object' if isinstance(self._value, dict) else 'a list' if self.is_list else repr(self._value)


_MISSING = object()


def read_json(file: Path, errors: list[str]) -> Entry:
    """The document in a JSON file.

    Raises:
        EvaluationError: the file cannot be read or is not JSON.
    """
    try:
        return Entry(json.loads(file.read_text(encoding='utf-8')), file, '', errors)
    except ValueError as error:
        raise EvaluationError(f'{file}: is not JSON: {error}') from error
    except OSError as error:
        raise EvaluationError(f'{file}: cannot be read: {error}') from error
