"""What lies in the store under which key: one record for each step or state, and one value for each of its parts.

A record is JSON behind its checksum, deflated: whole, it takes a page of LMDB's tree for itself. A part is a tensor's elements in
row-major order, or bytes, with nothing around them: a slice of the leading axes is one contiguous stretch, and whoever reads it
touches no other.
"""
from __future__ import annotations

import json
import struct
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from statekv_ros.errors import StoreError

if TYPE_CHECKING:       # `statekv-memory` looks into a memory without loading torch
    import torch

STEP, STATE = b's', b'c'
_CHECKSUM = struct.Struct('>I')
_STEP_NUMBER = struct.Struct('>Q')
_LEAST_STEP = -2**63        # so that keys sort as the steps do, the prefix (step -1) first
_LONGEST_CAMERA, _LONGEST_PART = 255, 128
# NumPy has no bfloat16 and no float8: elements travel as unsigned integers of their size.
_CARRIERS = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}


@dataclass(frozen=True)
class Part:
    """One part as its record describes it: `dtype` by torch's name, '' for bytes; `crc` is the CRC-32 of all of it."""
    dtype: str
    shape: tuple[int, ...]
    bytes: int
    crc: int


@dataclass(frozen=True)
class Record:
    """A step or a state: what the caller said of it, its parts, and its place in the order of first arrival."""
    header: dict[str, Any]
    parts: dict[str, Part]
    age: int

    def encode(self) -> bytes:
        body = zlib.compress(json.dumps(asdict(self), separators=(',', ':')).encode())
        return _CHECKSUM.pack(zlib.crc32(body)) + body

    @staticmethod
    def decode(value: bytes) -> Record:
        """Raises ValueError for a record that is not whole."""
        body = value[_CHECKSUM.size:]
        if len(value) < _CHECKSUM.size or _CHECKSUM.unpack_from(value)[0] != zlib.crc32(body):
            raise ValueError('its checksum is wrong')
        # Format 1 has the JSON as it is.
        read = json.loads(body if body.startswith(b'{') else zlib.decompress(body))
        parts = {name: Part(**{**part, 'shape': tuple(part['shape'])}) for name, part in read['parts'].items()}
        return Record(read['header'], parts, read['age'])


def step_prefix(camera: str) -> bytes:
    """What the keys of all records of a camera's steps begin with.

    Raises:
        StoreError: the name is empty, too long, or holds a zero character.
    """
    return STEP + _name('camera', camera, _LONGEST_CAMERA) + b'\0'


def step_key(camera: str, step: int) -> bytes:
    """Key of the record of one step."""
    return step_prefix(camera) + _STEP_NUMBER.pack(step - _LEAST_STEP)


def state_key(camera: str) -> bytes:
    """Key of the record of a camera's carried state."""
    return STATE + step_prefix(camera)[len(STEP):]


def camera_and_step(key: bytes) -> tuple[str, int]:
    """The inverse of `step_key`."""
    return (key[len(STEP):-_STEP_NUMBER.size - 1].decode(),
            _STEP_NUMBER.unpack_from(key, len(key) - _STEP_NUMBER.size)[0] + _LEAST_STEP)


def part_key(record_key: bytes, part: str) -> bytes:
    """Key of the value of one part of a record."""
    return record_key + _name('part', part, _LONGEST_PART)


def part_keys(camera: str, part: str, steps: Sequence[int]) -> list[bytes]:
    """Keys of one part of several steps."""
    prefix, name = step_prefix(camera), _name('part', part, _LONGEST_PART)
    return [prefix + _STEP_NUMBER.pack(step - _LEAST_STEP) + name for step in steps]


def raw(value: torch.Tensor | bytes) -> tuple[str, tuple[int, ...], memoryview]:
    """dtype, shape and bytes of a part; a tensor may lie on any device and in any strides."""
    if isinstance(value, bytes):
        return '', (len(value),), memoryview(value)
    import torch
    flat = value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
    return str(value.dtype).removeprefix('torch.'), tuple(value.shape), memoryview(flat)


def tensor(buffer: memoryview, dtype: torch.dtype, shape: tuple[int, ...]) -> torch.Tensor:
    """A part that lies in `buffer`, in memory of its own."""
    import torch
    elements = np.frombuffer(buffer, _CARRIERS[dtype.itemsize]).reshape(shape)
    return torch.from_numpy(np.array(elements, order='C')).view(dtype)


def describe(header: Mapping[str, Any], raws: Mapping[str, tuple[str, tuple[int, ...], memoryview]], age: int,
             staying: Mapping[str, Part]) -> bytes:
    """The record of these parts and of those that are there already, encoded.

    Raises:
        StoreError: the header holds something that JSON does not know.
    """
    try:
        return Record(dict(header), {**staying, **{name: Part(dtype, shape, len(value), zlib.crc32(value))
                                                   for name, (dtype, shape, value) in raws.items()}}, age).encode()
    except TypeError as error:
        raise StoreError(f'a header may hold what JSON knows (numbers, texts, lists, dicts): {error}, in {header!r}') from error


def _name(kind: str, name: str, longest: int) -> bytes:
    encoded = name.encode()
    if not 0 < len(encoded) <= longest or b'\0' in encoded:
        raise StoreError(f'the name of a {kind} must have 1 to {longest} bytes and no zero character, got {name!r}')
    return encoded
