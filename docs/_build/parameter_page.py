"""Reference of the node's parameters, from the table that declares them."""
from collections.abc import Iterable

from statekv_ros.node.parameters import LARGE, NODE, Spec, camera_specs, watch_specs

PARTS = (
    ('Of the node', '', NODE),
    ('Of each camera', 'A block for each name in `cameras`. Rate and QoS follow the node\'s unless they are given.',
     camera_specs('<camera>', "the node's rate_hz", "the node's reliability")),
    ('Of each standing question', 'A block for each name in `watches`: [Be told instead of asking](../watching.md).',
     watch_specs('<watch>')),
)


def sections() -> str:
    """One for each parameter."""
    return '\n'.join(f'## {title}\n\n{about}\n\n' + '\n'.join(_each(specs)) for title, about, specs in PARTS)


def _each(specs: Iterable[Spec]) -> Iterable[str]:
    for spec in specs:
        when = 'at start' if spec.fixed else 'at any time' if spec.runtime else 'while unconfigured'
        name = spec.name.replace('<', '&lt;').replace('>', '&gt;')
        about = spec.description.replace('<', '&lt;')
        facts = [f'default {_code(spec.default)}', *_allowed(spec), when]
        yield f'### {name} {{ #{anchor(spec.name)} }}\n\n{about[0].upper()}{about[1:]}.\n'
        yield f'{" · ".join(facts)}\n{{ .facts }}\n'


def anchor(name: str) -> str:
    """Of a parameter's heading."""
    return name.replace('<', '').replace('>', '')


def _allowed(spec: Spec) -> list[str]:
    if spec.choices:
        return ['one of ' + ', '.join(map(_code, spec.choices))]
    if spec.low is not None:
        return [f'at least {spec.low:g}' + (f', at most {spec.high:.10g}' if spec.high < LARGE else '')]
    return [spec.constraints.replace('<', '&lt;')] if spec.constraints else []


def _code(value) -> str:
    if isinstance(value, bool):
        return f'`{str(value).lower()}`'
    if isinstance(value, list):
        return f'`[{", ".join(value)}]`'
    return f'`{value}`' if value != '' else '`""`'
