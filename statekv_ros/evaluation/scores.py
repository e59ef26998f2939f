"""How an answer is judged: as the questions file says, or as a benchmark's own program does it.

A score is a function of the answer's text, the question, and when it was answered, and a line in SCORES.
"""
import re
from collections.abc import Callable

from statekv_ros.evaluation.judge import is_right
from statekv_ros.evaluation.schema import Question

_IN_TIME_S = 2.0        # StreamingBench, src/data/count.py
_LETTER = re.compile(r'[A-Z](?![A-Za-z])')


def _words(text: str, question: Question, at_s: float) -> bool:
    return is_right(text, question.accepted)


def _first_character(text: str, question: Question, at_s: float) -> bool:
    return text[:1] == question.accepted[0]


def _first_letter(text: str, question: Question, at_s: float) -> bool:
    found = _LETTER.search(text)
    return found is not None and found[0] == question.accepted[0]


def _letter_within(text: str, question: Question, at_s: float) -> bool:
    return question.accepted[0] in text


def _in_time(text: str, question: Question, at_s: float) -> bool:
    return question.poll is not None and abs(at_s - question.poll.due_s) <= _IN_TIME_S


def _output_in_time(text: str, question: Question, at_s: float) -> bool:
    return _in_time(text, question, at_s) and question.accepted[0] in text


def _judge(text: str, question: Question, at_s: float) -> None:
    """Nobody here knows."""


# Each: (answer, question, seconds at which it was given) -> whether it is right; None where a judge outside has to say.
SCORES: dict[str, Callable[[str, Question, float], bool | None]] = {
    'words': _words,                        # one of the accepted answers, but for case, white space and final punctuation
    'first_character': _first_character,    # begins with the right letter
    'first_letter': _first_letter,          # the first capital letter that stands alone is the right one
    'letter_within': _letter_within,        # has the right letter anywhere
    'in_time': _in_time,                    # given within 2 s of its time
    'output_in_time': _output_in_time,      # that, and says what was to be said
    'judge': _judge,
}


def judged(text: str, question: Question, at_s: float) -> dict[str, bool | None]:
    """What each of a question's scores says, the one that counts first."""
    return {name: SCORES[name](text, question, at_s) for name in question.scores}
