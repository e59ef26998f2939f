"""The index's second level: over hours even the entries are many, and no pass should score them all.

What is alike is seldom seen in one piece. So each layer and KV head sorts every `CHAPTER` pages, once they are complete, into
leaves of `LEAF` pages whose entries are alike, by halving along the direction in which they differ most, and has their entries
lie leaf by leaf from then on. A leaf has an entry as a page has: a query scores the leaves first, and then the pages of the best
ones.
"""
import torch

from statekv_ros.backbones.base import KVLayout
from statekv_ros.memory.detailed.index import PageIndex

CHAPTER = 1024      # pages
LEAF = 16           # pages; CHAPTER is a power of two times as many
LEAVES = CHAPTER // LEAF
_ROUNDS = 4         # of power iteration: the direction need not be exact


class Leaves:
    """Leaves of whole chapters. Chapter c has the pages from number c * CHAPTER on; one that lost a page is none any more, and
    its entries lie by number again.

    Chapters are sorted layer by layer, a few layers for each step that is added, so that no step bears all of it. The arrays
    slide as those of the page table.

    Attributes:
        first: number of the oldest chapter held.
    """

    def __init__(self, layout: KVLayout, index: PageIndex, dtype: torch.dtype):
        self.first = 0
        self._layout, self._index, self._dtype = layout, index, dtype
        self._stops = [0] * layout.layers       # chapters before this one are sorted, in each layer
        self._base = 0                          # chapter at the arrays' front
        self._pages, self._entries = self._empty(0)

    @property
    def bytes(self) -> int:
        """Bytes of all leaves, those not in use included."""
        return self._pages.nbytes + self._entries.nbytes

    @property
    def page_bytes(self) -> int:
        """Bytes for each page, rounded up."""
        leaf = LEAF * torch.int32.itemsize + self._index.entry_width(self._layout.head_dim) * self._dtype.itemsize
        return self._layout.layers * self._layout.kv_heads * -(-leaf // LEAF)

    @property
    def stops(self) -> list[int]:
        """Number of the first chapter that is not sorted yet, in each layer; `first` where none is."""
        return [max(self.first, stop) for stop in self._stops]

    def grow(self, entries: torch.Tensor, first: int, count: int) -> None:
        """Sort what is complete, as much of it as goes with new pages.

        Args:
            entries: at all places held, [layers, kv_heads, pages, entry_width]; sorted here.
            first: number of the oldest page.
            count: pages that are new.
        """
        layers, stop = len(self._stops), first + entries.shape[2]
        for _ in range(-(-count * layers // CHAPTER)):
            chapter, layer = min(zip(self.stops, range(layers)))
            if (chapter + 1) * CHAPTER > stop:
                break
            if chapter - self._base >= self._pages.shape[2] // LEAVES:
                self._slide(max(1, 2 * (chapter + 1 - self.first)))
            at = slice((chapter - self._base) * LEAVES, (chapter + 1 - self._base) * LEAVES)
            begin = chapter * CHAPTER - first
            in_chapter = entries[layer, :, begin:begin + CHAPTER]
            pages, grouped = self._sorted(in_chapter.float())
            in_chapter.copy_(grouped.flatten(1, 2))
            self._pages[layer, :, at] = pages + chapter * CHAPTER
            self._entries[layer, :, at] = self._index.group(grouped).clamp(
                torch.finfo(self._dtype).min, torch.finfo(self._dtype).max)
            self._stops[layer] = chapter + 1

    def forget(self, entries: torch.Tensor, first: int, left: int) -> None:
        """Pages before number `left` are not held any more; `entries` and `first` as of `grow`, those pages included."""
        chapter = left // CHAPTER
        if left % CHAPTER and chapter >= self.first:
            begin = chapter * CHAPTER - first
            for layer, stop in enumerate(self._stops):
                if chapter < stop:
                    in_chapter = entries[layer, :, begin:begin + CHAPTER]
                    pages = self.pages(layer, slice(chapter, chapter + 1)) - chapter * CHAPTER
                    in_chapter.copy_(in_chapter.gather(1, pages.argsort(dim=-1)[..., None].expand_as(in_chapter)))
        self.first = -(-left // CHAPTER)

    def chapters(self, layer: int) -> slice:
        """Those that are sorted."""
        return slice(self.first, max(self.first, self._stops[layer]))

    def entries(self, layer: int, chapters: slice) -> torch.Tensor:
        """Of the leaves of some chapters, as `page_votes` takes them, [kv_heads, leaves, entry_width]."""
        return self._entries[layer, :, self._at(chapters)]

    def pages(self, layer: int, chapters: slice) -> torch.Tensor:
        """Pages by number, leaf by leaf, of some chapters, [kv_heads, pages] int64."""
        return self._pages[layer, :, self._at(chapters)].flatten(1).long()

    def layer(self, layer: int) -> tuple[torch.Tensor, torch.Tensor, int]:
        """Entries [kv_heads, leaves, entry_width] and pages [kv_heads, leaves, LEAF] int32 of a layer's leaves, and the chapter
        that they begin with."""
        return self._entries[layer], self._pages[layer], self._base

    def of_heads(self, layout: KVLayout, heads: slice) -> 'Leaves':
        """The same of some KV heads, for reading."""
        part = Leaves(layout, self._index, self._dtype)
        part.first, part._base, part._stops = self.first, self._base, list(self._stops)
        part._pages, part._entries = self._pages[:, heads], self._entries[:, heads]
        return part

    def _at(self, chapters: slice) -> slice:
        return slice((chapters.start - self._base) * LEAVES, (chapters.stop - self._base) * LEAVES)

    def _empty(self, chapters: int) -> tuple[torch.Tensor, torch.Tensor]:
        shape = self._layout.layers, self._layout.kv_heads, chapters * LEAVES
        device, width = self._layout.device, self._index.entry_width(self._layout.head_dim)
        return (torch.zeros(*shape, LEAF, dtype=torch.int32, device=device),
                torch.zeros(*shape, width, dtype=self._dtype, device=device))

    def _slide(self, chapters: int) -> None:
        kept = slice(max(0, self.first - self._base) * LEAVES, None)
        old = self._pages[:, :, kept], self._entries[:, :, kept]
        self._pages, self._entries = self._empty(chapters)
        self._pages[:, :, :old[0].shape[2]], self._entries[:, :, :old[1].shape[2]] = old
        self._base = self.first

    def _sorted(self, entries: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Places in the chapter, [kv_heads, LEAVES, LEAF] int64, and entries of each leaf's pages, [kv_heads, LEAVES, LEAF,
        entry_width], of a chapter's entries [kv_heads, CHAPTER, entry_width]."""
        kv_heads, _, width = entries.shape
        places = torch.arange(CHAPTER, device=entries.device).expand(kv_heads, 1, -1)
        parts = entries[:, None]
        while places.shape[2] > LEAF:
            parts = parts - parts.mean(dim=2, keepdim=True)
            direction = parts[:, :, :1]
            for _ in range(_ROUNDS):
                direction = direction / direction.norm(dim=-1, keepdim=True).clamp_min(1e-12)
                direction = (parts @ direction.transpose(2, 3)).transpose(2, 3) @ parts
            order = (parts @ direction.transpose(2, 3)).squeeze(-1).argsort(dim=-1)
            places = places.gather(2, order).view(kv_heads, -1, places.shape[2] // 2)
            parts = entries.gather(1, places.flatten(1)[..., None].expand(-1, -1, width)).view(*places.shape, width)
        return places, parts
