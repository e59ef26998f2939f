"""One heap for all threads of the process."""
import ctypes
import os

_M_ARENA_MAX = -8       # of mallopt(3), in glibc's malloc.h


def use_one_arena() -> bool:
    """Have glibc's malloc keep one arena; True when it does. Call before any thread is started.

    By default every thread gets an arena of its own, up to eight for each core, and what is freed in one stays there. Images
    of many sizes, received, copied and decoded by different threads, then leave tens of MB of holes that nobody else can fill.
    A user's own MALLOC_ARENA_MAX or GLIBC_TUNABLES stays, and another C library's allocator is left alone.
    """
    if os.environ.get('MALLOC_ARENA_MAX') or 'glibc.malloc' in os.environ.get('GLIBC_TUNABLES', ''):
        return False
    mallopt = getattr(ctypes.CDLL(None), 'mallopt', None)
    return mallopt is not None and mallopt(_M_ARENA_MAX, 1) == 1
