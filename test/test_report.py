"""The report's numbers against numbers worked out by hand, and its page in a real browser."""
import csv
import json
import math
import shutil
import subprocess

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from conftest import SECOND
from statekv_ros.errors import ParameterError
from statekv_ros.evaluation import figures
from statekv_ros.evaluation.cli import main
from statekv_ros.evaluation.figures import cost_over_frames
from statekv_ros.evaluation.headline import headline, larger_for_less
from statekv_ros.evaluation.metrics import difference, percentiles, rank, share, slope, summarise, wilson
from statekv_ros.evaluation.report import write_report
from statekv_ros.evaluation.schema import Video
from statekv_ros.evaluation.statistics import collect, write_statistics
from statekv_ros.evaluation.store import RunFolder
from statekv_ros.memory import VideoStream

BROWSER = next(filter(None, map(shutil.which, ('chromium', 'chromium-browser', 'google-chrome'))), None)
RUN = {'model': 'patrol', 'mode': 'offline', 'device': 'cpu', 'dtype': 'float32', 'rate': None, 'max_tokens': 8}


def answer(question: int, right: bool, policy: str = 'all', kind: str = 'first', group: str = 'recall', age: float | None = 5.,
           text: str = 'red', hit: bool | None = None) -> dict:
    return {'question': question, 'text': 'which?', 'kind': kind, 'group': group, 'ask_at': 9., 'answer_policy': policy,
            'answer': text, 'accepted': ['red', 'a red one'], 'right': right, 'in_window': True, 'chance': .25, 'fact_age_s': age,
            'evidence': [], 'evidence_hit': hit, 'first_token_ms': 10. + question, 'total_ms': 20., 'context_tokens': 90}


def job(source: str, prefill: str, answers: list[dict], step_ms=(1., 1., 1., 1.), flops=1000) -> dict:
    return {'job': f'{source}-{prefill}', 'source': source, 'prefill_policy': prefill, 'mode': 'offline', 'frames': 8, 'steps': 4,
            'step_ms': list(step_ms), 'step_tokens': [9] * 4, 'step_flops': [flops] * 4, 'state_tokens': 36, 'detailed_bytes': 2500,
            'dropped': 0, 'answers': answers}


@pytest.fixture
def jobs() -> list[dict]:
    return [job('a', 'full', [answer(0, True), answer(1, True, kind='now', group='perception', age=None), answer(2, False)]),
            job('a', 'statekv(9)', [answer(0, False, text='blue'), answer(1, True, kind='now', group='perception', age=None),
                                    answer(2, True, text='blue', age=40., hit=True), answer(0, False, policy='last(4)', hit=False)],
                step_ms=(1., 2., 3., 4.), flops=500)]


@pytest.mark.parametrize('right, n, low, high', [
    (0, 0, 0., 1.), (0, 10, 0., .2775), (10, 10, .7225, 1.), (5, 10, .2366, .7634), (81, 263, .2553, .3662)])
def test_wilson_intervals_are_those_of_the_textbook(right, n, low, high):
    assert wilson(right, n) == pytest.approx((low, high), abs=2e-4)


def test_wilson_interval_stays_within_0_and_1_and_holds_the_share_for_every_n():
    for n in range(1, 201):
        for right in range(n + 1):
            low, high = wilson(right, n)
            assert 0 <= low <= right / n <= high <= 1, f'{right} of {n}'


@given(st.integers(1, 5000), st.data())
def test_wilson_holds_the_share_and_narrows(n, data):
    right = data.draw(st.integers(0, n))
    low, high = wilson(right, n)
    assert 0 <= low <= right / n <= high <= 1
    wide_low, wide_high = wilson(right * 4, n * 4)
    assert wide_high - wide_low < high - low
    mirrored = wilson(n - right, n)
    assert mirrored == pytest.approx((1 - high, 1 - low))


def test_shares_differences_percentiles_and_slopes():
    assert share([True, False, True, True]) == {'n': 4, 'right': .75, 'low': pytest.approx(.3006, abs=1e-3),
                                                'high': pytest.approx(.9544, abs=1e-3)}
    assert share([])['right'] is None
    paired = difference([True, True, False, False], [True, False, False, False])
    half = 1.96 * math.sqrt((3 / 6 - 1 / 36) / 6)       # one pair won: (1 + 1) / 6 against (0 + 1) / 6
    assert paired == {'n': 4, 'difference': .25, 'low': pytest.approx(1 / 6 - half, abs=1e-3),
                      'high': pytest.approx(1 / 6 + half, abs=1e-3)}
    agreed = difference([True] * 24, [True] * 24)
    assert agreed['difference'] == 0 and -.12 < agreed['low'] < -.05 and .05 < agreed['high'] < .12
    assert percentiles([1., 2., 3.], 50, 95) == {'p50': 2., 'p95': pytest.approx(2.9)} and percentiles([], 50) == {'p50': None}
    assert slope([[.002 * i for i in range(200)], [5 + .002 * i for i in range(200)]]) == pytest.approx(2.)
    assert slope([[1.] * 100, [2.] * 1000]) == 0      # flat, whatever their levels and lengths
    assert slope([[1., 2.]]) is None


def test_a_summary_counts_every_pair_of_policies(jobs):
    summary = summarise(jobs)
    assert (summary['videos'], summary['questions'], summary['kinds']) == (1, 3, ['first', 'now'])
    full, state, last = summary['policies']
    assert [p['policy'] for p in (full, state, last)] == ['full x all', 'statekv(9) x all', 'statekv(9) x last(4)']
    assert full['overall']['right'] == pytest.approx(2 / 3) and full['overall']['chance'] == .25
    assert state['kinds']['now'] == share([True]) | {'chance': .25} and state['groups']['recall']['n'] == 2
    assert state['agreement']['right'] == pytest.approx(1 / 3)                  # only the question about now was told alike
    assert state['against_full']['difference'] == 0 and last['against_full']['difference'] == -1
    assert state['evidence'] == share([True]) and last['evidence'] == share([False]) and full['evidence']['n'] == 0
    assert [(age['from_s'], age['to_s'], age['n'], age['right']) for age in state['ages']] == [(4, 8, 1, 0.), (32, 64, 1, 1.)]
    assert state['step_ms']['p50'] == 2.5 and state['step_flops'] == 500 and state['prefill_flops'] == 2000
    assert state['first_token_ms']['p50'] == 11.
    assert state['cost_over_step']['ms'] == [1., 2., 3., 4.]


def test_untimed_jobs_are_summarised_too(jobs):
    for made in jobs:
        made['step_ms'] = []
        for told in made['answers']:
            told['first_token_ms'] = None
    policy = summarise(jobs)['policies'][0]
    assert policy['step_ms'] == {'p50': None, 'p95': None, 'p99': None, 'slope': None} and policy['first_token_ms']['p50'] is None


def test_costs_are_drawn_in_the_unit_that_most_policies_have(jobs):
    assert 'ms per frame step' in cost_over_frames(summarise(jobs)['policies'])
    for made in jobs[1:]:
        made['step_ms'] = []
    assert 'GFLOP per frame step' in cost_over_frames(summarise(jobs)['policies'])


def test_a_report_has_a_page_a_table_and_numbers(jobs, tmp_path):
    jobs[0]['answers'][0]['answer'] = '<script>alert("x")</script>'
    report = write_report(jobs, RUN | {'model': '<b>model</b>'}, tmp_path)
    assert json.loads((tmp_path / 'report.json').read_text()) == json.loads(json.dumps(report))
    rows = list(csv.DictReader((tmp_path / 'answers.csv').open()))
    assert len(rows) == 7 and rows[0]['accepted'] == 'red|a red one' and rows[3]['prefill_policy'] == 'statekv(9)'
    page = (tmp_path / 'index.html').read_text()
    assert '<b>model' not in page and '<script' not in page and page.count('<svg') == 3
    assert 'http' not in page.replace('http://www.w3.org', '').replace('http://purl.org', '').replace('http://creativecommons', '')
    again = write_report(jobs, RUN | {'model': '<b>model</b>'}, tmp_path / 'again')
    assert again == report and (tmp_path / 'again/index.html').read_text() == page


def test_a_policy_has_one_colour_whatever_the_model_and_every_line_a_marker_of_its_own():
    policies = [{'model': model, 'policy': policy, 'mode': 'offline'} for model in ('small', 'large') for policy in 'abcdef']
    styles = figures.styles(policies)
    colours = [style['color'] for style in styles]
    assert colours[:6] == colours[6:] and len(set(colours)) == 6
    assert len({style['marker'] for style in styles}) == 12


def test_a_run_without_answers_still_has_a_report(tmp_path):
    write_report([job('a', 'full', [])], RUN, tmp_path)
    assert '<table' in (tmp_path / 'index.html').read_text()


@pytest.mark.parametrize('right', [False, True])
@pytest.mark.parametrize('n', [3, 6, 7, 10, 12])
def test_policies_that_are_always_wrong_or_always_right_are_drawn(n, right, tmp_path):
    write_report([job('a', 'full', [answer(i, right) for i in range(n)])], RUN, tmp_path)
    assert (tmp_path / 'index.html').read_text().count('<svg') == 3


def test_a_figure_that_fails_costs_only_itself_and_the_page_says_why(jobs, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(figures, 'MARKERS', ('<no marker>',))       # matplotlib refuses it while it draws a policy
    write_report(jobs, RUN, tmp_path)
    page = (tmp_path / 'index.html').read_text()
    assert page.count('could not be drawn') == 3 and '<table' in page and page.rstrip().endswith('</html>')
    assert 'the figure &quot;accuracy by age&quot; could not be drawn: ValueError' in page and '&lt;no marker&gt;' in page
    assert '"cost over frames" could not be drawn' in capsys.readouterr().err


def of(prefill: str, right: float, flops: float, answer: str = 'all', model: str = '') -> dict:
    return {'policy': f'{prefill} x {answer}', 'prefill': prefill, 'answer': answer, 'model': model, 'mode': 'offline',
            'overall': {'n': 10, 'right': right}, 'step_flops': flops}


def test_the_headline_names_what_statekv_stands_beside():
    policies = [of('full', .9, 100), of('statekv(64)', .8, 20), of('statekv(128)', .85, 40), of('window(4)', .5, 18),
                of('window(8)', .7, 38), of('window(16)', .75, 60), of('none', .2, 5, 'last(4)')]
    found = headline(policies)
    assert [found[name]['policy'] for name in ('ours', 'full', 'window', 'newest')] == [
        'statekv(128) x all', 'full x all', 'window(8) x all', 'none x last(4)'] and found['best'] is None
    assert headline(policies[3:4])['best'] is policies[3] and headline(policies[3:4])['ours'] is None
    assert set(headline([]).values()) == {None}
    large = [of('full', .95, 400, model='large'), of('statekv(64)', .93, 90, model='large')]
    small = [of('full', .9, 100, model='small'), of('statekv(64)', .88, 20, model='small')]
    assert larger_for_less(large + small) == (large[1], small[0]) and larger_for_less(small) is None


def test_policies_stand_in_the_order_of_their_numbers():
    names = ['window(16)', 'statekv(144)', 'full', 'statekv(36)', 'window(4)', 'statekv(unlimited)', 'none', 'statekv(36)/int4']
    assert sorted(names, key=rank) == ['full', 'none', 'statekv(36)', 'statekv(36)/int4', 'statekv(144)', 'statekv(unlimited)',
                                       'window(4)', 'window(16)']


def test_runs_of_several_checkpoints_become_one_page(jobs, tmp_path, capsys):
    plan = RUN | {'digest': 'x', 'videos': [{'source': 'a'}], 'jobs': [made['job'] for made in jobs]}
    for name in ('large', 'small'):
        folder = RunFolder(tmp_path / name, plan | {'model': f'/models/{name}'})
        for made in jobs:
            folder.save(made)
    runs = [str(tmp_path / name) for name in ('large', 'small')]
    assert main([*runs, '--compare', '--out', str(tmp_path / 'both')]) == 0
    report, page = json.loads((tmp_path / 'both/report.json').read_text()), (tmp_path / 'both/index.html').read_text()
    assert report['summary']['models'] == ['large', 'small'] and len(report['summary']['policies']) == 6
    assert {row['model'] for row in csv.DictReader((tmp_path / 'both/answers.csv').open())} == {'large', 'small'}
    assert all(policy['against_full']['n'] for policy in report['summary']['policies'])      # with full attention of its own model
    assert 'small: statekv(9) × all' in page and page.count('<svg') == 3
    assert main([*runs, '--compare', '--out', str(tmp_path / 'both')]) == 0       # its own page may be made again

    for broken, what in (([runs[0]], 'at least two'), ([runs[0], str(tmp_path)], 'is not a run'), ([runs[0], runs[0]], 'told apart')):
        assert main([*broken, '--compare', '--out', str(tmp_path / 'not')]) == 2
        assert what in capsys.readouterr().err
    (tmp_path / 'small/jobs' / f'{jobs[0]["job"]}.json').unlink()
    assert main([*runs, '--compare', '--out', str(tmp_path / 'not')]) == 2 and 'is not done' in capsys.readouterr().err
    RunFolder(tmp_path / 'third', plan | {'videos': [{'source': 'b'}]})
    assert main([runs[0], str(tmp_path / 'third'), '--compare', '--out', str(tmp_path / 'not')]) == 2
    assert 'asks other questions' in capsys.readouterr().err and not (tmp_path / 'not').exists()


def test_answers_are_shown_with_the_frames_that_they_are_about(jobs, tmp_path):
    for made in jobs:
        made['source'] = 'patrol:seed=1,steps=12,size=64x64'
        for told in made['answers']:
            told['ask_at'], told['evidence'] = 5., [[2., 2.5, .8]] if told['right'] else []
    video = Video('patrol:seed=1,steps=12,size=64x64', ())
    write_report(jobs, RUN, tmp_path, videos=[video])
    page = (tmp_path / 'index.html').read_text()
    assert page.count('<img src="data:image/jpeg;base64,') == 3 and 'looked at 2.0 s' in page and 'on show at 4.0 s' in page
    gone = [made | {'source': str(tmp_path / 'gone.mp4')} for made in jobs]
    write_report(gone, RUN, tmp_path, videos=[Video(str(tmp_path / 'gone.mp4'), ())])
    assert '<img' not in (tmp_path / 'index.html').read_text()


@pytest.mark.skipif(BROWSER is None, reason='no Chromium on PATH: apt-get install chromium')
@pytest.mark.parametrize('width', [1280, 400])
def test_the_page_opens_from_disk_without_network_or_errors(jobs, tmp_path, width):
    write_report(jobs, RUN, tmp_path)
    flags = ['--headless=new', '--disable-gpu', '--no-sandbox', '--host-resolver-rules=MAP * ~NOTFOUND', '--enable-logging=stderr',
             '--log-level=0', f'--user-data-dir={tmp_path / "profile"}', f'--window-size={width},2400', '--hide-scrollbars']
    shot, page = tmp_path / 'page.png', (tmp_path / 'index.html').as_uri()
    done = subprocess.run([BROWSER, *flags, f'--screenshot={shot}', page], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert 'CONSOLE' not in done.stderr
    pixels = np.asarray(Image.open(shot).convert('L'))
    assert pixels.shape[1] == width and .005 < (pixels < 128).mean() < .5     # written on, and mostly paper
    pdf = tmp_path / 'page.pdf'
    subprocess.run([BROWSER, *flags, f'--print-to-pdf={pdf}', '--no-pdf-header-footer', page], capture_output=True, timeout=120,
                   check=True)
    assert pdf.read_bytes()[:5] == b'%PDF-' and pdf.stat().st_size > 10_000


# --- attention statistics ---------------------------------------------------------------------------------------------

class Clip:
    """A few frames as a source."""

    def __init__(self, pictures):
        self._pictures = pictures

    def frames(self):
        return ((SECOND + i * SECOND // 2, picture) for i, picture in enumerate(self._pictures))


def test_statistics_are_their_definitions(backbone, frames):
    budget = 20
    found = collect(backbone, [Clip(frames[:12])], [budget, 10**6])
    assert found['steps'] == 6 and found['budgets'][10**6]['captured'] is None
    stream, noted = VideoStream(backbone, 'statekv(unlimited)'), []
    commit = stream.carried.commit
    stream.carried.commit = lambda: (noted.append(stream.carried.frame()[2].clone()), commit())
    for stamp, picture in Clip(frames[:12]).frames():
        stream.step(picture, stamp)
    captured, recalled, before = [], [], None
    for importance in noted:
        layers, heads, keys = importance.shape
        if keys <= budget:
            continue
        best = [[set(importance[i, h].argsort(descending=True)[:budget].tolist()) for h in range(heads)] for i in range(layers)]
        captured.append([np.mean([sum(importance[i, h, k].item() for k in best[i][h]) / importance[i, h].sum().item()
                                  for h in range(heads)]) for i in range(layers)])
        if before is not None:
            old_keys, old_best = before
            recalled.append([np.mean([sum(importance[i, h, k].item() for k in old_best[i][h])
                                      / importance[i, h, :old_keys].sum().item() for h in range(heads)]) for i in range(layers)])
        before = keys, best
    assert found['budgets'][budget]['captured'] == pytest.approx(np.mean(captured, axis=0).tolist(), rel=1e-4)
    assert found['budgets'][budget]['recalled'] == pytest.approx(np.mean(recalled, axis=0).tolist(), rel=1e-4)


def test_what_is_retained_is_counted_token_by_token(backbone, frames):
    found = collect(backbone, [Clip(frames[:12])], [20])['budgets'][20]
    stream, sets = VideoStream(backbone, 'statekv(20)'), []
    for stamp, picture in Clip(frames[:12]).frames():
        if stream.step(picture, stamp):
            sets.append([set(head.tolist()) for head in stream.carried.kept().flatten(0, 1)])
    retained = [np.mean([len(a & b) / len(a) for a, b in zip(one, two)]) for one, two in zip(sets, sets[1:])]
    assert found['retained'] == pytest.approx(retained, rel=1e-5)
    assert len(found['age_steps']) == 6 and all(0 <= age <= i for i, age in enumerate(found['age_steps']))


def test_statistics_are_written_as_numbers_and_a_page(tiny_model_dir, frames, tmp_path):
    write_statistics(tiny_model_dir, [Clip(frames[:8])], tmp_path, [16], device='cpu')
    assert (tmp_path / 'index.html').read_text().count('<svg') == 4
    assert json.loads((tmp_path / 'statistics.json').read_text())['layers'] == 3
    with pytest.raises(ParameterError, match=r'\[0\]'):
        collect(None, [], [0])
