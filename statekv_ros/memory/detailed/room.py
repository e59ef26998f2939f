"""Room for what grows over hours, and main memory given back to the system."""
import ctypes
import math
import mmap

import numpy as np
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
    return torch.frombuffer(_mapped(size), dtype=dtype).view(shape)


def zeros_of_numpy(*shape: int, dtype: np.dtype) -> np.ndarray:
    """As `zeros`, of numbers in main memory."""
    size = math.prod(shape) * dtype.itemsize
    if size < _LARGE:
        return np.zeros(shape, dtype)
    return np.frombuffer(_mapped(size), dtype).reshape(shape)


def give_back(rows: torch.Tensor) -> None:
    """What lies in some rows of room that `zeros` made is not wanted any more. Where the room is mapped by itself, the system has
    their memory back until they are written again; read before, they may be 0.

    Args:
        rows: [..., rows, width], each [rows, width] in one piece.
    """
    if rows.device.type != 'cpu' or rows.untyped_storage().nbytes() < _LARGE:
        return
    for piece in rows.flatten(0, -3):
        begin, end = piece.data_ptr(), piece.data_ptr() + piece.nbytes
        first = -(-begin // mmap.PAGESIZE) * mmap.PAGESIZE
        if first + mmap.PAGESIZE <= end:
            ctypes.CDLL(None).madvise(ctypes.c_void_p(first), ctypes.c_size_t((end - first) // mmap.PAGESIZE * mmap.PAGESIZE),
                                      mmap.MADV_DONTNEED)


def give_back_free_memory() -> bool:
    """Give the pages of glibc's heap that nothing lies in back to the system; True when there were any. Takes milliseconds, and
    the heap's lock.

    By itself glibc gives back only what is free at the heap's end: one small block that lives behind many that were freed keeps
    all of them resident.
    """
    malloc_trim = getattr(ctypes.CDLL(None), 'malloc_trim', None)
    return malloc_trim is not None and malloc_trim(0) == 1


def _mapped(size: int) -> mmap.mmap:
    return mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
