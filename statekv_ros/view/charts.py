"""Live charts: what a frame step costs, what the memory holds, the state, drops."""
import time
from collections.abc import Sequence

from nicegui import ui

from statekv_ros.view.camera import SECONDS
from statekv_ros.view.facts import printable
from statekv_ros.view.heading import Heading
from statekv_ros.view.state import State

_COLOURS = ['#3b8eea', '#e0823d', '#3aa981', '#a678de', '#d45d79', '#8a94a6']
_LEAST_MS = 30_000
_EVERY = 8      # calls of `refresh` between two updates


class Charts:
    """Four cards, each with the newest number and the last five minutes."""

    def __init__(self, state: State):
        self._state, self._calls = state, 0
        self._cards = {name: _Card(title, stacked) for name, title, stacked in (
            ('ms', 'Frame step', False), ('memory', 'Memory by tier', True), ('state', 'State', False), ('drops', 'Dropped', False))}

    def refresh(self) -> None:
        """Bring the browser the newest values, each time but a few."""
        self._calls += 1
        if self._calls % _EVERY != 1:
            return
        with self._state.lock:
            cameras = list(self._state.cameras.values())[:len(_COLOURS)]
            seconds = {printable(camera.name, 30): list(camera.seconds) for camera in cameras}
            tiers, engine = list(self._state.tiers), self._state.health.get('engine')
            budget, dropped = max((camera.budget for camera in cameras), default=0), sum(camera.dropped for camera in cameras)
        p50, p95 = (engine.values.get(f'step_ms_p{p}', '') if engine else '' for p in (50, 95))
        self._cards['ms'].show(f'{p50} ms' if p50 else '–', f'p95 {p95} ms' if p95 else '', {
            name: [(second.at, second.ms / second.steps) for second in of] for name, of in seconds.items()})
        newest = tiers[-1][1] if tiers else {}
        told = ' · '.join(f'{name} {_size(mb)}' for name, mb in newest.items() if mb)
        self._cards['memory'].show(_size(sum(newest.values())), told, {
            name: [(at, sizes.get(name, 0.0)) for at, sizes in tiers] for name in newest})
        held = {name: of[-1].state_tokens for name, of in seconds.items() if of}
        self._cards['state'].show(f'{max(held.values(), default=0):,} tokens', f'of at most {budget:,}' if budget else '', {
            name: [(second.at, second.state_tokens) for second in of] for name, of in seconds.items()})
        self._cards['drops'].show(f'{dropped:,}', 'images replaced before their turn', {
            name: [(second.at, second.dropped) for second in of] for name, of in seconds.items()})


class _Card:
    def __init__(self, title: str, stacked: bool):
        self._stacked = stacked
        with ui.element('section').classes('sk-card sk-chart'):
            with ui.element('div').classes('sk-bar'):
                Heading(title)
            self._number = ui.label().classes('sk-number')
            self._words = ui.label().classes('sk-dim sk-cut')
            self._chart = ui.echart(_options([], stacked), renderer='svg').props(
                f'role=img aria-label="{title}, last five minutes"')

    def show(self, number: str, words: str, series: dict[str, Sequence[tuple[int, float]]]) -> None:
        self._number.text, self._words.text = number, words
        options = _options([(name, [(at * 1000, round(value, 2)) for at, value in points]) for name, points in series.items()],
                           self._stacked)
        self._chart.run_chart_method('setOption', options, {'replaceMerge': ['series']})


def _options(series: list[tuple[str, list]], stacked: bool) -> dict:
    now = int(time.time() * 1000)
    begin = max(now - SECONDS * 1000, min([now - _LEAST_MS, *(data[0][0] for _, data in series if data)]))
    return {
        'animation': False, 'color': _COLOURS, 'grid': {'left': 0, 'right': 0, 'top': 6, 'bottom': 2},
        'xAxis': {'type': 'time', 'show': False, 'min': begin, 'max': now},
        'yAxis': {'type': 'value', 'show': False, 'min': 0},
        'series': [{'type': 'line', 'name': name, 'data': data, 'showSymbol': False, 'silent': True,
                    'lineStyle': {'width': 1.5}, 'areaStyle': {'opacity': .35 if stacked else .12}, **({'stack': 'all'} if stacked else {})}
                   for name, data in series]}


def _size(mb: float) -> str:
    return f'{mb / 1000:.2f} GB' if mb >= 1000 else f'{mb:.1f} MB'
