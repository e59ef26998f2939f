"""Reference of messages, services and actions, from the comments of msg/, srv/ and action/."""
from collections.abc import Iterable
from pathlib import Path

from rosidl_adapter.parser import (ActionSpecification, MessageSpecification, ServiceSpecification, parse_action_file,
                                   parse_message_file, parse_service_file)

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = 'statekv_ros'
KINDS = (
    ('Actions', 'action', parse_action_file, ('goal', 'result', 'feedback')),
    ('Services', 'srv', parse_service_file, ('request', 'response')),
    ('Messages', 'msg', parse_message_file, ()),
)


def sections() -> str:
    """One for each type, with a table for each of its parts."""
    text = []
    for title, folder, parse, parts in KINDS:
        text.append(f'## {title}\n')
        for file in sorted((ROOT / folder).iterdir()):
            text += _type(f'{folder}/{file.stem}', parse(PACKAGE, str(file)), parts)
    return '\n'.join(text)


def _type(name: str, spec: ActionSpecification | ServiceSpecification | MessageSpecification,
          parts: Iterable[str]) -> Iterable[str]:
    yield f'### {PACKAGE}/{name} {{ #{name.replace("/", "-").lower()} }}\n'
    if not parts:
        yield from _message(spec)
    for part in parts:
        message = getattr(spec, part)
        yield f'**{part.capitalize()}.** {_comment(message)}\n'
        yield from _rows(message)


def _message(spec: MessageSpecification) -> Iterable[str]:
    yield f'{_comment(spec)}\n'
    yield from _rows(spec)


def _rows(spec: MessageSpecification) -> Iterable[str]:
    """Constants, then fields: the order in which a reader needs them."""
    if spec.constants:
        yield '| constant | value | |\n|---|---|---|'
        yield from (f'| `{each.name}` | {each.value} | {_comment(each)} |' for each in spec.constants)
        yield ''
    if spec.fields:
        yield '| field | type | |\n|---|---|---|'
        yield from (f'| `{each.name}` | `{each.type}` | {_comment(each)} |' for each in spec.fields)
        yield ''


def _comment(of) -> str:
    return ' '.join(of.annotations.get('comment', ())).replace('<', '&lt;').replace('|', r'\|')
