"""RVS-Ego and RVS-Movie (arXiv 2406.08085) as ReKV's protocol asks them: open questions, each when its clip has just ended.

Format: Becomebright/ReKV, video_qa/rekv_stream_vqa.py, of data/rvs/ego/ego4d_oe.json and data/rvs/movie/movienet_oe.json: a list of
{video_id, video_path, conversations: [{question, answer, start_time, end_time}]}, times in seconds; watched at 0.5 frames a
second up to `end_time`. A judge of the user's choice says what is right: `predictions/` in the run folder has what was said.
"""
from collections.abc import Iterator

from statekv_ros.evaluation.benchmarks.annotations import Entry
from statekv_ros.evaluation.benchmarks.reading import Reading
from statekv_ros.evaluation.schema import Question


class Rvs:
    name, rate_hz, program, takes_context = 'rvs', 0.5, '', False

    def looks_like(self, document: Entry) -> bool:
        return document.first.has('conversations', 'video_id')

    def read(self, document: Entry, how: Reading) -> Iterator[tuple[str, Question] | None]:
        for entry in document.items():
            path = entry.field('video_path').text()
            for question in entry.field('conversations').items():
                text, answer = question.field('question').text(), question.field('answer').text()
                begin, end = question.field('start_time').number(), question.field('end_time').number()
                if None in (path, text, answer, begin, end):
                    yield None
                    continue
                if begin > end:
                    question.complain(f'start_time {begin:g} is after end_time {end:g}')
                    yield None
                    continue
                evidence = ((begin, end),) if begin < end else ()
                yield path, Question(text, 'open', 'perception', (answer,), end, (end, end), evidence, scores=('judge',))
