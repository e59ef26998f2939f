"""The pages that are held, oldest first: where each lies, how long it is, and its entry in the index."""
import torch

from statekv_ros.backbones.base import KVLayout
from statekv_ros.memory.detailed.index import PageIndex

_FIRST_PAGES = 64


class PageTable:
    """Pages have numbers that count from the stream's first page and never change; `first` is the oldest one that is held.

    The arrays slide: pages are added behind and go at the front, and what is left moves to the front once the end is reached.

    Attributes:
        first: number of the oldest page held.
        stop: number of the page that comes next.
    """

    def __init__(self, layout: KVLayout, index: PageIndex):
        self.index = index
        self.first = self.stop = 0
        self._layout = layout
        self._front = 0
        self._dtype = torch.float32 if layout.dtype == torch.float32 else torch.float16
        self._allocate(0)

    @property
    def bytes(self) -> int:
        """Bytes of the index and of the page table."""
        return self._entries.nbytes + self._starts.nbytes + self._lengths.nbytes

    def append(self, entries: torch.Tensor, row: int, tokens: int) -> None:
        """Add a step's pages, as `page_lengths` cuts them.

        Args:
            entries: [layers, kv_heads, pages, entry_width].
            row, tokens: first row and rows of the step.
        """
        count, live = entries.shape[2], self.stop - self.first
        if self._front + live + count > self._starts.shape[0]:
            self._slide(max(_FIRST_PAGES, 2 * (live + count)))
        at = slice(self._front + live, self._front + live + count)
        self._entries[:, :, at] = entries.clamp(torch.finfo(self._dtype).min, torch.finfo(self._dtype).max)
        # Computed where it is wanted: the host has nothing to send.
        cuts = torch.arange(count + 1, dtype=torch.int32, device=self._layout.device) * tokens // count
        self._starts[at], self._lengths[at] = cuts[:-1] + row, cuts[1:] - cuts[:-1]
        self.stop += count

    def forget(self, count: int) -> None:
        """Let go of the oldest pages."""
        self.first += count
        self._front += count

    def line_up(self) -> None:
        """All pages held lie one behind the other now, from the first row on."""
        held = slice(self._front, self._front + self.stop - self.first)
        self._starts[held] = self._lengths[held].cumsum(0) - self._lengths[held]

    def starts(self, pages: slice) -> torch.Tensor:
        """First row of pages by number, [pages] int32."""
        return self._starts[self._at(pages)]

    def lengths(self, pages: slice) -> torch.Tensor:
        """Rows of pages by number, [pages] int32."""
        return self._lengths[self._at(pages)]

    def entries(self, layer: int, pages: slice) -> torch.Tensor:
        """Index entries of pages by number, [kv_heads, pages, entry_width]."""
        return self._entries[layer, :, self._at(pages)]

    def of_heads(self, layout: KVLayout, heads: slice) -> 'PageTable':
        """The same pages of some KV heads, for reading."""
        part = PageTable(layout, self.index)
        part.first, part.stop, part._front = self.first, self.stop, self._front
        part._entries, part._starts, part._lengths = self._entries[:, heads], self._starts, self._lengths
        return part

    def _at(self, pages: slice) -> slice:
        return slice(pages.start - self.first + self._front, pages.stop - self.first + self._front)

    def _allocate(self, capacity: int) -> None:
        layout = self._layout
        width = self.index.entry_width(layout.head_dim)
        self._entries = torch.zeros(layout.layers, layout.kv_heads, capacity, width, dtype=self._dtype, device=layout.device)
        self._starts, self._lengths = (torch.zeros(capacity, dtype=torch.int32, device=layout.device) for _ in range(2))

    def _slide(self, capacity: int) -> None:
        live = slice(self._front, self._front + self.stop - self.first)
        entries, starts, lengths = self._entries[:, :, live], self._starts[live], self._lengths[live]
        self._allocate(capacity)
        count = starts.shape[0]
        self._entries[:, :, :count], self._starts[:count], self._lengths[:count] = entries, starts, lengths
        self._front = 0
