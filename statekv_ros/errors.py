"""Errors that a user can act on: each message names the bad value, what was expected, and what to change."""
import enum

_QUOTED_CHARS = 80


class Code(enum.IntEnum):
    """Why a question has no full answer, or a watch was not made; the constants of action/Ask.action, which says what each means."""
    NONE = 0
    UNKNOWN = 10000
    NOT_CONFIGURED = 10001
    NOT_ACTIVE = 10002
    SHUTTING_DOWN = 10003
    INVALID_ARGUMENT = 10004
    UNKNOWN_CAMERA = 10005
    NOTHING_SEEN = 10006
    QUEUE_FULL = 10007
    TIMEOUT = 10008
    CANCELED = 10009
    MEMORY_RESET = 10010
    UNKNOWN_FRAME = 10011
    INVALID_CONDITION = 10020
    TOO_MANY_WATCHES = 10021
    UNKNOWN_WATCH = 10022


class StateKVError(Exception):
    """Base of all errors raised on purpose by this package.

    Attributes:
        code: what a question that failed for it is told.
    """
    code = Code.UNKNOWN


class ModelError(StateKVError):
    """A checkpoint cannot be loaded or cannot watch video."""


class FrameError(StateKVError):
    """An image cannot become a frame: bad size, step, encoding, data or stamp."""


class PoseError(StateKVError):
    """A pose cannot be used: bad numbers, no stamp, a coordinate frame that is not the one wanted."""


class QuestionError(StateKVError):
    """A question cannot be answered: empty, too long, nothing seen yet, an empty time span."""

    def __init__(self, sentence: str, code: Code = Code.INVALID_ARGUMENT):
        super().__init__(sentence)
        self.code = code


class PolicyError(StateKVError, ValueError):
    """A prefill or answer policy is unknown or has a bad argument."""
    code = Code.INVALID_ARGUMENT


class BagError(StateKVError):
    """A bag, video or image folder cannot be read or written."""


class StoreError(StateKVError):
    """A memory on disk cannot be opened, read or written; what lies there is left as it is."""


class StoreMismatch(StoreError):
    """A memory on disk was made by another model, other policies or another layout."""


class StoreBusy(StoreError):
    """A memory on disk is being written by somebody else."""


class StoreFull(StoreError):
    """A step does not fit on the disk; everything that was there before still is."""


class ParameterError(StateKVError, ValueError):
    """A node parameter has a value that cannot work."""


class Interrupted(StateKVError):
    """The engine was told to stop in the middle of a step or an answer; nothing was committed."""


class EvaluationError(StateKVError):
    """A questions file, a plan or a run folder cannot be used; every line names a place and what is wrong there."""


def quoted(value: object) -> str:
    """What was given, as a sentence about it quotes it: its `repr`, of a long one the beginning and the length.

    Who sends a megabyte by mistake is helped by its first words, and a reply as long would stay in the middleware's history.
    """
    whole = value if isinstance(value, str) else repr(value)
    shown = whole[:_QUOTED_CHARS]
    said = repr(shown) if isinstance(value, str) else shown
    return said if shown == whole else f'{said}... ({len(whole)} characters)'
