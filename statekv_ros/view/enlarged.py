"""One picture, large."""
import math
from collections.abc import Sequence
from datetime import datetime

from nicegui import ui

from statekv_ros.view.facts import Looked, printable
from statekv_ros.view.live import Picture
from statekv_ros.view.pictures import pictures_url
from statekv_ros.view.state import State


def clock(stamp_ns: int) -> str:
    """A header stamp for people: the time of day, or seconds of a simulated clock."""
    if stamp_ns < 10**18:
        minutes, seconds = divmod(stamp_ns / 1e9, 60)
        return f'{minutes:.0f}:{seconds:04.1f}'
    return datetime.fromtimestamp(stamp_ns / 1e9).strftime('%H:%M:%S')


class Enlarged:
    """A dialog; arrow keys go through the steps that were given with it."""

    def __init__(self, state: State):
        self._state = state
        self._steps: Sequence[Looked] = ()
        self._place = 0
        with ui.dialog() as self._dialog, ui.element('div').classes('sk-enlarged'):
            self._picture = Picture()
            self._picture.props.update(empty='there is no picture of this moment')
            with ui.element('div').classes('sk-bar'):
                self._caption = ui.label().classes('sk-cut')
                ui.element('span').classes('sk-grow')
                self._before, self._after = (
                    ui.button(icon=icon, color=None, on_click=lambda by=by: self._go(by)).props(
                        f'flat round dense aria-label="{name}"')
                    for icon, by, name in (('chevron_left', -1, 'before'), ('chevron_right', 1, 'next')))
                ui.button(icon='close', color=None, on_click=self._dialog.close).props('flat round dense aria-label="close"')
        self._keys = ui.keyboard(self._key, active=False)
        self._dialog.on_value_change(lambda event: setattr(self._keys, 'active', event.value))

    def open(self, steps: Sequence[Looked], place: int = 0) -> None:
        """Show one of these steps."""
        self._steps, self._place = steps, place
        self._show()
        self._dialog.open()

    def _show(self) -> None:
        step = self._steps[self._place]
        words = [printable(step.camera, 60), clock(step.stamp_ns)]
        if step.share:
            words.append(f'{step.share:.0%} of the attention')
        if step.place is not None:
            place = step.place
            words.append(f'at ({place.x:.1f}, {place.y:.1f}) m, {math.degrees(place.yaw):.0f}° in {place.frame}')
        self._caption.text = ' · '.join(words)
        self._picture.props.update(src=f'{pictures_url(step.camera, self._state.lives)}&at={step.stamp_ns}',
                                   alt=f'picture of {words[0]} at {words[1]}')
        self._picture.update()
        for button in (self._before, self._after):
            button.set_visibility(len(self._steps) > 1)

    def _go(self, by: int) -> None:
        self._place = (self._place + by) % len(self._steps)
        self._show()

    def _key(self, event) -> None:
        by = {'ArrowLeft': -1, 'ArrowRight': 1}.get(event.key.name if hasattr(event.key, 'name') else '', 0)
        if by and event.action.keydown and self._dialog.value and self._steps:
            self._go(by)
