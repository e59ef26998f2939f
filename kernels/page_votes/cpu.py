"""Page votes on a CPU, compiled: hands cpp/votes.cpp what it reads and writes."""
import ctypes

import torch

from .candidates import Entries, Leaves, Lines

_POINTERS = ('queries', 'exact', 'codes', 'steps', 'scales', 'strays', 'bases', 'places', 'groups', 'numbers', 'sizes', 'leaves',
             'pages', 'leaf_size', 'page_sizes', 'through', 'found', 'votes')
_NUMBERS = ('kv_heads', 'rows', 'width', 'exact_half', 'exact_head', 'offset', 'codes_head', 'steps_head', 'scales_head', 'base',
            'stop', 'volume', 'strays_head', 'first_stray', 'bases_head', 'first_base', 'of_base', 'lines', 'places_head',
            'numbers_head', 'sizes_head', 'leaves_half', 'leaves_head', 'pages_head', 'leaf', 'first_place', 'first_page', 'opened',
            'stretches')
_NO_LINES, _NO_LEAVES = ((None,) * 4, (0,) * 4), ((None,) * 5, (0, 0, 0, 1, 0, 0, 0, 0))


class _Call(ctypes.Structure):
    """As `Call` of votes.cpp."""
    _fields_ = [*((name, ctypes.c_void_p) for name in _POINTERS), *((name, ctypes.c_int64) for name in _NUMBERS)]


def cpu_page_votes(library: ctypes.CDLL, queries: torch.Tensor, entries: Entries, lines: Lines,
                   leaves: Leaves | None) -> tuple[torch.Tensor | None, torch.Tensor]:
    """Arguments and results as in `page_votes`; other threads run meanwhile.

    Raises:
        ValueError: tensors are not on a CPU, or entries of a KV head do not lie one behind the other.
        MemoryError: there is no room for the scores of a KV head.
    """
    if queries.device.type != 'cpu':
        raise ValueError(f"implementation 'cpu' needs tensors on a CPU, got {queries.device}: use 'triton' or 'naive'")
    (kv_heads, rows, width), queries = queries.shape[1:], queries.contiguous()
    exact, codes, steps, scales, strays, bases = (
        entries.exact, entries.codes, entries.steps, entries.scales, entries.strays, entries.leaves)
    line_pointers, line_numbers = _of_lines(lines) if lines.count else _NO_LINES
    leaf_pointers, leaf_numbers = _of_leaves(leaves) if leaves and leaves.through else _NO_LEAVES
    *_, leaf, _, _, opened, stretches = leaf_numbers
    count = stretches * opened * leaf + lines.count
    found = torch.empty(kv_heads, count, dtype=torch.int32) if stretches else None
    votes = torch.empty(kv_heads, count)
    call = _Call(queries.data_ptr(), exact.data_ptr(), codes.data_ptr(), steps.data_ptr(), scales.data_ptr(),
                 strays.data_ptr(), bases.data_ptr(), *line_pointers, *leaf_pointers,
                 None if found is None else found.data_ptr(), votes.data_ptr(),
                 kv_heads, rows, width, exact.dtype == torch.float16, _from_head('entries', exact), entries.offset,
                 _from_head('codes', codes), _from_head('steps', steps), _from_head('scales', scales), entries.base,
                 entries.stop, entries.volume, _from_head('entries of strays', strays), entries.first_stray,
                 _from_head('entries of leaves', bases), entries.first_leaf, entries.leaf, *line_numbers, *leaf_numbers)
    if not library.statekv_page_votes(ctypes.byref(call)):
        raise MemoryError(f'there is no room for the scores of {rows} rows and {count} pages: ask a shorter question')
    return lines.numbers if found is None else found, votes


def _of_lines(lines: Lines) -> tuple[tuple, tuple]:
    flat, numbers = lines.flat, lines.numbers
    return ((flat.places.data_ptr(), flat.groups.data_ptr(), None if numbers is None else numbers.data_ptr(),
             flat.sizes.data_ptr()),
            (lines.count, _from_head('places', flat.places), 0 if numbers is None else _from_head('numbers', numbers),
             _from_head('sizes', flat.sizes)))


def _of_leaves(leaves: Leaves) -> tuple[tuple, tuple]:
    entries, pages = leaves.entries, leaves.pages
    if not 0 < leaves.opened <= min(part.stop - part.start for _, part in leaves.through):
        raise ValueError(f'opened must be positive and no more than the leaves of a stretch, got {leaves.opened} and '
                         f'{[part.stop - part.start for _, part in leaves.through]}')
    through = [number for group, part in leaves.through for number in (group, part.start, part.stop)]
    return ((entries.data_ptr(), pages.data_ptr(), leaves.size.data_ptr(), leaves.sizes.data_ptr(),
             ctypes.cast((ctypes.c_int64 * len(through))(*through), ctypes.c_void_p)),
            (entries.dtype == torch.float16, _from_head('entries of leaves', entries), _from_head('pages', pages),
             pages.shape[2], leaves.first_place, leaves.first, leaves.opened, len(leaves.through)))


def _from_head(name: str, tensor: torch.Tensor) -> int:
    """How many numbers the next KV head's are further on; 0 where all have the same."""
    if not (tensor.is_contiguous() or tensor[0].is_contiguous()):
        raise ValueError(f"implementation 'cpu' needs {name} that lie one behind the other in each KV head, got strides "
                         f'{tensor.stride()} of {tuple(tensor.shape)}')
    return tensor.stride(0) if len(tensor) > 1 else 0
