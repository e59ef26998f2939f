"""Compile the kernels of paged attention for a chip without one."""
import re

from statekv_ros.kernels.scored_attention.aot import Compiled, compile_kernel

from .configs import COMBINE, FEW_ROWS, MASS, MAX_PACKED_HEAD_DIM, Tile, find_tile, head_block
from .forward import combine_kernel, forward_kernel, mass_kernel

POOLS = {'raw': 16, 'int8': 8, 'int4': 4}
# A decoded token's rows read and note what each page got; a question's rows only read. With ' moved', pages are turned too.
PASSES = ('combine', 'masses', 'span few', 'span many',
          *(f'{pool} {rows}{moved}' for pool in POOLS for rows in ('few', 'many') for moved in ('', ' moved')))


def passes(head_dim: int) -> list[str]:
    """Those of PASSES that can be launched with such heads."""
    return [name for name in PASSES if not name.startswith('int') or head_dim <= MAX_PACKED_HEAD_DIM]


def tile_of(name: str, head_dim: int, dtype: str) -> Tile:
    """The tile that a pass is launched with (`keys` means nothing to 'combine')."""
    if name in ('combine', 'masses'):
        return COMBINE if name == 'combine' else MASS
    pool, rows = name.split()[:2]
    return find_tile(head_dim, 4 if dtype == 'fp32' else 2, POOLS.get(pool, 16), FEW_ROWS if rows == 'few' else FEW_ROWS + 1)


def compile_pass(name: str, capability: int, head_dim: int, dtype: str) -> Compiled:
    """Compile one pass as `triton_paged_attention` launches it on the chip.

    Args:
        name: one of PASSES.
        capability: 90 for compute capability 9.0.
        dtype: of the query, 'bf16', 'fp16' or 'fp32', as Triton writes them.
    """
    tile = tile_of(name, head_dim, dtype)
    constants = {'HEAD_DIM': head_dim, 'HEAD_BLOCK': head_block(head_dim), 'ROWS': tile.rows}
    pointers = dict.fromkeys(('O', 'LSE', 'PARTIAL', 'PARTIAL_LSE', 'PAGE_LSE', 'MASS', 'FREQUENCIES', 'STREAM', 'BIAS'), 'fp32')
    kernel, bits = combine_kernel, 16
    if name == 'masses':
        kernel, constants = mass_kernel, {'ROWS': tile.rows, 'KEYS': tile.keys}
    elif name != 'combine':
        kernel, bits = forward_kernel, POOLS.get(name.split()[0], 16)
        stored = dtype if bits == 16 else 'u8'
        pointers |= {'Q': dtype, 'K': stored, 'V': stored, 'NOTED': 'i1', 'AXES': 'i64', 'WHERE': 'i64'}
        pointers |= dict.fromkeys(('KEY_SCALE', 'KEY_ZERO', 'VALUE_SCALE', 'VALUE_ZERO'), 'fp16')
        pointers |= dict.fromkeys(('STARTS', 'LENGTHS', 'MOVES', 'ENTRIES', 'POSITIONS'), 'i32')
        constants |= {'KEYS': tile.keys, 'BITS': bits, 'PRECISION': 'ieee', 'UPCAST': False} | _without(name, bits)
    signature, values, attributes = {}, {}, {}
    for index, argument in enumerate(kernel.arg_names):
        if argument in constants:
            signature[argument], values[index,] = 'constexpr', constants[argument]
        elif argument in pointers:
            signature[argument] = f'*{pointers[argument]}'
        else:
            signature[argument] = 'fp32' if argument == 'scale_log2' else 'i32'
        # As at a launch: allocations are aligned, and strides are multiples of a row's length.
        row = head_dim * min(bits, 8) // 8 if argument[0] in 'kv' else head_dim
        if (argument in pointers and argument not in constants and not kernel.params[index].do_not_specialize
                or re.fullmatch(r'[qkvs]_(head|row)', argument) and row % 16 == 0):
            attributes[index,] = [['tt.divisibility', 16]]
    return compile_kernel(kernel, signature, values, attributes, capability, tile)


def _without(name: str, bits: int) -> dict[str, None]:
    """What such a call does not have."""
    missing = ['STARTS', 'LENGTHS', 'NOTED'] if name.startswith('span') else ['WHERE']
    missing += [] if bits < 16 else ['KEY_SCALE', 'KEY_ZERO', 'VALUE_SCALE', 'VALUE_ZERO', 'ENTRIES', 'FREQUENCIES', 'AXES',
                                    'POSITIONS', 'BIAS']
    if 'moved' not in name:
        missing += ['MOVES'] if bits < 16 else ['MOVES', 'STREAM']
    if 'few' not in name:
        missing += ['NOTED', 'PAGE_LSE']
    return dict.fromkeys(missing)
