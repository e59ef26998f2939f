"""One browser's page, put together."""
from pathlib import Path

from nicegui import ui

from statekv_ros.view.charts import Charts
from statekv_ros.view.enlarged import Enlarged
from statekv_ros.view.facts import Looked
from statekv_ros.view.heading import Heading
from statekv_ros.view.listener import Listener
from statekv_ros.view.live import Live
from statekv_ros.view.map import Map
from statekv_ros.view.pictures import Pictures
from statekv_ros.view.question import Questions
from statekv_ros.view.theme import Theme
from statekv_ros.view.timeline import Timeline
from statekv_ros.view.watches import Watches

_STYLE = Path(__file__).with_name('view.css').read_text()
_EVERY_S = 0.25
# In the browser alone: what is typed next goes into the box already.
_KEYS = '''<script>document.addEventListener("keydown", (event) => {
  if (event.key !== "/" || event.ctrlKey || event.metaKey || document.activeElement.matches("input, textarea")) return;
  event.preventDefault();
  document.querySelector(".sk-ask input").focus();
});</script>'''


class Page:
    """Reads what the listener heard, a few times a second, and brings the browser what has changed. Several may be open."""

    def __init__(self, listener: Listener, pictures: Pictures):
        self._listener, self._state, self._pictures = listener, listener.state, pictures
        self._lives, self._shown = listener.state.lives, None

    def build(self) -> None:
        """Make the page; it lives until its browser leaves."""
        ui.add_css(_STYLE)
        ui.add_head_html(_KEYS)
        ui.colors(primary='#1f6fd6', warning='#f0b429')
        with ui.element('header').classes('sk-header'):
            Heading(self._state.memory, level=1)
            self._dot = ui.element('i').classes('sk-dot')
            self._name = ui.label().classes('sk-name')
            self._words = ui.label().classes('sk-dim sk-cut sk-grow')
            Theme()
        self._banner = ui.label().classes('sk-banner').props('role=alert')
        with ui.element('main').classes('sk-main'):
            enlarged = Enlarged(self._state)
            with ui.element('div').classes('sk-left'):
                self._live = Live(self._state)
                self._map = Map(self._state, self._listener.history)
            self._questions = Questions(self._listener, self._open_evidence)
            self._watches = Watches(self._listener, enlarged)
            self._timeline = Timeline(self._state, lambda: self._questions.looked,
                                      lambda camera, stamp_ns: enlarged.open((self._step(camera, stamp_ns),)))
            with ui.element('div').classes('sk-charts'):
                self._charts = Charts(self._state)
        self._enlarged = enlarged
        self.refresh()
        ui.timer(_EVERY_S, self.refresh)

    def refresh(self) -> None:
        """Bring the browser what has changed."""
        if self._lives != self._state.lives:
            self._lives = self._state.lives
            self._pictures.clear()
        condition = self._state.condition()
        if condition != self._shown:
            self._shown = condition
            self._dot.classes(replace=f'sk-dot level{condition.level if condition.here else 2}')
            self._name.text, self._words.text = condition.name, condition.sentence if condition.here else ''
            self._banner.text = '' if condition.here else condition.sentence
            self._banner.set_visibility(not condition.here)
        self._live.refresh()
        self._questions.refresh()
        self._watches.refresh()
        self._timeline.refresh()
        self._charts.refresh()
        self._map.refresh(self._questions.looked)

    def _open_evidence(self, steps: tuple[Looked, ...], place: int) -> None:
        self._timeline.show(steps[place])
        self._enlarged.open(steps, place)

    def _step(self, camera: str, stamp_ns: int) -> Looked:
        """The evidence of the shown answer that is of this stamp, or just the moment."""
        known = (step for step in self._questions.looked if (step.camera, step.stamp_ns) == (camera, stamp_ns))
        return next(known, Looked(camera, stamp_ns, 0.0, None))
