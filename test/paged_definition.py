"""Paged attention by its definition in float64, and cases of every kind to hold implementations to it."""
import itertools
from dataclasses import replace
from typing import NamedTuple

import torch

from statekv_ros.kernels.paged_attention import PackedPool, Rope, paged_attention
from statekv_ros.kernels.paged_attention.pool import pack

HEAD_DIMS, GROUPS, LONGEST = (32, 64, 80, 100, 128, 256), (1, 2, 3, 4, 7, 8), (1, 2, 7, 9, 16, 33)
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
# In fp32, an angle of 3,000 radians is off by up to 1e-4.
TOLERANCE = {torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 2e-2}
KV_HEADS, PAGE_CAPACITY, AXES = 2, 40, 3


class Case(NamedTuple):
    """Shapes and kinds of one call. `rows` is group x tokens; pages have 1 to `longest` tokens, `bits` 16 is a raw pool."""

    pages: int
    longest: int
    rows: int
    head_dim: int
    dtype: torch.dtype
    bits: int
    moved: bool = False
    noted: bool = True
    unused: str = 'some'    # of the entries: 'none' (and then pages of one length), 'some', 'all' or 'head' (all of one head)
    seed: int = 0

    def __str__(self):
        return '-'.join(map(str, self)).replace('torch.', '')


def cases() -> list[Case]:
    """Every head dim with every format, moved and not, over odd sizes; then the edges."""
    sizes = itertools.cycle(itertools.product((1, 5, 17), LONGEST))
    tokens = itertools.cycle((1, 3, 15, 38))
    kinds = itertools.product(HEAD_DIMS, (16, 8, 4), (False, True))
    all_kinds = [Case(*next(sizes), GROUPS[index % 6] * next(tokens), head_dim, DTYPES[index % 3 - index // 3 % 3], bits, moved,
                      noted=index % 4 != 3, unused=('some', 'none')[index // 2 % 2], seed=index)
                 for index, (head_dim, bits, moved) in enumerate(kinds)]
    edges = [Case(4, 9, 300, 64, torch.float32, bits, True, unused=unused)
             for bits, unused in itertools.product((16, 8, 4), ('all', 'head', 'none'))]
    return all_kinds + edges


CASES = cases()


class Inputs(NamedTuple):
    query: torch.Tensor
    key: torch.Tensor | PackedPool
    value: torch.Tensor | None
    starts: torch.Tensor
    lengths: torch.Tensor
    scale: float
    moves: torch.Tensor | None
    noted: torch.Tensor | None
    rope: Rope
    entries: torch.Tensor | None


def inputs(case: Case) -> Inputs:
    """Pages anywhere in a pool whose other rows are NaN; unused entries say nonsense."""
    random = torch.Generator().manual_seed(case.seed)
    half, capacity = case.head_dim // 2, PAGE_CAPACITY * case.longest
    # Every page has a place of its own, so that none overlaps another.
    entries = torch.stack([torch.randperm(PAGE_CAPACITY, generator=random)[:case.pages] for _ in range(KV_HEADS)]).int()
    lengths = torch.randint(1, case.longest + 1, entries.shape, generator=random).int()
    lengths[:, 0] = case.longest
    starts = entries * case.longest + (torch.rand(lengths.shape, generator=random) * (case.longest - lengths + 1)).int()
    if case.unused == 'none':
        lengths.fill_(case.longest)
        starts = entries * case.longest
    moves = torch.randint(-200, 200, entries.shape, generator=random).int() if case.moved else None

    frequencies = 1e4 ** (-torch.arange(half) / half)
    axes = torch.randint(AXES, (half,), generator=random)
    rope = Rope(frequencies, frequencies * (axes != 2), axes, torch.randint(0, 3000, (AXES, capacity), generator=random).int(),
                torch.randn(KV_HEADS, case.head_dim, generator=random) * 3 if case.seed % 2 else None)
    shape = (KV_HEADS, capacity, case.head_dim)
    if case.bits == 16:
        # As a layer of a whole model's pool, of which only some rows were written so far.
        key, value = torch.randn(2, *shape[:1], capacity + 3, case.head_dim, generator=random).to(case.dtype)[:, :, :capacity]
        for head in range(KV_HEADS):
            for rows in (key, value):
                written = torch.zeros(capacity, dtype=torch.bool)
                for start, length in zip(starts[head].tolist(), lengths[head].tolist()):
                    written[start:start + length] = True
                rows[head, ~written] = torch.nan
    else:
        codes = [pack(torch.randint(0, 2**case.bits, shape, generator=random).to(torch.uint8), case.bits) for _ in range(2)]
        span = 2**case.bits - 1
        # Random numbers of about -1.5 to 1.5, times channels of different sizes.
        size = torch.rand(2, KV_HEADS, PAGE_CAPACITY, case.head_dim, generator=random) + 0.3
        key_scale, value_scale = (size * 3 / span).half()
        key_zero, value_zero = (-1.5 * size).half()
        key, value = PackedPool(*codes, key_scale, key_zero, value_scale, value_zero, case.bits), None
    if case.unused in ('some', 'head', 'all'):
        unused = torch.rand(lengths.shape, generator=random) < 0.3
        unused[:, 0] = case.unused == 'all'
        unused[0] |= case.unused in ('head', 'all')
        unused |= case.unused == 'all'
        lengths[unused], starts[unused], entries[unused] = 0, 10**6, -7
    query = torch.randn(KV_HEADS, case.rows, case.head_dim, generator=random).to(case.dtype)
    noted = torch.rand(capacity, generator=random) < 0.7 if case.noted else None
    return Inputs(query, key, value, starts, lengths, case.head_dim ** -0.5, moves, noted, rope,
                  entries if case.bits < 16 else None)


def turned(keys: torch.Tensor, angles: torch.Tensor) -> torch.Tensor:
    first, second = keys.chunk(2, -1)
    return torch.cat([first * angles.cos() - second * angles.sin(), second * angles.cos() + first * angles.sin()], -1)


def page_of(given: Inputs, head: int, page: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys and values [tokens, head_dim] of one page in float64, one number after the other in spirit."""
    start, length = given.starts[head, page].item(), given.lengths[head, page].item()
    rows, rope, pool = slice(start, start + length), given.rope, given.key
    move = 0 if given.moves is None else given.moves[head, page].item()
    if given.entries is None:
        keys, values = given.key[head, rows].double(), given.value[head, rows].double()
        return turned(keys, move * rope.stream_frequencies.double().expand(length, -1)), values
    entry, numbers = given.entries[head, page].item(), []
    for codes, scale, zero in ((pool.key_codes, pool.key_scale, pool.key_zero),
                               (pool.value_codes, pool.value_scale, pool.value_zero)):
        channels = torch.arange(given.query.shape[2])
        of_channel = codes[head, rows].long()[:, channels * pool.bits // 8] >> (channels % (8 // pool.bits) * pool.bits)
        numbers.append((of_channel & (2**pool.bits - 1)) * scale[head, entry].double() + zero[head, entry].double())
    if rope.bias is not None:
        numbers[0] = numbers[0] + rope.bias[head].double()
    positions = rope.positions[rope.axes, rows].T.double()
    return turned(numbers[0], positions * rope.frequencies.double() + move * rope.stream_frequencies.double()), numbers[1]


def definition(given: Inputs):
    """Output, log-sum-exp and that of each page's noted rows in float64."""
    kv_heads, rows, head_dim = given.query.shape
    pages = given.starts.shape[1]
    output = torch.zeros(kv_heads, rows, head_dim, dtype=torch.float64)
    lse = torch.full((kv_heads, rows), -torch.inf, dtype=torch.float64)
    page_lse = torch.full((kv_heads, rows, pages), -torch.inf, dtype=torch.float64)
    for head in range(kv_heads):
        used = [page for page in range(pages) if given.lengths[head, page] > 0]
        read = {page: page_of(given, head, page) for page in used}
        scores = {page: given.query[head].double() @ key.T * given.scale for page, (key, _) in read.items()}
        for page in used:
            start, length = given.starts[head, page], given.lengths[head, page]
            if given.noted is not None:
                page_lse[head, :, page] = scores[page][:, given.noted[start:start + length]].logsumexp(-1)
        if used:
            every = torch.cat([scores[page] for page in used], -1)
            lse[head] = every.logsumexp(-1)
            output[head] = every.softmax(-1) @ torch.cat([read[page][1] for page in used])
    return output, lse, page_lse if given.noted is not None else None


def on(given: Inputs, device: str) -> Inputs:
    def move(part):
        if isinstance(part, torch.Tensor):
            return part.to(device)
        if isinstance(part, (PackedPool, Rope)):
            return replace(part, **{name: move(value) for name, value in vars(part).items()})
        return part
    return Inputs(*map(move, given))


class Errors(NamedTuple):
    """Relative error of the output by norm; largest error of the log-sum-exp and of a page's share."""

    output: float
    lse: float
    share: float


def errors(given: Inputs, results) -> Errors:
    output, lse, page_lse = (part if part is None else part.cpu().double() for part in results)
    right_output, right_lse, right_page_lse = definition(given)
    assert output.shape == right_output.shape and lse.shape == right_lse.shape
    nothing = right_lse == -torch.inf
    assert (lse[nothing] == -torch.inf).all() and (output[nothing] == 0).all()
    off = ((output - right_output).norm() / right_output.norm().clamp_min(1e-30)).item()
    off_lse = (lse - right_lse)[~nothing].abs().amax().item() if (~nothing).any() else 0.0
    if right_page_lse is None:
        assert page_lse is None
        return Errors(off, off_lse, 0.0)
    assert page_lse.shape == right_page_lse.shape and (page_lse[right_page_lse == -torch.inf] == -torch.inf).all()
    total = right_lse.masked_fill(nothing, 0)[..., None]
    return Errors(off, off_lse, ((page_lse - total).exp() - (right_page_lse - total).exp()).abs().amax().item())


def measure(case: Case, implementation: str, device: str = 'cpu') -> Errors:
    given = inputs(case)
    results = paged_attention(*on(given, device), implementation)
    assert all(part is None or part.dtype == torch.float32 for part in results)
    return errors(given, results)


def assert_close(found: Errors, dtype: torch.dtype) -> None:
    # NaN, a place that was not written, compares false.
    assert all(error <= TOLERANCE[dtype] for error in found), found
