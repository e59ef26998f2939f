"""The fault campaign, each class in its short form. The full one is `python test/campaign all`: see docs/reliability.md."""
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from rclpy.qos import qos_profile_sensor_data
from sensor_msgs.msg import Image

from campaign import subject
from campaign.cli import CLASSES, run_class
from campaign.record import Record
from campaign.report import write_report
from campaign.samples import Samples
from domains import new_domain
from live import Graph, image

pytestmark = pytest.mark.timeout(300)
# A small share of a full run's trials; few enough that together they take about a minute. The seed is one whose few bags hold
# what a reader trips over most: text that is no text in a message that is whole.
SEED = 2
TRIALS = {'images': 150, 'intake': 400, 'services': 40, 'kills': 5, 'goals': 1, 'places': 6, 'watches': 1, 'restarts': 3,
          'lifecycle': 3, 'bags': 60, 'checkpoints': 6, 'soak': 5}
# Few trials stand beside a short warm-up: what the allocator takes for the first large image is no leak.
SLACK_MB = 60.0


def test_every_class_of_the_campaign_has_a_short_form():
    assert TRIALS.keys() == CLASSES.keys()


@pytest.mark.parametrize('name', TRIALS)
def test_every_promise_holds_through(name):
    record = run_class(name, SEED, trials=TRIALS[name], slack_mb=SLACK_MB)
    assert record.passed, '\n'.join(f'{failure.kind}: {failure.given}\n  {failure.detail}\n  again: {failure.command}'
                                    for failure in record.failures)
    assert record.trials == TRIALS[name]


def test_a_failure_tells_the_command_that_shows_it_again(tmp_path):
    record = Record('bags', 7, 3, 60.0, tmp_path)
    for number in record.numbers():
        if number == 1:
            record.note_refusal('ValueError: 7', number, 'seven')
        else:
            record.note_refusal('7 is not allowed: take 8', number, 'seven')
    told = record.as_dict()
    assert (told['passed'], told['trials'], told['kinds_of_failure']) == (False, 3, {'raw error': 1})
    assert told['outcomes'] == {'refused: N is not allowed: take N': 2}
    (failure,) = told['failures']
    assert failure['command'] == 'python test/campaign bags --seed 7 --only 1'


def test_a_trial_is_the_same_whatever_came_before_it(tmp_path):
    first, second = (Record('bags', 7, 10, 60.0, tmp_path) for _ in range(2))
    first.random(3).random()
    assert first.random(4).random() == second.random(4).random() != first.random(5).random()


def test_an_image_that_nobody_heard_is_followed_by_another_until_one_is_heard():
    graph, heard, sent = Graph(new_domain()), [], []
    publisher = graph.node.create_publisher(Image, '/front/image_raw', qos_profile_sensor_data)

    def send():
        publisher.publish(image(len(sent) + 1))
        sent.append(graph.node.create_subscription(Image, '/front/image_raw', heard.append, qos_profile_sensor_data)
                    if not sent else None)      # of the first image it never hears

    try:
        count = subject.send_until(graph.wait, send, lambda: heard, 'an image')
    finally:
        graph.close()
    assert count == len(sent) > 1 and heard[0].header.stamp.nanosec > 1


def test_a_node_that_does_not_start_is_told_and_does_not_stay(tmp_path, monkeypatch):
    monkeypatch.setattr(subject, '_START_S', 0.5)
    with pytest.raises(subject.Broken, match='no state active'):
        subject.Subject(Record('soak', 1, 1, 60.0, tmp_path), memory_dir=tmp_path / 'memory')
    assert not [file for file in Path('/proc').glob('[0-9]*/cmdline') if str(tmp_path).encode() in _content(file)]


def _content(file: Path) -> bytes:
    try:
        return file.read_bytes()
    except OSError:     # gone meanwhile
        return b''


def test_slopes_are_those_of_the_samples_after_the_warm_up():
    samples = Samples(60.0)
    samples.rows = [{'minute': k, 'rss_mb': 90.0 if k < 2 else 100 + 0.1 * k, 'fds': 23, 'threads': 22,
                     'step_ms_p50': 20.0 - k / 60, 'answer_ms_p50': None} for k in range(10)]
    assert samples.slopes(119.0) == {'rss_mb_slope_per_hour': 6.0, 'fds_slope_per_hour': 0.0, 'threads_slope_per_hour': 0.0,
                                     'step_ms_p50_slope_per_hour': -1.0}


def test_a_report_shows_failures_samples_and_what_was_put_in_as_text(tmp_path):
    record = Record('soak', 7, 3, 60.0, tmp_path)
    record.trials, record.samples = 3, Samples(60.0)
    record.samples.rows = [{'minute': k, 'rss_mb': 100.0, 'fds': 23, 'threads': 22, 'step_ms_p50': 20.0, 'answer_ms_p50': None}
                           for k in range(3)]
    record.fail('lost', 2, '<script>alert(1)</script>', 'no reply')
    told = write_report(tmp_path / 'out', [record.as_dict()], 60.0, 'python test/campaign soak --seed 7')
    page = (tmp_path / 'out' / 'index.html').read_text()
    assert json.loads((tmp_path / 'out' / 'report.json').read_text()) == json.loads(json.dumps(told)) and not told['passed']
    assert page.count('<svg') == 4, 'of what has samples'
    assert '<script' not in page and '&lt;script&gt;' in page
    assert 'src=' not in page and 'python test/campaign soak --seed 7 --only 2' in page


def test_the_command_ends_with_one_json_object_and_writes_a_report(tmp_path):
    command = [sys.executable, str(Path(__file__).parent / 'campaign'), 'bags', '--trials', '2', '--json', '--report', tmp_path]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ, timeout=120)
    told = json.loads(done.stdout.splitlines()[-1])
    assert done.returncode == 0 and told['passed'], done.stdout + done.stderr
    (bags,) = told['classes']
    assert (bags['class'], bags['trials'], bags['wanted'], bags['failures']) == ('bags', 2, 2, [])
    assert re.match('bags: passed, 2 of 2 trials', done.stdout)
    report = json.loads((tmp_path / 'report.json').read_text())
    assert report['classes'] == told['classes']
    assert report['command'] == 'python test/campaign bags --seed 1 --minutes 20 --trials 2'
    assert report['command'] in (tmp_path / 'index.html').read_text()
