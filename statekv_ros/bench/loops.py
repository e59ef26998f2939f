"""What an iteration of a compiled kernel's inner loop costs a processor at the least, pipe by pipe."""
from rich.box import SIMPLE
from rich.table import Table

from statekv_ros.bench.chips import PROCESSORS, Processor
from statekv_ros.bench.listing import KINDS, Loop, inner_loops

WARP = 32
PIPES = ('issue', 'tensor', 'fp32', 'mufu', 'integer', 'shared')


def loop_rows(listing: str, capability: int, warps: int, tile_flops: float) -> list[dict]:
    """The inner loops of one kernel, in the order of its code.

    Args:
        listing: the disassembler's.
        warps: of one program.
        tile_flops: of an iteration's matrix products, for chips whose tensor instructions do not name their size.

    Returns:
        [{'instructions': {kind: issued by a warp in an iteration}, 'aside': those of the loop that the shortest way through it
        jumps over, 'tensor': {name: count}, 'cycles': {pipe: at the least, of all warps of a program}, 'bound': the pipe with
        the most}].
    """
    rows = []
    for loop in inner_loops(listing):
        cycles = _cycles(loop, PROCESSORS[capability], warps, tile_flops)
        rows.append({'instructions': {kind: loop.common[kind] for kind in KINDS}, 'aside': loop.aside.total(),
                     'tensor': dict(loop.tensor), 'cycles': cycles, 'bound': max(cycles, key=cycles.get)})
    return rows


def _cycles(loop: Loop, processor: Processor, warps: int, tile_flops: float) -> dict[str, float]:
    threads = warps * WARP
    # Where one warp issues the products for all, they stand beside the way of the others.
    multiplies = loop.tensor or loop.aside['tensor']
    flops = warps * loop.flops or (tile_flops if multiplies else 0)
    return {
        'issue': loop.common.total() * warps / processor.issued,
        'tensor': flops / processor.tensor_flops,
        'fp32': loop.common['fp32'] * threads / processor.fp32_lanes,
        'mufu': loop.common['mufu'] * threads / processor.mufu_lanes,
        'integer': loop.common['integer'] * threads / processor.integer_lanes,
        'shared': loop.shared_bytes * warps / processor.shared_bytes,
    }


def tables(rows: list[dict]) -> list[Table]:
    """Instructions, and cycles, of rows of `statekv-bench aot` with loops."""
    counts = _table('inner loops: instructions that a warp issues in an iteration', ('all', *KINDS, 'aside'))
    cycles = _table('cycles of a processor for an iteration of one program, at the least', (*PIPES, 'bound'))
    for row in rows:
        for number, loop in enumerate(row.get('loops', ())):
            name = f'sm_{row["capability"]} {row["kernel"]} {row["head_dim"]}/{row["group"]} {row["dtype"]} {number}'
            issued = loop['instructions'].values()
            counts.add_row(name, str(sum(issued)), *map(str, issued), str(loop['aside']))
            cycles.add_row(name, *(f'{loop["cycles"][pipe]:.0f}' for pipe in PIPES), loop['bound'])
    return [counts, cycles]


def _table(title: str, columns: tuple[str, ...]) -> Table:
    table = Table(title=title, box=SIMPLE, padding=(0, 1, 0, 0))
    table.add_column('kernel, d/group, dtype, loop', no_wrap=True)
    for column in columns:
        table.add_column(column, no_wrap=True, justify='right')
    return table
