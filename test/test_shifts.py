"""Shifts: patrols of any length whose rare things are asked for at the end, by age, under several policies side by side."""
import json
from pathlib import Path

import numpy as np
import pytest
import yaml

from statekv_ros.errors import EvaluationError, ParameterError
from statekv_ros.evaluation.cli import main as evaluate
from statekv_ros.evaluation.footage import open_footage
from statekv_ros.evaluation.judge import fact_age_s
from statekv_ros.evaluation.metrics import rank
from statekv_ros.evaluation.schema import Video, load_questions
from statekv_ros.evaluation.tables import as_markdown, make_tables
from statekv_ros.patrol.cli import main as patrol
from statekv_ros.patrol.render import render
from statekv_ros.patrol.shift import KINDS, LEAST_STEPS, ask_shift, make_shift
from statekv_ros.patrol.world import COLOURS, View

BANDS = (10, 64, 256, 900, 1800, 3600)
POLICIES = ['statekv(144) x all', 'statekv(144) x sparse(72)', 'statekv(144) x last(4)', 'statekv(144)/int4 x sparse(72)',
            'window(32)/native x all']


def made(out: Path, steps: int, videos: int = 2, *more: str) -> Path:
    assert patrol(['make', str(out), '--shift', '--videos', str(videos), '--steps', str(steps), '--size', '64x64', *more]) == 0
    return out / 'questions.yaml'


@pytest.mark.parametrize('steps', [LEAST_STEPS, 41, 64, 300, 3600])
def test_a_shift_is_whole_and_passes_every_thing_once(steps):
    for seed in range(30):
        shift, again = (make_shift(steps, np.random.default_rng(seed)) for _ in range(2))
        assert shift == again and len(shift.steps) == steps
        things = [sight.thing for sight in shift.objects(steps - 1)]
        assert len(set(things)) == len(things) >= 5
        assert shift.sights[0].view == View.DOOR and shift.sights[0].first == 0
        assert all(a.last < b.first for a, b in zip(shift.sights, shift.sights[1:])) and shift.sights[-1].last < steps - 10
        for number, sight in enumerate(shift.sights):
            assert all(shift.steps[step].sight == number for step in range(sight.first, sight.last + 1))
        doors = [sight.colour for sight in shift.sights if sight.view == View.DOOR]
        assert all(a != b for a, b in zip(doors, doors[1:])), 'a door leads into another room'


def test_an_hour_has_questions_about_facts_of_every_age(tmp_path):
    [video] = load_questions(made(tmp_path / 'made', 3600, 1, '--no-bags'))
    ages = [question.age for question in video.questions]
    assert min(age for age in ages if age is not None) >= 10
    found = np.histogram([age for age in ages if age is not None], BANDS)[0]
    assert min(found) >= 10, found
    unseen = [question for question in video.questions if question.age is None]
    assert len(unseen) == 4 and all(question.accepted == ('no',) for question in unseen)
    assert {question.kind for question in video.questions} == set(KINDS)
    assert all(question.ask_at == 3599.75 and question.valid[1] == 3600 for question in video.questions)


def test_where_is_not_asked_of_the_present_room():
    for seed in range(20):
        shift, asked = ask_shift(64, np.random.default_rng(seed))
        for question, step in asked:
            if question.kind == 'where':
                [sight] = [sight for sight in shift.objects(step) if sight.thing == question.thing]
                assert COLOURS[sight.room] != COLOURS[shift.steps[step].room]


def test_a_shift_made_on_the_fly_is_its_bag(tmp_path):
    bags, virtual = (load_questions(made(tmp_path / name, LEAST_STEPS, 1, *more))
                     for name, more in (('bags', ()), ('virtual', ('--no-bags',))))
    assert bags[0].source == 'shift_0' and virtual[0].source == f'shift:seed=0,steps={LEAST_STEPS},size=64x64'
    assert bags[0].questions == virtual[0].questions
    pairs = zip(*(open_footage(video).frames() for video in bags + virtual), strict=True)
    assert all(a[0] == b[0] and np.array_equal(a[1], b[1]) for a, b in pairs)


def test_an_hour_is_checked_without_being_drawn(monkeypatch):
    drawn = []
    monkeypatch.setattr('statekv_ros.patrol.video.render', lambda *arguments: drawn.append(1) or render(*arguments))
    extent = open_footage(Video('shift:seed=1,steps=3600,size=64x48', ())).extent()
    assert (extent.frames, extent.duration_s, extent.height, extent.width) == (7200, 3600, 48, 64) and len(drawn) == 1


def test_too_short_a_shift_is_refused(tmp_path, capsys):
    assert patrol(['make', str(tmp_path / 'made'), '--shift', '--steps', '39']) == 2
    assert 'steps must be at least 40, got 39' in capsys.readouterr().err and not list(tmp_path.iterdir())
    with pytest.raises(EvaluationError, match='a shift has at least 40 steps and one pixel'):
        open_footage(Video('shift:seed=1,steps=39', ()))


def test_an_age_is_stated_with_each_question_and_is_the_one_that_counts(tmp_path):
    file = made(tmp_path / 'made', LEAST_STEPS, 1, '--no-bags')
    questions = load_questions(file)[0].questions
    assert all(fact_age_s(question) == question.age for question in questions)
    # Of a thing and the one before it, the thing was seen later.
    befores = [question for question in questions if question.kind == 'before']
    assert befores and all(question.age < question.ask_at - question.evidence[0][1] for question in befores)
    text = yaml.safe_load(file.read_text())
    text['videos'][0]['questions'][0]['age'] = -1
    file.write_text(yaml.safe_dump(text, sort_keys=False))
    with pytest.raises(EvaluationError, match=r'questions\[0\].age: must be a number of seconds from 0 on, got -1'):
        load_questions(file)


def test_a_short_shift_under_several_policies_and_formats(tmp_path):
    """The short form of the hour in docs/hours.md, well within what the model was trained for."""
    file, run = made(tmp_path / 'made', LEAST_STEPS, 2, '--no-bags'), tmp_path / 'run'
    arguments = [str(file), '--out', str(run), '--lockstep', '2', '--ask-alone', '--max-tokens', '8', '--policies', *POLICIES,
                 '--against', 'statekv(144)', '--ages', '10', '20', '40']
    assert evaluate([*arguments, '--so-far']) == 0 and (run / 'tables.md').read_text() == 'No answers.\n'
    assert evaluate(arguments) == 0
    tables = json.loads((run / 'report.json').read_text())['tables']
    found = {policy['policy']: policy for policy in tables['policies']}
    asked = [policy if ' x ' in policy else f'{policy} x all' for policy in POLICIES]
    assert list(found) == sorted(asked, key=lambda policy: [*map(rank, policy.split(' x '))])
    whole, sparse, newest, few = (found[name] for name in POLICIES[:4])
    assert tables['against'] == POLICIES[0] and whole['overall']['less']['difference'] == 0
    assert whole['overall']['right'] > .9 and few['overall']['right'] > .9
    assert all(sum(band['n'] for band in policy['ages']) + policy['undated']['n'] == policy['overall']['n']
               for policy in tables['policies'])
    assert max(band['right'] for band in newest['ages']) < .3 < newest['undated']['right'], 'nothing is in the last four frames'
    assert whole['evidence']['n'] > 30 and whole['evidence']['right'] > .5, 'asked alone, it is known where they looked'
    assert few['read_bytes'] < sparse['read_bytes'] / 2 < whole['read_bytes'] / 2
    before = {file.name: file.stat().st_mtime_ns for file in (run / 'jobs').iterdir()}
    assert evaluate([*arguments, '--so-far']) == 0
    assert {file.name: file.stat().st_mtime_ns for file in (run / 'jobs').iterdir()} == before
    assert json.loads((run / 'report.json').read_text())['tables'] == tables


# --- tables -----------------------------------------------------------------------------------------------------------


def job(source: str, prefill: str, rights: list[bool], ages=(5., 50., None), bytes_each: float = 100.) -> dict:
    answers = [{'question': number, 'kind': 'where', 'group': 'recall', 'answer_policy': 'all', 'right': right,
                'answer': 'red' if right else 'blue', 'chance': .25, 'fact_age_s': age, 'evidence_hit': None,
                'context_tokens': 10}
               for number, (right, age) in enumerate(zip(rights, ages))]
    return {'source': source, 'prefill_policy': prefill, 'token_bytes': bytes_each, 'answers': answers}


def test_tables_pair_the_questions_that_both_policies_were_asked():
    jobs = [job('a', 'full', [True, True, True]), job('b', 'full', [True, False, True]),
            job('a', 'statekv(9)/int4', [True, False, False], bytes_each=20.)]       # b is not done yet
    tables = make_tables(jobs, 'full x all', (0, 10, 100))
    full, ours = tables['policies']
    assert full['videos'] == 2 and (full['overall']['n'], full['overall']['right']) == (6, pytest.approx(5 / 6))
    assert ours['overall']['less']['n'] == 3 and ours['overall']['less']['difference'] == pytest.approx(-2 / 3)
    assert ours['overall']['same']['right'] == pytest.approx(1 / 3) and ours['read_bytes'] == 200 and full['read_bytes'] == 1000
    bands = [(band['from_s'], band['to_s'], band['n'], band['right']) for band in full['ages']]
    assert bands == [(0, 10, 2, 1.), (10, 100, 2, .5)]
    assert (ours['undated']['n'], ours['undated']['less']['difference']) == (1, -1.)
    assert ours['kinds']['where']['ages'][0]['right'] == 1.
    text = as_markdown(tables)
    assert '| statekv(9)/int4 x all | 3 | 33.3 (6.1-79.2) | -66.7 ±' in text and '50.0 (9.5-90.5), n = 2' in text


def test_without_the_policy_to_compare_with_there_is_no_difference():
    tables = make_tables([job('a', 'full', [True, True, True])], 'statekv(9) x all', (0, float('inf')))
    assert tables['against'] is None and tables['policies'][0]['overall']['less']['n'] == 0
    assert tables['policies'][0]['ages'][0]['to_s'] is None and '0 s on' in as_markdown(tables)


@pytest.mark.parametrize('edges', [(), (1,), (1, 1), (2, 1), (-1, 1), (0, float('nan'))])
def test_edges_that_do_not_grow_are_refused(edges):
    with pytest.raises(ParameterError, match='--ages must be'):
        make_tables([], 'full x all', edges)
