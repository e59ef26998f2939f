"""Compile every launch configuration of the kernels for every chip, with no GPU: no spills, shared memory within limits, and
what the inner loops consist of."""
import argparse
import contextlib
import functools
import multiprocessing
import os
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass

from rich.console import Console
from rich.progress import track

from statekv_ros.bench.loops import loop_rows, tables
from statekv_ros.errors import ParameterError
from statekv_ros.kernels.scored_attention.configs import CONFIGS, SHARED_MEMORY_KB, Tile, head_block
from statekv_ros.terminal import narrow_table

# (head dim, group) of InternVL3-1B, InternVL3-8B, Qwen3-VL-2B, Qwen3-VL-4B and -8B, InternVL3-2B
MODEL_SHAPES = ((64, 7), (128, 7), (128, 2), (128, 4), (128, 6))
ALL_SHAPES = (*MODEL_SHAPES, (32, 2), (80, 2), (256, 2))
PAGED, VOTES = 'paged ', 'votes '    # what the names of paged attention's and of page votes' kernels begin with


@dataclass(frozen=True)
class Case:
    """One pass for one chip (`capability` 90 is sm_90), head dim, group and dtype. Paged attention and page votes are given rows:
    group 1; page votes have entries of halves, whatever the model's dtype."""

    capability: int
    head_dim: int
    group: int
    dtype: str
    kernel: str


def run(args: argparse.Namespace) -> dict:
    """Compile and judge; Triton's cache makes the second time quick.

    Returns:
        {'benchmark', 'versions', 'unsupported': chips unknown to this Triton, 'rows': [{capability, head_dim, group, dtype,
        kernel, tile, registers, stack_bytes, shared_bytes, shared_limit_bytes, problem, with --loops loops: as
        `loops.loop_rows` gives them}], 'failed': rows with a problem}.

    Raises:
        ParameterError: a chip is not in the table, Triton is not installed, or its interpreter is switched on.
    """
    try:
        import triton
    except ImportError:
        raise ParameterError('the package triton is not installed: pip install triton') from None
    if os.environ.get('TRITON_INTERPRET', '0') not in ('', '0'):
        raise ParameterError(f'TRITON_INTERPRET is {os.environ["TRITON_INTERPRET"]!r}, and the interpreter compiles nothing: '
                             'unset it')
    unknown = sorted(set(args.chips) - set(CONFIGS))
    if unknown:
        raise ParameterError(f'--chips must be among {", ".join(map(str, CONFIGS))}, got {unknown[0]}')
    if args.processes < 1:
        raise ParameterError(f'--processes must be at least 1, got {args.processes}')
    from statekv_ros.kernels.scored_attention.aot import is_supported
    chips = [chip for chip in args.chips if is_supported(chip)]
    cases = [case for chip in chips for case in _cases(chip, everything=args.all)]
    with contextlib.ExitStack() as stack:
        judge = map
        if args.processes > 1:
            # New processes rather than forks: a fork would share the parent's threads and locks.
            judge = stack.enter_context(ProcessPoolExecutor(args.processes, multiprocessing.get_context('spawn'))).map
        rows = list(track(judge(functools.partial(_judge, with_loops=args.loops), cases), 'compiling', total=len(cases),
                          console=Console(stderr=True), disable=args.json))
    result = {
        'benchmark': 'aot', 'versions': {'triton': triton.__version__},
        'unsupported': [chip for chip in args.chips if chip not in chips],
        'rows': rows, 'failed': [row for row in rows if row['problem']],
    }
    if not args.json:
        _print(result)
    for row in result['failed']:
        Console(stderr=True, soft_wrap=True).print(f'[red]failed[/]: {_name(row)}: {row["problem"]}')
    return result


def _cases(chip: int, everything: bool) -> list[Case]:
    from statekv_ros.kernels.page_votes.aot import PASSES as VOTE_PASSES
    from statekv_ros.kernels.paged_attention.aot import passes
    from statekv_ros.kernels.scored_attention.aot import PASSES
    shapes, dtypes = (ALL_SHAPES, ('bf16', 'fp16', 'fp32')) if everything else (MODEL_SHAPES, ('bf16',))
    scored = PASSES if everything else [name for name in PASSES if not name.startswith('forward')]
    head_dims = sorted({head_dim for head_dim, _ in shapes})
    return [*(Case(chip, head_dim, group, dtype, kernel) for head_dim, group in shapes for dtype in dtypes
              for kernel in scored),
            *(Case(chip, head_dim, 1, dtype, PAGED + kernel) for head_dim in head_dims for dtype in dtypes
              for kernel in passes(head_dim)),
            *(Case(chip, head_dim, 1, 'fp16', VOTES + kernel) for head_dim in (head_dims if everything else head_dims[-1:])
              for kernel in VOTE_PASSES)]


def _judge(case: Case, with_loops: bool) -> dict:
    """Compile one case; its row of the result."""
    from statekv_ros.kernels.page_votes import aot as votes
    from statekv_ros.kernels.paged_attention import aot as paged
    from statekv_ros.kernels.scored_attention import aot as scored
    limit = SHARED_MEMORY_KB[case.capability] * 1024
    if case.kernel.startswith(PAGED):
        name = case.kernel.removeprefix(PAGED)
        tile = paged.tile_of(name, case.head_dim, case.dtype)
        compile_pass = functools.partial(paged.compile_pass, name, case.capability, case.head_dim, case.dtype)
    elif case.kernel.startswith(VOTES):
        name = case.kernel.removeprefix(VOTES)
        tile = votes.tile_of(name)
        compile_pass = functools.partial(votes.compile_pass, name, case.capability, case.head_dim)
    else:
        tile = scored.tile_of(case.kernel, case.capability, case.head_dim, case.dtype)
        compile_pass = functools.partial(scored.compile_pass, case.kernel, case.capability, case.head_dim, case.group,
                                         case.dtype)
    row = asdict(case) | {'tile': tile._asdict(), 'shared_limit_bytes': limit}
    try:
        compiled = compile_pass()
        usage = compiled.usage()
        if with_loops:
            row['loops'] = loop_rows(compiled.listing(), case.capability, tile.warps, _tile_flops(case, tile))
    except Exception as error:  # the compiler raises many kinds; one bad row must not hide the others
        return row | {'problem': f'does not compile: {type(error).__name__}: {str(error).strip().splitlines()[:3]}'}
    problem = None
    if usage.stack_bytes:
        problem = f'spills {usage.stack_bytes} bytes of registers to the stack'
    elif usage.shared_bytes > limit:
        problem = f'{usage.shared_bytes} bytes of shared memory, above the limit of {limit}'
    return row | usage._asdict() | {'problem': problem}


def _tile_flops(case: Case, tile: Tile) -> float:
    """Of an iteration: QK and PV, pass 2 of scored attention QK alone, and none where splits are combined or keys are put."""
    name = case.kernel.removesuffix(' of streams')
    products = 0 if name.endswith(('combine', 'put')) else 1 if name == 'mass' else 2
    return products * 2 * tile.rows * tile.keys * head_block(case.head_dim)


def _name(row: dict) -> str:
    return f'sm_{row["capability"]} {row["kernel"]}, head dim {row["head_dim"]}, group {row["group"]}, {row["dtype"]}'


def _print(result: dict) -> None:
    table = narrow_table(f'kernels compiled by Triton {result["versions"]["triton"]}', 'chip', 'kernel', 'dtype', 'tile', 'd', 'group',
                         'regs', 'stack', 'shared\nKB', text=4)
    for row in result['rows']:
        tile = row['tile']
        table.add_row(f'sm_{row["capability"]}', row['kernel'], row['dtype'],
                      f'{tile["rows"]}x{tile["keys"]} w{tile["warps"]} s{tile["stages"]}', str(row['head_dim']), str(row['group']),
                      str(row.get('registers', '?')), str(row.get('stack_bytes', '?')),
                      f'{row.get("shared_bytes", 0) / 1024:.0f}/{row["shared_limit_bytes"] // 1024}',
                      style='red' if row['problem'] else None)
    console = Console()
    console.print(table)
    console.print('d: head dim; tile: rows x keys, w warps, s pipeline stages; regs: per thread; stack: bytes spilled; '
                  'shared: memory of a program, of the limit.')
    if any('loops' in row for row in result['rows']):
        for table in tables(result['rows']):
            console.print(table)
        console.print('Loops in the order of the code; the instructions of one are those of the shortest way through it, aside '
                      'what that jumps over. Cycles are bounds of counts, not a speed.')
    if result['unsupported']:
        console.print('Not known to this Triton: ' + ', '.join(f'sm_{chip}' for chip in result['unsupported']))
