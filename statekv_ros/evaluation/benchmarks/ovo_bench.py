"""OVO-Bench (arXiv 2501.05510), realtime and backward tasks, in streaming mode: one memory for each source video, asked at each
question's `realtime`. The published protocol cuts a video for every question instead and watches it from the start again.

Format: JoeLeelyf/OVO-Bench, data/ovo_bench_new.json, a list of {id, task, video, realtime, question, options, gt}; forward tasks
(REC, SSR, CRR), which have `test_info` instead, are left out. Scores: utils/OVOBenchScore.py holds an answer right that has the
right letter anywhere; that is `letter_within` here, and `first_letter` stands beside it.
"""
from collections.abc import Iterator

from statekv_ros.evaluation.benchmarks.annotations import Entry
from statekv_ros.evaluation.benchmarks.reading import LETTERS, Reading, lettered
from statekv_ros.evaluation.schema import Question

_BACKWARD, _REALTIME, _FORWARD = ('EPM', 'ASI', 'HLD'), ('OCR', 'ACR', 'ATR', 'STU', 'FPD', 'OJR'), ('REC', 'SSR', 'CRR')
_PROMPT = '{}\n{}\nAnswer with the letter of the right option and nothing else.'


class OvoBench:
    name, rate_hz, program, takes_context = 'ovobench', 1.0, 'constant.py', False

    def looks_like(self, document: Entry) -> bool:
        return document.first.has('realtime', 'gt', 'test_info')

    def read(self, document: Entry, how: Reading) -> Iterator[tuple[str, Question] | None]:
        prompt = how.prompts.assigned('BR_PROMPT_TEMPLATE') if how.prompts else _PROMPT
        for entry in document.items():
            task = entry.field('task').one_of(_BACKWARD + _REALTIME + _FORWARD)
            if task in _FORWARD:
                continue
            path, ask_at, text = entry.field('video').text(), entry.field('realtime').number(), entry.field('question').text()
            options = [option.text() for option in entry.field('options').items(2)]
            right = entry.field('gt').index(len(options)) if options else None
            if None in (task, path, ask_at, text, right, *options):
                yield None
                continue
            yield path, Question(prompt.format(text, '; '.join(lettered(options)) + ';'), task,
                                 'perception' if task in _REALTIME else 'recall', (LETTERS[right],), ask_at, (ask_at, ask_at),
                                 chance=1 / len(options), scores=('letter_within', 'first_letter'), retrieve_by=text)
