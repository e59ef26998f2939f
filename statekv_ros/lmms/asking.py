"""Questions of one memory, several at once where it can."""
from collections.abc import Sequence
from dataclasses import dataclass

from statekv_ros.lmms.requests import Request
from statekv_ros.memory import VideoStream
from statekv_ros.memory.answering.decoding import Answering
from statekv_ros.memory.answering.shared import decode_together

_SLICE = 8          # tokens of an answer from one look for stops to the next
_QUESTION = 64      # as `VideoStream.answer` reads a question, for with `sparse` each slice of it chooses what it reads


@dataclass(frozen=True)
class Answer:
    """What came of a request; tokens: that were decoded for it."""
    text: str
    tokens: int


def ask(memory, requests: Sequence[Request], seed: int) -> list[Answer]:
    """The answers of a `VideoStream`, each what it would be alone, though questions share passes; or of a `CaptionMemory`.

    Raises:
        QuestionError: one that cannot be answered.
    """
    if not isinstance(memory, VideoStream):
        answers = [memory.answer(request.question, max_tokens=request.generation.max_tokens) for request in requests]
        return [Answer(request.generation.cut(answer.text), answer.answer_tokens)
                for request, answer in zip(requests, answers)]
    answerings = [memory.begin_answer(request.question, max_tokens=request.generation.max_tokens,
                                      temperature=request.generation.temperature, seed=seed, evidence=0)
                  for request in requests]
    while running := [each for each in answerings if not each.finish_reason]:
        _advance(running)
        for each, request in zip(answerings, requests):
            if request.generation.stops_in(each.text):
                each.finish('stop')
    return [Answer(request.generation.cut(each.text), len(each.token_ids)) for each, request in zip(answerings, requests)]


def _advance(answerings: Sequence[Answering]) -> None:
    """One slice of each."""
    together = [each for each in answerings if each.shares_with(answerings[0])]
    for each in answerings:
        if not each.is_decoding:
            each.advance(_QUESTION)
        elif each not in together or len(together) < 2:
            each.advance(_SLICE)
    for error in decode_together(together, _SLICE * len(together)) if len(together) > 1 else ():
        if error is not None:
            raise error
