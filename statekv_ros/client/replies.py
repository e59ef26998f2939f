"""What comes back from a question."""
import enum
from dataclasses import dataclass

from action_msgs.msg import GoalStatus

from statekv_ros.action import Ask
from statekv_ros.errors import Code
from statekv_ros.msg import Answer


class Result(enum.Enum):
    """How asking ended."""
    SUCCEEDED = 'succeeded'
    FAILED = 'failed'               # the question or the node said no; see `error`
    TIMEOUT = 'timeout'             # the time limit passed; `answer` holds what there was, if anything
    CANCELED = 'canceled'           # by `Asking.cancel`; `answer` holds what there was, if anything
    UNAVAILABLE = 'unavailable'     # there is no such node, or it left


@dataclass(frozen=True)
class Reply:
    """What came back.

    Attributes:
        answer: the answer (of several cameras: a line of text each); empty unless something was answered.
        answers: one per camera.
        error: why not, and what to do; empty on success.
        error_code: a constant of action/Ask.action (`Ask.Result.TIMEOUT`, ...); 0 on success and where no node was heard of.
    """
    result: Result
    answer: Answer
    answers: tuple[Answer, ...]
    error: str
    error_code: int = 0


_RESULTS = {Code.TIMEOUT: Result.TIMEOUT, Code.CANCELED: Result.CANCELED}


def reply_of(status: int, result: Ask.Result) -> Reply:
    """Of what the node said of a goal in this state (action_msgs/GoalStatus)."""
    if status == GoalStatus.STATUS_UNKNOWN:
        return without_answer(Result.FAILED, 'the node does not know this goal: its result was kept for 25 s and is gone, or '
                                             'the node began anew meanwhile; ask again')
    kind = Result.SUCCEEDED if result.success else _RESULTS.get(result.error_code, Result.FAILED)
    return Reply(kind, result.answer, tuple(result.answers), result.error_msg, result.error_code)


def without_answer(result: Result, error: str, code: int = 0) -> Reply:
    """Where the node has no part in it."""
    return Reply(result, Answer(), (), error, code)
