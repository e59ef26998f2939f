"""Regular expressions whose cost has a bound: each character of the text is looked at once, with all ways on at the same time.

Python's `re`, and others that try one way after the other, may take years over a few dozen characters, and hold up every thread
meanwhile. What is supported is what such a search needs no way back for.
"""
import re
from collections.abc import Callable
from functools import lru_cache

from statekv_ros.errors import Code, QuestionError

SUPPORTED = ('characters, ".", classes as in [a-z] and \\d \\w \\s, groups (a|b), the anchors ^ $ \\b, and * + ? {m,n} with at '
             'most 50 repeats')
MOST_CHARS = 200        # of a pattern
TEXT_CHARS = 256        # of a text; what stands behind is not looked at
_MOST_REPEATS, _MOST_STATES = 50, 400
_ATOM = re.compile(r'\\[dDwWsS]|\\[^A-Za-z0-9]|\[\^?\]?(?:\\.|(?!--|&&|~~|\|\|)[^\[\]\\])*\]|[^\\|*+?(){}\[\]^$]')
_REPEAT = re.compile(r'\{(\d{1,3})(,(\d{0,3}))?\}')

# A piece of a pattern: given the state that follows it, it adds its own and returns the first of them.
_Piece = Callable[[int], int]


class Pattern:
    """`search(text)`: whether the pattern is found anywhere in the text, whatever the case of letters."""

    def __init__(self, text: str):
        """
        Raises:
            QuestionError: it is no pattern, one with what is not supported, or too large a one.
        """
        if len(text) > MOST_CHARS:
            raise _refusal(text, f'it has {len(text)} characters, {MOST_CHARS} are allowed')
        self._text, self._at = text, 0
        # A state is (kind, test, next states): 'char' with its test, 'empty', or 'start', 'end', 'edge', which are empty as well, but
        # only there.
        self._states: list[tuple[str, re.Pattern | None, tuple[int, ...]]] = [('found', None, ())]
        piece = self._alternatives()
        if self._at < len(text):
            raise _refusal(text, f'")" at {self._at + 1} closes nothing')
        self._first = piece(0)

    def search(self, text: str) -> bool:
        """Whether it is found in the first `TEXT_CHARS` characters."""
        text = text[:TEXT_CHARS]
        ways: set[int] = set()
        for at in range(len(text) + 1):
            ways = self._closed({*ways, self._first}, text, at)
            if 0 in ways:
                return True
            if at < len(text):
                ways = {after for way in ways if self._states[way][0] == 'char' and self._states[way][1].match(text[at])
                        for after in self._states[way][2]}
        return False

    def _closed(self, ways: set[int], text: str, at: int) -> set[int]:
        """With all states that are reached without a character."""
        todo, reached = list(ways), set()
        while todo:
            if (way := todo.pop()) in reached:
                continue
            reached.add(way)
            kind, _, after = self._states[way]
            if kind == 'empty' or kind in _ANCHORS and _ANCHORS[kind](text, at):
                todo += after
        return reached

    def _add(self, kind: str, test: re.Pattern | None, *after: int) -> int:
        if len(self._states) >= _MOST_STATES:
            raise _refusal(self._text, f'it stands for more than {_MOST_STATES} characters and branches')
        self._states.append((kind, test, after))
        return len(self._states) - 1

    def _alternatives(self) -> _Piece:
        pieces = [self._sequence()]
        while self._take('|'):
            pieces.append(self._sequence())
        return pieces[0] if len(pieces) == 1 else lambda after: self._add('empty', None, *[piece(after) for piece in pieces])

    def _sequence(self) -> _Piece:
        pieces = []
        while self._at < len(self._text) and self._text[self._at] not in '|)':
            pieces.append(self._repeated(self._one()))

        def build(after: int) -> int:
            for piece in reversed(pieces):
                after = piece(after)
            return after
        return build

    def _one(self) -> _Piece:
        if self._take('('):
            if self._take('?') and not self._take(':'):
                raise _refusal(self._text, f'a group with "(?" at {self._at - 1} is not supported')
            piece = self._alternatives()
            if not self._take(')'):
                raise _refusal(self._text, '")" is missing')
            return piece
        for text, kind in (('^', 'start'), ('$', 'end'), (r'\b', 'edge')):
            if self._take(text):
                if self._text[self._at:self._at + 1] in tuple('*+?{'):
                    raise _refusal(self._text, f'a repeat of {text} is not supported')
                return lambda after, kind=kind: self._add(kind, None, after)
        match = _ATOM.match(self._text, self._at)
        if match is None:
            raise _refusal(self._text, f'what stands at {self._at + 1} ({self._text[self._at:self._at + 8]!r}) is not supported')
        self._at = match.end()
        test = _test_of(match[0], self._text)
        return lambda after: self._add('char', test, after)

    def _repeated(self, piece: _Piece) -> _Piece:
        least, most = 1, 1      # most None: without end
        if self._take('*'):
            least, most = 0, None
        elif self._take('+'):
            least, most = 1, None
        elif self._take('?'):
            least, most = 0, 1
        elif match := _REPEAT.match(self._text, self._at):
            self._at, least = match.end(), int(match[1])
            most = least if match[2] is None else int(match[3]) if match[3] else None
        else:
            return piece
        if max(least, most or 0) > _MOST_REPEATS or most is not None and most < least:
            raise _refusal(self._text, f'a repeat of {least} to {"any" if most is None else most} is not supported')
        if self._text[self._at:self._at + 1] in tuple('*+?{'):
            raise _refusal(self._text, f'a repeat of a repeat at {self._at + 1}: put the first one into a group')

        def build(after: int) -> int:
            if most is None:
                loop = self._add('empty', None)
                self._states[loop] = 'empty', None, (piece(loop), after)
                after = loop
            else:
                end = after
                for _ in range(most - least):
                    after = self._add('empty', None, piece(after), end)
            for _ in range(least):
                after = piece(after)
            return after
        return build

    def _take(self, text: str) -> bool:
        found = self._text.startswith(text, self._at)
        self._at += len(text) * found
        return found


def _is_word(text: str, at: int) -> bool:
    return 0 <= at < len(text) and (text[at].isalnum() or text[at] == '_')


_ANCHORS: dict[str, Callable[[str, int], bool]] = {
    'start': lambda text, at: at == 0, 'end': lambda text, at: at == len(text),
    'edge': lambda text, at: _is_word(text, at - 1) != _is_word(text, at)}


@lru_cache(maxsize=1000)
def _test_of(atom: str, text: str) -> re.Pattern:
    """What tells whether a character is meant by the atom; only ever given one character."""
    try:
        return re.compile(atom, re.IGNORECASE | re.DOTALL)
    except re.error as error:
        raise _refusal(text, f'{atom!r}: {error}') from error


def _refusal(text: str, why: str) -> QuestionError:
    shown = text if len(text) <= 80 else f'{text[:77]}...'
    return QuestionError(f'{shown!r} is not a pattern that can be used: {why}. Supported: {SUPPORTED}', Code.INVALID_CONDITION)
