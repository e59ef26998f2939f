"""One heap for all threads of the process, and what is free in it given back where much has become free."""
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


def give_back_free_memory() -> bool:
    """Give the pages of glibc's heap that nothing lies in back to the system; True when there were any. Takes milliseconds, and
    the heap's lock.

    By itself glibc gives back only what is free at the heap's end: one small block that lives behind many that were freed keeps
    all of them resident.
    """
    malloc_trim = getattr(ctypes.CDLL(None), 'malloc_trim', None)
    return malloc_trim is not None and malloc_trim(0) == 1
