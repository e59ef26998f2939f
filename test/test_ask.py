"""The action ~/ask against a real node, through rclpy's own client: what a goal hears, and how it ends."""
import re
import time
from pathlib import Path

import pytest
from action_msgs.msg import GoalStatus
from lifecycle_msgs.msg import Transition

from live import SECOND, image, memory_node
from statekv_ros.action import Ask
from statekv_ros.errors import Code
from statekv_ros.node.messages import to_ns, to_stamp
from statekv_ros.srv import Query

pytestmark = pytest.mark.timeout(300)

FRAMES = 6
ENDLESS = 60_000        # tokens: minutes of decoding
SUCCEEDED, CANCELED, ABORTED = GoalStatus.STATUS_SUCCEEDED, GoalStatus.STATUS_CANCELED, GoalStatus.STATUS_ABORTED


@pytest.fixture(scope='module')
def running(tmp_path_factory, tiny_model_dir):
    """A node that saw some frames of its front camera and none of its rear one."""
    folder = tmp_path_factory.mktemp('ask')
    with memory_node(folder, tiny_model_dir, cameras='[front,rear]', max_queued_questions=8) as (node, graph):
        graph.wait_for_state('active')
        for second in range(1, FRAMES + 1):
            graph.publish(image(second * SECOND))
            graph.wait_for_camera('front', frames_held=second)
        yield node, graph


@pytest.fixture
def graph(running):
    yield running[1]
    assert running[0].alive, running[0].log
    assert 'Traceback' not in running[0].log, running[0].log


def test_codes_are_those_of_the_action():
    text = (Path(__file__).resolve().parents[1] / 'action/Ask.action').read_text()
    constants = {name: int(value) for name, value in re.findall(r'^uint16 ([A-Z_]+)=(\d+)', text, re.MULTILINE)}
    assert constants == {code.name: code.value for code in Code}
    assert all(getattr(Ask.Result, name) == value for name, value in constants.items())


def test_goal_has_the_fields_of_the_service_and_the_service_is_as_it_was_but_for_its_last_field():
    assert Ask.Goal.get_fields_and_field_types() == Query.Request.get_fields_and_field_types()
    assert list(Query.Response.get_fields_and_field_types()) == ['success', 'error', 'answer', 'answers', 'error_code']


def test_goal_succeeds_with_the_answer_that_the_service_gives(graph):
    status, result = graph.result(graph.goal(max_tokens=5))
    response = graph.ask(max_tokens=5)
    assert (status, result.success, result.error_code, result.error_msg) == (SUCCEEDED, True, Code.NONE, '')
    assert (result.answer.text, result.answer.evidence) == (response.answer.text, response.answer.evidence)
    assert to_ns(result.answer.last_stamp) == FRAMES * SECOND and list(result.answers) == [result.answer]
    assert response.error_code == Code.NONE
    graph.wait(lambda: result.answer in graph.answers, 'the answer on its topic')


def test_feedback_lets_the_answer_be_seen_to_grow_and_where_its_newest_token_looked(graph):
    goal = graph.goal(max_tokens=ENDLESS, timeout_s=250.0)
    graph.wait(lambda: len(goal.feedback) > 5, 'feedback')
    goal.handle.cancel_goal_async()
    _, result = graph.result(goal)
    assert all(told.queue_place == 0 for told in goal.feedback)
    # Of what a slow executor has not sent yet only the newest is: how often a goal is told before its first token differs.
    grown = [told for told in goal.feedback if told.answer_tokens]
    assert all(told.text == '' and not told.evidence for told in goal.feedback if not told.answer_tokens)
    assert len(grown) > 2 and [told.answer_tokens for told in grown] == sorted({told.answer_tokens for told in grown})
    assert all(told.camera == 'front' for told in grown)
    # The last character may be half of one.
    assert all(result.answer.text.startswith(told.text[:-1].rstrip('\ufffd')) for told in grown)
    for told in grown:
        shares = [step.share for step in told.evidence]
        assert shares == sorted(shares, reverse=True) and len(shares) == 3 and sum(shares) == pytest.approx(1, abs=1e-3)
        assert all(SECOND <= to_ns(step.first_stamp) <= FRAMES * SECOND and step.camera == 'front' for step in told.evidence)


def test_cancel_ends_it_between_two_slices_with_what_there_was(graph):
    goal = graph.goal(max_tokens=ENDLESS, timeout_s=250.0)
    graph.wait(lambda: any(told.answer_tokens for told in goal.feedback), 'the first tokens')
    goal.handle.cancel_goal_async()
    status, result = graph.result(goal)
    assert (status, result.success, result.error_code) == (CANCELED, False, Code.CANCELED)
    assert result.answer.finish_reason == 'canceled' and 0 < result.answer.timing.answer_tokens < ENDLESS
    assert result.answer.text.startswith(goal.feedback[-1].text[:-1]) and result.error_msg
    graph.wait(lambda: graph.health['engine'][2]['active_questions'] == '0', 'the node stops answering')


def test_goals_take_turns_and_are_told_how_many_are_before_them(graph):
    long = [graph.goal(max_tokens=ENDLESS, timeout_s=250.0) for _ in range(3)]
    graph.wait(lambda: all(any(told.answer_tokens for told in goal.feedback) for goal in long), 'tokens of all three')
    assert any(told.queue_place == 2 for goal in long for told in goal.feedback if told.answer_tokens)
    status, result = graph.result(graph.goal(max_tokens=3))
    assert status == SUCCEEDED and not any(goal.done for goal in long), 'a short goal does not wait for long ones'
    long[1].handle.cancel_goal_async()
    assert graph.result(long[1])[0] == CANCELED and not long[0].done and not long[2].done
    for goal in (long[0], long[2]):
        goal.handle.cancel_goal_async()
    assert [graph.result(goal)[0] for goal in long] == [CANCELED] * 3


@pytest.mark.parametrize('fields, code, words', [
    ({'question': ' '}, Code.INVALID_ARGUMENT, 'empty'), ({'camera': 'attic'}, Code.UNKNOWN_CAMERA, "unknown camera 'attic'"),
    ({'camera': 'rear'}, Code.NOTHING_SEEN, 'nothing has been seen'), ({'answer_policy': 'x'}, Code.INVALID_ARGUMENT, 'x'),
    ({'temperature': -1.0}, Code.INVALID_ARGUMENT, 'temperature'), ({'timeout_s': -1.0}, Code.INVALID_ARGUMENT, 'timeout_s'),
    ({'max_tokens': 70_000}, Code.INVALID_ARGUMENT, 'max_tokens'), ({'question': 'x' * 9000}, Code.INVALID_ARGUMENT, '9000'),
    ({'from_stamp': to_stamp(99 * SECOND)}, Code.NOTHING_SEEN, 'no frame'),
    ({'timeout_s': 0.001, 'max_tokens': ENDLESS}, Code.TIMEOUT, 'timeout_s = 0.001')])
def test_bad_goal_is_aborted_with_the_code_and_the_sentence_of_the_service(graph, fields, code, words):
    fields = {'question': 'what?'} | fields
    status, result = graph.result(graph.goal(**fields))
    response = graph.ask(**fields)
    assert (status, result.success, result.error_code) == (ABORTED, False, code) and words in result.error_msg
    assert (response.success, response.error_code) == (False, code) and words in response.error


def test_more_goals_than_may_wait_are_aborted_and_the_others_go_on(graph):
    goals = [graph.goal(max_tokens=ENDLESS, timeout_s=250.0) for _ in range(11)]
    graph.wait(lambda: sum(goal.done for goal in goals) >= 3, 'the three that are too many')
    refused = [graph.result(goal) for goal in goals if goal.done]
    assert {(status, result.error_code) for status, result in refused} == {(ABORTED, Code.QUEUE_FULL)} and len(refused) == 3
    for goal in goals:
        if not goal.done:
            goal.handle.cancel_goal_async()
    assert sum(graph.result(goal)[0] == CANCELED for goal in goals) == 8


def test_reset_ends_goals_with_a_code(running):
    """After it the memory is as before."""
    graph = running[1]
    goal = graph.goal(max_tokens=ENDLESS, timeout_s=250.0)
    graph.wait(lambda: any(told.answer_tokens for told in goal.feedback), 'the first tokens')
    graph.response(graph.reset.call_async(graph.reset.srv_type.Request()))
    status, result = graph.result(goal)
    assert (status, result.error_code) == (ABORTED, Code.MEMORY_RESET) and 'reset' in result.error_msg
    graph.publish(image(20 * SECOND))
    graph.wait_for_camera('front', frames_held=1)


def test_deactivation_ends_goals_within_a_slice_and_refuses_others_while_the_service_answers(graph):
    goal = graph.goal(max_tokens=ENDLESS, timeout_s=250.0)
    graph.wait(lambda: any(told.answer_tokens for told in goal.feedback), 'the first tokens')
    assert graph.lifecycle(Transition.TRANSITION_DEACTIVATE)
    status, result = graph.result(goal)
    assert (status, result.error_code) == (ABORTED, Code.NOT_ACTIVE) and 'not active' in result.error_msg
    assert result.answer.timing.answer_tokens > 0 and result.answer.finish_reason == 'canceled'
    status, result = graph.result(graph.goal())
    assert (status, result.error_code) == (ABORTED, Code.NOT_ACTIVE) and '~/query' in result.error_msg
    assert graph.ask().success
    assert graph.lifecycle(Transition.TRANSITION_CLEANUP)
    status, result = graph.result(graph.goal())
    assert (status, result.error_code) == (ABORTED, Code.NOT_CONFIGURED) and 'not configured' in result.error_msg
    assert graph.ask().error_code == Code.NOT_CONFIGURED
    assert graph.lifecycle(Transition.TRANSITION_CONFIGURE) and graph.lifecycle(Transition.TRANSITION_ACTIVATE)
    graph.publish(image(30 * SECOND))
    graph.wait_for_camera('front', frames_held=1)
    assert graph.result(graph.goal(max_tokens=3))[0] == SUCCEEDED


def test_node_that_is_told_to_stop_ends_its_goals_with_a_code(running):
    """Last: the node is gone afterwards."""
    node, graph = running
    goals = [graph.goal(max_tokens=ENDLESS, timeout_s=250.0) for _ in range(4)]
    graph.wait(lambda: all(any(told.answer_tokens for told in goal.feedback) for goal in goals), 'tokens of all')
    begun = time.monotonic()
    assert node.stop()[0] == 0 and time.monotonic() - begun < 8.0
    for goal in goals:
        status, result = graph.result(goal)
        assert (status, result.error_code) == (ABORTED, Code.SHUTTING_DOWN) and 'shutting down' in result.error_msg
    assert 'Traceback' not in node.log, node.log
