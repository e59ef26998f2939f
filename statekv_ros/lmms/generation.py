"""A task's generation_kwargs, as far as they matter here."""
from collections.abc import Mapping
from dataclasses import dataclass

from statekv_ros.errors import ParameterError

_MAX_TOKENS = 128       # where a task does not say, as with the harness's own models


@dataclass(frozen=True)
class Generation:
    """How to answer.

    Attributes:
        max_tokens: the answer ends after this many tokens.
        temperature: 0 takes the most likely token.
        stops: the answer ends before the first of these texts.
    """
    max_tokens: int = _MAX_TOKENS
    temperature: float = 0.0
    stops: tuple[str, ...] = ()

    def stops_in(self, text: str) -> bool:
        """Whether a stop is in the text. Blank space at its beginning is no answer and does not count: the harness's usual stop is
        an empty line, and a model may well begin with one."""
        return any(stop in text.lstrip() for stop in self.stops)

    def cut(self, text: str) -> str:
        """The text before its first stop; all of it where there is none."""
        if not self.stops_in(text):
            return text
        text = text.lstrip()
        return text[:min(text.find(stop) for stop in self.stops if stop in text)]


def parse_generation(given: Mapping) -> Generation:
    """generation_kwargs of a task, or of `--gen_kwargs`.

    Raises:
        ParameterError: a way to decode that there is not here.
    """
    max_tokens = given.get('max_new_tokens', given.get('max_gen_toks', _MAX_TOKENS))
    if not isinstance(max_tokens, int) or max_tokens < 1:
        raise ParameterError(f'max_new_tokens must be a whole number from 1 on, got {max_tokens}: see --gen_kwargs')
    temperature = given.get('temperature') or 0
    if given.get('do_sample') is False:
        temperature = 0
    if (given.get('num_beams') or 1) != 1:
        raise ParameterError(f'answers are decoded token by token, so num_beams must be 1, got {given["num_beams"]}: see '
                             '--gen_kwargs')
    if temperature and ((given.get('top_p') or 1) < 1 or (given.get('top_k') or 0) > 0):
        raise ParameterError(f'top_p and top_k are not known here, got {given.get("top_p")} and {given.get("top_k")} with '
                             f'temperature {temperature}: see --gen_kwargs')
    until = given.get('until') or ()
    stops = (until,) if isinstance(until, str) else tuple(until)
    return Generation(max_tokens, float(temperature), tuple(stop for stop in stops if stop))
