"""Whether this machine can run the Triton kernels, found out by running them; where one cannot, its naive twin takes over.

Nothing is refused beforehand but what is known to fail: Triton itself missing, or a chip too old. A missing compiler is no
matter where Triton's cache holds what it would have built.
"""
import functools
import importlib.util
import os
import shutil
import subprocess
import sys
import sysconfig
import warnings
from collections.abc import Callable
from ctypes import CDLL
from pathlib import Path
from typing import TypeVar

import torch

from .compiled import library as find_library
from .compiled import problem as library_problem

Result = TypeVar('Result')
IMPLEMENTATIONS = ('naive', 'triton')
OLDEST_CAPABILITY = 80      # below it bf16 is emulated, and the tiles of configs.py are larger than the chip's shared memory
_COMPILERS = ('gcc', 'clang')
# What is known of this machine, by operation and number of the device: why its kernel does not run, and who has been told.
_failed: dict[tuple[str, int], str] = {}
_told: set[tuple[str, int]] = set()


def problem(operation: str, device: torch.device) -> str:
    """Why an operation ('scored_attention', 'paged_attention') has no Triton kernel on a CUDA device; '' where it has one, or
    where that has not been tried."""
    return _unfit(device) or _failed.get((operation, device.index or 0), '') if device.type == 'cuda' else ''


def choose(operation: str, device: torch.device) -> str:
    """'triton' on a CUDA device, as far as is known, else 'naive'; warns (once) of a GPU that has to do without Triton."""
    if device.type != 'cuda':
        return 'naive'
    reason, key = problem(operation, device), (operation, device.index or 0)
    if reason and key not in _told:
        _told.add(key)
        warnings.warn(f'{operation} on {device} is the naive one, many times slower: {reason}', RuntimeWarning, stacklevel=3)
    return 'naive' if reason else 'triton'


def forget_failures() -> None:
    """Try again what has failed: somebody may have mended it."""
    _failed.clear()
    _told.clear()


def run(operation: str, implementation: str | None, device: torch.device, kernel: Callable[[], Result],
        naive: Callable[[], Result], compiled: Callable[[CDLL], Result] | None = None) -> Result:
    """What the implementation gives that was asked for; None: the kernel on CUDA and what is compiled on a CPU, where they run,
    and the naive twin elsewhere.

    Args:
        compiled: 'cpu', of an operation that has it; given the operation's library.

    Raises:
        ValueError: the implementation is unknown or cannot run here; as `run_or_stand_in`.
    """
    if implementation is None and device.type == 'cuda':
        return run_or_stand_in(operation, device, kernel, naive)
    if compiled is not None and (implementation == 'cpu' or implementation is None and device.type == 'cpu'):
        library = find_library(operation)
        if library is not None:
            return compiled(library)
        if implementation == 'cpu':
            raise ValueError(f"implementation 'cpu' cannot run: {library_problem(operation)}, or use 'naive'")
    if implementation in (None, 'naive'):
        return naive()
    if implementation != 'triton':
        known = IMPLEMENTATIONS if compiled is None else ('cpu', *IMPLEMENTATIONS)
        raise ValueError(f'implementation must be one of {", ".join(known)}, got {implementation!r}')
    if not _triton_is_installed():
        raise ValueError("implementation 'triton' needs the package triton, which is not installed: pip install triton, or "
                         "use 'naive'")
    return kernel()


def run_or_stand_in(operation: str, device: torch.device, kernel: Callable[[], Result], naive: Callable[[], Result]) -> Result:
    """What the kernel gives; what the naive twin gives from the moment on when it could not be built or launched on the device.

    Raises:
        ValueError: the kernel refuses its arguments. A device that is lost or full is the caller's as well.
    """
    if choose(operation, device) == 'naive':
        return naive()
    try:
        return kernel()
    except Exception as error:  # compilers, assemblers, drivers and loaders raise many kinds
        if is_the_callers(error):
            raise
        note_failure(operation, device, error)
    return naive()


def note_failure(operation: str, device: torch.device, error: Exception) -> None:
    """From now on the operation's kernel is known to fail on this device."""
    _failed[operation, device.index or 0] = explain(error)
    choose(operation, device)


def is_the_callers(error: Exception) -> bool:
    """Whether an error has nothing to do with building a kernel: bad arguments, a device that is full or lost."""
    lost = isinstance(error, getattr(torch, 'AcceleratorError', ())) or 'CUDA error' in str(error)
    return lost or isinstance(error, (ValueError, torch.OutOfMemoryError)) or 'out of memory' in str(error)


def explain(error: Exception) -> str:
    """One sentence on a kernel that could not be built or launched, and what to do about it."""
    said = (str(error) or type(error).__name__).strip().splitlines()
    first = f'{type(error).__name__}: {said[-1].strip() if type(error).__name__ == "CompilationError" else said[0]}'
    building = isinstance(error, (subprocess.CalledProcessError, OSError)) or 'C compiler' in str(error)
    if not building:
        return f'Triton could not build or start its kernel ({first})'
    compiler = os.environ.get('CC')
    if not (shutil.which(compiler) if compiler else any(map(shutil.which, _COMPILERS))):
        where = f'CC={compiler} is not there' if compiler else f'none of {", ".join(_COMPILERS)} is there'
        return f'Triton builds its launcher with a C compiler, and {where}: install one (Debian, Ubuntu: "apt install gcc")'
    header = Path(sysconfig.get_paths()['include'], 'Python.h')
    if not header.is_file():
        version = f'{sys.version_info.major}.{sys.version_info.minor}'
        return (f"Triton builds its launcher against Python's headers, and {header} is missing: install them (Debian, Ubuntu: "
                f'"apt install python{version}-dev")')
    return f'Triton could not build its launcher ({first}): see what the compiler says above'


def _triton_is_installed() -> bool:
    return importlib.util.find_spec('triton') is not None


@functools.lru_cache
def _unfit(device: torch.device) -> str:
    if not _triton_is_installed():
        return 'the package triton is not installed: pip install triton'
    major, minor = torch.cuda.get_device_capability(device)
    if 10 * major + minor < OLDEST_CAPABILITY:
        return (f'{torch.cuda.get_device_name(device)} has compute capability {major}.{minor}, and the Triton kernels need '
                f'{OLDEST_CAPABILITY / 10} (bf16, and enough shared memory): a newer GPU is what helps')
    return ''
