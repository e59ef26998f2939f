"""Answers of one backbone that are decoded at the same time: a pass has a row for each, so that weights are read once for all.

What an answer reads stays its own: attention goes row by row, as each would alone. Nobody waits for anybody: a pass is of those
that are there.
"""
import warnings
from collections.abc import Sequence

import torch

from statekv_ros.errors import Interrupted
from statekv_ros.memory.answering.decoding import Answering, decode


@torch.inference_mode()
def decode_together(answerings: Sequence[Answering], tokens: int) -> list[Exception | None]:
    """One slice: decode `tokens` tokens of all these answers together, or one of each where that is more. One that ends leaves
    the others.

    Args:
        answerings: different ones, each of which `shares_with` the others.

    Returns:
        What went wrong with each, for which there is nothing more to do then.

    Raises:
        Interrupted: a stream's `cancelled` said so.
    """
    errors: dict[Answering, Exception] = {}
    for _ in range(max(1, tokens // max(1, len(answerings)))):
        if rows := [each for each in answerings if not each.finish_reason and each not in errors]:
            _pass(rows, errors)
    return [errors.get(each) for each in answerings]


def _pass(answerings: list[Answering], errors: dict[Answering, Exception]) -> None:
    rows = [each for each in answerings if _try(each.require_memory, each, errors)]
    try:
        decoded = decode(rows) if rows else []
    except Interrupted:
        raise
    except Exception as error:      # whosever fault it was: alone, it has no others to fail
        for each in rows:
            each.give_up_pass()
            _try(lambda: each.advance(1), each, errors)
        if not any(each in errors for each in rows):
            warnings.warn(f'answers were decoded one by one, which is slower: {type(error).__name__}: {error}', RuntimeWarning,
                          stacklevel=3)
        return
    for each, (token, logits) in zip(rows, decoded):
        _try(lambda: each.take(token, logits), each, errors)


def _try(do, answering: Answering, errors: dict[Answering, Exception]) -> bool:
    """Whether it went well; else why not is among `errors`."""
    try:
        do()
    except Interrupted:
        raise
    except Exception as error:      # one answer's trouble is its own
        errors[answering] = error
    return answering not in errors
