"""Pictures for the browsers: asked of the node a handful at a time, and kept as long as there is room."""
import asyncio
from collections import OrderedDict
from collections.abc import Callable
from urllib.parse import urlencode

PICTURE = '/picture'
MOST_BYTES = 48_000_000
_GATHER_S, _AT_ONCE = 0.03, 48

Fetch = Callable[[str, list[int], float], list[bytes | str]]


def pictures_url(camera: str, life: int) -> str:
    """Where a browser finds pictures of a camera; `&at=` a stamp in nanoseconds goes behind it. life: `State.lives`, so that it keeps none
    of an earlier one."""
    return f'{PICTURE}?{urlencode({"camera": camera, "life": life})}'


class Pictures:
    """One request to the node at a time, whatever the browsers want. For the server's event loop alone."""

    def __init__(self, fetch: Fetch, most_bytes: int = MOST_BYTES):
        """fetch: camera, stamps (ns) and how far away (s; 0: any) -> for each a JPEG, or why there is none; in a thread. Raises
        RuntimeError where the node does not say."""
        self._fetch, self._most_bytes, self._bytes = fetch, most_bytes, 0
        self._kept: OrderedDict[tuple, bytes] = OrderedDict()
        self._wanted: dict[tuple, asyncio.Future] = {}      # by (camera, stamp, within)
        self._worker: asyncio.Task | None = None

    async def get(self, camera: str, stamp_ns: int, within_s: float) -> bytes | str:
        """The picture nearest to that stamp, no further away; or a sentence."""
        key = camera, stamp_ns, within_s
        if key in self._kept:
            self._kept.move_to_end(key)
            return self._kept[key]
        if key not in self._wanted:
            self._wanted[key] = asyncio.get_running_loop().create_future()
        if self._worker is None or self._worker.done():
            self._worker = asyncio.create_task(self._work())
        return await asyncio.shield(self._wanted[key])

    def clear(self) -> None:
        """Keep none: the node began anew."""
        self._kept.clear()
        self._bytes = 0

    async def _work(self) -> None:
        await asyncio.sleep(_GATHER_S)
        while self._wanted:
            camera, _, within_s = next(iter(self._wanted))
            keys = [key for key in self._wanted if (key[0], key[2]) == (camera, within_s)][:_AT_ONCE]
            try:
                found = await asyncio.to_thread(self._fetch, camera, [stamp for _, stamp, _ in keys], within_s)
            except Exception as error:      # whatever it is: no browser waits for ever
                found = [str(error)] * len(keys)
            for key, picture in zip(keys, found):
                self._wanted.pop(key).set_result(picture)
                if isinstance(picture, bytes):
                    self._keep(key, picture)

    def _keep(self, key: tuple, picture: bytes) -> None:
        self._kept[key] = picture
        self._bytes += len(picture)
        while self._bytes > self._most_bytes:
            self._bytes -= len(self._kept.popitem(last=False)[1])
