"""Watches of the node's parameters: a list of names, and a block for each."""
from collections.abc import Callable
from dataclasses import fields

from statekv_ros.errors import StateKVError
from statekv_ros.node.watches.watch import Definition, Watch, define

PREFIX = 'watch'
_FIELDS = tuple(field.name for field in fields(Definition) if field.name != 'expires_s')   # what is configured does not expire


def configured(get: Callable[[str], object]) -> tuple[list[Watch], list[str]]:
    """The watches that the parameters name, and a sentence for each that cannot be.

    Args:
        get: a parameter's value by its name.
    """
    watches, problems = [], []
    for name in get('watches') or ():
        given = {field: get(f'{PREFIX}.{name}.{field}') for field in _FIELDS}
        try:
            watches.append(Watch(name, define(get('cameras'), get('watch_answer_policy'), get('max_tokens'), expires_s=0.0,
                                              **given), configured=True))
        except StateKVError as error:
            problems.append(f'watches names {name!r}, which cannot be: {error} (parameters "{PREFIX}.{name}.*")')
    if len(watches) > get('max_watches'):
        problems.append(f'watches names {len(watches)}, {get("max_watches")} are allowed: name fewer, or raise the parameter '
                        '"max_watches"')
    return watches, problems
