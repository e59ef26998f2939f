"""A picture of what answers looked at: a row for each, with the question, what was said of it, and the frames it attended to most."""
import textwrap
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np

THUMBNAIL = 160, 120        # width, height
LOOKED_AT = 3               # frame steps drawn for an answer
_LETTERS = 22               # in a line of a card, at most
_WHITE, _GREEN, _RED = (255, 255, 255), (120, 220, 130), (255, 120, 110)


class Row(NamedTuple):
    """An answer to draw.

    Attributes:
        right: None where nobody knows; `truth`: what would have been right.
        evidence: seconds since the first frame and share of the attention, greatest first.
    """
    question: str
    answer: str
    right: bool | None
    truth: str
    evidence: Sequence[tuple[float, float]]


def draw(rows: Sequence[Row], frames: Iterator[tuple[int, np.ndarray]], file: Path) -> bool:
    """Write the picture; False when it cannot be written.

    Args:
        frames: (time since the first in ns, uint8 [height, width, 3] RGB) of each; the nearest one in time is drawn.
    """
    nearest = _nearest({second for row in rows for second, _ in row.evidence[:LOOKED_AT]}, frames)
    drawn = []
    for row in rows:
        lines = [(f'Q {row.question}', _WHITE), (f'A {row.answer}', _WHITE)]
        if row.right is not None:
            lines.append(('right', _GREEN) if row.right else (f'wrong: {row.truth}', _RED))
        parts = [_card(lines)]
        for second, share in row.evidence[:LOOKED_AT]:
            parts.append(cv2.putText(_thumbnail(nearest[second]), f'{second:.0f} s, {share:.0%}', (6, THUMBNAIL[1] - 6),
                                     cv2.FONT_HERSHEY_SIMPLEX, .45, _WHITE, 1, cv2.LINE_AA))
        drawn.append(np.hstack(parts + [np.zeros_like(parts[0])] * (1 + LOOKED_AT - len(parts))))
    file.parent.mkdir(parents=True, exist_ok=True)
    return cv2.imwrite(str(file), cv2.cvtColor(np.vstack(drawn), cv2.COLOR_RGB2BGR))


def _nearest(seconds: set[float], frames: Iterator[tuple[int, np.ndarray]]) -> dict[float, np.ndarray]:
    """The frame nearest to each of these times."""
    found: dict[float, tuple[float, np.ndarray]] = {}
    for time_ns, frame in frames:
        for second in seconds:
            distance = abs(time_ns / 1e9 - second)
            if second not in found or distance < found[second][0]:
                found[second] = distance, frame
    return {second: frame for second, (_, frame) in found.items()}


def _thumbnail(frame: np.ndarray) -> np.ndarray:
    """The whole frame, made to fit, above a black rest."""
    (height, width), (wide, tall) = frame.shape[:2], THUMBNAIL
    scale = min(wide / width, tall / height)
    size = max(1, round(width * scale)), max(1, round(height * scale))
    picture = np.zeros((tall, wide, 3), np.uint8)
    picture[:size[1], :size[0]] = cv2.resize(frame, size, interpolation=cv2.INTER_AREA)
    return picture


def _card(lines: Sequence[tuple[str, tuple[int, int, int]]]) -> np.ndarray:
    """Text, each line with its colour, wrapped at words."""
    card = np.full((THUMBNAIL[1], THUMBNAIL[0], 3), 30, np.uint8)
    wrapped = [(part, colour) for text, colour in lines for part in textwrap.wrap(text, _LETTERS)]
    for index, (part, colour) in enumerate(wrapped):
        cv2.putText(card, part, (4, 16 + 15 * index), cv2.FONT_HERSHEY_SIMPLEX, .36, colour, 1, cv2.LINE_AA)
    return card
