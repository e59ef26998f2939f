"""What the past looks like to a new frame (prefill policy) and to a question (answer policy), as small parsed values."""
import re
from dataclasses import dataclass

from statekv_ros.errors import PolicyError, quoted

UNLIMITED = 2**31 - 1
_PREFILL_EXAMPLES = 'statekv(4096), window(16), rekv(15000), full or none'
_ANSWER_EXAMPLES = 'all, sparse(4096), state, last(4), retrieve(64) or rekv(64)'


@dataclass(frozen=True)
class PrefillPolicy:
    """`statekv(B)`: the B most important tokens; `window(R)`: the newest R frames; `rekv(n)`: for each token the n newest,
    itself among them, and the prompt before the video; `full`: everything; `none`: nothing."""
    kind: str
    budget: int = 0
    window_frames: int = 0
    window_tokens: int = 0

    def __str__(self) -> str:
        argument = 'unlimited' if self.budget == UNLIMITED else self.budget or self.window_frames or self.window_tokens
        return f'{self.kind}({argument})' if argument else self.kind


@dataclass(frozen=True)
class AnswerPolicy:
    """`all` of the detailed cache; `sparse(n)`: in every layer, KV head and pass the pages that the pass wants most, n tokens of
    them; `retrieve(k)`: in every layer the k frame steps that are nearest to the question as it is asked, `rekv(k)`: to its
    bare text (`begin_answer`'s `retrieve_by`), by their visual tokens;
    `state`: the carried tokens only; `last(n)`: the newest n frames."""
    kind: str
    last_frames: int = 0
    retrieved_steps: int = 0
    loaded_tokens: int = 0

    def __str__(self) -> str:
        argument = self.last_frames or self.retrieved_steps or self.loaded_tokens
        return f'{self.kind}({argument})' if argument else self.kind

    @property
    def retrieves(self) -> bool:
        """Whether it is the question that says which steps are read."""
        return self.retrieved_steps > 0


def parse_prefill_policy(text: str) -> PrefillPolicy:
    """Parse `statekv(B)` (B a positive number of tokens, or `unlimited`), `window(R)`, `rekv(n)`, `full` or `none`.

    Raises:
        PolicyError: unknown name, or an argument that is missing, not a whole number or not positive.
    """
    name, argument = _split(text, 'prefill policy', _PREFILL_EXAMPLES)
    if name == 'statekv':
        budget = UNLIMITED if argument == 'unlimited' else _positive(argument, text, 'budget', 'tokens', 'statekv(4096)')
        return PrefillPolicy('statekv', budget=budget)
    if name == 'window':
        return PrefillPolicy('window', window_frames=_positive(argument, text, 'window', 'frames', 'window(16)'))
    if name == 'rekv':
        return PrefillPolicy('rekv', window_tokens=_positive(argument, text, 'rekv', 'tokens', 'rekv(15000)'))
    return _plain(name, argument, text, PrefillPolicy, ('full', 'none'), _PREFILL_EXAMPLES)


def parse_answer_policy(text: str) -> AnswerPolicy:
    """Parse `all`, `sparse(n)`, `state`, `last(n)`, `retrieve(k)` or `rekv(k)`.

    Raises:
        PolicyError: unknown name, or an argument that is missing, not a whole number or not positive.
    """
    name, argument = _split(text, 'answer policy', _ANSWER_EXAMPLES)
    if name == 'last':
        return AnswerPolicy('last', last_frames=_positive(argument, text, 'last', 'frames', 'last(4)'))
    if name == 'sparse':
        return AnswerPolicy('sparse', loaded_tokens=_positive(argument, text, 'sparse', 'tokens', 'sparse(4096)'))
    if name in ('retrieve', 'rekv'):
        return AnswerPolicy(name, retrieved_steps=_positive(argument, text, name, 'frame steps', f'{name}(64)'))
    return _plain(name, argument, text, AnswerPolicy, ('all', 'state'), _ANSWER_EXAMPLES)


def _split(text: str, what: str, examples: str) -> tuple[str, str | None]:
    match = re.fullmatch(r'\s*([a-z_]+)\s*(?:\(\s*([^()]*?)\s*\))?\s*', text)
    if match is None:
        raise PolicyError(f'{what} must be {examples}, got {quoted(text)}')
    return match[1], match[2]


def _positive(argument: str | None, text: str, name: str, unit: str, example: str) -> int:
    try:
        number = int(argument or '')
    except ValueError:
        number = 0
    if number <= 0:
        raise PolicyError(f'{name} must be a positive number of {unit}, as in {example!r}, got {quoted(text)}')
    return number


def _plain(name: str, argument: str | None, text: str, kind: type, names: tuple[str, ...], examples: str):
    if name not in names:
        raise PolicyError(f'policy must be {examples}, got {quoted(text)}')
    if argument is not None:
        raise PolicyError(f'policy {quoted(name)} takes no argument, got {quoted(text)}')
    return kind(name)
