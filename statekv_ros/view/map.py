"""Where the robot was at what answers and alerts looked at."""
import math
from collections import OrderedDict
from collections.abc import Sequence

from nicegui import ui

from statekv_ros.view.facts import Looked
from statekv_ros.view.heading import Heading
from statekv_ros.view.history import History
from statekv_ros.view.state import State

_MOST = 300     # places that are kept on it
_RECENT = 20    # records that are looked through
_WIDE = 2.6     # see view.css
_GREY = '#8a94a6'


class Map:
    """A small map in metres, north up as the frame's y axis; hidden while no place is known. Those of the shown answer stand out."""

    def __init__(self, state: State, history: History):
        self._state, self._history = state, history
        self._places: OrderedDict[tuple, Looked] = OrderedDict()
        self._shown: tuple | None = None
        with ui.element('section').classes('sk-card sk-map') as self._card:
            with ui.element('div').classes('sk-bar'):
                Heading('Where')
                self._frame = ui.label().classes('sk-dim')
            self._chart = ui.echart(_options([], [])).props('role=img aria-label="map of the places that answers looked at"')
        self._card.set_visibility(False)

    def refresh(self, looked: Sequence[Looked]) -> None:
        """looked: of the shown answer."""
        shown = tuple(looked), self._history.version, len(self._state.alerts)
        if shown == self._shown:
            return
        self._shown = shown
        steps = [step for record in self._history.page(0, _RECENT) for step in record.looked]
        for step in (*steps, *(step for alert in list(self._state.alerts)[-_RECENT:] for step in alert.looked), *looked):
            if step.place is not None:
                self._places[step.camera, step.stamp_ns] = step
        while len(self._places) > _MOST:
            self._places.popitem(last=False)
        here = [step for step in looked if step.place is not None]
        frame = next((step.place.frame for step in here or self._places.values()), '')
        self._card.set_visibility(bool(self._places))
        self._frame.text = f'metres in {frame}' if frame else ''
        others = [step for step in self._places.values() if step.place.frame == frame]
        self._chart.run_chart_method('setOption', _options(others, [step for step in here if step.place.frame == frame]))


def _options(others: list[Looked], here: list[Looked]) -> dict:
    def points(steps: list[Looked], size: float) -> list[dict]:
        # ECharts turns symbols counterclockwise from up, in degrees; yaw counts from the x axis.
        return [{'value': [step.place.x, step.place.y], 'symbolRotate': math.degrees(step.place.yaw) - 90,
                 'symbolSize': size + 18 * step.share * (size > 8)} for step in steps]

    places = [step.place for step in (*others, *here)]
    middle = [(min(values) + max(values)) / 2 if values else 0.0 for values in ([p.x for p in places], [p.y for p in places])]
    # The same scale both ways: the chart's area is so many times as wide as it is tall.
    away = [max(abs(place.x - middle[0]) / _WIDE, abs(place.y - middle[1])) for place in places]
    reach = 1.15 * max([.5, *away])
    axis = {'type': 'value', 'splitLine': {'lineStyle': {'opacity': .15}},
            'axisLabel': {'fontSize': 10, 'color': _GREY, 'showMinLabel': False, 'showMaxLabel': False}}
    return {'animation': False, 'grid': {'left': 34, 'right': 8, 'top': 8, 'bottom': 22},
            'xAxis': axis | {'min': middle[0] - _WIDE * reach, 'max': middle[0] + _WIDE * reach},
            'yAxis': axis | {'min': middle[1] - reach, 'max': middle[1] + reach},
            'series': [{'type': 'scatter', 'symbol': symbol, 'data': data, 'itemStyle': style} for symbol, data, style in (
                ('circle', points(others, 5), {'color': _GREY, 'opacity': .6}), ('arrow', points(here, 12), {'color': '#e0823d'}))]}
