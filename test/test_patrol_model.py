"""The model that the package brings along: what it is, what it knows, and the demo that shows it."""
import json
import os
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from conftest import SECOND
from statekv_ros.backbones import load_backbone
from statekv_ros.memory import VideoStream
from statekv_ros.patrol.heldout import ask_all, measure
from statekv_ros.patrol.packing import Packer
from statekv_ros.patrol.pictures import PictureBank
from statekv_ros.patrol.questions import KINDS, PERCEPTION, answer_at
from statekv_ros.patrol.tokenizer import make_tokenizer
from statekv_ros.patrol.video import patrol_frames
from statekv_ros.share import find_share


@pytest.fixture(scope='module')
def patrol_backbone():
    return load_backbone('patrol', device='cpu', dtype='float32')


def test_it_is_small_and_safe_to_load():
    folder = find_share('models/patrol')
    assert sum(file.stat().st_size for file in folder.iterdir()) < 10**7
    assert {file.suffix for file in folder.iterdir()} == {'.json', '.safetensors', '.md'}
    assert json.loads((folder / 'config.json').read_text())['architectures'] == ['Qwen3VLForConditionalGeneration']
    shipped, made = json.loads((folder / 'tokenizer.json').read_text()), json.loads(make_tokenizer().backend_tokenizer.to_str())
    assert shipped['model']['vocab'] == made['model']['vocab']       # the code that trains is the code that made it


def test_it_answers_about_videos_it_never_saw(patrol_backbone):
    """The model card has the numbers; here, what would show that it is broken."""
    packer = Packer(make_tokenizer(), PictureBank(424242, 6))
    scores = measure(patrol_backbone._model, packer, steps=32, per_kind=60, seed=7)
    right = {kind: scores[kind]['right'] for kind in KINDS}
    assert all(right[kind] > .9 for kind in PERCEPTION), right
    assert all(right[kind] > .8 for kind in KINDS), right
    assert np.mean([*right.values()]) > .96, right


def test_a_stream_at_camera_size_is_answered_under_a_small_budget(patrol_backbone):
    right = []
    for seed in range(3):
        patrol, asked = ask_all(24, np.random.default_rng(9000 + seed))
        stream = VideoStream(patrol_backbone, 'statekv(72)')
        frames = list(patrol_frames(patrol, seed))
        for index, (time_ns, frame) in enumerate(frames):
            stream.step(frame, SECOND + time_ns)
            right += [stream.answer(question.text, max_tokens=8).text == answer_at(patrol, question, step)
                      for question, step in filter(None, asked) if index == 2 * step + 1]
    assert len(right) > 20 and np.mean(right) > .8


@pytest.mark.timeout(180)
def test_the_demo_answers_rightly_through_the_nodes_service(tmp_path):
    picture = tmp_path / 'answers.png'
    done = subprocess.run([sys.executable, '-m', 'statekv_ros.demo', '--picture', str(picture)], capture_output=True, text=True,
                          timeout=150, env=os.environ | {'OMP_NUM_THREADS': '1'})
    assert done.returncode == 0, done.stderr + done.stdout
    result = json.loads(done.stdout.splitlines()[-1])
    assert len(result['answers']) == 5 and result['right'] >= 4, [(a['question'], a['text'], a['truth']) for a in result['answers']]
    assert result['state_tokens'] == result['budget'] and result['lost'] == 0
    assert all(answer['evidence'] for answer in result['answers'])
    assert Image.open(picture).size == (4 * 160, 5 * 120)
