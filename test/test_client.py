"""The planner's client against a real memory node in another process: what each result means."""
import signal
import threading

import pytest

pytest.importorskip('rclpy', reason='rclpy is not installed')

import rclpy  # noqa: E402
from diagnostic_msgs.msg import DiagnosticArray  # noqa: E402
from geometry_msgs.msg import PointStamped  # noqa: E402
from lifecycle_msgs.msg import Transition  # noqa: E402
from rclpy.executors import SingleThreadedExecutor  # noqa: E402

from live import SECOND, image, memory_node  # noqa: E402
from policies import Policy, names_of  # noqa: E402
from statekv_ros.client import Result, StateKVClient  # noqa: E402
from statekv_ros.errors import Code  # noqa: E402
from statekv_ros.node.health import main as statekv_health  # noqa: E402
from statekv_ros.node.messages import to_ns, to_stamp  # noqa: E402

pytestmark = pytest.mark.timeout(240)

FRAMES = 6              # one a second of header time, from second 1 on
ENDLESS = 60_000        # tokens: minutes of decoding


@pytest.fixture(scope='module')
def running(tmp_path_factory, tiny_model_dir):
    """A node that saw some frames of its front camera and none of its rear one; rclpy in this process, in its domain."""
    with memory_node(tmp_path_factory.mktemp('client'), tiny_model_dir, cameras='[front,rear]') as (node, graph):
        rclpy.init(args=[], domain_id=graph.context.get_domain_id())
        try:
            graph.wait_for_state('active')
            for second in range(1, FRAMES + 1):
                graph.publish(image(second * SECOND))
                graph.wait_for_camera('front', frames_held=second)
            yield node, graph
        finally:
            rclpy.try_shutdown()


@pytest.fixture(scope='module')
def memory(running):
    with StateKVClient() as client:
        assert client.wait_until_ready()
        yield client


def test_answer_comes_back_with_its_stamps_and_evidence(memory):
    reply = memory.ask('is the door open?', max_tokens=5)
    assert reply.result is Result.SUCCEEDED and reply.error == ''
    assert (to_ns(reply.answer.first_stamp), to_ns(reply.answer.last_stamp)) == (SECOND, FRAMES * SECOND)
    assert reply.answer.question == 'is the door open?' and reply.answers == (reply.answer,)
    assert 0 < reply.answer.timing.answer_tokens <= 5 and reply.answer.evidence


def test_security_policies_allow_what_node_and_client_have_and_no_more(running, memory):
    graph = running[1]
    graph.wait(lambda: ('statekv_client', '/') in graph.node.get_node_names_and_namespaces(), 'the client to be seen')
    graph.wait(lambda: Policy('node').misses(names_of(graph.node, 'statekv')) == [], 'all that the policy names')
    assert Policy('node').refuses(names_of(graph.node, 'statekv')) == []
    stop = memory.on_alert(lambda alert: None)
    have = names_of(memory.node, 'statekv_client')
    stop()
    assert Policy('client').refuses(have) == [] and Policy('client').misses(have) == []


@pytest.mark.parametrize('arguments,code,words', [
    ([], 0, '/statekv: active'), (['--state', 'inactive'], 1, '/statekv: active'),
    (['--node', '/nobody', '--timeout', '0.5'], 1, '/nobody: no answer within 0.5 s')])
def test_health_is_told_by_exit_code_and_words(running, monkeypatch, capsys, arguments, code, words):
    monkeypatch.setenv('ROS_DOMAIN_ID', str(running[1].context.get_domain_id()))
    assert statekv_health(['--timeout', '60', *arguments]) == code
    assert capsys.readouterr().out == words + '\n'


def test_every_argument_reaches_the_node(memory):
    span = {'from_stamp': to_stamp(3 * SECOND), 'to_stamp': to_stamp(4 * SECOND)}
    cut = memory.ask('what?', camera='front', max_tokens=3, **span).answer
    assert (to_ns(cut.first_stamp), to_ns(cut.last_stamp), cut.timing.answer_tokens) == (3 * SECOND, 4 * SECOND, 3)
    assert memory.ask('what?', answer_policy='last(2)').answer.answer_policy == 'last(2)'
    place = PointStamped()
    place.header.frame_id = 'map'
    reply = memory.ask('what?', near=place, within_m=2.0)
    assert reply.error_code == Code.UNKNOWN_FRAME and 'pose.topic' in reply.error, 'these frames have no poses'
    texts = [memory.ask('what?', max_tokens=12, temperature=2.0, seed=seed).answer.text for seed in (1, 1, 2)]
    assert texts[0] == texts[1] != texts[2], 'the seed decides what is sampled'


@pytest.mark.parametrize('arguments,words', [
    ({'question': ''}, 'empty'), ({'camera': 'attic'}, "unknown camera 'attic'"), ({'camera': 'rear'}, 'nothing has been seen'),
    ({'answer_policy': 'magic'}, 'magic'), ({'temperature': float('nan')}, 'temperature'), ({'timeout_s': -1.0}, 'timeout_s must be'),
    ({'timeout_s': 0}, 'timeout_s must be'), ({'timeout_s': float('nan')}, 'timeout_s must be'),
    ({'near': (1.0, 2.0), 'within_m': 1.0}, 'near must be a point'), ({'within_m': 1.0}, 'within_m must be 0 where'),
    ({'near': PointStamped()}, 'within_m must be above 0'), ({'near': PointStamped(), 'within_m': 1.0}, 'header.frame_id'),
    ({'near': PointStamped(), 'within_m': float('nan')}, 'within_m must be 0'),
    ({'from_stamp': to_stamp(100 * SECOND)}, 'no frame')])
def test_question_that_the_node_refuses_has_failed_with_its_reason(memory, arguments, words):
    reply = memory.ask(**{'question': 'what?', **arguments})
    assert reply.result is Result.FAILED and words in reply.error
    assert reply.answer.text == '' and reply.answers == ()


def test_time_limit_ends_the_answer_on_both_sides_and_gives_what_there_was(running, memory):
    reply = memory.ask('tell me everything', timeout_s=1.0, max_tokens=ENDLESS)
    assert reply.result is Result.TIMEOUT and 'timeout_s = 1' in reply.error
    assert reply.answer.finish_reason == 'timeout' and 0 < reply.answer.timing.answer_tokens < ENDLESS
    assert reply.answer.frames_covered == FRAMES
    running[1].wait(lambda: running[1].health['engine'][2]['active_questions'] == '0', 'the node stops answering')


def test_node_that_does_not_exist_is_unavailable(memory):
    with StateKVClient('nobody') as client:
        assert not client.wait_until_ready(0.2)
        reply = client.ask('what?', timeout_s=0.2)
        assert reply.result is Result.UNAVAILABLE and "'nobody'" in reply.error and reply.answers == ()
        with pytest.raises(RuntimeError, match="'nobody'"):
            client.reset(timeout_s=0.2)


def test_node_that_hangs_times_out_and_the_client_works_when_it_is_back(running, memory):
    process = running[0].process
    process.send_signal(signal.SIGSTOP)
    try:
        reply = memory.ask('are you there?', timeout_s=0.2, max_tokens=3)
    finally:
        process.send_signal(signal.SIGCONT)
    assert reply.result is Result.TIMEOUT and 'no reply' in reply.error and reply.answers == ()
    later = memory.ask('and now?', max_tokens=3)
    assert later.result is Result.SUCCEEDED and later.answer.question == 'and now?'


def test_two_planners_at_once_both_get_their_answer(running):
    replies = {}

    def plan(question):
        with StateKVClient(node=rclpy.create_node(f'planner_{len(question)}')) as client:
            replies[question] = client.ask(question, max_tokens=30)
            client.node.destroy_node()

    planners = [threading.Thread(target=plan, args=(question,)) for question in ('where?', 'since when?')]
    for planner in planners:
        planner.start()
    for planner in planners:
        planner.join()
    for question, reply in replies.items():
        assert reply.result is Result.SUCCEEDED and reply.answer.question == question


def test_subscriptions_of_its_node_are_served_while_it_waits_for_an_answer(memory):
    seen = []
    subscription = memory.node.create_subscription(DiagnosticArray, '/diagnostics', seen.append, 10)
    while not seen:
        memory.spin_for(0.1)
    before = len(seen)
    memory.ask('tell me everything', timeout_s=2.0, max_tokens=ENDLESS)
    assert len(seen) > before + 2
    memory.node.destroy_subscription(subscription)


def test_client_uses_a_node_that_another_thread_spins(running):
    node, executor = rclpy.create_node('planner'), SingleThreadedExecutor()
    executor.add_node(node)
    spinner = threading.Thread(target=executor.spin)
    spinner.start()
    try:
        with StateKVClient(node=node, executor=executor) as client:
            assert client.wait_until_ready()
            assert client.ask('what?', max_tokens=3).result is Result.SUCCEEDED
            assert client.ask('', timeout_s=5.0).result is Result.FAILED
        assert node in executor.get_nodes(), 'what it was given, it leaves'
    finally:
        executor.shutdown()
        spinner.join()
        node.destroy_node()


def test_client_uses_a_node_of_another_context(running):
    graph = running[1]
    node = rclpy.create_node('elsewhere', context=graph.context)
    with StateKVClient(node=node) as client:
        assert client.wait_until_ready() and client.ask('what?', max_tokens=3).result is Result.SUCCEEDED
    node.destroy_node()


def test_reset_forgets_and_says_how_much(running, memory):
    graph = running[1]
    with pytest.raises(RuntimeError, match="unknown camera 'attic'"):
        memory.reset('attic')
    assert memory.reset('rear') == 0
    assert memory.reset() == FRAMES
    assert 'nothing has been seen' in memory.ask('what?').error
    graph.publish(image(50 * SECOND))
    graph.wait_for_camera('front', frames_held=1)
    assert memory.ask('what?', max_tokens=3).answer.frames_covered == 1


def test_node_without_a_model_fails_with_the_reason_and_one_that_left_is_unavailable(running, memory):
    """Last: the node is gone afterwards."""
    node, graph = running
    assert graph.lifecycle(Transition.TRANSITION_DEACTIVATE)
    assert 'not active' in memory.ask('what?', max_tokens=3).error
    assert graph.lifecycle(Transition.TRANSITION_CLEANUP)
    reply = memory.ask('what?')
    assert reply.result is Result.FAILED and 'not configured' in reply.error
    with pytest.raises(RuntimeError, match='not configured'):
        memory.reset()
    assert node.stop()[0] == 0
    graph.wait(lambda: not memory._ends.is_ready(), 'the service is gone')
    assert memory.ask('what?', timeout_s=0.5).result is Result.UNAVAILABLE
