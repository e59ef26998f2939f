"""The model that the package brings along: what it is, what it knows, and the demo that shows it."""
import json
import os
import subprocess
import sys

import cv2
import numpy as np
import pytest
from PIL import Image

from conftest import SECOND
from statekv_ros.backbones import load_backbone
from statekv_ros.memory import VideoStream
from statekv_ros.memory.trial import demonstration_warning
from statekv_ros.patrol.heldout import ask_all, measure
from statekv_ros.patrol.packing import Packer
from statekv_ros.patrol.pictures import PictureBank
from statekv_ros.patrol.questions import KINDS, PERCEPTION, answer_at
from statekv_ros.patrol.tokenizer import make_tokenizer
from statekv_ros.patrol.train import KNOWS
from statekv_ros.patrol.video import patrol_frames
from statekv_ros.share import find_share


@pytest.fixture(scope='module')
def patrol_backbone():
    return load_backbone('patrol', device='cpu', dtype='float32')


def test_it_says_that_it_is_a_demonstration(patrol_backbone):
    assert patrol_backbone.demonstration == KNOWS
    assert 'made-up patrols' in demonstration_warning(patrol_backbone)
    stream = VideoStream(patrol_backbone, 'statekv(72)')
    stream.step(np.zeros((64, 64, 3), np.uint8), SECOND)
    assert stream.answer('what is in view?', max_tokens=1).demonstration_model


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
    done = subprocess.run([sys.executable, '-m', 'statekv_ros.demo', '--json', '--picture', str(picture)], capture_output=True, text=True,
                          timeout=150, env=os.environ | {'OMP_NUM_THREADS': '1'})
    assert done.returncode == 0, done.stderr + done.stdout
    result = json.loads(done.stdout.splitlines()[-1])
    assert len(result['answers']) == 5 and result['right'] >= 4, [(a['question'], a['text'], a['truth']) for a in result['answers']]
    assert result['state_tokens'] == result['budget'] and result['lost'] == 0
    assert result['restarts'] == 1
    for answer in result['answers'][1:]:    # of before the restart too
        assert answer['frames'] == result['frames_processed'] and answer['covered_s'] > 38
    assert all(answer['evidence'] for answer in result['answers'])
    assert Image.open(picture).size == (4 * 160, 5 * 120)


@pytest.mark.timeout(180)
def test_the_demo_on_a_video_warns_of_its_model_and_draws_what_answers_looked_at(tmp_path):
    video, picture = tmp_path / 'grey.avi', tmp_path / 'answers.png'
    writer = cv2.VideoWriter(str(video), cv2.VideoWriter_fourcc(*'MJPG'), 10, (128, 64))
    for brightness in range(100, 220, 4):
        writer.write(np.full((64, 128, 3), brightness, np.uint8))
    writer.release()
    done = subprocess.run([sys.executable, '-m', 'statekv_ros.demo', '--json', '--video', str(video), '--picture', str(picture)],
                          capture_output=True, text=True, timeout=150, env=os.environ | {'OMP_NUM_THREADS': '1'})
    assert done.returncode == 0, done.stderr + done.stdout
    said = ' '.join(done.stdout.split())
    assert 'knows made-up patrols only' in said and '--model' in said
    answers = json.loads(done.stdout.splitlines()[-1])['answers']
    drawn = np.asarray(Image.open(picture))
    assert drawn.shape == (len(answers) * 120, 4 * 160, 3)
    for row, answer in enumerate(answers):
        for column, evidence in enumerate(answer['evidence'][:3]):
            # The first 80 rows are the frame: 128 x 64 made 160 x 80. The label stands below.
            grey = drawn[row * 120:row * 120 + 80, 160 * (column + 1):160 * (column + 2)]
            assert abs(int(np.median(grey)) - (100 + 40 * evidence['first_s'])) < 6
