"""Streaming benchmarks that no harness has, read as their authors publish them: `statekv-eval FILE.json --benchmark NAME`.

A benchmark is one small file with a reader, and a line here.
"""
from collections.abc import Sequence
from pathlib import Path

from statekv_ros.errors import EvaluationError
from statekv_ros.evaluation.benchmarks.annotations import read_json
from statekv_ros.evaluation.benchmarks.ovo_bench import OvoBench
from statekv_ros.evaluation.benchmarks.prompts import Prompts
from statekv_ros.evaluation.benchmarks.reading import Benchmark, Reading, as_videos
from statekv_ros.evaluation.benchmarks.rvs import Rvs
from statekv_ros.evaluation.benchmarks.streaming_bench import StreamingBench, StreamingBenchProactive
from statekv_ros.evaluation.schema import Video

BENCHMARKS: dict[str, Benchmark] = {benchmark.name: benchmark for benchmark in (
    OvoBench(), StreamingBench('real'), StreamingBench('omni'), StreamingBench('sqa'), StreamingBenchProactive(), Rvs())}


def find_benchmark(name: str) -> Benchmark:
    """Raises EvaluationError for a name that is none."""
    if name not in BENCHMARKS:
        raise EvaluationError(f'--benchmark must be one of {", ".join(BENCHMARKS)}, got {name!r}')
    return BENCHMARKS[name]


def read_benchmark(name: str, files: Sequence[Path], videos: Path, rate_hz: float | None = None, context_s: float | None = None,
                   prompts: Path | None = None) -> list[Video]:
    """Videos with the questions of a benchmark's files.

    Args:
        videos: folder that the paths in the files are relative to.
        rate_hz: frames to watch per second; None: as the benchmark's protocol has it.
        context_s: how far a question may look back; None: to the start.
        prompts: a copy of the benchmark's repository, whose wording is used; None: ours.

    Raises:
        EvaluationError: one line for each mistake of the files or arguments.
    """
    benchmark = find_benchmark(name)
    for option, value in (('--rate-hz', rate_hz), ('--context', context_s)):
        if value is not None and not 0 < value < float('inf'):
            raise EvaluationError(f'{option} must be a positive number, got {value:g}')
    if context_s is not None and not benchmark.takes_context:
        raise EvaluationError(f'--context {context_s:g}: the protocol of {name} knows none')
    if prompts is not None and not benchmark.program:
        raise EvaluationError(f'--prompts {prompts}: {name} asks its questions as they stand')
    if not videos.is_dir():
        raise EvaluationError(f'--videos {videos} is not a folder: it is where the paths in {files[0].name} begin')
    program = prompts and Prompts(prompts / benchmark.program if prompts.is_dir() else prompts)
    how, errors, found = Reading(videos, rate_hz or benchmark.rate_hz, context_s, program), [], []
    for file in files:
        document = read_json(file, errors)
        others = [other.name for other in BENCHMARKS.values() if other.looks_like(document)]
        if others and name not in others:
            raise EvaluationError(f'{file} is not a file of {name}: it looks like one of {", ".join(others)}')
        asked = list(benchmark.read(document, how))
        if not errors:
            found += as_videos(asked, how, str(file))
    if errors:
        raise EvaluationError('\n'.join(errors))
    if not found:
        raise EvaluationError(f'{files[0]} asks nothing that {name} takes')
    return found
