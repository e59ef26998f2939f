"""Questions of one memory, several at once where it can."""
from collections.abc import Sequence
from dataclasses import dataclass

from statekv_ros.lmms.requests import Request
from statekv_ros.memory import VideoStream
from statekv_ros.memory.answering.decoding import UNHURRIED, Answering
from statekv_ros.memory.answering.shared import decode_together

_SLICE = 8      # tokens of an answer from one look for stops to the next


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
                                      temperature=request.generation.temperature, seed=seed, evidence=0,
                                      retrieve_by=request.retrieve_by)
                  for request in requests]
    while running := [each for each in answerings if not each.finish_reason]:
        _advance(running)
        for each, request in zip(answerings, requests):
            if request.generation.stops_in(each.text):
                each.finish('stop')
    return [Answer(request.generation.cut(each.text), len(each.token_ids)) for each, request in zip(answerings, requests)]


def _advance(answerings: Sequence[Answering]) -> None:
    """One slice of each: those whose next token can be found share passes, a question is read as `VideoStream.answer` reads it."""
    decoding = [each for each in answerings if each.is_decoding]
    for each in answerings:
        if each not in decoding:
            each.advance(UNHURRIED)
    for error in decode_together(decoding, _SLICE * len(decoding)):
        if error is not None:
            raise error
