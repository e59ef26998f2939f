"""Names that become part of parameters: of cameras and of watches."""
from collections.abc import Sequence

from statekv_ros.errors import ParameterError

_REMEDY = 'names are letters, digits and "_", beginning with a letter'


def check_names(kind: str, names: Sequence[str], taken: Sequence[str]) -> None:
    """Raises ParameterError for names that cannot be part of a parameter's, that mean something else, or that are there twice.

    Args:
        kind: what they are the names of, in one word.
        taken: names that are none.
    """
    for name in names:
        if not (name.isascii() and name.replace('_', 'a').isalnum() and name[0].isalpha()) or name in taken:
            raise ParameterError(f'{kind} name {name!r} cannot be used: {allowed(kind, taken)}')
    if len(set(names)) < len(names):
        raise ParameterError(f'{kind} names must differ, got {list(names)}')


def allowed(kind: str, taken: Sequence[str]) -> str:
    """What a name may be, in words."""
    return f'{kind} {_REMEDY}, and not {", ".join(map(_quoted, taken))}'


def _quoted(name: str) -> str:
    return f'"{name}"'
