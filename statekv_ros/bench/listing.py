"""The inner loops of a compiled kernel, read from the disassembler's listing of its machine code."""
import math
import re
from collections import Counter
from typing import NamedTuple

_LABEL = re.compile(r'^(\.L_\w+):')
_INSTRUCTION = re.compile(r'^\s*/\*[0-9a-f]+\*/\s+(@!?U?P\w+\s+)?([A-Z][A-Za-z0-9_.]*)\s*(.*?);')
_WARPGROUP = re.compile(r'HGMMA\.(\d+)x(\d+)x(\d+)')
_WARP_SHAPES = {'16816': 16 * 8 * 16, '1688': 16 * 8 * 8}      # rows x columns x depth
_TARGET = re.compile(r'`\((\.L_\w+)\)')

# Kinds by the part of an instruction's name before its first dot. A leading U (uniform: one result for the whole warp) is taken
# off beforehand.
KINDS = {
    'tensor': 'HMMA IMMA DMMA HGMMA QGMMA TCHMMA TCQMMA',
    'fp32': 'FFMA FMUL FADD FMNMX FMNMX3 FSEL FSETP FSET FFMA2 FMUL2 FADD2 FCHK HFMA2 HADD2 HMUL2',
    'mufu': 'MUFU',
    'convert': 'F2FP F2F I2F F2I I2FP F2IP I2I FRND',
    'integer': 'IMAD IADD IADD3 IADD64 VIADD LEA ISETP SHF SHL SHR LOP LOP3 PLOP3 IMNMX VIMNMX VIADDMNMX VIMNMX3 IABS FLO POPC '
               'BREV BMSK SGXT ISCADD IDP PRMT SEL',
    'move': 'MOV MOV32I R2UR CS2R S2R S2UR P2R R2P P2UR LDC LDCU',
    'shuffle': 'SHFL VOTE REDUX CREDUX',
    'shared': 'LDS STS LDSM STSM ATOMS LDTM STTM',
    'global': 'LDG STG LDGSTS TMALDG TMASTG ATOMG RED LDL STL',
    'control': '',     # whatever else: barriers, fences, waits, branches
}
_KIND_OF = {name: kind for kind, names in KINDS.items() for name in names.split()}


class Loop(NamedTuple):
    """Instructions that a warp issues in one iteration, by kind.

    Attributes:
        common: on the shortest way through the loop, which leaves out what is jumped over.
        aside: of the loop, but not on that way.
        tensor: names of its tensor instructions and how many of each are on the common way.
        flops: of those, a warp's share, a fused multiply and add being two; 0 where their names do not say their size.
        shared_bytes: that a warp reads from and writes to shared memory on the common way, operands of tensor instructions
            included (a warp's share).
    """

    common: Counter
    aside: Counter
    tensor: Counter
    flops: float
    shared_bytes: float


class _Block(NamedTuple):
    instructions: list[tuple[str, str]]
    successors: list[int]


def kind_of(name: str) -> str:
    """The kind of an instruction, 'IMAD.WIDE' for instance."""
    base = name.split('.')[0]
    return _KIND_OF.get(base) or _KIND_OF.get(base.removeprefix('U'), 'control')


def inner_loops(listing: str) -> list[Loop]:
    """Loops that contain no other, in the order of the code; those that only wait for a barrier are left out."""
    blocks = _blocks(listing)
    loops = [(head, body) for head, body in _natural_loops(blocks).items() if not _only_waits(blocks, body)]
    inner = [(head, body) for head, body in loops if not any(other != head and other in body for other, _ in loops)]
    return [_count(blocks, head, body) for head, body in sorted(inner)]


def _blocks(listing: str) -> list[_Block]:
    labels, starts, code = {}, {0}, []
    for line in listing.splitlines():
        if label := _LABEL.match(line):
            labels[label[1]] = len(code)
            starts.add(len(code))
        elif found := _INSTRUCTION.match(line):
            guard, name, rest = found.groups()
            code.append((guard, name, rest))
            if _leaves(name):
                starts.add(len(code))
    starts = sorted(start for start in starts if start < len(code))
    number = {start: index for index, start in enumerate(starts)}
    blocks = []
    for index, (start, end) in enumerate(zip(starts, [*starts[1:], len(code)])):
        guard, name, rest = code[end - 1]
        successors = []
        if _leaves(name) and (target := _TARGET.search(rest)) and labels.get(target[1]) in number:
            successors.append(number[labels[target[1]]])
        # BRA.DIV jumps where threads of a warp have parted; BRA.U and the others by their guard or their first operand.
        always = guard is None and name in ('BRA', 'EXIT', 'RET', 'JMP') or name.startswith(('RET', 'BRA.U')) and (
            guard is None and not re.match(r'!?UP\d', rest))
        if not always and index + 1 < len(starts):
            successors.append(index + 1)
        blocks.append(_Block([(name, rest) for _, name, rest in code[start:end]], successors))
    return blocks


def _leaves(name: str) -> bool:
    return name.split('.')[0] in ('BRA', 'EXIT', 'RET', 'JMP', 'CALL')


def _natural_loops(blocks: list[_Block]) -> dict[int, set[int]]:
    """{head: blocks of the loop}: an edge back to a block that every way to the edge has passed closes a loop."""
    everything = set(range(len(blocks)))
    before = {index: set() for index in everything}
    for index, block in enumerate(blocks):
        for successor in block.successors:
            before[successor].add(index)
    reached, waiting = set(), [0]
    while waiting:
        index = waiting.pop()
        if index not in reached:
            reached.add(index)
            waiting += blocks[index].successors
    dominators = {index: {0} if index == 0 else set(reached) for index in reached}
    changed = True
    while changed:
        changed = False
        for index in sorted(reached - {0}):
            new = {index} | set.intersection(*(dominators[other] for other in before[index] & reached))
            changed |= new != dominators[index]
            dominators[index] = new
    loops: dict[int, set[int]] = {}
    for index in reached:
        for head in set(blocks[index].successors) & dominators[index]:
            body, waiting = loops.setdefault(head, {head}), [index]
            while waiting:
                block = waiting.pop()
                if block not in body:
                    body.add(block)
                    waiting += before[block] & reached
    return loops


def _only_waits(blocks: list[_Block], body: set[int]) -> bool:
    return all(kind_of(name) in ('control', 'move', 'integer') for block in body for name, _ in blocks[block].instructions)


def _count(blocks: list[_Block], head: int, body: set[int]) -> Loop:
    """Shortest way from the head back to it, by instructions."""
    best: dict[int, tuple[int, list[int]]] = {head: (len(blocks[head].instructions), [head])}
    waiting, closed = [head], []
    while waiting:
        index = min(waiting, key=lambda block: best[block][0])
        waiting.remove(index)
        for successor in set(blocks[index].successors) & body:
            if successor == head:
                closed.append(best[index])
                continue
            cost = best[index][0] + len(blocks[successor].instructions)
            if successor not in best or cost < best[successor][0]:
                best[successor] = cost, [*best[index][1], successor]
                waiting.append(successor)
    way = set(min(closed)[1])
    common = [instruction for block in sorted(way) for instruction in blocks[block].instructions]
    tensor = [name for name, _ in common if kind_of(name) == 'tensor']
    return Loop(Counter(kind_of(name) for name, _ in common),
                Counter(kind_of(name) for block in body - way for name, _ in blocks[block].instructions),
                Counter(tensor), sum(map(_flops, tensor)), sum(_shared_bytes(name, rest) for name, rest in common))


def _flops(name: str) -> float:
    """A warp's share of a tensor instruction: HMMA.16816 is one warp's 16 x 8 x 16, HGMMA.64x128x16 that of four warps."""
    if group := _WARPGROUP.search(name):
        return 2 * math.prod(map(int, group.groups())) / 4
    return 2 * _WARP_SHAPES.get(name.split('.')[1] if '.' in name else '', 0)


def _shared_bytes(name: str, operands: str) -> float:
    """Bytes of shared memory that an instruction moves for a warp; two bytes an element of a warp group's operands."""
    base, *rest = name.split('.')
    if group := _WARPGROUP.search(name):
        rows, columns, depth = map(int, group.groups())
        from_registers = re.match(r'R\d+, R\d+, gdesc', operands) is not None
        return 2 * depth * (columns + (0 if from_registers else rows)) / 4
    if base in ('LDSM', 'STSM'):
        return 128 * int(rest[-1]) if rest[-1] in '124' else 128
    if base in ('LDS', 'STS', 'LDGSTS'):
        return 32 * next((int(part) // 8 for part in rest if part in ('64', '128')), 4)
    return 0
