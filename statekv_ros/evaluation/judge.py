"""Whether an answer is right, and whether it looked where the answer was."""
from collections.abc import Iterable, Sequence

from statekv_ros.evaluation.schema import Question

_FINAL = '.,;:!?'


def normal(text: str) -> str:
    """Lower case, single spaces, no final punctuation."""
    return ' '.join(text.casefold().split()).rstrip(_FINAL).rstrip()


def is_right(text: str, accepted: Iterable[str]) -> bool:
    """Whether an answer is one of the accepted ones, case, white space and final punctuation aside."""
    return normal(text) in map(normal, accepted)


def evidence_hit(question: Question, evidence: Sequence[Sequence[float]]) -> bool | None:
    """Whether the most attended step, the first of `evidence` ([first_s, last_s, share] each), lies in one of the question's
    evidence spans; None where the question names none."""
    if not question.evidence:
        return None
    if not evidence:
        return False
    first, last = evidence[0][:2]
    return any(first < end and last >= begin for begin, end in question.evidence)


def fact_age_s(question: Question) -> float | None:
    """A question's own `age`, or the seconds from the end of the last evidence span that began before it until it is asked: 0
    while the span lasts, None where there is none."""
    if question.age is not None:
        return question.age
    ends = [end for begin, end in question.evidence if begin <= question.ask_at]
    return max(0.0, question.ask_at - max(ends)) if ends else None
