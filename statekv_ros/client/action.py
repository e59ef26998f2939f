"""The client's ends of ~/ask, in a callback group of their own.

Plain service clients and a subscription, which is what an action is made of. rclpy's `ActionClient` (Kilted) replaces the future
of a goal after it was sent: a response that another thread has taken by then is lost, and the first future is kept for good.
"""
from collections.abc import Callable

from rclpy.callback_groups import ReentrantCallbackGroup
from rclpy.node import Node
from rclpy.qos import QoSProfile
from rclpy.task import Future

from statekv_ros.action import Ask

# ROS's default keeps ten replies; more may come at once.
DEEP = QoSProfile(depth=1000)
_FEEDBACK = QoSProfile(depth=100)


class AskEnds:
    """Sends goals and hears of them. From any thread."""

    def __init__(self, node: Node, memory: str, group: ReentrantCallbackGroup,
                 on_feedback: Callable[[bytes, Ask.Feedback], None]):
        """on_feedback: takes what came for any goal, those of other clients too, by the goal's id."""
        self._node = node
        parts = Ask.Impl
        self._send, self._result, self._cancel = (
            node.create_client(kind, f'{memory}/ask/_action/{name}', qos_profile=DEEP, callback_group=group)
            for kind, name in ((parts.SendGoalService, 'send_goal'), (parts.GetResultService, 'get_result'),
                               (parts.CancelGoalService, 'cancel_goal')))
        self._feedback = node.create_subscription(
            parts.FeedbackMessage, f'{memory}/ask/_action/feedback',
            lambda message: on_feedback(bytes(message.goal_id.uuid), message.feedback), _FEEDBACK, callback_group=group)

    def is_ready(self) -> bool:
        """Whether a server is there."""
        return all(client.service_is_ready() for client in (self._send, self._result, self._cancel))

    def send(self, key: bytes, goal: Ask.Goal) -> Future:
        """Of the response: whether it is accepted. `key`: the goal's id, 16 random bytes."""
        request = Ask.Impl.SendGoalService.Request(goal=goal)
        request.goal_id.uuid = list(key)
        return self._send.call_async(request)

    def result(self, key: bytes) -> Future:
        """Of the result's response."""
        request = Ask.Impl.GetResultService.Request()
        request.goal_id.uuid = list(key)
        return self._result.call_async(request)

    def cancel(self, key: bytes) -> Future:
        """Ask for a goal's end; the result tells of it."""
        request = Ask.Impl.CancelGoalService.Request()
        request.goal_info.goal_id.uuid = list(key)
        return self._cancel.call_async(request)

    def forget(self, future: Future) -> None:
        """Expect no response any more."""
        for client in (self._send, self._result, self._cancel):
            client.remove_pending_request(future)

    def destroy(self) -> None:
        for client in (self._send, self._result, self._cancel):
            self._node.destroy_client(client)
        self._node.destroy_subscription(self._feedback)
