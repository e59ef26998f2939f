"""What a store holds and what it costs, so that it knows which steps leave when the quota is full."""
from collections.abc import Iterable, Iterator

from statekv_ros.store.leaving import Held, Leaving, Name

_PAGE_BYTES = 4096              # LMDB's unit on machines with pages of 4 KiB; larger ones only round more
_TREE_BYTES = 256               # of a value in the tree: its entry in half-filled pages, twice
_IN_TREE = 2000                 # a value up to so many bytes, that of half a page, lies in the tree itself
_RECORD_COST = 1024             # of the record of a step: deflated, several share a page
# Room that stays unused: what left since the last flush and in the two newest commits cannot be used again yet.
_SPARE_SHARE, _SPARE_STEPS = 100, 4


def value_cost(size: int) -> int:
    """Bytes of the file that a value of this size takes. Small ones lie in the tree, whose pages are rather more than half full."""
    return _TREE_BYTES + (-(-(size + 16) // _PAGE_BYTES) * _PAGE_BYTES if size > _IN_TREE else 7 * size // 4)


def likely_cost(size: int) -> int:
    """The same on average, of values that have about this size: half a page of each is lost."""
    return _TREE_BYTES + (size + 16 + _PAGE_BYTES // 2 if size > _IN_TREE else 7 * size // 4)


def cost_of(sizes: Iterable[int]) -> int:
    """Bytes of the file that parts of these sizes take, with their record."""
    return sum(map(value_cost, sizes)) + _RECORD_COST


class Retention:
    """Which steps and states there are. Steps below 0 (the prefix) and states never have to leave."""

    def __init__(self, quota_bytes: int):
        self.quota_bytes = quota_bytes
        self._leaving = Leaving()
        self._staying: dict[Name, Held] = {}
        self._total = 0
        self._largest = 0
        self._next_age = 0

    def __iter__(self) -> Iterator[Name]:
        yield from self._staying
        yield from self._leaving

    def age(self, name: Name) -> int:
        """Its place in the order of first arrival; a new version of a step keeps the step's."""
        held = self._table(name).get(name)
        return self._next_age if held is None else held.age

    def add(self, name: Name, held: Held) -> int:
        """Note a step or state, a new one or a new version; returns the bytes that became free. New ages come last."""
        before = self._table(name).get(name)
        self._table(name)[name] = held
        self._total += held.cost - (before.cost if before else 0)
        self._largest = max(self._largest, held.cost)
        self._next_age = max(self._next_age, held.age + 1)
        return before.cost if before else 0

    def remove(self, name: Name) -> int:
        """Note that it is gone; returns the bytes that became free."""
        cost = self._table(name).pop(name).cost
        self._total -= cost
        return cost

    def spare(self, cost: int = 0) -> int:
        """Bytes that stay unused when the next commit has `cost` bytes."""
        return max(self.quota_bytes // _SPARE_SHARE, _SPARE_STEPS * max(cost, self._largest))

    def must_leave(self, name: Name, cost: int) -> list[Name] | None:
        """Steps that have to leave for a commit, oldest first; None when it has no room even so."""
        before = self._table(name).get(name)
        excess = self._total + cost - (before.cost if before else 0) + self.spare(cost) - self.quota_bytes
        leaving = []
        for other, held in self._leaving.items():
            if excess <= 0:
                break
            if other != name:
                leaving.append(other)
                excess -= held.cost
        return leaving if excess <= 0 else None

    def oldest(self, cost: int) -> list[Name]:
        """The oldest steps, as many as take `cost` bytes."""
        found = []
        for name, held in self._leaving.items():
            if cost <= 0:
                break
            found.append(name)
            cost -= held.cost
        return found

    def _table(self, name: Name) -> dict[Name, Held] | Leaving:
        return self._staying if name[1] is None or name[1] < 0 else self._leaving
