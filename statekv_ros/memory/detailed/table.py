"""The pages that are held, oldest first: where each lies, how long it is, and its entry in the index."""
from array import array

import numpy as np
import torch

from statekv_ros.backbones.base import KVLayout
from statekv_ros.kernels.page_votes import Entries
from statekv_ros.memory.detailed.index import PageIndex
from statekv_ros.memory.detailed.leaves import CHAPTER, LEAF, Leaves
from statekv_ros.memory.detailed.pages import Stretch
from statekv_ros.memory.detailed.room import give_back, zeros

ENTRY_DTYPE = torch.float16     # of a model in fp32 too: an entry only says what to read, and there are many
_FIRST_PAGES = 64


class PageTable:
    """Pages have numbers that count from the stream's first page and never change; `first` is the oldest one that is held.

    The arrays slide: pages are added behind and go at the front, and what is left moves to the front once the end is reached.

    Entries lie at places, which count as pages do: that of a page is its number, but where a chapter is sorted, its places hold
    its pages leaf by leaf, in each layer and KV head in an order of its own (`Leaves`). Where volumes are sorted, places have
    codes of 4 bits (`Codes`); only those behind them, a volume and some chapters at most, and strays have exact entries.

    Attributes:
        first: number of the oldest page held.
        near: pages before this number are not on the device.
        boundary: pages before this number are in few bits, all others are exact; boundary_there: the same on the device, [1]
            int64, where it is until the device comes to what changes it.
        stop: number of the page that comes next.
        leaves: the second level of the index.
    """

    def __init__(self, layout: KVLayout, index: PageIndex, query_squares: torch.Tensor | None = None):
        """query_squares: as `Backbone.query_squares`; what is alike is told by them."""
        self.index = index
        self.boundary_there = torch.zeros(1, dtype=torch.int64, device=layout.device)
        self.first = self.near = self.boundary = self.stop = 0
        self._layout = layout
        self._front = 0
        self._offset = 0        # from the number of a page to where its exact entry lies
        self._stretches = array('q')    # number of the first page, position and shift of each, oldest first
        self.leaves = Leaves(layout, index, ENTRY_DTYPE, None if query_squares is None else index.says(query_squares))
        self._allocate(0)
        self._allocate_exact(0)

    @property
    def boundary(self) -> int:
        return self._boundary

    @boundary.setter
    def boundary(self, number: int) -> None:
        self._boundary = number
        self.boundary_there.fill_(number)

    @property
    def device(self) -> torch.device:
        return self._layout.device

    @property
    def head_dim(self) -> int:
        return self._layout.head_dim

    @property
    def bytes(self) -> int:
        """Bytes of the index and of the page table, entries that are not in use included."""
        return self._of_pages.nbytes + self._exact.nbytes + self.leaves.codes.bytes + self.leaves.bytes

    @property
    def page_bytes(self) -> int:
        """Bytes of a page once it is sorted, its share of the leaves included."""
        return self._of_pages.shape[0] * torch.int32.itemsize + self.leaves.codes.page_bytes + self.leaves.page_bytes

    def bytes_of(self, pages: int) -> int:
        """Bytes of so many pages, without room that is not in use: of the newest ones as many as may be exact at most."""
        layout = self._layout
        exact = layout.layers * layout.kv_heads * self.index.entry_width(layout.head_dim) * ENTRY_DTYPE.itemsize
        newest = min(pages, self.leaves.codes.volume + 2 * CHAPTER)
        return pages * self.page_bytes + newest * (exact - self.leaves.codes.page_bytes)

    @property
    def _first_exact(self) -> int:
        """Number of the oldest page without codes."""
        return max(self.first, self.leaves.codes.stop)

    def append(self, entries: torch.Tensor, row: int, tokens: int, stretch: Stretch = Stretch(0, 0)) -> None:
        """Add a step's pages, as `page_lengths` cuts them.

        Args:
            entries: [layers, kv_heads, pages, entry_width].
            row, tokens: first row and rows of the step.
            stretch: the one that it stands in.
        """
        count, live = entries.shape[2], self.stop - self.first
        first = self._first_exact
        # What was there before these: the newest step's entries lie one behind the other until the next one comes.
        self.leaves.grow(self._exact_of(first), first, count)
        if self._first_exact > first:       # a volume has become codes
            give_back(self._exact[:, :, first + self._offset:self._first_exact + self._offset])
        if self.stop + self._offset + count > self._exact.shape[2]:
            self._slide_exact(count)
        if self._front + live + count > self._starts.shape[0]:
            self._slide(max(_FIRST_PAGES, 2 * (live + count)))
        at, stop = slice(self._front + live, self._front + live + count), self.stop + self._offset
        self._exact[:, :, stop:stop + count] = entries.clamp(torch.finfo(ENTRY_DTYPE).min, torch.finfo(ENTRY_DTYPE).max)
        # Computed where it is wanted: the host has nothing to send.
        cuts = torch.arange(count + 1, dtype=torch.int32, device=self._layout.device) * tokens // count
        self._starts[at], self._lengths[at] = cuts[:-1] + row, cuts[1:] - cuts[:-1]
        torch.log(self._lengths[at], out=self._sizes[at])
        own = array('q', (stretch.position, stretch.shift))
        if self._stretches[-2:] != own:
            self._stretches.append(self.stop)
            self._stretches.extend(own)
        self.stop += count

    def forget(self, count: int) -> None:
        """Let go of the oldest pages."""
        self.leaves.forget(self._exact_of(self._first_exact), self._first_exact, self.first + count)
        self._sizes[self._at(slice(self.first, self.first + count))] = float('-inf')
        self.first += count
        while len(self._stretches) > 3 and self._stretches[3] <= self.first:
            del self._stretches[:3]
        self.near = max(self.near, self.first)
        if self.boundary < self.first:
            self.boundary = self.first
        self._front += count

    def leave(self, count: int) -> None:
        """The oldest pages on the device are no longer there."""
        self.near += count
        if self.boundary < self.near:
            self.boundary = self.near

    def hide(self, first: int, count: int) -> None:
        """Pages that are lost while older ones are held: none of their tokens are read any more."""
        at = self._at(slice(first, first + count))
        self._lengths[at], self._sizes[at] = 0, float('-inf')

    def line_up_rows(self, first: int, stop: int) -> None:
        """Pages from number `first` to before `stop` lie one behind the other now, from the first row of their pool on. Computed
        on the device, so that nobody waits."""
        if first < stop:
            at = self._at(slice(first, stop))
            self._starts[at] = self._lengths[at].cumsum(0) - self._lengths[at]

    def line_up_slots(self, first: int, stop: int) -> None:
        """As `line_up_rows`, for the scales of pages in few bits."""
        if first < stop:
            self._slots[self._at(slice(first, stop))] = torch.arange(stop - first, dtype=torch.int32, device=self._layout.device)

    def pack(self, count: int, moved: int, slot: int) -> None:
        """The oldest exact pages are in few bits now, `moved` rows further on in another pool, with scales from `slot` on."""
        at = self._at(slice(self.boundary, self.boundary + count))
        self._starts[at] += moved
        self._slots[at] = torch.arange(slot, slot + count, dtype=torch.int32, device=self._layout.device)
        self.boundary += count

    def lengths(self, pages: slice) -> torch.Tensor:
        """Rows of pages by number, [pages] int32."""
        return self._lengths[self._at(pages)]

    def sizes(self, pages: slice) -> torch.Tensor:
        """Logarithms of the rows of pages by number, [pages] fp32, -inf of those that are lost, as some of the oldest leaves are.
        They are not copied: pages that are lost later are -inf from then on."""
        return self._sizes[self._at(pages)]

    def stretches(self, pages: slice) -> np.ndarray:
        """The stretches that pages by number stand in, oldest first: number of the first of the pages that does, position and
        shift, [3, stretches] int64."""
        firsts, *where = np.array(self._stretches, np.int64).reshape(-1, 3).T
        begin, end = np.searchsorted(firsts, pages.start, 'right') - 1, np.searchsorted(firsts, pages.stop)
        return np.stack([firsts.clip(min=pages.start), *where])[:, begin:end]

    def places(self, pages: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """First row, rows, and where the scales are, of pages by number; shaped as these, int32."""
        return self._of_pages[:3, pages + (self._front - self.first)].unbind(0)

    def newest_entries(self, pages: slice) -> torch.Tensor:
        """Index entries of pages of the newest step by number, in all layers, [layers, kv_heads, pages, entry_width]."""
        return self._exact[:, :, pages.start + self._offset:pages.stop + self._offset]

    def lying(self, layer: int, pages: slice) -> tuple[slice | torch.Tensor, torch.Tensor]:
        """The places of pages by number, as a `Line` has them, and which page each is, [kv_heads or 1, pages] int64; strays
        whose entries are elsewhere are the last ones in each KV head."""
        chapters, device = self.leaves.chapters(layer), self.device
        first, stop = chapters.start * CHAPTER, chapters.stop * CHAPTER
        begin, end = pages.start, pages.stop
        if first < begin < stop:
            begin = self.leaves.together(layer, begin // CHAPTER).start * CHAPTER
        if first < end < stop:
            end = self.leaves.together(layer, (end - 1) // CHAPTER).stop * CHAPTER
        whole = slice(begin, end)
        begin, end = max(first, whole.start), min(stop, whole.stop)
        if begin >= end:
            return pages, torch.arange(pages.start, pages.stop, device=device)[None]
        chapters = slice(begin // CHAPTER, end // CHAPTER)
        of_leaves = self.leaves.pages(layer, chapters)
        before, behind = (torch.arange(*part, device=device).expand(len(of_leaves), -1)
                          for part in ((whole.start, begin), (end, whole.stop)))
        numbers = torch.cat([before, of_leaves, behind], dim=1)
        if whole == pages and begin >= self.leaves.codes.stop:
            return pages, numbers
        # Some of a chapter or volume lie elsewhere in each KV head, and are as many; strays that have no code are the last ones.
        places = torch.cat([before, self.leaves.places(layer, chapters), behind], dim=1)
        unwanted = (numbers < pages.start) | (numbers >= pages.stop)
        order = (places < 0).int().masked_fill(unwanted, 2).argsort(dim=-1, stable=True)[:, :pages.stop - pages.start]
        return places.gather(1, order), numbers.gather(1, order)

    def layer(self, layer: int) -> Entries:
        """Index entries of a layer."""
        return self.leaves.entries(layer, self._exact[layer], self._offset)

    @property
    def columns(self) -> tuple[torch.Tensor, int]:
        """First row, rows and slot of the scales of each page, [3 or more, capacity] int32, and what to add to its number to find
        it there."""
        return self._of_pages, self._front - self.first

    def place(self) -> tuple[int, ...]:
        """Where what is known of pages lies: the same as long as a page is found where it was."""
        return (self._front - self.first, self._of_pages.data_ptr(), self._of_pages.shape[1], self._offset,
                self._exact.data_ptr(), self._exact.shape[2])

    def of_heads(self, layout: KVLayout, heads: slice) -> 'PageTable':
        """The same pages of some KV heads, for reading."""
        part = PageTable(layout, self.index)
        part.first, part.near, part.boundary, part.stop = self.first, self.near, self.boundary, self.stop
        part._front, part._offset = self._front, self._offset
        part._exact, part.leaves = self._exact[:, heads], self.leaves.of_heads(layout, heads)
        part._stretches = self._stretches
        part._share(self._of_pages)
        return part

    def _at(self, pages: slice) -> slice:
        return slice(pages.start - self.first + self._front, pages.stop - self.first + self._front)

    def _exact_of(self, first: int) -> torch.Tensor:
        """Exact entries at the places from `first` on, [layers, kv_heads, pages, entry_width]."""
        return self._exact[:, :, first + self._offset:self.stop + self._offset]

    def _allocate(self, capacity: int) -> None:
        self._share(zeros(4, capacity, dtype=torch.int32, device=self._layout.device))

    def _share(self, of_pages: torch.Tensor) -> None:
        self._of_pages = of_pages
        self._starts, self._lengths, self._slots, sizes = of_pages
        self._sizes = sizes.view(torch.float32)

    def _allocate_exact(self, capacity: int) -> None:
        layout = self._layout
        width = self.index.entry_width(layout.head_dim)
        self._exact = zeros(layout.layers, layout.kv_heads, capacity, width, dtype=ENTRY_DTYPE, device=layout.device)

    def _slide(self, capacity: int) -> None:
        kept = max(0, self.first - self.leaves.first * CHAPTER)     # see `sizes`
        of_pages = self._of_pages[:, self._at(slice(self.first - kept, self.stop))]
        self._front = kept
        self._allocate(kept + capacity)
        self._of_pages[:, :of_pages.shape[1]] = of_pages

    def _slide_exact(self, count: int) -> None:
        """Make room for `count` pages more: in front, where a volume has become codes, else elsewhere."""
        first = self._first_exact
        held, needed = self._exact_of(first), self.stop - first + count
        front = first % LEAF        # leaves lie at multiples of their length
        if front + needed > self._exact.shape[2] or front + held.shape[2] > first + self._offset:
            room = max(_FIRST_PAGES, needed + min(needed, CHAPTER))
            self._allocate_exact((-(-room // LEAF) + 1) * LEAF)     # as much wherever the first one lies
        self._offset = front - first
        self._exact_of(first).copy_(held)
        give_back(self._exact[:, :, self.stop + self._offset:])
