"""How attention is spread over a stream, and what a budget keeps of it: the three figures with which StateKV argues.

* Mass captured: of the attention that a frame step pays to all keys so far, the share that the B keys with most of it receive.
* Weighted recall: of the attention that a step pays to the past, the share on keys that were among the B best one step before.
* Retention: of the B keys carried, the share still carried one step later; age: how many steps ago they were seen.

The first two watch with an unlimited state, so nothing is lost to earlier selections; the third with a state of B.
"""
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from tqdm import tqdm

from statekv_ros.backbones import Backbone, load_backbone
from statekv_ros.errors import EvaluationError, ParameterError
from statekv_ros.evaluation import figures
from statekv_ros.memory import VideoStream
from statekv_ros.memory.trial import try_out

Frames = Iterable[tuple[int, np.ndarray]]


class Source(Protocol):
    """What can be watched again and again."""

    def frames(self) -> Frames:
        """(header stamp in ns, uint8 [height, width, 3] RGB)."""


class _Scores:
    """Follows an unlimited state, and notes what each budget would have captured and recalled."""

    def __init__(self, budgets: Sequence[int]):
        self.captured: dict[int, list[np.ndarray]] = {budget: [] for budget in budgets}
        self.recalled: dict[int, list[np.ndarray]] = {budget: [] for budget in budgets}
        self._best: dict[int, torch.Tensor] = {}

    def note(self, importance: torch.Tensor) -> None:
        """importance: of one step, [layers, kv_heads, keys] fp32; keys in the order in which they were seen."""
        keys = importance.shape[-1]
        for budget in self.captured:
            if budget >= keys:
                continue        # all is kept
            if budget in self._best:
                best = self._best[budget]
                past = importance[..., :best.shape[-1]]
                self.recalled[budget].append(((past * best).sum(-1) / past.sum(-1)).mean(1).numpy())
            mass, index = importance.topk(budget, dim=-1)
            self.captured[budget].append((mass.sum(-1) / importance.sum(-1)).mean(1).numpy())
            self._best[budget] = torch.zeros_like(importance).scatter_(-1, index, 1.)


def collect(backbone: Backbone, sources: Sequence[Source], budgets: Sequence[int]) -> dict:
    """Watch every source once without a limit, and once with each budget.

    Returns:
        'layers', 'steps' (frame steps in all) and 'budgets': budget -> {'captured', 'recalled': mean per layer, None where the
        budget never had to choose; 'retained', 'age_steps': mean over layers and heads for each step of the longest source}.

    Raises:
        ParameterError: no budget, or one that is not positive.
    """
    if not budgets or min(budgets) <= 0:
        raise ParameterError(f'budgets must be positive numbers of tokens, got {list(budgets)}')
    captured = {budget: [] for budget in budgets}
    recalled = {budget: [] for budget in budgets}
    retained: dict[int, list[list[float]]] = {budget: [] for budget in budgets}
    ages: dict[int, list[list[float]]] = {budget: [] for budget in budgets}
    steps = 0
    with tqdm(total=len(sources) * (1 + len(budgets)), unit='pass', disable=None) as bar:
        for source in sources:
            scores = _Scores(budgets)
            steps += _watch_all(backbone, source, scores)
            bar.update()
            for budget in budgets:
                captured[budget] += scores.captured[budget]
                recalled[budget] += scores.recalled[budget]
                kept, old = _watch_kept(backbone, source, budget)
                retained[budget].append(kept)
                ages[budget].append(old)
                bar.update()
    return {'layers': backbone.layout.layers, 'steps': steps, 'budgets': {
        budget: {'captured': _per_layer(captured[budget]), 'recalled': _per_layer(recalled[budget]),
                 'retained': _mean_series(retained[budget]), 'age_steps': _mean_series(ages[budget])} for budget in budgets}}


def write_statistics(model: str, sources: Sequence[Source], out: Path, budgets: Sequence[int], device: str = 'auto',
                     weights: str = 'auto') -> dict:
    """Write statistics.json and index.html into a folder; returns what `collect` does.

    Raises:
        ModelError, ParameterError: see `load_backbone` and `collect`.
        EvaluationError: the folder cannot be written.
    """
    from statekv_ros.evaluation.report import render
    backbone = load_backbone(model, device, weights=weights)
    try_out(backbone)
    found = collect(backbone, sources, budgets)
    try:
        out.mkdir(parents=True, exist_ok=True)
        (out / 'statistics.json').write_text(json.dumps(found, indent=1))
        (out / 'index.html').write_text(render('statistics.html.j2', model=model, found=found, figures=[
            _figure(found, 'captured', 'Attention captured by the B most attended keys', 'layer', 'share of the mass'),
            _figure(found, 'recalled', 'Weighted recall from step to step', 'layer', 'share of the mass on the past'),
            _figure(found, 'retained', 'Retention of the compressed state', 'frame step', 'share carried on'),
            _figure(found, 'age_steps', 'Age of what is carried', 'frame step', 'steps since it was seen (mean)', None)]))
    except OSError as error:
        raise EvaluationError(f'the statistics cannot be written to {out}: {error}') from error
    return found


def _watch_all(backbone: Backbone, source: Source, scores: _Scores) -> int:
    stream = VideoStream(backbone, 'statekv(unlimited)', positions='native')
    commit = stream.carried.commit

    def commit_and_note() -> None:
        scores.note(stream.carried.frame()[2].cpu())
        commit()

    stream.carried.commit = commit_and_note
    for stamp_ns, frame in source.frames():
        stream.step(frame, stamp_ns)
    stream.flush()
    return stream.steps


def _watch_kept(backbone: Backbone, source: Source, budget: int) -> tuple[list[float], list[float]]:
    """For each step: the share of the state that is carried on, and the mean age of what is carried, in steps."""
    stream, retained, ages, before = VideoStream(backbone, f'statekv({budget})'), [], [], None
    for stamp_ns, frame in source.frames():
        if stream.step(frame, stamp_ns) is None:
            continue
        kept = stream.carried.kept().sort(dim=-1).values.cpu()
        if before is not None:
            found = torch.searchsorted(kept, before).clamp_max(kept.shape[-1] - 1)
            retained.append((kept.gather(-1, found) == before).float().mean().item())
        before = kept
        firsts = torch.tensor([record.first_ordinal for record in stream.detailed.records()])
        seen_in = torch.searchsorted(firsts, kept, right=True) - 1      # the prefix counts as seen with the first step
        ages.append((len(firsts) - 1 - seen_in.clamp_min(0)).float().mean().item())
    return retained, ages


def _per_layer(rows: list[np.ndarray]) -> list[float] | None:
    return np.mean(rows, axis=0).tolist() if rows else None


def _mean_series(series: list[list[float]]) -> list[float]:
    longest = max(map(len, series), default=0)
    return [float(np.mean([values[i] for values in series if i < len(values)])) for i in range(longest)]


def _figure(found: dict, name: str, title: str, x: str, y: str, top: float | None = 1.02) -> str:
    return figures.attempt(title, _draw, found, name, title, x, y, top)


def _draw(found: dict, name: str, title: str, x: str, y: str, top: float | None) -> str:
    figure, axes = figures.new_axes(title, x, y)
    for index, (budget, values) in enumerate(found['budgets'].items()):
        if values[name]:
            axes.plot(range(len(values[name])), values[name], linewidth=1.3, markersize=4,
                      markevery=max(1, len(values[name]) // 10), label=f'B = {budget}', **figures.style(index))
    axes.set_ylim(0, top)
    return figures.finished(figure, axes)
