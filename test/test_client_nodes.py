"""The client inside other nodes: the programs of docs/client.md, and what must not happen to a node that has one."""
import re
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

pytest.importorskip('rclpy', reason='rclpy is not installed')

import rclpy  # noqa: E402
from rclpy.callback_groups import ReentrantCallbackGroup  # noqa: E402
from rclpy.executors import MultiThreadedExecutor, SingleThreadedExecutor  # noqa: E402

from live import PATIENCE_S, SECOND, environment, image, memory_node  # noqa: E402
from statekv_ros.action import Ask  # noqa: E402
from statekv_ros.client import Result, StateKVClient, WouldBlock  # noqa: E402

pytestmark = pytest.mark.timeout(240)

DOC = (Path(__file__).resolve().parents[1] / 'docs/client.md').read_text()
PROGRAMS = dict(re.findall(r'^## (.*?)\n.*?```python\n(.*?)```', DOC.split('\n## The action')[0], re.DOTALL | re.MULTILINE))
ENDLESS = 60_000


@pytest.fixture(scope='module')
def running(tmp_path_factory, tiny_model_dir):
    """A node that has seen something; rclpy in this process, in its domain."""
    with memory_node(tmp_path_factory.mktemp('nodes'), tiny_model_dir, cameras='[front]') as (node, graph):
        rclpy.init(args=[], domain_id=graph.context.get_domain_id())
        try:
            graph.wait_for_state('active')
            graph.publish(image(SECOND))
            graph.wait_for_camera('front', frames_held=1)
            yield graph
        finally:
            rclpy.try_shutdown()


@pytest.fixture
def spun(running):
    """spun(executor, *callbacks) -> (node, client): a node that the executor spins in a thread."""
    executors, clients = [], []

    def spin(executor, *callbacks, group=None):
        node = rclpy.create_node('planner')
        client = StateKVClient(node=node)
        clients.append((node, client))
        executor.add_node(node)
        for callback in callbacks:
            node.create_timer(0.05, lambda callback=callback: callback(client), callback_group=group)
        thread = threading.Thread(target=executor.spin)
        executors.append((executor, thread))
        thread.start()
        return node, client
    yield spin
    for executor, thread in executors:
        executor.shutdown()
        thread.join()
    for node, client in clients:
        client.close()
        node.destroy_node()


def await_that(until, what: str) -> None:
    end = time.monotonic() + PATIENCE_S
    while not until():
        assert time.monotonic() < end, f'waited for {what}'
        time.sleep(0.02)


def lines_of(program: str, domain: int, enough) -> list[str]:
    """What a program prints until that is enough, or it ends by itself."""
    process = subprocess.Popen([sys.executable, '-c', program], env=environment(domain), stdout=subprocess.PIPE,
                               stderr=subprocess.STDOUT, text=True)
    watch = threading.Timer(PATIENCE_S, process.kill)
    watch.start()
    lines = []
    for line in process.stdout:
        lines.append(line.strip())
        if enough(lines):
            break
    watch.cancel()
    process.kill()
    process.wait()
    return lines


def test_every_situation_has_a_program():
    assert len(PROGRAMS) == 6


@pytest.mark.parametrize('title, other', [
    ('A timer callback under a single-threaded executor', 'planning'), ('A callback under a multi-threaded executor', 'driving'),
    ('An async callback', 'driving'), ('A lifecycle node', 'driving')])
def test_program_gets_its_answer_while_its_other_callbacks_go_on(running, title, other):
    def enough(lines):
        return 'succeeded' in lines and lines.count(other) >= 3 and lines[lines.index('succeeded'):].count(other) >= 3

    lines = lines_of(PROGRAMS[title], running.context.get_domain_id(), enough)
    assert enough(lines), '\n'.join(lines)
    assert set(lines) == {'succeeded', other}


def test_own_program_hears_the_answer_grow(running):
    *heard, last = lines_of(PROGRAMS['A program of its own'], running.context.get_domain_id(), lambda lines: False)
    assert last.startswith('succeeded'), heard
    assert all(line.startswith('so far:') for line in heard if ':' in line)


def test_eight_threads_each_get_their_own_answer(running):
    lines = lines_of(PROGRAMS['Eight threads'], running.context.get_domain_id(), lambda lines: False)
    assert lines == [f'succeeded did you see cone number {number}?' for number in range(8)]


def test_client_made_in_a_callback_leaves_the_node_to_its_executor(spun):
    ticks = []

    def tick(_):
        ticks.append(1)
        if len(ticks) == 3:
            ticks.append(StateKVClient(node=node))

    executor = SingleThreadedExecutor()
    node, _ = spun(executor, tick)
    await_that(lambda: len(ticks) > 10, 'ticks after a client was made')
    assert node.executor is executor and node in executor.get_nodes()
    next(made for made in ticks if made != 1).close()
    assert node.executor is executor


@pytest.mark.parametrize('call', ['ask', 'wait', 'reset', 'wait_until_ready', 'spin_for'])
def test_call_that_waits_in_the_only_thread_raises_at_once_and_says_what_to_do(spun, call):
    raised, ticks = [], []

    def wait(client):
        ticks.append(1)
        try:
            {'ask': lambda: client.ask('what?'), 'wait': lambda: client.ask_async('what?', max_tokens=2).wait(),
             'reset': client.reset, 'wait_until_ready': client.wait_until_ready, 'spin_for': lambda: client.spin_for(9.0)}[call]()
        except WouldBlock as error:
            raised.append(str(error))

    spun(SingleThreadedExecutor(), wait)
    await_that(lambda: len(raised) > 2, 'the error')
    assert all('await memory.ask_async' in text and 'MultiThreadedExecutor' in text for text in raised)
    assert len(ticks) - len(raised) <= 1


def test_client_with_a_node_of_its_own_does_not_hold_up_the_executor_of_a_callback_either(spun):
    raised = []
    with StateKVClient() as own:
        def wait(_):
            with pytest.raises(WouldBlock):
                own.ask('what?')
            raised.append(1)
        spun(SingleThreadedExecutor(), wait)
        await_that(lambda: len(raised) > 2, 'the error')
        assert own.ask('what?', max_tokens=2).result is Result.SUCCEEDED


def test_last_free_thread_is_not_blocked(spun):
    """Of two threads one may wait; a second raises instead of waiting for what nobody could receive."""
    outcomes = []

    def wait(client):
        try:
            outcomes.append(client.ask('what?', timeout_s=1.0, max_tokens=ENDLESS).result)
        except WouldBlock as error:
            outcomes.append(str(error))

    spun(MultiThreadedExecutor(num_threads=2), wait, wait, group=ReentrantCallbackGroup())
    await_that(lambda: Result.TIMEOUT in outcomes, 'an answer')
    refused = [outcome for outcome in outcomes if isinstance(outcome, str)]
    assert refused and all('1 callbacks wait already in the 2 threads' in text for text in refused)


def test_executor_that_nobody_spins_is_named_and_not_the_node(running):
    node, executor = rclpy.create_node('planner'), SingleThreadedExecutor()
    executor.add_node(node)
    with StateKVClient(node=node) as memory:
        reply = memory.ask('what?', timeout_s=0.2)
    assert reply.result is Result.TIMEOUT and "the executor of node 'planner' ran no callback" in reply.error
    assert node in executor.get_nodes()
    executor.shutdown()
    node.destroy_node()


def test_two_clients_of_one_node_wait_for_both_in_one_thread_and_in_two(running):
    node = rclpy.create_node('planner')
    with StateKVClient(node=node) as memory:
        with StateKVClient(node=node) as other:
            askings = [client.ask_async('what?', max_tokens=2) for client in (memory, other)]
            assert [asking.wait().result for asking in askings] == [Result.SUCCEEDED] * 2
            with ThreadPoolExecutor(2) as threads:
                replies = threads.map(lambda client: client.ask('what?', max_tokens=2), (memory, other))
                assert [reply.result for reply in replies] == [Result.SUCCEEDED] * 2
        assert memory.ask('what?', max_tokens=2).result is Result.SUCCEEDED, 'the other one took nothing along'
    assert node.executor is None
    node.destroy_node()


def test_node_that_the_client_spun_can_be_given_to_an_executor(running):
    node = rclpy.create_node('planner')
    with StateKVClient(node=node) as memory:
        assert memory.ask('what?', max_tokens=2).result is Result.SUCCEEDED
        executor = SingleThreadedExecutor()
        asking = memory.ask_async('what?', max_tokens=2)
        executor.add_node(node)
        executor.spin_until_future_complete(asking, PATIENCE_S)
        assert asking.result().result is Result.SUCCEEDED and node.executor is executor
        executor.remove_node(node)
        assert memory.ask('what?', max_tokens=2).result is Result.SUCCEEDED
    assert node.executor is None
    executor.shutdown()
    node.destroy_node()


def test_answer_grows_and_ends_when_it_is_canceled(running):
    texts = []
    with StateKVClient() as memory:
        asking = memory.ask_async('tell me everything', timeout_s=200.0, max_tokens=ENDLESS, on_text=texts.append)
        while len(texts) < 3:
            assert asking.wait(0.1) is None
        assert asking.feedback.camera == 'front' and asking.feedback.evidence and asking.feedback.text == texts[-1]
        asking.cancel()
        reply = asking.wait()
        assert reply.result is Result.CANCELED and reply.error_code == Ask.Result.CANCELED
        assert reply.answer.finish_reason == 'canceled' and reply.answer.text.startswith(texts[0][:-1])
        later = memory.ask_async('and now?', max_tokens=2)
        later.cancel()
        assert later.wait().result in (Result.CANCELED, Result.SUCCEEDED)
        with StateKVClient('nobody') as nobody:
            unsent = nobody.ask_async('what?')
            unsent.cancel()
            assert unsent.done() and unsent.result().result is Result.CANCELED
        assert not memory._askings
    running.wait(lambda: running.health['engine'][2]['active_questions'] == '0', 'the node stops answering')


def test_client_that_is_closed_ends_what_is_under_way(running):
    memory = StateKVClient()
    asking = memory.ask_async('tell me everything', timeout_s=200.0, max_tokens=ENDLESS)
    while not asking.feedback.text:
        assert asking.wait(0.1) is None
    memory.close()
    assert asking.result().result is Result.CANCELED and 'closed' in asking.result().error
    running.wait(lambda: running.fresh_health()['engine'][2]['active_questions'] == '0', 'the node stops answering')


@pytest.mark.parametrize('arguments, words', [
    ({'max_tokens': -1}, 'max_tokens must be a whole number from 0'), ({'max_tokens': 2.5}, 'got 2.5'),
    ({'max_tokens': True}, 'True'),
    ({'max_tokens': 2**32}, 'max_tokens'), ({'seed': -1}, 'seed must be'), ({'seed': 2**64}, 'seed must be'),
    ({'temperature': 'hot'}, "temperature must be 0 (greedy) or a positive number, got 'hot'"),
    ({'temperature': 1e39}, 'temperature'),
    ({'timeout_s': '5'}, "timeout_s must be a positive number of seconds, got '5'"), ({'timeout_s': None}, 'timeout_s'),
    ({'question': b'what?'}, "question must be a string, got b'what?'"), ({'question': 'what \ud800?'}, 'UTF-8'),
    ({'question': ' \n'}, 'empty'), ({'camera': None}, 'camera must be a string'), ({'answer_policy': 8192}, 'answer_policy'),
    ({'from_stamp': 3.5}, 'from_stamp must be a header stamp'), ({'to_stamp': (1, 2)}, 'got (1, 2)')])
def test_argument_that_no_message_takes_has_failed_with_a_sentence_that_names_it(running, arguments, words):
    with StateKVClient('nobody') as memory:
        reply = memory.ask(**{'question': 'what?', **arguments})
    assert reply.result is Result.FAILED and words in reply.error and reply.error_code == Ask.Result.INVALID_ARGUMENT


def test_stamps_may_be_those_of_a_clock(running):
    with StateKVClient() as memory:
        assert memory.ask('what?', max_tokens=2, to_stamp=memory.node.get_clock().now()).result is Result.SUCCEEDED
        early = memory.ask('what?', max_tokens=2, from_stamp=memory.node.get_clock().now())
    assert early.result is Result.FAILED and early.error_code == Ask.Result.NOTHING_SEEN
