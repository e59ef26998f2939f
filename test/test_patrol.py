"""The patrol world, its questions and its training code: facts against a plain retelling, numbers against the engine."""
import numpy as np
import pytest
import torch

from conftest import SECOND
from statekv_ros.backbones import load_backbone
from statekv_ros.memory import VideoStream
from statekv_ros.patrol import curriculum, train
from statekv_ros.patrol.captions import caption
from statekv_ros.patrol.forward import forward
from statekv_ros.patrol.heldout import ask_all, measure
from statekv_ros.patrol.packing import GRID, IGNORED, QUESTION_TOKENS
from statekv_ros.patrol.pictures import PictureBank
from statekv_ros.patrol.questions import (KINDS, Question, answer_at, ask, evidence_steps, holds_during, newest_fact_step,
                                          pick_step)
from statekv_ros.patrol.render import render
from statekv_ros.patrol.tokenizer import make_tokenizer
from statekv_ros.patrol.world import COLOURS, Patrol, Sight, Step, View, make_patrol, name_in_view


def patrol_of(text: str) -> Patrol:
    """'D0 . b1 b1 . c2': a red door, an empty step, a green ball for two steps, an empty step, a blue cone."""
    steps, sights, room, last = [], [], -1, None
    for index, word in enumerate(text.split()):
        if word == '.':
            steps.append(Step(View.EMPTY, 0, 0, -1, room))
        else:
            view, colour = View.DOOR if word[0] == 'D' else View.OBJECT, int(word[1])
            shape = 0 if view == View.DOOR else 'bxcr'.index(word[0])
            room = colour if view == View.DOOR else room
            if word == last:
                sights[-1] = sights[-1]._replace(last=index)
            else:
                sights.append(Sight(view, shape, colour, room, index, index))
            steps.append(Step(view, shape, colour, len(sights) - 1, room))
        last = word
    return Patrol(tuple(steps), tuple(sights))


STORY = patrol_of('D0 . b1 b1 . D2 x3 . b1 . c4 . b5 .')


@pytest.mark.parametrize('question, step, answer', [
    (Question('now'), 0, 'red door'), (Question('now'), 1, 'nothing'), (Question('now'), 3, 'green ball'),
    (Question('here'), 4, 'red'), (Question('here'), 5, 'blue'),
    (Question('exist', (0, 1)), 1, 'no'), (Question('exist', (0, 1)), 2, 'yes'),
    (Question('first', (0, -1)), 13, 'green'), (Question('last', (0, -1)), 13, 'white'), (Question('first', (3, -1)), 13, None),
    (Question('where', (1, 3)), 13, 'blue'), (Question('where', (0, 1)), 4, 'red'), (Question('where', (0, 1)), 13, None),
    (Question('before', (2, 4)), 13, 'green ball'), (Question('after', (2, 4)), 13, 'white ball'),
    (Question('after', (2, 4)), 10, None), (Question('before', (0, 1)), 4, None),
    (Question('when', (2, 4)), 13, '10'), (Question('when', (0, 1)), 4, '2'),
    (Question('count', (0, -1)), 13, '3'), (Question('count', (3, -1)), 13, '0'), (Question('count', (0, -1)), 3, '1'),
    (Question('again'), 8, 'yes'), (Question('again'), 2, 'no'), (Question('again'), 9, None)])
def test_answers_follow_from_the_story(question, step, answer):
    assert answer_at(STORY, question, step) == answer


def test_an_answer_holds_exactly_while_it_is_true():
    assert holds_during(STORY, Question('now'), 2) == (2, 3)
    assert holds_during(STORY, Question('last', (0, -1)), 9) == (2, 11)
    assert holds_during(STORY, Question('count', (0, -1)), 13) == (12, 13)


def test_evidence_is_where_the_answer_was_in_view():
    assert evidence_steps(STORY, Question('first', (0, -1)), 13) == (2, 3)
    assert evidence_steps(STORY, Question('after', (2, 4)), 13) == (12,)
    assert evidence_steps(STORY, Question('now'), 7) == (7,)
    assert evidence_steps(STORY, Question('count', (0, -1)), 13) == ()


@pytest.mark.parametrize('question, step, newest', [
    (Question('now'), 7, 7), (Question('again'), 8, 8), (Question('here'), 4, 0), (Question('here'), 13, 5),
    (Question('first', (0, -1)), 13, 3), (Question('last', (0, -1)), 13, 12), (Question('where', (1, 3)), 13, 6),
    (Question('before', (2, 4)), 13, 10), (Question('after', (2, 4)), 13, 12), (Question('when', (0, 1)), 4, 3),
    (Question('when', (0, 1)), 2, 2), (Question('exist', (0, 1)), 13, 8), (Question('exist', (3, 0)), 13, None),
    (Question('count', (0, -1)), 10, 8), (Question('count', (3, -1)), 13, None)])
def test_a_fact_is_as_old_as_the_newest_step_that_shows_what_it_rests_on(question, step, newest):
    assert newest_fact_step(STORY, question, step) == newest


def test_captions_tell_each_sight_once_with_its_second():
    assert caption(STORY, 0, 7, range(20, 40)) == '20 red door , 22 green ball , 25 blue door , 26 yellow box'
    assert caption(STORY, 3, 3, range(14)) == '3 green ball'
    assert caption(STORY, 13, 13, range(14)) == 'nothing'


@pytest.mark.parametrize('steps', [1, 3, 32, 200])
def test_a_patrol_is_whole_and_the_same_for_one_seed(steps):
    patrol, again = (make_patrol(steps, np.random.default_rng(7)) for _ in range(2))
    assert patrol == again and len(patrol.steps) == steps
    assert patrol.steps[0].view == View.DOOR
    for index, step in enumerate(patrol.steps):
        if step.sight >= 0:
            sight = patrol.sights[step.sight]
            assert sight.first <= index <= sight.last and (sight.view, sight.colour) == (step.view, step.colour)
    for kind in KINDS:
        random = np.random.default_rng(1)
        at = pick_step(patrol, kind, random, late=False)
        question = ask(patrol, kind, at, random)
        assert question is None or answer_at(patrol, question, at) is not None


def test_kinds_cannot_be_answered_by_always_saying_the_same():
    random, answers = np.random.default_rng(0), {kind: [] for kind in KINDS}
    for _ in range(300):
        patrol, asked = ask_all(32, random)
        for kind, pair in zip(KINDS, asked):
            if pair is not None:
                answers[kind].append(answer_at(patrol, *pair))
    for kind, told in answers.items():
        most = max(told.count(answer) for answer in set(told)) / len(told)
        assert len(told) > 100 and most < (.6 if kind in ('exist', 'again', 'count') else .3), (kind, most)


def test_hard_questions_have_no_shortcut():
    random = np.random.default_rng(0)
    for _ in range(200):
        patrol, end = make_patrol(32, random), 31
        where, first = ask(patrol, 'where', end, random, hard=True), ask(patrol, 'first', end, random, hard=True)
        assert where is None or answer_at(patrol, where, end) != COLOURS[patrol.steps[end].room]
        assert first is None or len({s.colour for s in patrol.objects(end) if s.shape == first.thing[0]}) > 1


@pytest.mark.parametrize('size', [(64, 64), (320, 240), (640, 480)])
def test_pictures_show_their_colour(size):
    random = np.random.default_rng(0)
    for colour, (red, green, blue) in ((0, (1, 0, 0)), (1, (0, 1, 0)), (2, (0, 0, 1))):
        thing = render(Step(View.DOOR, 0, colour, 0, 0), random, *size).astype(float)
        assert thing.shape == (2, size[1], size[0], 3)
        strongest = thing.max(axis=-1) - thing.min(axis=-1) > 60
        assert strongest.mean() > .03
        assert thing[strongest].mean(axis=0).argmax() == np.argmax((red, green, blue))


def test_every_sentence_of_the_world_survives_the_tokenizer():
    tokenizer = make_tokenizer()
    sentences = [Question(kind, (shape, colour)).text for kind in KINDS for shape in range(4) for colour in range(6)]
    sentences += [name_in_view(step) for step in STORY.steps] + ['1234 red ball , 99 green door', 'where are my keys?']
    for sentence in sentences:
        ids = tokenizer(sentence, add_special_tokens=False).input_ids
        assert tokenizer.unk_token_id not in ids
        assert tokenizer.decode(ids, skip_special_tokens=True).replace(' ', '') == sentence.replace(' ', '')
    assert len(tokenizer('<1234.5 seconds>', add_special_tokens=False).input_ids) == 4


# --- training ---------------------------------------------------------------------------------------------------------

@pytest.fixture(scope='module', autouse=True)
def small_batches():
    """Without bf16 in hardware, a processor takes minutes for those of a real run."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(curriculum, 'STAGES', (curriculum.Stage(1., 2, (3, 4), 3),))
        patch.setattr(train, 'POLISH', curriculum.Stage(1., 2, (5,), 3, floor=.15, urgency=4.))
        patch.setattr(train, 'LOOK_ROWS', 32)
        yield


@pytest.fixture(scope='module')
def trained_a_little(tmp_path_factory):
    """A run of three batches, two of pictures and one of videos, and its checkpoint."""
    folder = tmp_path_factory.mktemp('run')
    trainer = train.Trainer(folder, 0, 2, 2, 2, pictures=2)
    trainer.run(3)
    train.export(trainer, folder / 'model')
    return trainer, folder


def test_the_packed_forward_is_the_streaming_engine(trained_a_little):
    _, folder = trained_a_little
    backbone = load_backbone(str(folder / 'model'), device='cpu', dtype='float32')
    packer = train.Packer(make_tokenizer(), PictureBank(5, 2))
    random = np.random.default_rng(3)
    patrol = make_patrol(11, random)
    asked = [(Question('now'), 10), (Question('exist', (0, 1)), 10), (Question('here'), 6)]
    batch = packer.asked_batch([(patrol, asked)], random)
    with torch.inference_mode():
        hidden, _ = forward(backbone._model, batch, packer.bank.pixels(batch.pictures))
        packed = backbone.logits(hidden)[0]
    stream, told = VideoStream(backbone, 'statekv(unlimited)'), {}
    for step, picture in enumerate(batch.pictures):
        for half, frame in enumerate(frames_of(packer.bank.patches[picture])):
            stream.step(frame, SECOND + (2 * step + half) * SECOND // 2)
        for place, (question, at) in enumerate(asked):
            if at == step:
                told[place] = first_logits(stream, question.text)
    for place in range(len(asked)):
        start = batch.context_tokens + place * QUESTION_TOKENS
        first = start + int((batch.labels[0, start:start + QUESTION_TOKENS] != IGNORED).nonzero()[0])
        torch.testing.assert_close(told[place], packed[first], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize('size', [(64, 64), (320, 240), (640, 480), (480, 480)])
def test_cameras_of_common_shapes_are_seen_as_in_training(trained_a_little, size):
    backbone = load_backbone(str(trained_a_little[1] / 'model'), device='cpu')
    assert backbone.demonstration == train.KNOWS
    assert backbone.prepare(np.zeros((size[1], size[0], 3), np.uint8)).shape == (64, 64, 3)


def test_a_killed_run_goes_on_as_if_it_had_not_been(trained_a_little, tmp_path):
    trainer, folder = trained_a_little
    whole = train.Trainer(tmp_path, 0, 2, 2, 2, pictures=2)
    whole.run(5)
    resumed = train.Trainer(folder, 0, 2, 2, 2, pictures=2)
    assert resumed.step == 3
    resumed.run(5)
    for name, weight in whole.master.items():
        torch.testing.assert_close(resumed.master[name], weight, atol=1e-6, rtol=1e-5)
    with pytest.raises(ValueError, match='seed 0, not 1'):
        train.Trainer(folder, 1, 2, 2, 2, pictures=2)


def test_training_learns(tmp_path, monkeypatch):
    monkeypatch.setattr(train, 'WARM_UP_STEPS', 4)
    trainer = train.Trainer(tmp_path, 0, 60, 60, 0, pictures=2)
    for first, learn in ((0, trainer._look), (60, trainer._learn)):
        batch, pixels = trainer._batch(first, np.ones(len(KINDS)))
        losses = []
        for trainer.step in range(first, first + 5):
            losses.append(learn(batch, pixels))
        assert losses[-1] < .7 * losses[0]


def test_held_out_measurement_counts_what_it_says(trained_a_little):
    trainer, folder = trained_a_little
    backbone = load_backbone(str(folder / 'model'), device='cpu', dtype='float32')
    scores = measure(backbone._model, train.Packer(make_tokenizer(), PictureBank(5, 2)), steps=8, per_kind=5)
    assert set(scores) == set(KINDS)
    assert all(s['n'] == 5 and 0 <= s['right'] <= 1 and s['chance'] >= .2 for s in scores.values())


def frames_of(patches: np.ndarray) -> np.ndarray:
    """Undo the patch order: uint8 [2, 64, 64, 3]."""
    cells = patches.reshape(GRID, GRID, 2, 2, 3, 2, 16, 16)     # row, column, row in cell, column in cell, colour, frame, y, x
    return np.ascontiguousarray(cells.transpose(5, 0, 2, 6, 1, 3, 7, 4).reshape(2, 64, 64, 3))


def first_logits(stream: VideoStream, question: str) -> torch.Tensor:
    backbone, noted = stream.backbone, []
    plain = backbone.logits
    backbone.logits = lambda hidden: noted.append(plain(hidden)) or noted[-1]
    try:
        stream.answer(question, max_tokens=1)
    finally:
        del backbone.logits
    return noted[0].flatten()
