"""What rclpy's action server keeps for good, ours does not: shown with real goals, on a simulated clock that stands still."""
import time

import pytest

pytest.importorskip('rclpy', reason='rclpy is not installed')

import rclpy  # noqa: E402
from action_msgs.msg import GoalStatus  # noqa: E402
from rclpy.action import ActionClient, CancelResponse  # noqa: E402
from rclpy.action.server import RCLError  # noqa: E402
from rclpy.callback_groups import ReentrantCallbackGroup  # noqa: E402
from rclpy.executors import SingleThreadedExecutor  # noqa: E402
from rclpy.parameter import Parameter  # noqa: E402
from rclpy.qos import QoSProfile  # noqa: E402

from domains import new_domain  # noqa: E402
from live import PATIENCE_S, Goal  # noqa: E402
from statekv_ros.action import Ask  # noqa: E402
from statekv_ros.node import action_server  # noqa: E402

pytestmark = pytest.mark.timeout(120)


async def succeed(handle) -> Ask.Result:
    handle.succeed()
    return Ask.Result(success=True)


@pytest.fixture
def place(monkeypatch):
    """A server on a clock that nobody moves, a client, and a function that spins both until something is so."""
    monkeypatch.setattr(action_server, 'RESULTS_KEPT_S', 1)
    context = rclpy.Context()
    rclpy.init(args=[], context=context, domain_id=new_domain())
    node = rclpy.create_node('server', context=context, parameter_overrides=[Parameter('use_sim_time', value=True)])
    executor = SingleThreadedExecutor(context=context)
    executor.add_node(node)
    server = action_server.BoundedActionServer(node, Ask, 'ask', succeed, ReentrantCallbackGroup(),
                                               lambda handle: CancelResponse.ACCEPT, QoSProfile(depth=100))
    client = ActionClient(node, Ask, 'ask')

    def spin(until) -> bool:
        end = time.monotonic() + PATIENCE_S
        while not until() and time.monotonic() < end:
            executor.spin_once(0.05)
        return until()

    assert spin(client.server_is_ready)
    yield server, client, spin
    client.destroy()
    server.destroy()
    executor.shutdown(timeout_sec=0)
    node.destroy_node()
    rclpy.shutdown(context=context)


def test_results_and_requests_are_let_go_of_while_simulated_time_stands_still(place):
    server, client, spin = place
    goals = [Goal(client, question='x' * 1000) for _ in range(5)]
    assert spin(lambda: all(goal.done for goal in goals))
    assert [goal.result.result().status for goal in goals] == [GoalStatus.STATUS_SUCCEEDED] * 5
    assert all(handle.request is None for handle in server._goal_handles.values())
    assert spin(lambda: not server._goal_handles) and not server._result_futures and not server._futures


def test_goal_past_those_that_are_kept_is_rejected(place, monkeypatch):
    server, client, spin = place
    monkeypatch.setattr(action_server, 'GOALS_KEPT', 2)
    goals = [Goal(client, question=str(number)) for number in range(3)]
    assert spin(lambda: all(goal.done for goal in goals))
    assert [goal.rejected for goal in goals] == [False, False, True]
    assert spin(lambda: not server._goal_handles)
    again = Goal(client, question='again')
    assert spin(lambda: again.done) and not again.rejected


def test_goal_whose_client_died_before_it_heard_of_its_acceptance_is_let_go_of(place):
    """The middleware then refuses to send; which of two moments a client dies in cannot be chosen from outside."""
    server, client, spin = place
    handle, refused = server._handle, []

    class Refusing:
        def send_goal_response(self, *_):
            refused.append(True)
            raise RCLError('client will not receive response')

        def __getattr__(self, name):
            return getattr(handle, name)

        def __enter__(self):
            return handle.__enter__()

        def __exit__(self, *error):
            return handle.__exit__(*error)

    server._handle = Refusing()
    Goal(client, question='dead')
    assert spin(lambda: refused)
    server._handle = handle
    assert spin(lambda: not server._goal_handles) and not server._result_futures
