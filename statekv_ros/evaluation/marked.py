"""YAML read with its line numbers: every value knows where it stands, and all mistakes are collected before any is reported."""
import math
from pathlib import Path

import yaml

from statekv_ros.errors import EvaluationError

_STRING, _NUMBERS = 'tag:yaml.org,2002:str', ('tag:yaml.org,2002:int', 'tag:yaml.org,2002:float')


class Marked:
    """One value of a YAML file, its line and its path of fields (`videos[0].questions[2].ask_at`).

    The methods that read it note a mistake in `errors` and return None (or what is left of a list) when it is of another type.
    """

    def __init__(self, node: yaml.Node, file: Path, field: str, errors: list[str]):
        self._node, self._file, self._field, self._errors = node, file, field, errors

    @property
    def place(self) -> str:
        """'questions.yaml:12: videos[0].source'."""
        return f'{self._file}:{self._node.start_mark.line + 1}' + (f': {self._field}' if self._field else '')

    def complain(self, what: str) -> None:
        """Note a mistake here."""
        self._errors.append(f'{self.place}: {what}')

    def fields(self, required: tuple[str, ...], optional: tuple[str, ...] = ()) -> 'dict[str, Marked]':
        """The values of a mapping by name; missing, unknown and repeated fields are mistakes."""
        if not isinstance(self._node, yaml.MappingNode):
            self.complain(f'must be a mapping with the fields {", ".join(required)}')
            return {}
        found: dict[str, Marked] = {}
        for key, value in self._node.value:
            name = str(key.value) if isinstance(key, yaml.ScalarNode) else '?'
            field = Marked(value, self._file, f'{self._field}.{name}'.lstrip('.'), self._errors)
            if name not in required + optional:
                Marked(key, self._file, field._field, self._errors).complain(
                    f'unknown field; known here: {", ".join(required + optional)}')
            elif name in found:
                field.complain('stands here twice')
            else:
                found[name] = field
        for name in required:
            if name not in found:
                self.complain(f'lacks the field {name!r}')
        return found

    def items(self) -> 'list[Marked]':
        """The items of a list that must not be empty."""
        if not isinstance(self._node, yaml.SequenceNode) or not self._node.value:
            self.complain(f'must be a list with at least one item, got {self._shown()}')
            return []
        return [Marked(node, self._file, f'{self._field}[{index}]', self._errors)
                for index, node in enumerate(self._node.value)]

    def text(self) -> str | None:
        """Any single value as it is written, so that an answer may be yes, no or 3 without quotes."""
        if not isinstance(self._node, yaml.ScalarNode) or not self._node.value.strip():
            self.complain(f'must be text, got {self._shown()}')
            return None
        return self._node.value

    def number(self) -> float | None:
        """A finite number."""
        if isinstance(self._node, yaml.ScalarNode) and self._node.tag in _NUMBERS:
            try:
                if math.isfinite(value := float(self._node.value)):
                    return value
            except ValueError:      # YAML's other ways to write one, as 1:30 or 0x1f
                pass
        self.complain(f'must be a number, got {self._shown()}')
        return None

    def span(self) -> tuple[float, float] | None:
        """Two numbers in order: [begin, end]."""
        numbers = [item.number() for item in self.items()]
        if None in numbers or not numbers:
            return None
        if len(numbers) != 2 or not 0 <= numbers[0] <= numbers[1]:
            self.complain(f'must be [begin, end] in seconds with 0 <= begin <= end, got {numbers}')
            return None
        return numbers[0], numbers[1]

    def _shown(self) -> str:
        return repr(self._node.value) if isinstance(self._node, yaml.ScalarNode) else f'a {self._node.id}'


def read_marked(file: Path, errors: list[str]) -> Marked:
    """The document in a YAML file.

    Raises:
        EvaluationError: the file cannot be read, is not YAML, or is empty.
    """
    try:
        node = yaml.compose(file.read_text(encoding='utf-8'), Loader=yaml.SafeLoader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        raise EvaluationError(f'{file}:{mark.line + 1 if mark else 1}: is not YAML: {error.problem}') from error
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise EvaluationError(f'{file}: cannot be read: {" ".join(str(error).split())}') from error
    if node is None:
        raise EvaluationError(f'{file}:1: is empty: see docs/questions.md')
    return Marked(node, file, '', errors)
