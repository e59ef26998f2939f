"""rclpy's action server with what it keeps bounded, whatever clients do."""
from collections.abc import Awaitable, Callable

from action_msgs.msg import GoalStatus
from rclpy.action import ActionServer, CancelResponse, GoalResponse
from rclpy.action.server import ServerGoalHandle
from rclpy.callback_groups import CallbackGroup
from rclpy.clock import Clock, ClockType
from rclpy.node import Node
from rclpy.qos import QoSProfile

# For a client to fetch: where discovery is slow, its request was seen to take 20 s. Longer, and a client that asks often would
# have used up all places with goals that are done: 40 a second may be.
RESULTS_KEPT_S = 25
GOALS_KEPT = 1000       # under way, or with a result that is kept


class BoundedActionServer(ActionServer):
    """What differs from rclpy's:

    * The time for which a result is kept is that of the machine. On a simulated clock that stands still, rclpy keeps all.
    * Past `GOALS_KEPT` a goal is rejected. A status message has an entry for each that is kept.
    * A goal whose acceptance could not be sent, because its client died meanwhile, is aborted. rclpy keeps it for good.
    * With a result the goal's request, which may be large, is not kept.
    """

    def __init__(self, node: Node, action_type, name: str, execute: Callable[[ServerGoalHandle], Awaitable],
                 group: CallbackGroup, cancel: Callable[[ServerGoalHandle], CancelResponse], qos: QoSProfile):
        """
        Args:
            execute: takes the goal to a terminal state, returns its result and does not raise.
            cancel: does not raise.
            qos: of the three services; as many replies may wait at once.
        """
        super().__init__(_OnSystemTime(node), action_type, name, execute, callback_group=group, goal_callback=self._has_room,
                         cancel_callback=cancel, goal_service_qos_profile=qos, result_service_qos_profile=qos,
                         cancel_service_qos_profile=qos, feedback_pub_qos_profile=QoSProfile(depth=100),
                         result_timeout=RESULTS_KEPT_S)

    def _has_room(self, goal) -> GoalResponse:
        return GoalResponse.ACCEPT if len(self._goal_handles) < GOALS_KEPT else GoalResponse.REJECT

    async def _execute_goal_request(self, taken) -> None:
        await super()._execute_goal_request(taken)
        handle = self._goal_handles.get(bytes(taken[1].goal_id.uuid))
        if handle is not None and handle.status == GoalStatus.STATUS_ACCEPTED:
            handle.execute(self._abort_unheard)

    async def _abort_unheard(self, handle: ServerGoalHandle):
        handle.abort()
        return self.action_type.Result()

    async def _execute_goal(self, execute, handle: ServerGoalHandle) -> None:
        await super()._execute_goal(execute, handle)
        handle._goal_request = None


class _OnSystemTime:
    """A node whose clock is the machine's; else the node itself."""

    def __init__(self, node: Node):
        self._node, self._clock = node, Clock(clock_type=ClockType.SYSTEM_TIME)

    def get_clock(self) -> Clock:
        return self._clock

    def __getattr__(self, name: str):
        return getattr(self._node, name)
