"""Reference of the commands, from their argparse parsers."""
import argparse
import importlib
import re
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from unittest.mock import patch

try:
    import tomllib
except ModuleNotFoundError:     # Python 3.10
    import tomli as tomllib

ROOT = Path(__file__).resolve().parents[2]
# The node listens for signals before it looks at its arguments.
ELSEWHERE = {'statekv-node': ('statekv_ros.node.arguments', 'check_arguments')}
WIDTH = 100     # of usage lines


class Caught(BaseException):
    """Carries the parser that a command was about to use; no command catches it."""

    def __init__(self, parser: argparse.ArgumentParser):
        self.parser = parser


def scripts() -> dict[str, Callable]:
    """The function that each console script calls with its arguments."""
    listed = tomllib.loads((ROOT / 'pyproject.toml').read_text())['project']['scripts']
    places = {name: ELSEWHERE.get(name, where.split(':')) for name, where in listed.items()}
    return {name: getattr(importlib.import_module(module), function) for name, (module, function) in places.items()}


def parser_of(main: Callable) -> argparse.ArgumentParser:
    """The parser that a command makes, before it parses anything."""
    def caught(self, args=None, namespace=None):
        raise Caught(self)

    with patch.object(argparse.ArgumentParser, 'parse_args', caught):
        try:
            main([])
        except Caught as found:
            return found.parser
    raise RuntimeError(f'{main.__module__} parses no arguments')


def commands() -> Iterator[tuple[argparse.ArgumentParser, str]]:
    """Each command and sub-command that does something by itself, with what it is for."""
    for main in scripts().values():
        parser = parser_of(main)
        yield parser, parser.description or ''
        for choices in (action for action in parser._actions if isinstance(action, argparse._SubParsersAction)):
            about = {each.dest: each.help for each in choices._choices_actions}
            yield from ((sub, sub.description or f'{about[name].capitalize()}.') for name, sub in choices.choices.items())


def sections() -> str:
    """One for each command."""
    text = []
    for parser, about in commands():
        level = '##' if ' ' not in parser.prog else '###'
        text += [f'{level} {parser.prog} {{ #{anchor(parser.prog)} }}\n', f'{_plain(about)}\n']
        text += ['```text', *_usage(parser), '```\n']
        text += _options(parser)
    return '\n'.join(text)


def anchor(prog: str) -> str:
    """Of a command's heading."""
    return prog.replace(' ', '-')


def _usage(parser: argparse.ArgumentParser) -> list[str]:
    parser.formatter_class = partial(argparse.HelpFormatter, width=WIDTH)
    return parser.format_usage().removeprefix('usage: ').rstrip().splitlines()


def _options(parser: argparse.ArgumentParser) -> Iterable[str]:
    shown = [action for action in parser._actions if action.help != argparse.SUPPRESS
             and not isinstance(action, (argparse._HelpAction, argparse._SubParsersAction))]
    if shown:
        yield '| argument | default | |\n|---|---|---|'
    for action in shown:
        names = ', '.join(f'`{name}`' for name in action.option_strings) or f'`{action.metavar or action.dest}`'
        given = isinstance(action, (argparse._StoreTrueAction, argparse._StoreFalseAction))
        default = '' if given or action.default in (None, '', argparse.SUPPRESS) else f'`{_value(action.default)}`'
        among = '' if not action.choices else ' One of ' + ', '.join(f'`{choice}`' for choice in action.choices) + '.'
        about = parser._get_formatter()._expand_help(action) if action.help else ''
        yield f'| {names} | {default} | {_plain(about)}{among} |'
    yield ''


def _value(default) -> str:
    if not isinstance(default, (list, tuple)):
        return str(default)
    return ' '.join(f'"{value}"' if ' ' in str(value) else str(value) for value in default)


def _plain(text: str) -> str:
    """One line of Markdown; what looks like HTML or ends a table cell is text here."""
    parts = re.split(r'(`[^`]*`)', ' '.join(text.split()).replace('|', r'\|'))
    return ''.join(part if part.startswith('`') else part.replace('<', '&lt;').replace('*', r'\*') for part in parts)
