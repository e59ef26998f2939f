"""The memory over time."""
import time
from collections.abc import Callable, Sequence

from nicegui import ui

from statekv_ros.view.camera import CameraSeen
from statekv_ros.view.facts import Looked, printable
from statekv_ros.view.pictures import pictures_url
from statekv_ros.view.state import State


class TimelineElement(ui.element, component='timeline.js'):
    """The browser's part: zoom, moving and what is in sight are its own affair."""


class Timeline:
    """Of one camera, which a choice above it says where there are several."""

    def __init__(self, state: State, looked: Callable[[], Sequence[Looked]], on_open: Callable[[str, int], None]):
        """looked: the frame steps to highlight; on_open: takes the camera and the stamp (ns) that somebody wants to see."""
        self._state, self._looked, self._on_open = state, looked, on_open
        self._shown = None
        with ui.element('section').classes('sk-card sk-wide'):
            self._choice = ui.select({}, label='camera').props('dense outlined').classes('sk-camera')
            self._choice.on_value_change(lambda: self.refresh())
            self._element = TimelineElement().on('open', self._open)

    @property
    def camera(self) -> str:
        return self._choice.value or ''

    def refresh(self) -> None:
        """Bring the browser what has changed."""
        names = self._state.camera_names()
        if names != list(self._choice.options):
            self._choice.set_options({name: printable(name, 40) for name in names},
                                     value=self.camera if self.camera in names else names[0] if names else None)
        self._choice.set_visibility(len(names) > 1)
        shown = self._state.version, self._state.lives, self.camera, tuple(self._looked())
        if shown == self._shown:
            return
        self._shown = shown
        with self._state.lock:
            seen = self._state.cameras.get(self.camera) or CameraSeen(self.camera)
            data = {'zone': time.localtime().tm_gmtoff * 1000, 'begin': _ms(seen.begin_ns), 'newest': _ms(seen.newest_ns),
                    'segments': [(_ms(first), _ms(last), number) for first, last, number in seen.segments],
                    'drops': [(_ms(stamp), count) for stamp, count in seen.drops],
                    'alerts': [(str(alert.stamp_ns), _ms(alert.stamp_ns), f'{alert.question} {alert.before} → {alert.text}')
                               for alert in self._state.alerts if alert.camera == self.camera]}
        # Nanoseconds do not fit the browser's numbers: as text.
        data['evidence'] = [(str(step.stamp_ns), _ms(step.stamp_ns), step.share)
                            for step in shown[3] if step.camera == self.camera]
        self._element.props['data'], self._element.props['url'] = data, pictures_url(self.camera, self._state.lives)
        self._element.update()

    def show(self, step: Looked) -> None:
        """Bring this step into sight."""
        if step.camera in self._choice.options:
            self._choice.set_value(step.camera)
        self._element.run_method('show', _ms(step.stamp_ns))

    def _open(self, event) -> None:
        at = str(event.args.get('at', '')) if isinstance(event.args, dict) else ''
        if at.isdecimal() and len(at) < 20:
            self._on_open(self.camera, int(at))


def _ms(stamp_ns: int) -> float:
    return round(stamp_ns / 1e6, 3)
