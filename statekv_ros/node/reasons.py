"""What is told of an exception: a sentence, and a code for programs."""
import torch

from statekv_ros.errors import Code, StateKVError


def reason_of(error: Exception) -> str:
    """For people; says what to do where that is known."""
    if isinstance(error, torch.OutOfMemoryError):
        return 'GPU memory is full: lower the parameter "budget" or "max_frame_pixels", or bound "device_cache_mb"'
    return str(error) if isinstance(error, StateKVError) else f'{type(error).__name__}: {error}'


def code_of(error: Exception) -> Code:
    """For programs."""
    return error.code if isinstance(error, StateKVError) else Code.UNKNOWN
