"""The same patrol videos and questions through lmms-eval and through statekv-eval, compared answer by answer.

    python test/lmms_patrol.py --videos 64 --policy 'statekv(144) x all' OUT
"""
import argparse
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import yaml

from lmms_data import write_video
from statekv_ros.evaluation.cli import main as statekv_eval
from statekv_ros.patrol.heldout import ask_all
from statekv_ros.patrol.questions import answer_at
from statekv_ros.patrol.render import FRAMES_PER_STEP
from statekv_ros.patrol.video import patrol_frames

MAX_TOKENS = 16
# What a data set of one's own needs: where its videos are, what is asked, what is right.
TASK = """\
task: patrol
dataset_path: {documents}
test_split: test
output_type: generate_until
doc_to_visual: !function patrol_task.video
doc_to_text: "{{{{question}}}}"
doc_to_target: "answer"
process_results: !function patrol_task.judge
generation_kwargs: {{max_new_tokens: {max_tokens}, temperature: 0}}
metric_list: [{{metric: right, aggregation: mean, higher_is_better: true}}]
"""
FUNCTIONS = """\
from statekv_ros.evaluation.judge import is_right

def video(doc):
    return [doc['video']]

def judge(doc, results):
    return {'right': float(is_right(results[0], [doc['answer']]))}
"""


def write_patrols(folder: Path, videos: int, steps: int, seed: int = 0, size: tuple[int, int] = (320, 240)) -> None:
    """Videos without loss, `questions.yaml` for statekv-eval, and the task `patrol` for lmms-eval, with the same questions, all
    asked at the end."""
    documents, entries = [], []
    for number in range(seed, seed + videos):
        patrol, asked = ask_all(steps, np.random.default_rng(number))
        file = write_video(folder / f'patrol_{number}.mp4', (frame for _, frame in patrol_frames(patrol, number, *size)),
                           FRAMES_PER_STEP)
        texts = {question.text: answer for question, _ in filter(None, asked)
                 if (answer := answer_at(patrol, question, steps - 1)) is not None}
        end = steps - .25
        entries.append({'source': file.name, 'questions': [
            {'text': text, 'kind': 'end', 'group': 'recall', 'accepted': [answer], 'ask_at': end, 'valid': [0., end]}
            for text, answer in texts.items()]})
        documents += [{'video': str(file), 'question': text, 'answer': answer} for text, answer in texts.items()]
    (folder / 'questions.yaml').write_text(yaml.safe_dump({'version': 1, 'videos': entries}, sort_keys=False))
    (folder / 'tasks').mkdir()
    (folder / 'documents').mkdir()
    (folder / 'documents/test.jsonl').write_text(''.join(json.dumps(document) + '\n' for document in documents))
    (folder / 'tasks/patrol.yaml').write_text(TASK.format(documents=folder / 'documents', max_tokens=MAX_TOKENS))
    (folder / 'tasks/patrol_task.py').write_text(FUNCTIONS)


def by_statekv_eval(folder: Path, policy: str) -> list[tuple[str, str, str]]:
    """(video, question, answer) of all questions."""
    code = statekv_eval([str(folder / 'questions.yaml'), '--policies', policy, '--max-tokens', str(MAX_TOKENS), '--out',
                         str(folder / 'statekv-eval'), '--device', 'cpu', '--json'])
    if code:
        raise SystemExit(f'statekv-eval ended with {code}')
    jobs = [json.loads(file.read_text()) for file in sorted((folder / 'statekv-eval/jobs').glob('*.json'))]
    return [(job['source'], answer['text'], answer['answer']) for job in jobs for answer in job['answers']]


def by_lmms_eval(folder: Path, policy: str, batch_size: int = 1) -> list[tuple[str, str, str]]:
    """As `by_statekv_eval`."""
    prefill, _, answer = policy.partition(' x ')
    arguments = f'pretrained=patrol,prefill={prefill},answer={answer},fps={FRAMES_PER_STEP},device=cpu,resume={folder / "resume"}'
    done = subprocess.run(
        [sys.executable, '-m', 'lmms_eval', '--model', 'statekv', '--model_args', arguments, '--tasks', 'patrol',
         '--include_path', str(folder / 'tasks'), '--batch_size', str(batch_size), '--output_path', str(folder / 'lmms-eval'),
         '--log_samples'], env=os.environ | {'HF_HOME': str(folder / 'home'), 'HF_HUB_OFFLINE': '1'}, capture_output=True, text=True)
    [samples] = list(folder.glob('lmms-eval/*/*_samples_patrol.jsonl')) or [None]
    if samples is None:
        raise SystemExit(f'lmms-eval wrote nothing:\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}')
    documents = [json.loads(line) for line in (folder / 'documents/test.jsonl').read_text().splitlines()]
    told = [(documents[entry['doc_id']], entry['filtered_resps'])
            for entry in map(json.loads, samples.read_text().splitlines())]
    return [(Path(document['video']).name, document['question'], answer) for document, answer in told]


def main(argv: list[str] | None = None) -> int:
    """Print how many answers are the same; 1 where not all are."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument('out', type=Path)
    parser.add_argument('--videos', type=int, default=64)
    parser.add_argument('--steps', type=int, default=64, help='of each video, one second each')
    parser.add_argument('--policy', default='statekv(144) x all')
    parser.add_argument('--batch-size', type=int, default=1)
    args = parser.parse_args(argv)
    args.out.mkdir(parents=True)
    write_patrols(args.out.resolve(), args.videos, args.steps)
    ours, theirs = (sorted(run) for run in (by_statekv_eval(args.out.resolve(), args.policy),
                                            by_lmms_eval(args.out.resolve(), args.policy, args.batch_size)))
    same = sum(a == b for a, b in zip(ours, theirs, strict=True))
    print(f'{same} of {len(ours)} answers about {args.videos} videos are the same')
    return int(same < len(ours))


if __name__ == '__main__':
    sys.exit(main())
