"""A slice of the engine's time: of one question, or of all those whose answers' next tokens one pass can find."""
from collections.abc import Callable, Sequence
from functools import partial

from statekv_ros.errors import Interrupted
from statekv_ros.memory import Answering
from statekv_ros.memory.answering.shared import decode_together
from statekv_ros.node.questions import Question


def sharing(questions: Sequence[Question]) -> list[Question]:
    """The first one, with those that can share its next slice. What waits with them is not waited for, nor do they wait."""
    first, *others = questions
    return [first, *(other for other in others if first.shares_with(other))]


def advance(questions: Sequence[Question], tokens: int, steps: int) -> list[bool | Exception]:
    """One slice of what `sharing` found: so many tokens of all together, or one of each where that is more.

    Returns:
        Whether each is done, as `Question.advance` says, or what went wrong with it.

    Raises:
        Interrupted: the engine is stopping.
    """
    if len(questions) == 1:
        return [_tried(partial(questions[0].advance, tokens, steps))]
    outcomes = {question: _tried(partial(question.next_answer, steps)) for question in questions}
    answers = {question: answer for question, answer in outcomes.items() if isinstance(answer, Answering)}
    for question, error in zip(answers, decode_together(list(answers.values()), tokens)):
        outcomes[question] = error or _tried(partial(question.settle, steps))
    return [True if outcome is None else outcome for outcome in outcomes.values()]      # None: out of time


def _tried(function: Callable) -> object:
    """What it returns, or what went wrong: a question's trouble is its own."""
    try:
        return function()
    except Interrupted:
        raise
    except Exception as error:
        return error
