"""Dark or light: as the system has it, or as somebody chose; the browser remembers."""
from nicegui import ui

_COOKIE = 'statekv_theme'
_CHOICES = {'auto': (None, 'brightness_auto'), 'light': (False, 'light_mode'), 'dark': (True, 'dark_mode')}


class Theme:
    """A button that goes through the choices."""

    def __init__(self):
        chosen = ui.context.client.request.cookies.get(_COOKIE, 'auto')
        self._name = chosen if chosen in _CHOICES else 'auto'
        self._dark = ui.dark_mode(_CHOICES[self._name][0])
        self._button = ui.button(color=None, on_click=self._next).props('flat round dense')
        self._show()

    def _next(self) -> None:
        names = list(_CHOICES)
        self._name = names[(names.index(self._name) + 1) % len(names)]
        self._dark.value = _CHOICES[self._name][0]
        ui.run_javascript(f'document.cookie = "{_COOKIE}={self._name};path=/;max-age=31536000;samesite=strict"')
        self._show()

    def _show(self) -> None:
        self._button.props(f'icon={_CHOICES[self._name][1]} aria-label="colours: {self._name}" title="colours: {self._name}"')
