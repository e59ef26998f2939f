"""The page of a live node, as a person uses it in a real browser, and who may see it."""
import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from email.message import Message
from pathlib import Path

import numpy as np
import pytest
import yaml

pytest.importorskip('rclpy', reason='rclpy is not installed')
pytest.importorskip('nicegui', reason="NiceGUI is not installed: pip install 'statekv_ros[view]'")

from rclpy.qos import DurabilityPolicy, QoSProfile  # noqa: E402
from std_msgs.msg import String  # noqa: E402
from visualization_msgs.msg import Marker, MarkerArray  # noqa: E402

from live import PATIENCE_S, SECOND, Graph, NodeProcess, environment, new_domain  # noqa: E402
from statekv_ros.msg import Alert, Answer, FrameTiming  # noqa: E402
from statekv_ros.node.messages import to_ns  # noqa: E402
from statekv_ros.patrol.path import odometry  # noqa: E402
from statekv_ros.patrol.video import patrol_frames  # noqa: E402
from statekv_ros.patrol.world import make_patrol  # noqa: E402
from statekv_ros.replay.bag_writer import BagOptions, write_bag  # noqa: E402

pytestmark = pytest.mark.timeout(300)

ROOT = Path(__file__).resolve().parents[1]
BROWSER = next(filter(None, map(shutil.which, ('chromium', 'chromium-browser', 'google-chrome'))), None)
FLAGS = ['--headless', '--no-sandbox', '--disable-gpu', '--disable-quic', '--no-first-run', '--disable-background-networking',
         '--disable-component-update', '--disable-sync', '--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1']
WAIT_MS = PATIENCE_S * 1000
HOSTILE = '<img src=x onerror="window.hacked=1">\x1b[31m\u202e</script>'
SHOWN = '<img src=x onerror="window.hacked=1">\N{REPLACEMENT CHARACTER}[31m\N{REPLACEMENT CHARACTER}</script>'


def free_port() -> int:
    with socket.socket() as trial:
        trial.bind(('127.0.0.1', 0))
        return trial.getsockname()[1]


class PageProcess:
    """`statekv-view` in a domain, and its first line."""

    def __init__(self, domain: int, *arguments: str):
        self.port = free_port()
        # With this variable NiceGUI takes itself to be in a test of its own kind.
        around = {name: value for name, value in environment(domain).items() if name != 'PYTEST_CURRENT_TEST'}
        self.process = subprocess.Popen([sys.executable, '-m', 'statekv_ros.view', '--port', str(self.port), *arguments], env=around,
                                        text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)

    def address(self) -> str:
        """Once it serves."""
        said = []
        for line in self.process.stdout:
            said.append(line)
            if 'http://' in line:
                return line.split(': ', 1)[1].strip()
        raise AssertionError(''.join(said))

    def get(self, path: str, **headers: str) -> tuple[int, str, Message]:
        """Status, text and headers, of the first answer: a redirection is one."""
        class Stay(urllib.request.HTTPRedirectHandler):
            def redirect_request(self, *_):
                return None
        request = urllib.request.Request(f'http://127.0.0.1:{self.port}{path}', headers=headers)
        try:
            reply = urllib.request.build_opener(Stay).open(request, timeout=PATIENCE_S)
        except urllib.error.HTTPError as error:
            reply = error
        with reply:
            return reply.status, reply.read().decode(errors='replace'), reply.headers

    def end(self) -> tuple[int, str]:
        """Exit code after SIGINT, and what it said."""
        self.process.send_signal(signal.SIGINT)
        try:
            said = self.process.communicate(timeout=20)[0]
        except subprocess.TimeoutExpired:
            self.process.kill()
            said = self.process.communicate()[0]
        return self.process.returncode, said


class Live:
    """A page that was there first, a node that comes late and a looping bag, in one domain."""

    def __init__(self, folder: Path):
        self.folder, self.domain = folder, new_domain()
        self.page = PageProcess(self.domain)
        write_bag(folder / 'bag', patrol_frames(make_patrol(30, np.random.default_rng(0)), 0, 160, 120),
                  BagOptions(topic='/front/image_raw'), poses=odometry(30 * SECOND))
        self.graph = Graph(self.domain)
        self.address = self.page.address()
        self.node = self.player = None

    def start_node(self) -> None:
        self.node = NodeProcess(self.folder, self.domain, model='patrol', cameras='[front]', rate_hz='1000.0', budget=72,
                                reliability='reliable', memory_dir=self.folder / 'memory', pose__topic='/odom',
                                diagnostics_period_s='0.2')
        if self.player is None:
            self.player = subprocess.Popen(
                [sys.executable, '-m', 'statekv_ros.replay.cli', 'play', str(self.folder / 'bag'), '--loop', '--restamp',
                 '--no-clock', '--rate', '2', '--wait-timeout', '60'], env=environment(self.domain), stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL)

    def need_node(self) -> None:
        if self.node is None:
            self.start_node()

    def close(self) -> None:
        if self.player is not None:
            self.player.kill()
            self.player.wait()
        if self.node is not None:
            self.node.stop()
        self.graph.close()


@pytest.fixture(scope='module')
def live(tmp_path_factory):
    made = Live(tmp_path_factory.mktemp('view'))
    try:
        yield made
    finally:
        code, said = made.page.end()
        made.close()
    assert code == 0 and 'Traceback' not in said, said


@pytest.fixture(scope='module')
def browser(tmp_path_factory):
    if BROWSER is None:
        pytest.skip('no Chromium on PATH: apt-get install chromium')
    playwright = pytest.importorskip('playwright.sync_api', reason='Playwright is not installed')
    with playwright.sync_playwright() as driver:
        context = driver.chromium.launch_persistent_context(
            str(tmp_path_factory.mktemp('profile')), executable_path=BROWSER, args=FLAGS, headless=True,
            viewport={'width': 1400, 'height': 900}, color_scheme='dark')
        context.set_default_timeout(WAIT_MS)
        yield context
        context.close()


def opened(browser, address: str):
    """A page, and what goes wrong in it."""
    page, wrong = browser.new_page(), []
    page.on('pageerror', lambda error: wrong.append(str(error)))
    page.on('console', lambda message: wrong.append(message.text)
            if message.type == 'error' and '404' not in message.text else None)      # a moment without a picture is no error
    page.on('request', lambda request: None if request.url.startswith((address, 'data:', 'blob:')) else wrong.append(request.url))
    page.goto(address)
    return page, wrong


def somebody_else_asks(graph: Graph, page, question: str) -> int:
    """Until the graph and the page have heard of it: what was published before a node had found a reader is lost to that one.
    Returns questions of others that the page lists."""
    end = time.monotonic() + PATIENCE_S
    while time.monotonic() < end:
        assert graph.ask(question).success
        graph.spin(.5)
        if any(answer.question == question for answer in graph.answers) and (listed := page.locator('.sk-tag').count()):
            return listed
    raise AssertionError('no answer heard')


def remove(page, question: str) -> None:
    """A standing question, until it is gone: what is pressed while a page that lost its server loads anew is lost."""
    from playwright.sync_api import TimeoutError as NotYet
    row, end = page.locator('.sk-row'), time.monotonic() + PATIENCE_S
    while row.count() and time.monotonic() < end:
        with contextlib.suppress(NotYet):
            page.get_by_role('button', name=f'remove: {question}').click(timeout=5_000)
            row.wait_for(state='detached', timeout=5_000)
    assert not row.count()


def has_picture(selector: str) -> str:
    return f'[...document.querySelectorAll({selector!r})].some(image => image.naturalWidth > 0)'


def test_a_person_watches_asks_looks_and_is_told_and_the_page_outlives_the_node(live, browser):
    page, wrong = opened(browser, live.address)
    page.get_by_text('No memory node statekv yet').wait_for()
    page.get_by_label('question', exact=True).fill('is anybody there?')
    page.keyboard.press('Enter')
    page.get_by_role('button', name='Cancel', exact=True).click()
    page.locator('.sk-answer').get_by_text('canceled before it was sent').wait_for()
    live.start_node()
    page.wait_for_function(has_picture('.sk-live img'))
    page.wait_for_function(has_picture('.sk-thumb img'))
    assert page.locator('.sk-banner').is_hidden()
    others = somebody_else_asks(live.graph, page, 'is anything red?')

    page.keyboard.press('/')
    page.keyboard.type('what is in view?')
    page.keyboard.press('Enter')
    page.locator('.sk-evidences button').first.wait_for()
    answered = page.locator('.sk-a').inner_text()
    live.graph.wait(lambda: [answer for answer in live.graph.answers if answer.question == 'what is in view?'], 'the answer')
    assert answered == live.graph.answers[-1].text != ''
    page.locator('.sk-evidence').first.wait_for()
    page.locator('.sk-map').get_by_text('metres in odom').wait_for()
    assert page.locator('.sk-tag').count() == others    # its own question is not there a second time as somebody else's

    page.locator('.sk-evidences button').first.click()
    page.wait_for_function(has_picture('.sk-enlarged img'))
    assert 'of the attention' in page.locator('.sk-enlarged').inner_text()
    page.keyboard.press('Escape')
    page.locator('.sk-enlarged').wait_for(state='hidden')

    page.get_by_label('standing question', exact=True).fill('what is in view?')
    page.get_by_role('button', name='Watch', exact=True).click()
    page.locator('.sk-row').wait_for()
    page.locator('.sk-alerts button').first.wait_for()
    page.locator('.sk-alert').first.wait_for()

    other, wrong_there = opened(browser, live.address)
    other.set_viewport_size({'width': 390, 'height': 844})
    other.locator('.sk-q').get_by_text('what is in view?').wait_for()
    assert other.evaluate('document.documentElement.scrollWidth') == 390

    live.node.stop(signal.SIGKILL)
    page.get_by_text('Nothing heard of statekv').wait_for()
    live.start_node()
    page.locator('.sk-banner').wait_for(state='hidden')
    page.locator('.sk-header').get_by_text('active', exact=True).wait_for()
    assert page.locator('.sk-row').count() == 1     # the watch came back with the node
    other.get_by_label('question', exact=True).fill('which room are you in?')
    other.keyboard.press('Enter')
    page.locator('.sk-list').get_by_text('which room are you in?').wait_for()
    other.wait_for_function('document.querySelectorAll(".sk-evidences button").length > 0')
    remove(page, 'what is in view?')
    assert wrong == wrong_there == []
    other.close()
    page.close()


def test_what_others_write_is_shown_as_it_stands_and_does_nothing(live, browser):
    page, wrong = opened(browser, live.address)
    node, latched = live.graph.node, QoSProfile(depth=20, durability=DurabilityPolicy.TRANSIENT_LOCAL)
    ends = {kind: node.create_publisher(kind, f'/statekv/{name}', qos) for kind, name, qos in (
        (FrameTiming, 'timing', QoSProfile(depth=100)), (Answer, 'answer', QoSProfile(depth=100)), (Alert, 'alert', latched))}
    for kind, end in ends.items():      # the graph of the test listens to two of them
        live.graph.wait(lambda kind=kind, end=end: end.get_subscription_count() >= 1 + (kind is not Alert), 'the page')
    ends[Alert].publish(Alert(id=HOSTILE, question=HOSTILE, camera=HOSTILE, condition=HOSTILE, text_before=HOSTILE, text=HOSTILE))
    for number in range(20):
        ends[Answer].publish(Answer(question=f'{number} {HOSTILE}', text=HOSTILE, camera=HOSTILE))
    for _ in range(5):      # which is best effort
        ends[FrameTiming].publish(FrameTiming(camera=HOSTILE, total_ms=float('nan')))
        live.graph.spin(.1)
    page.locator('.sk-live .sk-name').get_by_text(SHOWN, exact=True).wait_for()
    page.locator('.sk-ask .sk-list').get_by_text(f'19 {SHOWN}', exact=True).wait_for()
    page.locator('.sk-alerts').get_by_text(SHOWN).first.wait_for()
    assert page.locator('.sk-ask .sk-list > button').count() == 8
    page.get_by_role('button', name='older questions').click()
    page.locator('.sk-ask .sk-list').get_by_text(f'11 {SHOWN}', exact=True).click()
    page.locator('.sk-a').get_by_text(SHOWN, exact=True).wait_for()
    page.get_by_role('button', name='colours: auto').click()
    page.wait_for_function('!document.body.classList.contains("body--dark")')       # the second choice is light
    assert page.evaluate('window.hacked') is None and wrong == []
    assert page.locator('img[src=x]').count() == 0
    page.close()
    for end in ends.values():
        node.destroy_publisher(end)


def test_the_timeline_is_used_by_keyboard_from_a_minute_to_all(live, browser):
    live.need_node()
    page, _ = opened(browser, live.address)
    page.wait_for_function(has_picture('.sk-thumb img'))
    view = page.locator('.sk-view')
    view.focus()
    page.keyboard.press('ArrowLeft')
    page.get_by_role('button', name='live', exact=True).and_(page.locator('[aria-pressed=false]')).wait_for()
    for _ in range(9):
        page.keyboard.press('-')
    # Of hours, the seconds are left out.
    page.wait_for_function('[...document.querySelectorAll(".sk-axis span")].every(tick => tick.innerText.length === 5)')
    page.keyboard.press('Home')
    page.get_by_role('button', name='all', exact=True).and_(page.locator('[aria-pressed=true]')).wait_for()
    page.keyboard.press('End')
    page.get_by_role('button', name='live', exact=True).and_(page.locator('[aria-pressed=true]')).wait_for()
    page.close()


def test_layouts_for_foxglove_and_rviz_show_topics_that_the_node_has(live):
    live.need_node()
    live.graph.wait_for_state('active')
    topics = {name for name, _ in live.graph.node.get_topic_names_and_types()} | {
        name for name, _ in live.graph.node.get_service_names_and_types()}

    def strings(value) -> list[str]:
        inside = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
        return [value] if isinstance(value, str) else [text for each in inside for text in strings(each)] + (
            list(value) if isinstance(value, dict) else [])

    layout = json.loads((ROOT / 'config/foxglove_layout.json').read_text())
    rviz = yaml.safe_load((ROOT / 'config/statekv.rviz').read_text())
    for told_of in (strings(layout), strings(rviz)):
        named = {text.partition('.')[0] for text in told_of if text.startswith('/')}
        assert named >= {'/statekv/evidence_image', '/statekv/evidence_markers'} and named <= topics
    fields = FrameTiming.get_fields_and_field_types()
    plotted = [text.split('.')[1] for text in strings(layout) if text.startswith('/statekv/timing.')]
    assert plotted and set(plotted) <= set(fields)

    def panels(split) -> list[str]:
        return [split] if isinstance(split, str) else panels(split['first']) + panels(split['second'])
    assert sorted(panels(layout['layout'])) == sorted(layout['configById'])


def test_evidence_markers_stand_where_the_evidence_was_seen(live):
    live.need_node()
    came: list[MarkerArray] = []
    live.graph.node.create_subscription(MarkerArray, '/statekv/evidence_markers', came.append, QoSProfile(depth=5))
    live.graph.wait_for_state('active')
    live.graph.wait(lambda: live.graph.node.count_publishers('/statekv/evidence_markers') == 1, 'the topic')
    live.graph.wait(lambda: live.graph.ask(question='what is in view?').answer.has_pose, 'evidence with a pose')
    placed = [step for step in live.graph.ask(question='what is in view?').answer.evidence if step.has_pose]

    def arrows_of(array: MarkerArray) -> list[Marker]:
        return [marker for marker in array.markers[1:] if marker.type == Marker.ARROW]
    live.graph.wait(lambda: came and [arrow.pose for arrow in arrows_of(came[-1])] == [step.pose.pose for step in placed],
                    'the markers')
    (clear, *rest), arrows = came[-1].markers, arrows_of(came[-1])
    assert clear.action == Marker.DELETEALL and len(rest) == 2 * len(placed) > 0
    assert {marker.header.frame_id for marker in rest} == {'odom'} and {to_ns(marker.header.stamp) for marker in rest} == {0}
    sizes = [arrow.scale.x for arrow in arrows]
    assert sizes == sorted(sizes, reverse=True)     # as the shares are
    assert f'{placed[0].share:.0%}' in rest[1].text


def test_only_this_machine_sees_it_and_no_page_of_another_site(live):
    assert live.page.get('/')[0] == 200
    status, text, headers = live.page.get('/', Host='evil.example:80')
    assert status == 403 and "not as 'evil.example:80'" in text
    assert headers['X-Frame-Options'] == 'DENY' and headers['Referrer-Policy'] == 'no-referrer'
    polling = '/_nicegui_ws/socket.io/?EIO=4&transport=polling'
    assert live.page.get(polling, Origin='http://evil.example')[0] == 403
    assert live.page.get('/picture?camera=front&at=1', Origin=f'http://127.0.0.1:{live.page.port}')[0] in (200, 404)
    for path in ('/../../../../etc/passwd', '/%2e%2e/%2e%2e/etc/passwd', '/_nicegui/static/../../../../etc/passwd',
                 '/picture?camera=../../etc/passwd&at=0', '/docs', '/openapi.json'):
        status, text, _ = live.page.get(path)
        assert 'root:' not in text and '"openapi"' not in text, path
    assert live.page.get('/picture?camera=front&at=nonsense')[0] == 422
    assert live.page.get(f'/picture?camera=front&at={2**64}')[0] == 404


def test_elsewhere_a_token_is_needed_and_a_node_of_another_version_is_told():
    graph = Graph(domain := new_domain())
    page = PageProcess(domain, '--host', '0.0.0.0', '--memory', 'nobody')
    try:
        token = page.address().partition('?token=')[2]
        assert len(token) >= 32
        polling = '/_nicegui_ws/socket.io/?EIO=4&transport=polling'
        for path in ('/', '/?token=', f'/?token={token[:-1]}', f'/?token={token}x', polling, '/picture?camera=front&at=1'):
            status, text, headers = page.get(path)
            assert status == 403 and 'A token is needed' in text and token not in text and 'Set-Cookie' not in headers, path
        assert page.get('/', Cookie='statekv_view=wrong')[0] == page.get('/', Cookie='statekv_view="\\')[0] == 403
        status, _, headers = page.get(f'/?token={token}')
        assert (status, headers['Location']) == (303, '/')
        assert all(word in headers['Set-Cookie'] for word in ('HttpOnly', 'SameSite=strict'))
        cookie = headers['Set-Cookie'].split(';')[0]
        assert page.get(polling, Cookie=cookie, Origin='http://evil.example')[0] == 403
        status, text, _ = page.get('/', Cookie=cookie)
        assert status == 200 and 'No memory node nobody yet' in text and token not in text
        graph.node.create_publisher(String, '/nobody/timing', 1)
        graph.wait(lambda: 'of another version' in page.get('/', Cookie=cookie)[1], 'the page to say so')
    finally:
        code, said = page.end()
        graph.close()
    assert code == 0 and 'Traceback' not in said, said


def test_what_cannot_be_served_is_said_in_one_line():
    with socket.socket() as taken:
        taken.bind(('127.0.0.1', 0))
        taken.listen()
        for arguments, words in ((['--port', str(taken.getsockname()[1])], 'choose others with --host and --port'),
                                 (['--port', '0'], '--port must be 1 to 65535, got 0'),
                                 (['--host', '192.0.2.1'], 'cannot listen at 192.0.2.1'),
                                 (['--memory', 'a b'], "--memory 'a b' is no name of a node")):
            if '--port' not in arguments:
                arguments += ['--port', str(free_port())]
            done = subprocess.run([sys.executable, '-m', 'statekv_ros.view', *arguments], capture_output=True, text=True,
                                  timeout=120, env=os.environ | {'ROS_AUTOMATIC_DISCOVERY_RANGE': 'LOCALHOST'})
            assert done.returncode == 1 and words in done.stderr.replace('\n', ' ') and 'Traceback' not in done.stderr, done.stderr


# --- without a browser ------------------------------------------------------------------------------------------------
