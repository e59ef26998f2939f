"""Compile the kernels of page votes for a chip without one."""
import re

from statekv_ros.kernels.scored_attention.aot import Compiled, compile_kernel

from .configs import BEST, CHOSEN, OPEN, PLACES, SCORE, SPLITS, VOTES, Tile, width_block
from .counting import votes_kernel
from .finding import places_kernel
from .scores import open_kernel, score_kernel

PASSES = 'score lines', 'score leaves', 'open', 'votes', 'votes twice', 'places', 'places split'
_KERNELS = {'score': score_kernel, 'open': open_kernel, 'votes': votes_kernel, 'places': places_kernel}
_POINTERS = {'i64': ('BEST', 'FOUND', 'BOUNDARY'), 'i32': ('PLACES', 'GROUPS', 'PAGES', 'NUMBERS', 'COLUMNS', 'MOVES', 'PLACED'),
             'i1': ('UNWANTED',), 'u8': ('CODES',), 'fp16': ('ENTRIES', 'LEAVES', 'STRAYS'),
             'fp32': ('Q', 'STEPS', 'SCALES', 'SIZES', 'SCORES', 'TOPS', 'SUMS', 'VOTES')}
_LEAF, _VOLUME = 32, 4096       # pages of a leaf and of a volume


def tile_of(name: str) -> Tile:
    """The tile that a pass is launched with."""
    return {'score': SCORE, 'open': OPEN, 'votes': VOTES, 'places': PLACES}[name.split()[0]]


def compile_pass(name: str, capability: int, head_dim: int) -> Compiled:
    """Compile one pass as it is launched on the chip, for entries of a mean and a variance.

    Args:
        name: one of PASSES.
        capability: 90 for compute capability 9.0.
    """
    kernel, tile, width = _KERNELS[name.split()[0]], tile_of(name), 2 * head_dim
    constants = {'WIDTH': width, 'WIDTH_BLOCK': width_block(tile, width), 'ROWS': tile.rows, 'KEYS': tile.keys,
                 'LEAF': _LEAF, 'OF_LEAF': _LEAF, 'VOLUME': _VOLUME, 'BEST_BLOCK': BEST, 'CHOSEN': CHOSEN, 'SPLITS': SPLITS,
                 'SPLIT': name.endswith('split'), 'TWICE': name.endswith('twice')}
    if name == 'score leaves':
        constants |= {'PLACES': None, 'GROUPS': None, 'CODES': None, 'STEPS': None, 'SCALES': None, 'LEAVES': None, 'STRAYS': None,
                      'VOLUME': 1, 'OF_LEAF': 1}
    pointers = {pointer: dtype for dtype, named in _POINTERS.items() for pointer in named}
    signature, values, attributes = {}, {}, {}
    for index, argument in enumerate(kernel.arg_names):
        if argument in constants:
            signature[argument], values[index,] = 'constexpr', constants[argument]
        else:
            signature[argument] = f'*{pointers[argument]}' if argument in pointers else 'i32'
            # As at a launch: allocations are aligned, and strides of queries and entries are multiples of an entry.
            aligned = argument in pointers and not kernel.params[index].do_not_specialize
            if aligned or re.fullmatch(r'[qecvbt]_(group|head|row)', argument) and width % 16 == 0:
                attributes[index,] = [['tt.divisibility', 16]]
    return compile_kernel(kernel, signature, values, attributes, capability, tile)
