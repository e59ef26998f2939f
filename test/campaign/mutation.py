"""Ways to spoil bytes, with words for what was done."""
import random


def flipped(data: bytes, rng: random.Random, first: int = 0, last: int | None = None) -> tuple[bytes, str]:
    """A few bytes of data[first:last] replaced."""
    data = bytearray(data)
    end = len(data) if last is None else min(last, len(data))
    places = {rng.randrange(first, end): rng.randrange(256) for _ in range(rng.choice((1, 1, 2, 8, 64)))} if first < end else {}
    for place, value in places.items():
        data[place] = value
    return bytes(data), f'{len(places)} bytes replaced, first at {min(places, default=None)}'


def cut_short(data: bytes, rng: random.Random) -> tuple[bytes, str]:
    """Only the beginning."""
    length = rng.randrange(len(data)) if data else 0
    return data[:length], f'cut off after {length} of {len(data)} bytes'


def cut_out(data: bytes, rng: random.Random) -> tuple[bytes, str]:
    """A piece of up to 200 bytes left out."""
    place, length = rng.randrange(len(data)), rng.randrange(1, 200)
    return data[:place] + data[place + length:], f'{length} bytes left out at {place}'


def zero_tail(data: bytes, rng: random.Random) -> tuple[bytes, str]:
    """The end replaced by zeros, as after a crash of the file system."""
    place, length = rng.randrange(len(data)), rng.randrange(3000)
    return data[:place] + bytes(length), f'{length} zeros from byte {place} on'
