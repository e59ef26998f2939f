"""Room for what grows over hours."""
import math
import mmap

import torch

_LARGE = 2**18      # bytes
_MORE = 4


def room_for(count: int) -> int:
    """How many to make room for where there are so many: a quarter more, so that room that is never used, and copies, are few."""
    return count + count // _MORE


def zeros(*shape: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """As `torch.zeros`. In main memory large room is mapped by itself: what is not written yet takes none, and what is let go of
    is the system's again, where an allocator keeps it in pieces that the next, larger room does not fit in."""
    size = math.prod(shape) * dtype.itemsize
    if device.type != 'cpu' or size < _LARGE:
        return torch.zeros(*shape, dtype=dtype, device=device)
    mapped = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    return torch.frombuffer(mapped, dtype=dtype).view(shape)
