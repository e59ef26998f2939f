"""How a benchmark words its questions to a model, taken from the program that its authors published: read, never run."""
import ast
from pathlib import Path

from statekv_ros.errors import EvaluationError


class Prompts:
    """The wordings in one Python file.

    Raises:
        EvaluationError: there is no such file, or it is not Python.
    """

    def __init__(self, file: Path):
        self._file = file
        try:
            self._tree = ast.parse(file.read_text(encoding='utf-8'))
        except (OSError, ValueError, SyntaxError) as error:
            raise EvaluationError(f'--prompts: {file} cannot be read as Python: {error}') from error

    def assigned(self, name: str) -> str:
        """The text that a name is set to, with {} wherever it has a value filled in.

        Raises:
            EvaluationError: the name is set to no text.
        """
        values = [node.value for node in ast.walk(self._tree) if isinstance(node, ast.Assign)
                  and any(isinstance(target, ast.Name) and target.id == name for target in node.targets)]
        return self._text(values, 0, f'no text is assigned to {name}')

    def added(self, name: str, number: int) -> str:
        """The text that is added to a name (`name += '...'`) the `number`th time, counted from 0; as `assigned`."""
        added = [node for node in ast.walk(self._tree) if isinstance(node, ast.AugAssign) and isinstance(node.target, ast.Name)
                 and node.target.id == name]
        return self._text([node.value for node in sorted(added, key=lambda node: node.lineno)], number,
                          f'no text is added to {name} for the {number + 1}. time')

    def _text(self, values: list[ast.expr], number: int, otherwise: str) -> str:
        texts = [text for text in map(_text_of, values) if text is not None]
        if len(texts) <= number:
            raise EvaluationError(f'--prompts: {self._file} is not the program that was expected: {otherwise}')
        return texts[number]


def _text_of(value: ast.expr) -> str | None:
    if isinstance(value, ast.Constant) and isinstance(value.value, str):
        return value.value
    if isinstance(value, ast.JoinedStr):
        return ''.join(part.value if isinstance(part, ast.Constant) else '{}' for part in value.values)
    return None
