"""Libraries of operations that are compiled for CPUs when the package is installed; without its own, the naive twin runs."""
import ctypes
import functools
import warnings
from pathlib import Path

import torch

import statekv_ros

# By what torch finds the processor to have; any other runs what is compiled for each of its kind.
_INSTRUCTIONS = {'AVX2': 'avx2', 'AVX512': 'avx512'}


@functools.cache
def library(operation: str) -> ctypes.CDLL | None:
    """That of an operation, as fast as the processor allows; None where there is none to load: a warning tells once."""
    found, path = problem(operation), _path(operation)
    if found:
        warnings.warn(f'{operation} on a CPU is the naive one, several times slower: {found}', RuntimeWarning, stacklevel=2)
        return None
    return ctypes.CDLL(str(path))


def problem(operation: str) -> str:
    """Why an operation has no library here; '' where it has one."""
    path = _path(operation)
    if path is None:
        return (f'{_names(operation)[-1]} is not in {", ".join(statekv_ros.__path__)}: install the package again; it is '
                'compiled then, as the messages are')
    try:
        ctypes.CDLL(str(path))
    except OSError as error:
        return f'{path} cannot be loaded ({error}): install the package again'
    return ''


def _names(operation: str) -> list[str]:
    """Best first."""
    instructions = _INSTRUCTIONS.get(torch.backends.cpu.get_cpu_capability())
    return [f'{operation}_{each}.so' for each in (instructions, 'any') if each]


def _path(operation: str) -> Path | None:
    files = (Path(folder, name) for name in _names(operation) for folder in statekv_ros.__path__)
    return next(filter(Path.is_file, files), None)
