"""Bags with bytes changed, left out or cut off: each is read, or refused with a BagError."""
import random
import shutil
import time
from pathlib import Path

import numpy as np

from campaign.mutation import cut_out, cut_short, flipped, zero_tail
from campaign.record import Record
from campaign.workers import run_trials, tell_input
from statekv_ros.errors import BagError, FrameError
from statekv_ros.images import decode_compressed, decode_image
from statekv_ros.replay.bag_reader import bag_info, choose_topics, iterate_images
from statekv_ros.replay.bag_writer import BagOptions, write_bag

WANTED = 500
_LIMIT_S = 30.0
_IMAGES = 12
_WHOLE = [(storage, encoding) for storage in ('mcap', 'sqlite3') for encoding in ('raw', 'jpeg')]


def run(record: Record) -> None:
    """Four whole bags, and a spoiled copy of one of them for each trial."""
    for storage, encoding in _WHOLE:
        frames = ((k * 10**8, np.random.default_rng(k).integers(0, 256, (48, 64, 3), dtype=np.uint8)) for k in range(_IMAGES))
        write_bag(record.folder / f'{storage}_{encoding}', frames, BagOptions(storage=storage, encoding=encoding))
    run_trials(record, read_spoiled, (), _LIMIT_S)


def read_spoiled(record: Record, number: int) -> None:
    """Spoil a bag and read it, as it is and with what is left of it allowed."""
    rng = record.random(number)
    storage, encoding = rng.choice(_WHOLE)
    bag = record.folder / 'spoiled'
    shutil.rmtree(bag, ignore_errors=True)
    shutil.copytree(record.folder / f'{storage}_{encoding}', bag)
    given = f'bag {storage}, {encoding}: {_spoil(bag, rng)}'
    tell_input(record, given)
    source = bag if rng.random() < 0.8 else _storage_file(bag)
    for allow_truncated in (False, True):
        begun = time.monotonic()
        try:
            record.note(f'{_read(source, allow_truncated)}, allow_truncated={allow_truncated}')
        except BagError as error:
            record.note_refusal(str(error), number, given)
        except Exception as error:
            record.fail(f'raw {type(error).__name__}', number, f'{given}; allow_truncated={allow_truncated}',
                        f'{type(error).__name__} after {time.monotonic() - begun:.2f} s: {error}')


def _spoil(bag: Path, rng: random.Random) -> str:
    file = _storage_file(bag)
    size = file.stat().st_size
    ways = {'bytes': (0.35, lambda data: flipped(data, rng)), 'head': (0.15, lambda data: flipped(data, rng, 0, 600)),
            'tail': (0.1, lambda data: flipped(data, rng, max(0, size - 900))), 'cut': (0.2, lambda data: cut_short(data, rng)),
            'hole': (0.05, lambda data: cut_out(data, rng)), 'zeros': (0.05, lambda data: zero_tail(data, rng)),
            'metadata cut': (0.05, lambda data: cut_short(data, rng)),
            'metadata bytes': (0.05, lambda data: flipped(data, rng))}
    way = rng.choices(list(ways), [weight for weight, _ in ways.values()])[0]
    target = bag / 'metadata.yaml' if way.startswith('metadata') else file
    data, what = ways[way][1](target.read_bytes())
    target.write_bytes(data)
    return f'{target.name}, {what}'


def _read(source: Path, allow_truncated: bool) -> str:
    """Read all images and decode them; words for how much was there."""
    info = bag_info(source, allow_truncated)
    images = refused = 0
    for image in iterate_images(info, choose_topics(info, None)):
        images += 1
        try:
            message = image.message()
            (decode_image if image.type.endswith('/Image') else decode_compressed)(message)
        except (BagError, FrameError):
            refused += 1
    return f'{"all" if images == _IMAGES else "some"} images read' + (', some refused' if refused else '')


def _storage_file(bag: Path) -> Path:
    return next(file for file in bag.iterdir() if file.suffix in ('.mcap', '.db3'))
