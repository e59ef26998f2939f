"""Compile the kernels for a chip without one: what a launch configuration costs in registers, stack and shared memory, and the
machine code."""
import re
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from .configs import COMBINE, PUT, Tile, find_config, head_block
from .forward import combine_kernel, forward_kernel
from .mass import mass_kernel
from .put import put_kernel

_ALONE = 'forward', 'split forward', 'combine', 'mass'
OF_STREAMS = ' of streams'     # with a table of them
PASSES = (*_ALONE, *(name + OF_STREAMS for name in _ALONE), 'put')
_TOOLS = Path(triton.__file__).parent / 'backends/nvidia/bin'


class Usage(NamedTuple):
    """Of the compiled code: registers and stack per thread (a stack means spilled registers), shared memory per program."""

    registers: int
    stack_bytes: int
    shared_bytes: int


@dataclass(frozen=True)
class Compiled:
    """A kernel for one chip. Both looks at it run a tool that comes with Triton."""

    cubin: bytes
    shared_bytes: int

    def usage(self) -> Usage:
        """What it takes of a processor."""
        registers, stack = re.search(r'REG:(\d+) STACK:(\d+)', self._run('cuobjdump', '-res-usage')).groups()
        return Usage(int(registers), int(stack), self.shared_bytes)

    def listing(self) -> str:
        """Its machine code in words, with labels where it jumps to."""
        return self._run('nvdisasm', '-c')

    def _run(self, tool: str, option: str) -> str:
        with tempfile.NamedTemporaryFile(suffix='.cubin') as file:
            file.write(self.cubin)
            file.flush()
            return subprocess.run([_TOOLS / tool, option, file.name], capture_output=True, text=True, check=True).stdout


def is_supported(capability: int) -> bool:
    """Whether the installed Triton's assembler knows the chip."""
    assembler = _TOOLS / 'ptxas-blackwell' if capability >= 100 else _TOOLS / 'ptxas'
    if not assembler.exists():
        assembler = _TOOLS / 'ptxas'
    known = subprocess.run([assembler, '--help'], capture_output=True, text=True, check=True).stdout
    return re.search(rf'\bsm_{capability}\b', known) is not None


def tile_of(name: str, capability: int, head_dim: int, dtype: str) -> Tile:
    """The tile that a pass is launched with (`keys` means nothing to 'combine' and 'put')."""
    name = name.removesuffix(OF_STREAMS)
    if name in ('combine', 'put'):
        return COMBINE if name == 'combine' else PUT
    config = find_config(capability, head_dim, 4 if dtype == 'fp32' else 2)
    return config.mass if name == 'mass' else config.forward


def compile_pass(name: str, capability: int, head_dim: int, group: int, dtype: str) -> Compiled:
    """Compile one pass as `triton_scored_attention` and `triton_scored_streams` launch it on the chip.

    Args:
        name: one of PASSES; 'split forward' writes fp32 parts, 'combine' puts them together.
        capability: 90 for compute capability 9.0.
        dtype: 'bf16', 'fp16' or 'fp32', as Triton writes them.
    """
    tile, of_streams = tile_of(name, capability, head_dim, dtype), name == 'put' or name.endswith(OF_STREAMS)
    name = name.removesuffix(OF_STREAMS)
    kernel = {'mass': mass_kernel, 'combine': combine_kernel, 'put': put_kernel}.get(name, forward_kernel)
    constants = {'GROUP': group, 'HEAD_DIM': head_dim, 'HEAD_BLOCK': head_block(head_dim), 'ROWS': tile.rows,
                 'KEYS': tile.keys, 'PRECISION': 'ieee', 'UPCAST': False}
    pointers = {'Q': dtype, 'K': dtype, 'V': dtype, 'O': 'fp32' if name == 'split forward' else dtype, 'LSE': 'fp32',
                'MASS': 'fp32', 'PARTIAL': 'fp32', 'PARTIAL_LSE': 'fp32', 'TABLE': 'i64', 'HERE': dtype}
    if not of_streams:
        constants['TABLE'] = None
    signature, values, attributes = {}, {}, {}
    for index, argument in enumerate(kernel.arg_names):
        if argument in constants:
            signature[argument], values[index,] = 'constexpr', constants[argument]
        elif argument in pointers:
            signature[argument] = f'*{pointers[argument]}'
        else:
            signature[argument] = 'fp32' if argument == 'scale_log2' else 'i32'
        # As at a launch: allocations are aligned, and strides are multiples of a head dim that is one of 16.
        stride = re.fullmatch(r'[qkvop]_(split|batch|head|row)', argument)
        if argument in pointers and argument not in constants or stride and head_dim % 16 == 0:
            attributes[index,] = [['tt.divisibility', 16]]
    return compile_kernel(kernel, signature, values, attributes, capability, tile)


def compile_kernel(kernel: triton.JITFunction, signature: dict, values: dict, attributes: dict, capability: int,
                   tile: Tile) -> Compiled:
    """Compile a kernel, its arguments given as Triton's ASTSource wants them.

    Raises:
        RuntimeError: Triton's interpreter is on.
    """
    if not isinstance(kernel, triton.JITFunction):
        raise RuntimeError('kernels can be compiled only where TRITON_INTERPRET is not set')
    compiled = triton.compile(ASTSource(kernel, signature, values, attributes), target=GPUTarget('cuda', capability, 32),
                              options={'num_warps': tile.warps, 'num_stages': tile.stages, 'maxnreg': tile.registers,
                                       'enable_fp_fusion': True})
    return Compiled(compiled.asm['cubin'], compiled.metadata.shared)
