"""What each camera sees now."""
from nicegui import ui

from statekv_ros.view.facts import printable
from statekv_ros.view.heading import Heading
from statekv_ros.view.pictures import pictures_url
from statekv_ros.view.state import State


class Picture(ui.element, component='picture.js'):
    """A picture that another one takes the place of without flicker."""


class Live:
    """A tile for each camera, with its health: at most two pictures a second."""

    def __init__(self, state: State):
        self._state = state
        self._names: list[str] | None = None
        self._tiles: dict[str, tuple] = {}
        with ui.element('section').classes('sk-card sk-live'):
            with ui.element('div').classes('sk-bar'):
                Heading('Now')
                self._rate = ui.label().classes('sk-dim')
            self._grid = ui.element('div').classes('sk-tiles')

    def refresh(self) -> None:
        """Bring the browser what has changed."""
        names = self._state.camera_names()
        if names != self._names:
            self._names = names
            self._build(names)
        now = {}
        for name, (picture, dot, words) in self._tiles.items():
            stamp_ns, health = self._state.live_ns(name), self._state.health.get(name)
            source = f'{pictures_url(name, self._state.lives)}&at={stamp_ns}' if stamp_ns else ''
            if picture.props.get('src') != source:
                picture.props['src'] = source
                picture.update()
            dot.classes(replace=f'sk-dot level{health.level if health else 0}')
            words.text = health.message if health else ''
            with self._state.lock:
                seconds = self._state.cameras[name].seconds if name in self._state.cameras else ()
                now[name] = [second.steps for second in list(seconds)[-6:-1]]
        rates = [sum(counts) / len(counts) for counts in now.values() if counts]
        self._rate.text = f'{sum(rates):.1f} steps/s' if rates else ''

    def _build(self, names: list[str]) -> None:
        self._grid.clear()
        self._tiles.clear()
        with self._grid:
            if not names:
                ui.label('no camera yet').classes('sk-dim sk-empty')
            for name in names:
                shown = printable(name, 60)
                with ui.element('figure'):
                    picture = Picture()
                    picture.props.update(alt=f'newest picture of camera {shown}', empty='no picture yet')
                    with ui.element('figcaption'):
                        dot = ui.element('i').classes('sk-dot')
                        ui.label(shown).classes('sk-name')
                        words = ui.label().classes('sk-dim sk-cut')
                self._tiles[name] = picture, dot, words
