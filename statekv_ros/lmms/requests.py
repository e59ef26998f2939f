"""What the harness asks: a video, and a question about it."""
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from statekv_ros.errors import EvaluationError, StateKVError
from statekv_ros.lmms.generation import Generation, parse_generation

_MOST_TOLD = 10     # mistakes that are listed; the others are counted


@dataclass(frozen=True)
class Request:
    """One question.

    Attributes:
        place: task and document, for messages.
        video: path of what is watched before it is asked.
        retrieve_by: as of `VideoStream.begin_answer`.
    """
    place: str
    video: str
    question: str
    generation: Generation
    retrieve_by: str = ''


def read_all(instances: Sequence, read: Callable) -> list[Request]:
    """The requests of the harness's instances, each as `read` has it.

    Raises:
        EvaluationError: one line for each that cannot be asked, such as one whose video is missing.
    """
    requests, errors = [], []
    for instance in instances:
        try:
            requests.append(read(instance))
        except StateKVError as error:
            errors.append(f'task {instance.task_name}, document {instance.doc_id}: {error}')
        # How tasks say that a file is missing: most leave the program.
        except (SystemExit, AssertionError, OSError, KeyError, ValueError, TypeError) as error:
            errors.append(f'task {instance.task_name}, document {instance.doc_id} cannot be read: '
                          f'{str(error) or type(error).__name__}')
    if errors:
        more = f'\nand {len(errors) - _MOST_TOLD} more' if len(errors) > _MOST_TOLD else ''
        raise EvaluationError(f'{len(errors)} of {len(instances)} questions cannot be asked; nothing has been watched yet:\n'
                              + '\n'.join(errors[:_MOST_TOLD]) + more)
    return requests


def from_messages(messages: Sequence[dict], place: str, generation: dict) -> Request:
    """Of a chat: one turn of the user's, with one video and then text, perhaps in several pieces.

    Raises:
        StateKVError: it is something else.
    """
    from lmms_eval.protocol import ChatMessages
    visuals, texts = [], []
    for message in ChatMessages(messages=messages or []).messages:
        if message.role != 'user':
            remedy = 'put its text into model_args, system_prompt=...' if message.role == 'system' else 'leave few-shot out'
            raise EvaluationError(f'has a message of the role {message.role}, but a memory is asked one question: {remedy}')
        for content in message.content:
            if content.type == 'text':
                texts.append(content.text)
                continue
            if any(text.strip() for text in texts):
                raise EvaluationError(f'has text before its {content.type}, {"".join(texts)[:60]!r}, but a memory has watched '
                                      'before it is asked: choose a task that shows the video first')
            visuals.append((content.type, content.url))
    return _request(visuals, ''.join(texts), place, generation)


def bare_question(document: Mapping, field: str) -> str:
    """The text in a field of a task's document; '' without a field. Raises EvaluationError where there is none."""
    if not field:
        return ''
    text = document.get(field)
    if not isinstance(text, str) or not text.strip():
        raise EvaluationError(f'has no text in the field {field!r} that retrieve_by names; its fields are {", ".join(document)}')
    return text


def _request(visuals: Sequence[tuple[str, object]], question: str, place: str, generation: dict) -> Request:
    kinds = [kind for kind, _ in visuals]
    if kinds != ['video'] or not isinstance(visuals[0][1], str):
        raise EvaluationError(f'must have one video, a file, got {", ".join(kinds) or "none"}: StateKV watches one video and '
                              'answers from it, so choose another task')
    video = visuals[0][1]
    if '://' not in video and not os.path.isfile(video):
        raise EvaluationError(f'video {video} does not exist: is the data set whole?')
    if not question.strip():
        raise EvaluationError('has no question')
    return Request(place, video, question, parse_generation(generation))
