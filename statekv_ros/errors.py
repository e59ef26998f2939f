"""Errors that a user can act on: each message names the bad value, what was expected, and what to change."""


class StateKVError(Exception):
    """Base of all errors raised on purpose by this package."""


class ModelError(StateKVError):
    """A checkpoint cannot be loaded or cannot watch video."""


class FrameError(StateKVError):
    """An image cannot become a frame: bad size, step, encoding, data or stamp."""


class QuestionError(StateKVError):
    """A question cannot be answered: empty, too long, nothing seen yet, an empty time span."""


class PolicyError(StateKVError, ValueError):
    """A prefill or answer policy is unknown or has a bad argument."""


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
