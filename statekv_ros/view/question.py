"""Ask, hear the answer grow, cancel; what was asked before."""
from collections.abc import Callable

from nicegui import ui

from statekv_ros.view.enlarged import clock
from statekv_ros.view.facts import Looked, printable
from statekv_ros.view.heading import Heading
from statekv_ros.view.history import Record
from statekv_ros.view.listener import Listener
from statekv_ros.view.pictures import pictures_url

PAGE = 8
_MOST_LOOKED = 8


class Questions:
    """The box, the chosen question with its answer and evidence, and the list of all.

    Attributes:
        chosen: the record that is shown; None where there is none.
    """

    def __init__(self, listener: Listener, on_open: Callable[[tuple[Looked, ...], int], None]):
        """on_open: takes the evidence of an answer and which of it somebody wants to see."""
        self._listener, self._history, self._state, self._on_open = listener, listener.history, listener.state, on_open
        self.chosen: Record | None = None
        self._page, self._listed, self._shown = 0, None, None
        with ui.element('section').classes('sk-card sk-ask'):
            with ui.element('form').classes('sk-askbox').on('submit.prevent', self.ask):
                self.box = ui.input(placeholder='Ask what it saw …').props(
                    'dense outlined maxlength=4000 aria-label="question" autocomplete=off').classes('sk-grow')
                self._camera = ui.select({}).props('dense outlined aria-label="camera"').classes('sk-camera')
                self._button = ui.button('Ask').props('type=submit unelevated no-caps')
                self._cancel = ui.button('Cancel', on_click=self._stop).props('outline no-caps')
            with ui.element('div').classes('sk-answer'):
                self._question = ui.label().classes('sk-q')
                self._text = ui.label().classes('sk-a').props('role=status aria-live=polite')
                self._note = ui.label().classes('sk-dim')
                self._evidence = ui.element('div').classes('sk-evidences')
            with ui.element('div').classes('sk-bar sk-past'):
                self._count = Heading()
                ui.element('span').classes('sk-grow')
                self._newer = ui.button(icon='chevron_left', color=None, on_click=lambda: self._turn(-1)).props(
                    'flat round dense aria-label="newer questions"')
                self._older = ui.button(icon='chevron_right', color=None, on_click=lambda: self._turn(1)).props(
                    'flat round dense aria-label="older questions"')
            self._list = ui.element('div').classes('sk-list')

    @property
    def looked(self) -> tuple[Looked, ...]:
        """Evidence of the chosen question."""
        return self.chosen.looked if self.chosen is not None else ()

    def ask(self) -> None:
        """What is in the box."""
        question = (self.box.value or '').strip()
        if not question:
            self.box.run_method('focus')
            return
        self.chosen, self._page = self._listener.ask(question, self._camera.value or ''), 0
        self.box.value = ''
        self.refresh()

    def refresh(self) -> None:
        """Bring the browser what has changed."""
        names = self._state.camera_names()
        if len(names) != len(self._camera.options) - 1 or any(name not in self._camera.options for name in names):
            choices = {'': 'all cameras'} | {name: printable(name, 40) for name in names}
            self._camera.set_options(choices, value=self._camera.value if self._camera.value in choices else '')
        self._camera.set_visibility(len(names) > 1)
        self.chosen = self.chosen or self._history.newest()
        self._show_chosen()
        self._show_list()

    def _show_chosen(self) -> None:
        record = self.chosen
        shown = (record, record.state, record.text, record.looked, record.error) if record is not None else ('nothing',)
        if shown == self._shown:
            return
        evidence_changed = self._shown is None or self._shown[0] is not record or self._shown[3:4] != shown[3:4]
        self._shown = shown
        busy = record is not None and record.own and not record.over
        self._cancel.set_visibility(busy)
        if record is None:
            self._question.text, self._text.text, self._note.text = '', '', 'Answers come here. Press / to ask.'
            return
        self._question.text = record.question
        self._text.text = record.text or {'waiting': 'waiting for its turn …', 'answering': '…'}.get(record.state, '')
        _mark(self._text, 'busy', busy)
        words = [record.error] if record.error else []
        words += [record.state] if record.state not in ('answered', 'failed') else []
        self._note.text = ' · '.join([*words, *filter(None, [record.note])])
        _mark(self._note, 'bad', record.state == 'failed')
        if evidence_changed:
            self._show_evidence(record)

    def _show_evidence(self, record: Record) -> None:
        self._evidence.clear()
        with self._evidence:
            for place, step in enumerate(record.looked[:_MOST_LOOKED]):
                when = clock(step.stamp_ns)
                with ui.element('button').props(f'type=button aria-label="evidence {place + 1}: {when}, {step.share:.0%}"').on(
                        'click', lambda place=place: self._on_open(record.looked, place)):
                    source = f'{pictures_url(step.camera, self._state.lives)}&at={step.stamp_ns}'
                    ui.element('img').props(f'src="{source}" alt="" loading=lazy')
                    ui.element('b').style(f'width:{max(2, min(100, 100 * step.share)):.0f}%')
                    ui.label(f'{when} · {step.share:.0%}')

    def _show_list(self) -> None:
        total = len(self._history)
        pages = max(1, -(-total // PAGE))
        self._page = min(self._page, pages - 1)
        self._count.text = f'Asked before ({total:,})' if total else 'Asked before'
        self._newer.set_enabled(self._page > 0)
        self._older.set_enabled(self._page < pages - 1)
        records = self._history.page(self._page, PAGE)
        listed = self.chosen, [(record.number, record.state) for record in records]
        if listed == self._listed:      # what somebody is about to press stays where it is
            return
        self._listed = listed
        self._list.clear()
        with self._list:
            for record in records:
                row = ui.element('button').props('type=button').on('click', lambda record=record: self._choose(record))
                row.classes('chosen' if record is self.chosen else '')
                with row:
                    ui.label(record.question).classes('sk-cut')
                    ui.label((record.text or record.error) * record.over or record.state).classes('sk-cut sk-said')
                    if not record.own:
                        ui.label('other').classes('sk-tag').props('title="asked by another client of the node"')

    def _choose(self, record: Record) -> None:
        self.chosen = record
        self.refresh()

    def _turn(self, by: int) -> None:
        self._page += by
        self.refresh()

    def _stop(self) -> None:
        if self.chosen is not None:
            self._listener.cancel(self.chosen)


def _mark(element: ui.element, name: str, holds: bool) -> None:
    element.classes(add=name) if holds else element.classes(remove=name)
