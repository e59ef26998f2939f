"""Answers that a judge outside has to look at, in files that judges know."""
import csv
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

from statekv_ros.evaluation.plan import slug

# As Becomebright/ReKV, video_qa/rekv_stream_vqa.py writes them and video_qa/eval/eval_open_ended.py reads them.
_COLUMNS = ('video_id', 'question', 'answer', 'pred_answer')


def write_predictions(jobs: Sequence[dict], folder: Path) -> None:
    """One CSV file for each policy with the answers of which nobody here knows whether they are right; none where there are none.

    Raises:
        OSError: it cannot be written.
    """
    rows: dict[str, list[dict]] = defaultdict(list)
    for job in jobs:
        for answer in job['answers']:
            if answer['right'] is None:
                rows[f'{job["prefill_policy"]} x {answer["answer_policy"]}'].append(dict(zip(_COLUMNS, (
                    Path(job['video']).stem, answer['text'], answer['accepted'][0], ' '.join(answer['answer'].split())))))
    for policy, answers in rows.items():
        folder.mkdir(parents=True, exist_ok=True)
        with (folder / f'{slug(policy)}.csv').open('w', newline='') as stream:
            writer = csv.DictWriter(stream, _COLUMNS)
            writer.writeheader()
            writer.writerows(answers)
