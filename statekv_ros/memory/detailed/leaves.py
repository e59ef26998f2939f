"""The index's second level: over hours even the entries are many, and no pass should score them all.

What is alike is seldom seen in one piece. So each layer and KV head sorts every `CHAPTER` pages, once they are complete, into
leaves of `LEAF` pages whose entries are alike, by halving along the direction in which they differ most, and has their entries
lie leaf by leaf from then on. A leaf has an entry as a page has: a query scores the leaves first, and then the pages of the
best ones. The more pages are sorted together, the more alike are those of a leaf: so every `VOLUME` chapters are sorted anew
later, as one; what will be scored of them then, for hours, are their leaves' entries and codes of what differs (`Codes`).

What was seen once in hours is like nothing else, and the entry of a leaf, which is of what its pages have in common, tells
nothing of it. So the pages that are least like the others of their leaves are strays: each has an exact entry of its own, which
is scored in every pass, and its leaf's entry is made without it. It has a place among the others of its leaf all the same.
"""
import torch

from statekv_ros.backbones.base import KVLayout
from statekv_ros.kernels.page_votes import Entries
from statekv_ros.memory.detailed.codes import Codes
from statekv_ros.memory.detailed.index import PageIndex
from statekv_ros.memory.detailed.room import give_back_free_memory, room_for, zeros

CHAPTER = 1024      # pages
LEAF = 32           # pages; CHAPTER is a power of two times as many
LEAVES = CHAPTER // LEAF
STRAYS = CHAPTER // 32     # of a chapter; of those that are sorted together as many for each
VOLUME = 4          # chapters; a power of two
_ROUNDS = 4         # of power iteration: the direction need not be exact


class Leaves:
    """Leaves of whole chapters. Chapter c has the pages from number c * CHAPTER on; one that lost a page is none any more, and
    its entries lie by number again; but where these are codes, they stay as they are until all of their volume is lost.

    Chapters are sorted layer by layer, a few layers for each step that is added, so that no step bears all of it; volumes, which
    begin at multiples of `VOLUME`, KV head by KV head. One that loses a page before that is done is chapters again. The arrays
    slide as those of the page table.

    Attributes:
        first: number of the oldest chapter held; of one that begins a volume of codes, pages may be lost.
        codes: entries of pages in volumes.
    """

    def __init__(self, layout: KVLayout, index: PageIndex, dtype: torch.dtype, says: torch.Tensor | None = None):
        """says: how much each number of an entry has to say in scores, [layers, kv_heads, entry_width]; None: all as much."""
        self.first = 0
        self._layout, self._index, self._dtype, self._says = layout, index, dtype, says
        self._stops = [0] * layout.layers       # chapters before this one are sorted, in each layer
        self._begun = [0] * layout.layers       # volumes before this one are sorted, in some KV head at least, in each layer,
        self._whole = 0                         # but not those before this one, which lost pages
        self._volume = self._heads_sorted = 0   # that which is sorted now; in so many KV heads, counted through all layers
        self._base = 0                          # chapter at the arrays' front
        self.codes = Codes(layout, index.entry_width(layout.head_dim), VOLUME * CHAPTER, LEAF)
        self._pages, self._entries, self._strays, self._of_strays = self._empty(0)

    @property
    def bytes(self) -> int:
        """Bytes of all leaves and strays, those not in use included, without the codes."""
        return self._pages.nbytes + self._entries.nbytes + self._strays.nbytes + self._of_strays.nbytes

    @property
    def page_bytes(self) -> int:
        """Bytes for each page, rounded up."""
        entry = self._index.entry_width(self._layout.head_dim) * self._dtype.itemsize
        chapter = LEAVES * (LEAF * torch.int32.itemsize + entry) + STRAYS * (torch.int32.itemsize + entry)
        return -(-self._layout.layers * self._layout.kv_heads * chapter // CHAPTER)

    @property
    def stops(self) -> list[int]:
        """Number of the first chapter that is not sorted yet, in each layer; `first` where none is."""
        return [max(self.first, stop) for stop in self._stops]

    def grow(self, entries: torch.Tensor, first: int, count: int) -> None:
        """Sort what is complete, as much of it as goes with new pages.

        Args:
            entries: at all places held that have no codes, [layers, kv_heads, pages, entry_width]; sorted here.
            first: number of the oldest of their pages.
            count: pages that are new.
        """
        layers, stop = len(self._stops), first + entries.shape[2]
        sorted_before = min(self.stops), self.codes.stop
        for _ in range(-(-count * layers // CHAPTER)):
            chapter, layer = min(zip(self.stops, range(layers)))
            if (chapter + 1) * CHAPTER > stop:
                break
            if chapter - self._base >= self._pages.shape[2] // LEAVES:
                self._slide(1 + room_for(chapter + 1 - self.first))
            at = slice((chapter - self._base) * LEAVES, (chapter + 1 - self._base) * LEAVES)
            begin = chapter * CHAPTER - first
            in_chapter = entries[layer, :, begin:begin + CHAPTER]
            places, grouped = self._sorted(layer, slice(None), in_chapter.float())
            in_chapter.copy_(grouped.flatten(1, 2))
            self._put(layer, slice(None), at, places + chapter * CHAPTER, grouped)
            self._stops[layer] = chapter + 1
        for _ in range(-(-count * layers * self._layout.kv_heads // (VOLUME * CHAPTER))):
            # Once a chapter behind it is sorted: what stands near ends within a volume less often than within a chapter, and one
            # that is not wanted whole is scored page by page.
            if (self._volume + 1) * VOLUME >= min(self.stops):
                break
            self._sort_more(entries, first)
        if entries.device.type == 'cpu' and (min(self.stops), self.codes.stop) != sorted_before:
            give_back_free_memory()     # sorting takes some MB for a moment, and leaves them in pieces

    def forget(self, entries: torch.Tensor, first: int, left: int) -> None:
        """Pages before number `left` are not held any more; `entries` and `first` as of `grow`, those pages included."""
        self.codes.forget(left)
        chapter, volume = left // CHAPTER, left // (VOLUME * CHAPTER)
        if left < self.codes.stop:
            self._whole, self.first = volume, volume * VOLUME
            return
        whole = -(-left // (VOLUME * CHAPTER))
        for layer in range(len(self._stops)):
            if whole > volume and self._whole <= volume < self._begun[layer]:
                self._part(entries, first, layer, volume)
        self._whole = whole
        if self._volume < whole:
            self._volume, self._heads_sorted = whole, 0
        if left % CHAPTER and chapter >= self.first:
            for layer, stop in enumerate(self._stops):
                if chapter < stop:
                    in_chapter = self._lying(entries, first, layer, slice(chapter, chapter + 1))
                    pages = self.pages(layer, slice(chapter, chapter + 1)) - chapter * CHAPTER
                    in_chapter.copy_(in_chapter.gather(1, pages.argsort(dim=-1)[..., None].expand_as(in_chapter)))
        self.first = -(-left // CHAPTER)

    def together(self, layer: int, chapter: int) -> slice:
        """The chapters that a sorted one is sorted with: their places hold their pages in any order."""
        volume = chapter // VOLUME
        if self._whole <= volume < self._begun[layer]:
            return slice(volume * VOLUME, (volume + 1) * VOLUME)
        return slice(chapter, chapter + 1)

    def state(self, layer: int) -> tuple[int, ...]:
        """Changes when pages of a layer lie otherwise than before."""
        return self.first, self.stops[layer], self._whole, self._volume, self._heads_sorted

    def chapters(self, layer: int) -> slice:
        """Those that are sorted."""
        return slice(self.first, max(self.first, self._stops[layer]))

    def pages(self, layer: int, chapters: slice) -> torch.Tensor:
        """Pages by number, leaf by leaf, of some chapters, [kv_heads, pages] int64."""
        return by_number(self._pages[layer, :, self._at(chapters)]).flatten(1).long()

    def places(self, layer: int, chapters: slice) -> torch.Tensor:
        """Where the entries of all places of some chapters are, [kv_heads, pages] int64: at the place, or, of a stray whose place
        has a code, at ~index among the strays. No volume is cut by `chapters`."""
        begin, stop = chapters.start * CHAPTER, chapters.stop * CHAPTER
        strays = self._pages[layer, :, self._at(chapters)].flatten(1) < 0
        places = torch.arange(begin, stop, device=strays.device)
        index = strays.cumsum(dim=-1) + (chapters.start * STRAYS - 1)
        return torch.where(strays & (places < self.codes.stop), ~index, places)

    def strays(self, layer: int, chapters: slice) -> tuple[slice, torch.Tensor]:
        """The strays of some chapters, none of which is sorted with others: which of all strays they are, as many for each
        chapter, and which page each is, [kv_heads, strays] int32."""
        at = slice((chapters.start - self._base) * STRAYS, (chapters.stop - self._base) * STRAYS)
        return slice(chapters.start * STRAYS, chapters.stop * STRAYS), self._strays[layer, :, at]

    def entries(self, layer: int, exact: torch.Tensor, offset: int) -> Entries:
        """Entries of all places of a layer; `exact` and `offset` as `Entries` has them."""
        return Entries(exact, offset, *self.codes.layer(layer), self.codes.stop, self.codes.volume, LEAF, self._entries[layer],
                       self._base * CHAPTER, self._of_strays[layer], self._base * STRAYS)

    def layer(self, layer: int) -> tuple[torch.Tensor, torch.Tensor, int]:
        """Entries [kv_heads, leaves, entry_width] and pages [kv_heads, leaves, LEAF] int32, as `kernels.page_votes.Leaves` has
        them, of a layer's leaves, and the chapter that they begin with."""
        return self._entries[layer], self._pages[layer], self._base

    def place(self) -> tuple[int, ...]:
        """Where leaves and codes lie, and what `state` says of all layers."""
        return (*self.codes.place(), self._base, self._pages.data_ptr(), self._entries.data_ptr(), self._strays.data_ptr(),
                self._of_strays.data_ptr(), self._pages.shape[2], self.first, *self.stops, self._whole, self._volume,
                self._heads_sorted)

    def of_heads(self, layout: KVLayout, heads: slice) -> 'Leaves':
        """The same of some KV heads, for reading."""
        part = Leaves(layout, self._index, self._dtype)
        part.first, part._base, part._stops = self.first, self._base, list(self._stops)
        part._begun, part._whole = list(self._begun), self._whole
        part._pages, part._entries, part._strays, part._of_strays = (
            of_all[:, heads] for of_all in (self._pages, self._entries, self._strays, self._of_strays))
        part.codes = self.codes.of_heads(layout, heads)
        return part

    def _sort_more(self, entries: torch.Tensor, first: int) -> None:
        """Sort the next volume in one KV head more; arguments as of `grow`."""
        layer, head = divmod(self._heads_sorted, self._layout.kv_heads)
        chapters, heads = slice(self._volume * VOLUME, (self._volume + 1) * VOLUME), slice(head, head + 1)
        begin = chapters.start * CHAPTER - first
        in_volume = entries[layer, heads, begin:begin + VOLUME * CHAPTER]
        places, grouped = self._sorted(layer, heads, in_volume.float())
        in_volume.copy_(grouped.flatten(1, 2))
        pages = self.pages(layer, chapters)[heads].gather(1, places.flatten(1)).view(places.shape)
        strays, differences = self._put(layer, heads, self._at(chapters), pages, grouped)
        self.codes.put(layer, heads, self._volume, differences, strays)
        self._begun[layer] = self._volume + 1
        self._heads_sorted += 1
        if self._heads_sorted == len(self._stops) * self._layout.kv_heads:
            self.codes.finish(self._volume)
            self._volume, self._heads_sorted = self._volume + 1, 0

    def _part(self, entries: torch.Tensor, first: int, layer: int, volume: int) -> None:
        """Make a volume chapters again, each with its pages in the order that they have: what is alike stays side by side."""
        chapters = slice(volume * VOLUME, (volume + 1) * VOLUME)
        in_volume, pages = self._lying(entries, first, layer, chapters), self.pages(layer, chapters)
        order = (pages // CHAPTER).argsort(dim=-1, stable=True)
        in_volume.copy_(in_volume.gather(1, order[..., None].expand_as(in_volume)))
        pages = pages.gather(1, order).view(len(order), VOLUME, LEAVES, LEAF)
        grouped = in_volume.float().view(*pages.shape, -1)
        for each, chapter in enumerate(range(chapters.start, chapters.stop)):
            self._put(layer, slice(None), self._at(slice(chapter, chapter + 1)), pages[:, each], grouped[:, each])

    def _lying(self, entries: torch.Tensor, first: int, layer: int, chapters: slice) -> torch.Tensor:
        """Entries of all places of some chapters that have no codes, where they lie, [kv_heads, pages, entry_width]."""
        return entries[layer, :, chapters.start * CHAPTER - first:chapters.stop * CHAPTER - first]

    def _put(self, layer: int, heads: slice, at: slice, pages: torch.Tensor,
             grouped: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Make leaves.

        Args:
            at: which, counted from the arrays' front.
            pages: numbers of their pages, [kv_heads, leaves, LEAF]; grouped: their entries, [..., entry_width] fp32.

        Returns:
            Which of the pages are strays, [kv_heads, leaves, LEAF] bool; by how much each differs from its leaf's entry,
            [kv_heads, leaves, LEAF, entry_width] fp32.
        """
        strays, common = self._apart(layer, heads, grouped)
        pages, entries = pages.flatten(1), grouped.flatten(1, 2)
        of_leaves = slice(at.start // LEAVES * STRAYS, at.stop // LEAVES * STRAYS)
        self._strays[layer, heads, of_leaves] = pages.gather(1, strays).int()
        of_strays = entries.gather(1, strays[..., None].expand(-1, -1, entries.shape[2]))
        self._of_strays[layer, heads, of_leaves] = self._as_kept(of_strays)
        self._pages[layer, heads, at] = pages.scatter(1, strays, ~pages.gather(1, strays)).int().unflatten(1, (-1, LEAF))
        leaves = self._as_kept(self._index.group(common))
        self._entries[layer, heads, at] = leaves
        return (torch.zeros_like(pages, dtype=torch.bool).scatter_(1, strays, True).view(grouped.shape[:3]),
                grouped - leaves[:, :, None])

    def _as_kept(self, entries: torch.Tensor) -> torch.Tensor:
        limits = torch.finfo(self._dtype)
        return entries.clamp(limits.min, limits.max).to(self._dtype)

    def _apart(self, layer: int, heads: slice, grouped: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Which pages of leaves that are sorted together are strays, counted from the first leaf's first, ascending, [kv_heads,
        strays] int64; and entries without them: the mean of the leaf's other pages in their place. Arguments as of `_put`."""
        mean = grouped.mean(dim=2, keepdim=True)
        unlike = (grouped - mean if self._says is None else (grouped - mean) * self._says[layer, heads, None, None]).norm(dim=-1)
        strays = unlike.flatten(1).topk(grouped.shape[1] // LEAVES * STRAYS, dim=-1).indices.sort(dim=-1).values
        apart = torch.zeros_like(unlike, dtype=torch.bool).flatten(1).scatter_(1, strays, True).view(unlike.shape)[..., None]
        others = LEAF - apart.sum(dim=2, keepdim=True)
        of_others = grouped.masked_fill(apart, 0).sum(dim=2, keepdim=True) / others.clamp_min(1)
        return strays, torch.where(apart, torch.where(others > 0, of_others, mean), grouped)

    def _at(self, chapters: slice) -> slice:
        return slice((chapters.start - self._base) * LEAVES, (chapters.stop - self._base) * LEAVES)

    def _empty(self, chapters: int) -> tuple[torch.Tensor, ...]:
        """Pages and entries of leaves, numbers and entries of strays."""
        shape = self._layout.layers, self._layout.kv_heads
        device, width = self._layout.device, self._index.entry_width(self._layout.head_dim)
        return (zeros(*shape, chapters * LEAVES, LEAF, dtype=torch.int32, device=device),
                zeros(*shape, chapters * LEAVES, width, dtype=self._dtype, device=device),
                zeros(*shape, chapters * STRAYS, dtype=torch.int32, device=device),
                zeros(*shape, chapters * STRAYS, width, dtype=self._dtype, device=device))

    def _slide(self, chapters: int) -> None:
        gone, old = max(0, self.first - self._base), (self._pages, self._entries, self._strays, self._of_strays)
        new = self._pages, self._entries, self._strays, self._of_strays = self._empty(chapters)
        for each, before, of_chapter in zip(new, old, (LEAVES, LEAVES, STRAYS, STRAYS)):
            kept = before[:, :, gone * of_chapter:]
            each[:, :, :kept.shape[2]] = kept
        self._base = self.first

    def _sorted(self, layer: int, heads: slice, entries: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Places in a chapter or volume, [kv_heads, leaves, LEAF] int64, and entries of each leaf's pages, [kv_heads, leaves,
        LEAF, entry_width], of its entries [kv_heads, pages, entry_width] in these heads of a layer."""
        kv_heads, count, width = entries.shape
        places = torch.arange(count, device=entries.device).expand(kv_heads, 1, -1)
        told = entries if self._says is None else entries * self._says[layer, heads, None]
        parts = told[:, None]
        while places.shape[2] > LEAF:
            parts = parts - parts.mean(dim=2, keepdim=True)
            direction = parts[:, :, :1]
            for _ in range(_ROUNDS):
                direction = direction / direction.norm(dim=-1, keepdim=True).clamp_min(1e-12)
                direction = (parts @ direction.transpose(2, 3)).transpose(2, 3) @ parts
            order = (parts @ direction.transpose(2, 3)).squeeze(-1).argsort(dim=-1)
            places = places.gather(2, order).view(kv_heads, -1, places.shape[2] // 2)
            parts = told.gather(1, places.flatten(1)[..., None].expand(-1, -1, width)).view(*places.shape, width)
        return places, entries.gather(1, places.flatten(1)[..., None].expand(-1, -1, width)).view(*places.shape, width)


def by_number(pages: torch.Tensor) -> torch.Tensor:
    """Numbers of pages of leaves, strays or not."""
    return torch.where(pages < 0, ~pages, pages)
