"""The one table of launch configurations: per compute capability, head dim and bytes per element, for both passes.

Every entry is compiled ahead of time by `statekv-bench aot`, which fails on registers that spill to the stack and on shared
memory above the chip's limit; to tune a chip, give it entries of its own and run `statekv-bench kernel` on it.
"""
from typing import NamedTuple


class Tile(NamedTuple):
    """One program's work: `rows` (query x group member) by `keys`, and how the compiler spreads and pipelines it.

    `registers` are the most of a thread: what the hardware has, or as many as let further programs run beside it. Not told
    so, the assembler would rather spill a few than have one program less at a time.
    """

    rows: int
    keys: int
    warps: int
    stages: int
    registers: int = 255


class Config(NamedTuple):
    """Tiles of pass 1 (output, log-sum-exp) and pass 2 (mass per key)."""

    forward: Tile
    mass: Tile


MAX_HEAD_DIM = 256
COMBINE = Tile(8, 1, 4, 3)
PUT = Tile(16, 1, 4, 3)

# Largest shared memory of one program in KB (CUDA C++ Programming Guide, technical specifications per compute capability).
SHARED_MEMORY_KB = {80: 163, 86: 99, 87: 163, 89: 99, 90: 227, 100: 227, 103: 227, 110: 227, 120: 99, 121: 99}

# Keys: (head dim as a power of two, bytes per element).
# Exact fp32 products run on the ordinary cores, whose tiles live in registers: small ones, alike on every chip.
_FP32 = {
    (32, 4): Config(Tile(64, 32, 8, 2, 128), Tile(32, 64, 8, 2, 128)),
    (64, 4): Config(Tile(32, 32, 8, 2, 128), Tile(32, 64, 8, 2, 128)),
    (128, 4): Config(Tile(16, 32, 8, 2, 128), Tile(16, 64, 8, 2, 128)),
    (256, 4): Config(Tile(16, 16, 8, 1), Tile(16, 32, 4, 1)),
}
# From Hopper on the same tiles take more.
_FP32_90 = _FP32 | {
    (32, 4): Config(Tile(64, 32, 8, 2, 144), Tile(32, 64, 8, 2, 128)),
    (128, 4): Config(Tile(16, 32, 8, 2, 128), Tile(16, 64, 8, 2, 160)),
}
# Chips whose tensor cores are fed from registers. Fewer rows than head dim would split the output across warps.
_MMA = {
    (32, 2): Config(Tile(64, 32, 4, 3, 104), Tile(64, 128, 4, 3, 144)),
    (64, 2): Config(Tile(128, 64, 8, 3), Tile(64, 128, 4, 3, 168)),
    (128, 2): Config(Tile(128, 32, 8, 4), Tile(64, 128, 8, 3, 128)),
    (256, 2): Config(Tile(64, 32, 8, 2), Tile(32, 128, 8, 2)),
}
# Hopper: tensor cores fed from shared memory.
_WGMMA = {
    (32, 2): Config(Tile(128, 128, 8, 3), Tile(64, 128, 4, 3, 128)),
    (64, 2): Config(Tile(128, 64, 8, 3), Tile(128, 64, 4, 3, 168)),
    (128, 2): Config(Tile(128, 64, 8, 3), Tile(64, 128, 4, 3, 168)),
    (256, 2): Config(Tile(64, 32, 8, 2), Tile(64, 128, 8, 2)),
}
# Blackwell of data centres and Thor: tensor memory besides.
_TCGEN05 = {
    (32, 2): Config(Tile(128, 64, 8, 3), Tile(64, 64, 4, 3)),
    (64, 2): Config(Tile(128, 64, 8, 3), Tile(64, 64, 4, 3)),
    (128, 2): Config(Tile(128, 64, 8, 3), Tile(64, 64, 8, 3, 80)),
    (256, 2): Config(Tile(64, 32, 8, 2), Tile(64, 64, 4, 2)),
}
# Little shared memory per processor: one large program of pass 2 fits where two did above.
_MMA_120 = _MMA | {(128, 2): Config(Tile(128, 32, 8, 4), Tile(128, 128, 8, 2))}
CONFIGS = {
    80: _MMA | _FP32,                          # A100
    86: _MMA | _FP32,                          # RTX 30
    87: _MMA | _FP32,                          # Jetson Orin
    89: _MMA | _FP32,                          # L40S, RTX 40
    90: _WGMMA | _FP32_90,                     # H100, H200
    100: _TCGEN05 | _FP32_90,                  # B200
    103: _TCGEN05 | _FP32_90,                  # B300
    110: _TCGEN05 | _FP32_90,                  # Jetson Thor
    120: _MMA_120 | _FP32_90,                  # RTX 50
    121: _MMA_120 | _FP32_90,                  # DGX Spark
}
# In the interpreter a program costs the same whatever its size.
INTERPRETER = Config(Tile(128, 128, 4, 1), Tile(128, 128, 4, 1))


def head_block(head_dim: int) -> int:
    """Head dim as the kernels see it: the next power of two, 32 or more."""
    return max(32, 1 << (head_dim - 1).bit_length())


def find_config(capability: int, head_dim: int, itemsize: int) -> Config:
    """The entry for a chip (90 for compute capability 9.0); one that is not in the table gets what fits on all of them."""
    return CONFIGS.get(capability, CONFIGS[89])[head_block(head_dim), itemsize]


def choose_splits(programs: int, keys: int, tile: Tile, processors: int) -> int:
    """Into how many parts to split the keys of pass 1, when its `programs` alone would leave processors idle.

    Counts the tiles that the busiest processor goes through, and one for each part that has to be combined.
    """
    slots = processors * max(1, 8 // tile.warps)
    tiles = -(-keys // tile.keys)
    return min(range(1, min(tiles, 32) + 1),
               key=lambda splits: -(-programs * splits // slots) * -(-tiles // splits) + splits)
