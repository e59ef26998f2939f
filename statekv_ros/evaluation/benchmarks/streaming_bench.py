"""StreamingBench (arXiv 2411.03628): real-time, omni-source (asked without its sound), sequential and proactive questions.

Format: THUNLP-MT/StreamingBench, src/data/questions_{real,omni,sqa,proactive}.json: a list of {video_path, questions:
[{task_type, question, time_stamp, answer, options}]}; of sqa a list of such lists, whose questions build on each other: the
ones before stand in the text with their right answers; of proactive with ground_truth_time_stamp and ground_truth_output
instead of answer and options. Protocol: src/benchmark/*.py, src/data/count.py. Right is what begins with the right letter; of
proactive, what says the output within 2 s of its time, where the model is asked every second whether the time has come. A
question sees the 60 s before it (`--context 60`) or all.
"""
from collections.abc import Iterator
from dataclasses import dataclass

from statekv_ros.evaluation.benchmarks.annotations import Entry
from statekv_ros.evaluation.benchmarks.reading import Reading, lettered
from statekv_ros.evaluation.schema import Poll, Question

_FOUR = 'ABCD'
_PROMPT = '{}\n{}\n{}\n{}\n{}\nAnswer with the letter of the right option and nothing else.'
_PROMPT_AFTER = '{}\n{}\n{}\n{}\n{}\n{}\nAnswer with the letter of the right option and nothing else.'
_BEFORE = 'At {} this was asked: {} ({}, {}, {}, {}) The answer was {}. '
_TIME_COME = '{} Has the time come to say "{}"? Answer yes or no.'
_AFTER_S = 4.0      # the model is asked until so long after the right time


@dataclass(frozen=True)
class StreamingBench:
    """`part`: 'real', 'omni' or 'sqa'."""
    part: str
    rate_hz: float = 1.0
    takes_context: bool = True

    @property
    def name(self) -> str:
        return f'streamingbench-{self.part}'

    @property
    def program(self) -> str:
        return f'src/benchmark/StreamingBench{"SQA" if self.part == "sqa" else ""}.py'

    def looks_like(self, document: Entry) -> bool:
        if self.part == 'sqa':
            return document.first.is_list
        return document.first.has('video_path', 'questions') and not document.first.has('conversations', 'video_id') \
            and not _is_proactive(document.first)

    def read(self, document: Entry, how: Reading) -> Iterator[tuple[str, Question] | None]:
        if self.part != 'sqa':
            prompt = how.prompts.assigned('PROMPT_TEMPLATE') + how.prompts.added('inp', 0) if how.prompts else _PROMPT
            for entry in document.items():
                yield from (self._asked(entry, question, prompt, ()) for question in entry.field('questions').items())
            return
        prompt, heading, before = (how.prompts.assigned('PROMPT_TEMPLATE'), how.prompts.added('context', 0),
                                   how.prompts.added('context', 1)) if how.prompts else (_PROMPT_AFTER, '', _BEFORE)
        for sequence in document.items():
            context = ''
            for entry in sequence.items():
                for question in entry.field('questions').items():
                    yield (asked := self._asked(entry, question, prompt, (context,)))
                    if asked is not None:
                        context = (context or heading) + before.format(question.field('time_stamp').text(),
                                                                       question.field('question').text(), *_options(question),
                                                                       asked[1].accepted[0])

    def _asked(self, entry: Entry, question: Entry, prompt: str, before: tuple[str, ...]) -> tuple[str, Question] | None:
        path, kind = entry.field('video_path').text(), question.field('task_type').text()
        ask_at, text = question.field('time_stamp').clock_s(), question.field('question').text()
        right, options = question.field('answer').one_of(tuple(_FOUR)), _options(question)
        if None in (path, kind, ask_at, text, right, *options) or not options:
            return None
        return path, Question(prompt.format(*before, text, *options), kind, 'recall' if before else 'perception', (right,), ask_at,
                              (ask_at, ask_at), chance=1 / len(_FOUR), scores=('first_character', 'letter_within'),
                              retrieve_by=text)


class StreamingBenchProactive:
    name, rate_hz, takes_context = 'streamingbench-proactive', 1.0, False
    program = 'src/benchmark/StreamingBenchProactive.py'

    def looks_like(self, document: Entry) -> bool:
        return _is_proactive(document.first)

    def read(self, document: Entry, how: Reading) -> Iterator[tuple[str, Question] | None]:
        prompt, time_come = (how.prompts.assigned('PROMPT_TEMPLATE_PROACTIVE'), how.prompts.assigned('query')) \
            if how.prompts else ('{}', _TIME_COME)
        for entry in document.items():
            for question in entry.field('questions').items():
                path, kind = entry.field('video_path').text(), question.field('task_type').text()
                ask_at, text = question.field('time_stamp').clock_s(), question.field('question').text()
                due = question.field('ground_truth_time_stamp').clock_s()
                output = question.field('ground_truth_output').text()
                if None in (path, kind, ask_at, text, due, output):
                    yield None
                    continue
                if due < ask_at:
                    question.complain(f'ground_truth_time_stamp is {ask_at - due:g} s before time_stamp')
                    yield None
                    continue
                yield path, Question(prompt.format(text), kind, 'formed', (output,), ask_at, (ask_at, due + _AFTER_S),
                                     scores=('output_in_time', 'in_time'), retrieve_by=text,
                                     poll=Poll(prompt.format(time_come.format(text, output)), due, due + _AFTER_S))


def _is_proactive(entry: Entry) -> bool:
    return entry.has('questions') and entry.field('questions').first.has('ground_truth_output', 'ground_truth_time_stamp')


def _options(question: Entry) -> list[str | None]:
    """Four options with their letters."""
    items = question.field('options').items(len(_FOUR))
    options = [item.text() for item in items]
    if len(items) > len(_FOUR):
        question.field('options').complain(f'must be four options, got {len(items)}')
        return [None]
    return options if None in options or not options or options[0].startswith('A.') else lettered(options)
