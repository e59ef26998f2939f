"""What the page of a live node keeps of what it hears, and how much."""
import asyncio
import time
import unicodedata
from concurrent.futures import ThreadPoolExecutor

import pytest
from hypothesis import given
from hypothesis import strategies as st

pytest.importorskip('rclpy', reason='rclpy is not installed')
pytest.importorskip('nicegui', reason="NiceGUI is not installed: pip install 'statekv_ros[view]'")

from diagnostic_msgs.msg import DiagnosticArray, DiagnosticStatus, KeyValue  # noqa: E402

from live import SECOND  # noqa: E402
from statekv_ros.client import Reply, Result  # noqa: E402
from statekv_ros.msg import Alert, Answer, FrameTiming  # noqa: E402
from statekv_ros.node.messages import to_stamp  # noqa: E402
from statekv_ros.view import history as histories  # noqa: E402
from statekv_ros.view.camera import LIVE_S, CameraSeen  # noqa: E402
from statekv_ros.view.facts import printable, told  # noqa: E402
from statekv_ros.view.history import History  # noqa: E402
from statekv_ros.view.pictures import Pictures  # noqa: E402
from statekv_ros.view.state import MOST_CAMERAS, State  # noqa: E402


@given(st.text(max_size=40))
def test_printable_text_holds_nothing_that_a_terminal_or_a_line_obeys(text):
    shown = printable(text)
    assert all(unicodedata.category(letter) not in ('Cc', 'Cs') or letter == '\n' for letter in shown) and len(shown) == len(text)
    assert not set('\x1b\x07\r\u202e\u2066') & set(shown)
    assert printable('a' * 5000, 10) == 'a' * 10 + ' ...'


def test_ten_thousand_questions_are_kept_and_listed_a_page_at_a_time():
    history = History()
    for number in range(histories.MOST + 500):
        answer = Answer(question=f'question {number}', text='yes', camera='front')
        answer.header.stamp = to_stamp(number)
        history.hear(answer)
        history.hear(answer)        # the same one twice
    assert len(history) == histories.MOST
    assert [record.question for record in history.page(0, 3)] == [f'question {number}' for number in (10499, 10498, 10497)]
    assert [record.question for record in history.page(1249, 8)][-1] == 'question 500'
    assert history.page(1250, 8) == []
    begun = time.perf_counter()
    for _ in range(100):
        history.page(600, 8)
    assert (time.perf_counter() - begun) / 100 < .05


@pytest.mark.parametrize('heard_first', [True, False])
def test_what_a_page_asked_itself_is_never_shown_as_somebody_elses(heard_first):
    """Whichever comes first, the reply or what the node publishes; who asks the same meanwhile is shown in the end."""
    history, own, theirs = History(), Answer(question='is it red?', text='yes'), Answer(question='is it red?', text='no')
    record = history.begin(' is it red? ', '')
    for answer in (own, theirs) * heard_first:
        history.hear(answer)
        assert history.page(0, 8) == [record]
    history.end(record, Reply(Result.SUCCEEDED, own, (own,), ''))
    for answer in (own, theirs) * (not heard_first):
        history.hear(answer)
    newest, oldest = history.page(0, 8)
    assert (newest.text, newest.own) == ('no', False) and oldest is record and record.text == 'yes' and record.own


def timing(stamp_ns: int, dropped: int = 0, segment: int = 0, camera: str = 'front') -> FrameTiming:
    message = FrameTiming(camera=camera, segment=segment, dropped=dropped, total_ms=10.0, state_tokens=9)
    message.header.stamp = to_stamp(stamp_ns)
    return message


def test_a_shift_of_frame_steps_takes_bounded_room_and_loses_no_drop():
    seen = CameraSeen('front')
    for step in range(steps := 8 * 3600):
        seen.note(timing(step * SECOND, dropped=step // 7, segment=step // 10000))
    assert len(seen.drops) <= 400 and sum(count for _, count in seen.drops) == (steps - 1) // 7
    assert [stamp for stamp, _ in seen.drops] == sorted(stamp for stamp, _ in seen.drops)
    assert [(first // SECOND, number) for first, _, number in seen.segments] == [(0, 0), (10000, 1), (20000, 2)]
    assert seen.newest_ns == (steps - 1) * SECOND
    seen.span(5 * SECOND, seen.newest_ns)
    assert seen.begin_ns == 5 * SECOND and all(stamp >= 5 * SECOND for stamp, _ in seen.drops)


def test_live_pictures_change_twice_a_second_however_many_ask():
    seen, shown = CameraSeen('front'), []
    end = time.monotonic() + 1.3
    while time.monotonic() < end:
        seen.note(timing(time.monotonic_ns()))
        shown += [seen.live_ns(), seen.live_ns()]
        time.sleep(.002)
    assert 2 <= len(set(shown)) <= 5


def test_a_live_picture_is_asked_for_when_a_step_has_ended_and_the_last_one_is_shown(monkeypatch):
    now, seen = 100.0, CameraSeen('front')
    monkeypatch.setattr('statekv_ros.view.camera.time.monotonic', lambda: now)
    seen.span(1, 5)
    assert seen.live_ns() == 5, 'of before this page began'
    for step in range(6, 40):
        now += .49 if step % 2 else .51     # twice a second, more or less
        seen.note(timing(step))
        shown = seen.live_ns()
        assert shown == step or step < 8, 'each, at once'
        now += .3
        assert seen.live_ns() == shown, 'not between two steps'
        now -= .3
    now += .1
    seen.note(timing(40))
    assert seen.live_ns() == 39, 'too early'
    now += 2 * LIVE_S
    assert seen.live_ns() == 40, 'the camera has stopped'


def health(steps: int, held: int, state: str = 'active') -> DiagnosticArray:
    def values(**pairs) -> list[KeyValue]:
        return [KeyValue(key=key, value=str(value)) for key, value in pairs.items()]
    return DiagnosticArray(status=[
        DiagnosticStatus(name='statekv: engine', message='well', values=values(state=state, steps=steps)),
        DiagnosticStatus(name='statekv: front', values=values(frames_in=held, frames_held=held, device_mb='1.5', host_mb='nan')),
        DiagnosticStatus(name='other: engine', level=DiagnosticStatus.ERROR, values=values(state='finalized', steps=0))])


def test_state_tells_how_the_node_is_and_notices_a_new_life():
    state = State('statekv')
    assert state.condition().name == 'absent' and 'ROS_DOMAIN_ID' in state.condition().sentence
    assert not state.note_health(health(5, 10)) and state.condition().name == 'active'
    assert not state.note_health(health(9, 18, 'inactive')) and state.condition().name == 'inactive'
    state.note_timing(timing(SECOND))
    assert state.camera_names() == ['front'] and state.cameras['front'].newest_ns == SECOND
    assert state.note_health(health(1, 18)) and state.lives == 1 and state.cameras['front'].newest_ns == 0
    assert state.note_health(health(2, 0)) and state.lives == 2        # forgotten
    for number in range(2 * MOST_CAMERAS):
        state.note_timing(timing(SECOND, camera=f'camera {number}'))
    assert len(state.cameras) == MOST_CAMERAS
    state.other_version = True
    assert not state.condition().here and 'another version' in state.condition().sentence
    alert = told(Alert(id='1', question='q', text='yes'))
    state.note_alert(alert)
    state.note_alert(told(Alert(id='1', question='q', text='yes')))     # told again to who came late
    assert list(state.alerts) == [alert]


def test_pictures_are_asked_for_together_one_request_at_a_time_and_kept_within_bounds():
    asked, running = [], []

    def fetch(camera: str, stamps: list[int], within_s: float) -> list[bytes | str]:
        running.append(camera)
        assert len(running) == 1
        asked.append((camera, stamps))
        time.sleep(.02)
        running.pop()
        if camera == 'gone':
            raise RuntimeError('no memory node')
        return [b'x' * 100 if stamp else 'nothing seen' for stamp in stamps]

    async def browse() -> None:
        pictures = Pictures(fetch, most_bytes=1000)
        found = await asyncio.gather(*(pictures.get('front', stamp, 0.0) for stamp in (0, 1, 2, 2, 1)),
                                     pictures.get('gone', 1, 0.0))
        assert found == ['nothing seen', *[b'x' * 100] * 4, 'no memory node']
        assert asked == [('front', [0, 1, 2]), ('gone', [1])]
        await pictures.get('front', 2, 0.0)
        assert len(asked) == 2
        await asyncio.gather(*(pictures.get('front', stamp, 0.0) for stamp in range(10, 30)))
        assert len(pictures._kept) == 10
        await pictures.get('front', 2, 0.0)
        assert len(asked) == 4
    with ThreadPoolExecutor(1) as thread:       # Playwright has a loop of its own in this one
        thread.submit(asyncio.run, browse()).result()
