"""What happened in a clip, in words: '3 red door , 5 green ball', or 'nothing'."""
from collections.abc import Sequence

from statekv_ros.patrol.world import Patrol, name_in_view

PROMPT = 'describe what is happening.'


def caption(patrol: Patrol, first: int, last: int, seconds: Sequence[int]) -> str:
    """Caption of steps `first` to `last`, both included; each sight with the second of its first step in the clip.

    seconds: whole second that each step of the patrol shows.
    """
    told, parts = -1, []
    for index in range(first, last + 1):
        step = patrol.steps[index]
        if step.sight >= 0 and step.sight != told:
            told = step.sight
            parts.append(f'{seconds[index]} {name_in_view(step)}')
    return ' , '.join(parts) or 'nothing'
