"""Every compiled variant of page votes that answers of a model can need, run once on noise."""
import torch

from .candidates import Entries, Leaves, Line, Lines
from .places import PageColumns

_LEAVES, _OPENED, _CHOSEN = 20, 3, 9        # of noise; what is compiled knows no number of them


def run_variants(kv_heads: int, width: int, leaf: int, volume: int, dtype: torch.dtype, device: torch.device) -> list[str]:
    """Launch each kernel: with pages scored one by one and through leaves, which a memory has only after hours, and with places
    of one pool and of two.

    Args:
        width: numbers in an entry; leaf: pages in one; volume: places whose codes have the same steps; dtype: of other entries.

    Returns:
        what was run, in words.

    Raises:
        Exception: a kernel cannot be compiled or launched; see `fitness.explain`.
    """
    from .triton import triton_page_places, triton_page_votes
    pages = _LEAVES * leaf
    queries = torch.randn(1, kv_heads, 1, width, device=device)
    entries = torch.zeros(kv_heads, pages, width, dtype=dtype, device=device)
    sizes = torch.zeros(pages, device=device)
    numbers = torch.arange(pages, dtype=torch.int32, device=device)
    listed = Lines([Line(0, slice(0, leaf), sizes[None, None, :leaf])], numbers[None, :leaf])
    through = Leaves(entries[:, ::leaf].contiguous(), numbers.view(1, _LEAVES, leaf).repeat(kv_heads, 1, 1), 0,
                     [(0, slice(0, _LEAVES))], _OPENED, sizes[:1].view(1, 1, 1), sizes, 0)
    for each in (None, through):
        triton_page_votes(queries, Entries.plain(entries)._replace(volume=volume, leaf=leaf), listed, each)    # in 4 bits: the same
    ran = ['pages one by one', 'pages through leaves']
    columns, moves = (torch.ones(*shape, pages, dtype=torch.int32, device=device) for shape in ((3,), ()))
    boundary = torch.tensor([pages - 1], device=device)
    best = torch.arange(_CHOSEN, device=device).repeat(kv_heads, 1)
    for packed in (False, True):
        for of_pages in (None, numbers[None]):
            for moved in (None, moves):
                for unwanted in (None, moves > 1):
                    triton_page_places(best, best.float(), of_pages, 0,
                                       PageColumns(columns, 0, 0, pages, boundary, packed, 1, 0, moved, unwanted), _CHOSEN)
    return [*ran, 'places of chosen pages']
