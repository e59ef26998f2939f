"""Page votes as they are compiled for CPUs, any and those with wide registers: against the definition and the naive twin."""
import ctypes
import re
import shutil
import subprocess
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from statekv_ros.kernels import compiled, fitness
from statekv_ros.kernels.page_votes import page_votes
from statekv_ros.memory.detailed.leaves import by_number
from test_page_votes import CASES, LEAF, Case, Inputs, inputs, off

SOURCE = Path(__file__).resolve().parents[1] / 'kernels/page_votes/cpp/votes.cpp'
COMPILER = shutil.which('g++') or shutil.which('clang++')
FLAGS = {'any': [], 'avx2': ['-mavx2', '-mfma', '-mf16c'],      # as CMakeLists.txt has them
         'avx512': ['-mavx512f', '-mavx512bw', '-mavx512dq', '-mavx512vl', '-mfma', '-mf16c']}


@pytest.fixture(scope='module')
def built(tmp_path_factory):
    """`built(instructions)`: the library, compiled here; None: the one that is installed."""
    folder, found = tmp_path_factory.mktemp('compiled'), {}

    def build(instructions: str) -> ctypes.CDLL:
        if COMPILER is None:
            pytest.skip('needs a C++ compiler')
        capability = torch.backends.cpu.get_cpu_capability().lower()
        if instructions not in ('any', capability, 'avx2' if capability == 'avx512' else ''):
            pytest.skip(f'needs a processor with {instructions}')
        if instructions not in found:
            path = folder / f'{instructions}.so'
            subprocess.run([COMPILER, '-std=c++20', '-O1', '-Wall', '-Wextra', '-Werror', '-Wno-psabi', '-fPIC', '-shared',
                            *FLAGS[instructions], str(SOURCE), '-o', str(path)], check=True)
            found[instructions] = ctypes.CDLL(str(path))
        return found[instructions]
    return build


@pytest.fixture(params=list(FLAGS))
def library(request, built, monkeypatch):
    """implementation='cpu' runs what was compiled here."""
    library = built(request.param)
    monkeypatch.setattr(fitness, 'find_library', lambda operation: library)
    return library


def by_page(numbers: torch.Tensor, votes: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    order = numbers.expand(len(votes), -1).argsort(dim=-1, stable=True)
    return numbers.expand(len(votes), -1).gather(1, order), votes.gather(1, order)


def assert_as_naive(given: Inputs) -> None:
    (numbers, votes), (right_numbers, right_votes) = (page_votes(*given, implementation=each) for each in ('cpu', 'naive'))
    if given.leaves is None:
        assert numbers is given.lines.numbers
    else:
        assert numbers.dtype == torch.int32
        (numbers, votes), (right_numbers, right_votes) = by_page(numbers, votes), by_page(right_numbers, right_votes)
        assert torch.equal(numbers, right_numbers)
    assert votes.dtype == torch.float32 and torch.allclose(votes, right_votes, atol=1e-5 * given.queries.shape[2])


@pytest.mark.parametrize('case', CASES, ids=str)
def test_votes_equal_the_definition(case, library):
    same, error = off(case, 'cpu')
    assert same and error < 1e-6 * case.rows


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.builds(Case, rows=st.integers(1, 20), width=st.integers(1, 70), heads=st.integers(1, 3),
                 lines=st.lists(st.integers(1, 80), min_size=1, max_size=3).map(tuple),
                 stretches=st.lists(st.integers(5, 30), max_size=2).map(tuple), opened=st.integers(1, 5),
                 dtype=st.sampled_from([torch.float16, torch.float32]), coded=st.integers(0, 4), seed=st.integers(0, 99)))
@example(Case(3, 8, lines=(16,), coded=9))
def test_votes_of_any_shape_are_those_of_the_naive_twin(library, case):
    assert_as_naive(inputs(case))


def test_scores_far_apart_have_their_shares(library):
    """Where all but one of the candidates have next to nothing, or nothing. All leaves are opened: which of those that have nothing
    would be is anybody's choice."""
    given = inputs(Case(5, 32, lines=(50,), stretches=(12,), opened=12, unwanted=True))
    for size in (0, 1e-3, 30, 300):
        assert_as_naive(given._replace(queries=size * given.queries))


@pytest.mark.parametrize('number', [float('nan'), float('inf')])
def test_queries_that_are_no_numbers_read_pages_all_the_same(library, number):
    given = inputs(Case(5, 32, lines=(50,), stretches=(12,)))
    given.queries[..., 3:, :] = number
    numbers, _ = page_votes(*given, implementation='cpu')
    opened = numbers[:, :-50]
    assert all(len(pages.unique()) == len(pages) for pages in opened) and opened.shape[1] == given.leaves.opened * LEAF
    known = by_number(given.leaves.pages).flatten(1)
    assert all(set(pages.tolist()) <= set(own.tolist()) for pages, own in zip(opened, known))


@pytest.mark.parametrize('size', [0, 300])
def test_of_leaves_that_have_the_same_votes_each_is_opened_once(library, size):
    given = inputs(Case(5, 32, lines=(50,), stretches=(12,)))
    numbers, votes = page_votes(*given._replace(queries=size * given.queries), implementation='cpu')
    opened = numbers[:, :-50]
    assert all(len(pages.unique()) == len(pages) for pages in opened) and opened.shape[1] == given.leaves.opened * LEAF
    assert votes.isfinite().all() and (votes.clamp_min(0).sum(dim=1) < 5.001).all()
    strays = torch.stack([torch.isin(of_head, ~own[own < 0]) for of_head, own in zip(opened, given.leaves.pages)])
    assert strays.any() and torch.equal(votes[:, :-50] < 0, strays) and (votes[:, -50:] >= 0).all()


def test_halves_of_every_size_are_read_as_they_are(library):
    """All finite ones, those below the least normal number among them: a score is a half itself."""
    halves = torch.arange(2**16).short().view(torch.float16)
    halves = halves[halves.isfinite() & (halves.abs() < 40)]
    given = inputs(Case(1, 1, 1, lines=(len(halves),)))
    given.entries.exact[0, given.lines.lines[0].places.start + given.entries.offset:][:len(halves), 0] = halves
    given.queries.fill_(1)
    given.lines.lines[0].sizes.zero_()
    _, votes = page_votes(*given, implementation='cpu')
    assert torch.allclose(votes[0].double(), halves.double().softmax(0), rtol=1e-5, atol=0)


def test_threads_do_not_disturb_each_other(library):
    calls = [inputs(case) for case in CASES if case.dtype == torch.float16] * 6
    alone = [page_votes(*each, implementation='cpu') for each in calls]
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(lambda each: page_votes(*each, implementation='cpu'), calls))
    for (numbers, votes), (other_numbers, other_votes) in zip(alone, together):
        assert torch.equal(numbers, other_numbers) and torch.equal(votes, other_votes)


def test_some_of_the_kv_heads_are_read_where_all_of_them_lie(library):
    given = inputs(Case(3, 24, heads=3, lines=(20, 9), stretches=(11, 8), coded=2))
    entries, leaves, cut = given.entries, given.leaves, slice(1, 3)
    lines = type(given.lines)([line._replace(**{name: part[cut] for name, part in line._asdict().items()
                                                if isinstance(part, torch.Tensor) and len(part) == 3})
                              for line in given.lines],
                              given.lines.numbers[cut])
    own = {name: part[cut] for name, part in entries._asdict().items() if isinstance(part, torch.Tensor)}
    some = Inputs(given.queries[:, cut], entries._replace(**own), lines,
                  leaves._replace(entries=leaves.entries[cut], pages=leaves.pages[cut]))
    (numbers, votes), (all_numbers, all_votes) = (page_votes(*each, implementation='cpu') for each in (some, given))
    assert torch.equal(numbers, all_numbers[cut]) and torch.allclose(votes, all_votes[cut], atol=1e-6)


@pytest.mark.parametrize('change, words', [
    (lambda given: given._replace(entries=given.entries._replace(exact=given.entries.exact.mT.contiguous().mT)),
     "'cpu' needs entries that lie one behind the other in each KV head, got strides"),
    (lambda given: given._replace(leaves=given.leaves._replace(opened=21)),
     'no more than the leaves of a stretch, got 21 and .20'),
    (lambda given: given._replace(leaves=given.leaves._replace(opened=0)), 'opened must be positive'),
])
def test_what_cannot_be_read_is_an_error_that_names_it(change, words, library):
    with pytest.raises(ValueError, match=words):
        page_votes(*change(inputs(CASES[5])), implementation='cpu')


@pytest.fixture
def forgotten():
    """What was found out about libraries."""
    compiled.library.cache_clear()
    yield
    compiled.library.cache_clear()


def no_library(folder: Path) -> str:
    return f'is not in {folder}: install the package again'


def a_broken_library(folder: Path) -> str:
    for instructions in FLAGS:
        (folder / f'page_votes_{instructions}.so').write_text('no library')
    return 'cannot be loaded'


@pytest.mark.parametrize('lacks', [no_library, a_broken_library])
def test_without_a_library_the_naive_twin_runs_and_one_sentence_says_why(lacks, forgotten, monkeypatch, tmp_path):
    monkeypatch.setattr(compiled.statekv_ros, '__path__', [str(tmp_path)])
    words, given = lacks(tmp_path), inputs(CASES[5])
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter('always')
        (numbers, votes), _ = page_votes(*given), page_votes(*given)
    [told] = caught
    assert 'page_votes on a CPU is the naive one' in str(told.message) and words in str(told.message)
    right_numbers, right_votes = page_votes(*given, implementation='naive')
    assert torch.equal(numbers, right_numbers) and torch.equal(votes, right_votes)
    with pytest.raises(ValueError, match="'cpu' cannot run: .*or use 'naive'"):
        page_votes(*given, implementation='cpu')


def test_a_processor_without_wide_registers_gets_the_library_for_any(monkeypatch, tmp_path):
    monkeypatch.setattr(compiled.statekv_ros, '__path__', [str(tmp_path)])
    for instructions in FLAGS:
        (tmp_path / f'page_votes_{instructions}.so').touch()
    for capability, name in (('AVX2', 'avx2'), ('AVX512', 'avx512'), ('DEFAULT', 'any'), ('SVE256', 'any')):
        monkeypatch.setattr(torch.backends.cpu, 'get_cpu_capability', lambda capability=capability: capability)
        assert compiled._path('page_votes').name == f'page_votes_{name}.so'


def test_a_library_is_called_with_what_it_expects():
    """Names and order of what one call is given, in C++ and in Python."""
    from statekv_ros.kernels.page_votes.cpu import _Call
    [fields] = re.findall(r'struct Call {(.*?)};', SOURCE.read_text(), re.DOTALL)
    declared = re.findall(r'(\w+)[,;]', re.sub(r'//.*', '', fields))
    assert declared == [name for name, _ in _Call._fields_]
