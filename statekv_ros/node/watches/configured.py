"""Watches of the node's parameters: a list of names, and a block for each."""
from collections.abc import Callable

from statekv_ros.errors import ParameterError, StateKVError
from statekv_ros.node.watches.watch import Watch, define

PREFIX = 'watch'


def configured(get: Callable[[str], object]) -> tuple[list[Watch], list[str]]:
    """The watches that the parameters name, and a sentence for each that cannot be.

    Args:
        get: a parameter's value by its name.
    """
    watches, problems = [], []
    for name in get('watches') or ():
        fields = {field: get(f'{PREFIX}.{name}.{field}') for field in
                  ('question', 'camera', 'condition', 'every_steps', 'every_s', 'debounce', 'max_tokens', 'answer_policy')}
        try:
            watches.append(Watch(name, define(get('cameras'), get('watch_answer_policy'), get('max_tokens'), expires_s=0.0,
                                              **fields), configured=True))
        except StateKVError as error:
            problems.append(f'watches names {name!r}, which cannot be: {error} (parameters "{PREFIX}.{name}.*")')
    if len(watches) > get('max_watches'):
        problems.append(f'watches names {len(watches)}, {get("max_watches")} are allowed: name fewer, or raise the parameter '
                        '"max_watches"')
    return watches, problems


def check_names(names: list[str]) -> None:
    """Raises ParameterError for names that cannot be part of a parameter's, or that are there twice."""
    for name in names:
        if not (name.isascii() and name.replace('_', 'a').isalnum() and name[0].isalpha()) or name == 'all':
            raise ParameterError(f'watch name {name!r} cannot be used: names are letters, digits and "_", beginning with a '
                                 'letter, and not "all"')
    if len(set(names)) < len(names):
        raise ParameterError(f'watch names must differ, got {list(names)}')
