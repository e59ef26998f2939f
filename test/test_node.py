"""One memory node over real DDS: what it answers, and what bad images and bad questions do to it (nothing but a message)."""
import itertools
import math

import pytest

from live import SECOND, image, jpeg, memory_node
from statekv_ros.node.messages import to_ns, to_stamp

pytestmark = pytest.mark.timeout(300)


@pytest.fixture(scope='module')
def running(tmp_path_factory, tiny_model_dir):
    """A node with a raw and a compressed camera, and a silent one."""
    with memory_node(tmp_path_factory.mktemp('node'), tiny_model_dir, cameras='[front,side,silent]',
                     side__topic='/side/image/compressed', evidence_frames=100) as (node, graph):
        graph.wait_for_state('active')
        yield node, graph


@pytest.fixture
def graph(running):
    return running[1]


@pytest.fixture(autouse=True)
def the_node_lives_on(running):
    yield
    node, graph = running
    assert node.alive, node.log
    assert graph.health['engine'][2]['state'] == 'active'


CLOCK = itertools.count(100)     # seconds of header time; every test goes on where the last one stopped


def watch(graph, count: int) -> list[int]:
    """Let the front camera see `count` good images, one a second of header time; their seconds."""
    held, seconds = int(graph.camera('front')['frames_held']), [next(CLOCK) for _ in range(count)]
    for index, second in enumerate(seconds):
        graph.publish(image(second * SECOND))
        graph.wait_for_camera('front', frames_held=held + index + 1)
    return seconds


def test_a_question_before_the_first_frame_is_an_error_that_says_so(graph):
    response = graph.ask(camera='front')
    assert not response.success and 'nothing has been seen' in response.error
    assert not graph.ask().success
    assert graph.health['silent'][1].startswith('no image yet')


def test_frames_become_steps_with_timing_and_an_answer_with_stamps_and_evidence(graph):
    watch(graph, 6)
    graph.wait(lambda: len(graph.timings) >= 3, 'three timings')
    timing = graph.timings[-1]
    assert (timing.camera, timing.step, timing.header.frame_id) == ('front', 2, 'camera_link')
    assert to_ns(timing.header.stamp) == 105 * SECOND
    assert timing.total_ms == pytest.approx(timing.preprocess_ms + timing.vision_ms + timing.prefill_ms + timing.select_ms)
    assert min(timing.wait_ms, timing.preprocess_ms, timing.vision_ms, timing.prefill_ms, timing.select_ms) > 0
    assert (timing.budget, timing.frames_in, timing.frames_sampled, timing.frames_processed) == (64, 6, 6, 6)
    assert 0 < timing.state_tokens <= 64 and timing.detailed_bytes > timing.detailed_tokens > timing.step_tokens
    assert (timing.dropped, timing.lost, timing.rejected) == (0, 0, 0)

    published = len(graph.answers)
    response = graph.ask('is the door open?', camera='front')
    assert response.success and not response.error
    answer = response.answer
    assert (answer.question, answer.camera, answer.frames_covered) == ('is the door open?', 'front', 6)
    assert (to_ns(answer.first_stamp), to_ns(answer.last_stamp)) == (100 * SECOND, 105 * SECOND)
    assert answer.header.frame_id == 'camera_link' and to_ns(answer.header.stamp) > 0
    assert (answer.prefill_policy, answer.answer_policy) == ('statekv(64)', 'sparse(8192)')
    assert not answer.demonstration_model and graph.health['engine'][0] == 0
    assert answer.finish_reason in ('stop', 'length') and 0 < answer.timing.answer_tokens <= 6
    assert sum(e.share for e in answer.evidence) == pytest.approx(1, abs=1e-3)
    assert [e.share for e in answer.evidence] == sorted((e.share for e in answer.evidence), reverse=True)
    assert 0 < answer.timing.first_token_ms <= answer.timing.total_ms
    graph.wait(lambda: len(graph.answers) > published, 'the answer on its topic')
    assert graph.answers[-1].text == answer.text


def test_all_cameras_give_a_line_each_and_silent_ones_are_left_out(graph):
    watch(graph, 2)
    for second in (200, 201):
        graph.publish(jpeg(second * SECOND), '/side/image/compressed')
        graph.wait_for_camera('side', frames_processed=second - 199)
    response = graph.ask()
    assert response.success and response.answer.camera == 'front,side'
    assert [a.camera for a in response.answers] == ['front', 'side']
    assert [line.split(':')[0] for line in response.answer.text.split('\n') if line[:4] in ('fron', 'side')] == ['front', 'side']
    assert {e.camera for e in response.answer.evidence} == {'front', 'side'}


@pytest.mark.parametrize('fields, words', [
    ({'question': ''}, 'empty'),
    ({'question': '   '}, 'empty'),
    ({'question': 'x' * 100_000}, '100000 characters'),
    ({'camera': 'attic'}, "unknown camera 'attic'"),
    ({'camera': 'silent'}, 'nothing has been seen'),
    ({'from_stamp': to_stamp(9000 * SECOND)}, 'no frame'),
    ({'from_stamp': to_stamp(104 * SECOND), 'to_stamp': to_stamp(103 * SECOND)}, 'before it begins'),
    ({'answer_policy': 'magic'}, 'magic'),
    ({'answer_policy': 'magic' * 100_000}, 'magic\'... (500000 characters)'),
    ({'camera': 'attic' * 100_000}, 'attic\'... (500000 characters)'),
    ({'answer_policy': 'last(0)'}, 'last'),
    ({'max_tokens': 65537}, 'max_tokens must be at most 65536, got 65537'),
    ({'max_tokens': 2**32 - 1}, 'max_tokens'),
    ({'temperature': -1.0}, 'temperature'),
    ({'temperature': math.nan}, 'temperature'),
    ({'timeout_s': math.nan}, 'timeout_s'),
    ({'timeout_s': -1.0}, 'timeout_s'),
])
def test_a_bad_question_is_an_error_that_names_it(fields, words, graph):
    watch(graph, 1)
    response = graph.ask(**{'question': 'is the door open?', **fields})
    assert not response.success and words in response.error, response.error
    assert len(response.error) < 1000
    assert graph.ask(camera='front').success


def test_a_time_span_reads_only_its_frames(graph):
    first, last = (seconds := watch(graph, 8))[2], seconds[5]
    response = graph.ask(camera='front', from_stamp=to_stamp(first * SECOND), to_stamp=to_stamp(last * SECOND))
    assert response.success, response.error
    # A step of two frames belongs to every span that it touches.
    assert (first - 1) * SECOND <= to_ns(response.answer.first_stamp) <= first * SECOND
    assert last * SECOND <= to_ns(response.answer.last_stamp) <= (last + 1) * SECOND


def test_two_questions_at_once_are_both_answered(graph):
    watch(graph, 2)
    futures = [graph.ask_later(f'question {number}?', camera='front', max_tokens=60) for number in range(3)]
    responses = [graph.response(future) for future in futures]
    assert all(response.success for response in responses)
    assert [response.answer.question for response in responses] == ['question 0?', 'question 1?', 'question 2?']


def test_each_of_many_questions_at_once_gets_a_reply_be_it_that_there_are_too_many(graph):
    watch(graph, 2)
    responses = [graph.response(future) for future in [graph.ask_later(f'{number}?') for number in range(40)]]
    answered = [response for response in responses if response.success]
    assert len(answered) >= 16
    assert all('max_queued_questions' in response.error for response in responses if not response.success)


def test_a_question_out_of_time_gives_what_it_has_and_says_so(graph):
    watch(graph, 2)
    # Sampled hot, so that a random model hardly ever ends by itself; where it does, the next seed is asked.
    for seed in range(20):
        response = graph.ask(camera='front', max_tokens=60_000, temperature=5.0, seed=seed, timeout_s=0.1)
        if not response.success:
            break
    assert not response.success and 'timeout_s' in response.error
    assert response.answer.finish_reason == 'timeout' and response.answer.frames_covered > 0


BAD_IMAGES = {
    'step too small': ({'step': 10}, 'step is 10'),
    'data too short': ({'data': bytes(100)}, '100 bytes'),
    'no data': ({'data': b''}, '0 bytes'),
    'zero width': ({'width': 0}, '0'),
    'zero height': ({'height': 0}, '0'),
    'unknown encoding': ({'encoding': 'telepathy8'}, 'telepathy8'),
    'depth': ({'encoding': '16UC1', 'step': 128, 'data': bytes(128 * 64)}, 'depth'),
    'thin': ({'width': 1, 'height': 900, 'step': 3, 'data': bytes(2700)}, 'factor'),
}


@pytest.mark.parametrize('case', BAD_IMAGES)
def test_a_bad_image_is_refused_by_name_and_nothing_seen_is_lost(case, graph):
    fields, words = BAD_IMAGES[case]
    watch(graph, 2)
    before = graph.camera('front')
    graph.publish(image(next(CLOCK) * SECOND, **fields))
    after = graph.wait_for_camera('front', rejected=int(before['rejected']) + 1)
    assert words in after['last_error'], after['last_error']
    assert after['frames_held'] == before['frames_held'] and after['detailed_tokens'] == before['detailed_tokens']
    assert graph.ask(camera='front').answer.frames_covered == int(before['frames_held'])


def test_a_corrupt_jpeg_is_refused_and_the_next_one_seen(graph):
    graph.publish(jpeg(300 * SECOND), '/side/image/compressed')
    before = graph.camera('side')
    for second, keep in ((301, 0.5), (302, 0.05), (303, 0.0)):
        graph.publish(jpeg(second * SECOND, keep), '/side/image/compressed')
        before = graph.wait_for_camera('side', rejected=int(before['rejected']) + 1)
        assert 'compressed image' in before['last_error']
    graph.publish(jpeg(304 * SECOND), '/side/image/compressed')
    graph.wait_for_camera('side', frames_held=int(before['frames_held']) + 1)


@pytest.mark.parametrize('stamp, words', [(0, 'stamp is zero'), (None, 'twice')])
def test_stamps_that_cannot_be_are_refused(stamp, words, graph):
    [second] = watch(graph, 1)
    before = graph.camera('front')
    graph.publish(image(second * SECOND if stamp is None else stamp))
    after = graph.wait_for_camera('front', rejected=int(before['rejected']) + 1)
    assert words in after['last_error'] and after['frames_held'] == before['frames_held']


def test_stamps_that_go_back_open_a_segment_and_keep_the_memory(graph):
    newest = watch(graph, 3)[-1]
    before = graph.camera('front')
    segment, messages = int(before['segment']), []
    graph.publish(image(50 * SECOND))
    graph.wait(lambda: messages.append(graph.health['front'][1]) or graph.health['front'][2]['segment'] == str(segment + 1),
               'the new segment')
    assert any('went back' in message for message in messages)
    after = graph.wait_for_camera('front', frames_held=int(before['frames_held']) + 1)
    assert int(after['detailed_tokens']) >= int(before['detailed_tokens'])
    answer = graph.ask(camera='front').answer
    assert answer.frames_covered == int(after['frames_held']) and to_ns(answer.last_stamp) == newest * SECOND


def test_a_change_of_resolution_is_watched_on(graph):
    before = graph.camera('front')
    for index, (width, height) in enumerate([(64, 64), (128, 96), (320, 240), (640, 480), (64, 64)]):
        graph.publish(image(next(CLOCK) * SECOND, width, height))
        graph.wait_for_camera('front', frames_held=int(before['frames_held']) + index + 1)
    assert graph.ask(camera='front').success
    assert graph.camera('front')['failed_steps'] == '0'


def test_reset_forgets_one_camera(graph):
    watch(graph, 1)
    held, side = graph.camera('front')['frames_held'], graph.health['side'][2]['frames_held']
    response = graph.response(graph.reset.call_async(graph.reset.srv_type.Request(camera='front')))
    assert response.success and response.frames_forgotten == int(held)
    graph.wait_for_camera('front', frames_held=0, detailed_tokens=0)
    assert graph.health['side'][2]['frames_held'] == side
    assert 'nothing has been seen' in graph.ask(camera='front').error
    response = graph.response(graph.reset.call_async(graph.reset.srv_type.Request(camera='attic')))
    assert not response.success and 'attic' in response.error
