"""Standing questions: see, add, remove; and what they told."""
import asyncio

from nicegui import ui

from statekv_ros.client import WatchRefused
from statekv_ros.view.enlarged import Enlarged, clock
from statekv_ros.view.facts import Looked, Told, Watched, printable
from statekv_ros.view.heading import Heading
from statekv_ros.view.listener import Listener
from statekv_ros.view.pictures import pictures_url

_KINDS = {'changes': 'its answer changes', 'equals': 'its answer is', 'matches': 'its answer matches',
          'rises above': 'it rises above', 'falls below': 'it falls below'}
_SHOWN, _MOST = 12, 100     # alerts; watches


class Watches:
    """The form, the list, and the newest alerts."""

    def __init__(self, listener: Listener, enlarged: Enlarged):
        self._listener, self._state, self._enlarged = listener, listener.state, enlarged
        self._shown: tuple = None, []
        self._rows: dict[str, tuple[ui.label, ui.label, ui.label]] = {}
        self._last = self._state.alerts[-1] if self._state.alerts else None
        with ui.element('section').classes('sk-card sk-watches'):
            with ui.element('div').classes('sk-bar'):
                Heading('Standing questions')
            with ui.element('form').classes('sk-form').on('submit.prevent', self._add):
                self._question = ui.input(placeholder='Tell me when …').props(
                    'dense outlined maxlength=4000 aria-label="standing question" autocomplete=off').classes('sk-whole')
                self._camera = ui.select({}).props('dense outlined aria-label="camera of the standing question"').classes('sk-whole')
                with ui.element('div').classes('sk-bar sk-whole'):
                    self._kind = ui.select(_KINDS, value='changes').props('dense outlined aria-label="condition"').classes('sk-grow')
                    self._value = ui.input(placeholder='text or number').props(
                        'dense outlined maxlength=200 aria-label="of the condition" autocomplete=off').classes('sk-grow')
                    self._value.bind_visibility_from(self._kind, 'value', backward=lambda kind: kind != 'changes')
                with ui.element('div').classes('sk-bar sk-whole'):
                    ui.label('every').classes('sk-dim')
                    self._every = _number(0, 86400, 'seconds between checks; 0: each step')
                    ui.label('s, if').classes('sk-dim')
                    self._row = _number(1, 1000, 'checks in a row in which it must hold')
                    ui.label('× in a row').classes('sk-dim')
                    ui.button('Watch').props('type=submit unelevated no-caps')
            self._error = ui.label().classes('sk-dim bad').props('role=alert')
            self._list = ui.element('div').classes('sk-list')
            self._alerts_title = Heading().classes('sk-alerts-title')
            self._alerts = ui.element('div').classes('sk-list sk-alerts')

    def refresh(self) -> None:
        """Bring the browser what has changed; a new alert is told once."""
        names = self._state.camera_names()
        if names != list(self._camera.options):
            self._camera.set_options({name: printable(name, 40) for name in names},
                                     value=self._camera.value if self._camera.value in names else next(iter(names), None))
        self._camera.set_visibility(len(names) > 1)
        watches, alerts = self._state.watches, list(self._state.alerts)[-_SHOWN:]
        if alerts and alerts[-1] is not self._last:
            self._last = alert = alerts[-1]
            ui.notify(f'{alert.question} {alert.before} → {alert.text}', position='top-right', color='warning', textColor='black')
        if (watches, alerts) != self._shown:
            self._show_watches(watches)
            if alerts != self._shown[1]:
                self._show_alerts(alerts)
            self._shown = watches, alerts

    def _show_watches(self, watches: tuple[Watched, ...]) -> None:
        ids = [watch.id for watch in watches[:_MOST]]
        if ids != list(self._rows) or not ids:      # else what somebody is about to press stays where it is
            self._make_rows(watches[:_MOST])
        for watch in watches[:_MOST]:
            about, problem, said = self._rows[watch.id]
            about.text = f'{watch.condition} · {watch.every} · {watch.checks} checks'
            problem.text = watch.error or ('' if watch.keeps_up else 'does not keep up')
            said.text = watch.text or '–'

    def _make_rows(self, watches: tuple[Watched, ...]) -> None:
        self._list.clear()
        with self._list:
            self._rows = {watch.id: self._make_row(watch) for watch in watches}
            if not watches:
                ui.label('none yet: the node asks it again and again, and tells here when the answer meets the condition').classes(
                    'sk-dim')

    def _make_row(self, watch: Watched) -> tuple[ui.label, ui.label, ui.label]:
        with ui.element('div').classes('sk-row'):
            with ui.element('div').classes('sk-grow sk-cut'):
                ui.label(watch.question).classes('sk-cut')
                about, problem = ui.label().classes('sk-dim sk-cut'), ui.label().classes('sk-dim bad sk-cut')
            said = ui.label().classes('sk-said sk-cut')
            remove = ui.button(icon='close', color=None, on_click=lambda: self._remove(watch.id)).props('flat round dense size=sm')
            remove.props['aria-label'] = f'remove: {watch.question}'
        return about, problem, said

    def _show_alerts(self, alerts: list[Told]) -> None:
        self._alerts_title.text = 'Alerts' if alerts else ''
        self._alerts.clear()
        with self._alerts:
            for alert in reversed(alerts):
                self._show_alert(alert)

    def _show_alert(self, alert: Told) -> None:
        step = alert.looked[0] if alert.looked else Looked(alert.camera, alert.stamp_ns, 0.0, None)
        with ui.element('button').props('type=button').on('click', lambda: self._enlarged.open(alert.looked or (step,))):
            source = f'{pictures_url(step.camera, self._state.lives)}&at={step.stamp_ns}'
            ui.element('img').props(f'src="{source}" alt="" loading=lazy')
            with ui.element('div').classes('sk-grow sk-cut'):
                ui.label(f'{alert.before or "–"} → {alert.text}').classes('sk-cut')
                ui.label(f'{alert.question} · {clock(alert.stamp_ns)}').classes('sk-dim sk-cut')

    async def _add(self) -> None:
        kind, value = self._kind.value, (self._value.value or '').strip()
        try:
            await asyncio.to_thread(
                self._listener.watch, (self._question.value or '').strip(), self._camera.value or '',
                kind if kind == 'changes' else f'{kind} {value}', float(self._every.value or 0), int(self._row.value or 1))
        except (ValueError, WatchRefused) as error:
            self._error.text = printable(str(error))
            return
        self._error.text = self._question.value = ''

    async def _remove(self, id: str) -> None:
        try:
            await asyncio.to_thread(self._listener.unwatch, id)
        except WatchRefused as error:
            self._error.text = printable(str(error))


def _number(value: int, most: int, what: str) -> ui.number:
    return ui.number(value=value, min=0, max=most).props(
        f'dense outlined aria-label="{what}" title="{what}"').classes('sk-short')
