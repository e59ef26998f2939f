"""Lifecycle transitions in a thread of their own: a model may take minutes to load, and the node must answer meanwhile."""
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

from lifecycle_msgs.srv import ChangeState
from rclpy.callback_groups import ReentrantCallbackGroup
from rclpy.lifecycle import LifecycleNode
from rclpy.task import Future


class Transitions:
    """Runs a node's transitions one after the other, in the order in which they were asked for, off its executor.

    `change_state` is answered when its transition is over, with what came of it; meanwhile `get_state` tells where the node is
    (configuring, say). What is asked for while another transition is under way waits for it.
    """

    def __init__(self, node: LifecycleNode):
        self._node = node
        self._thread = ThreadPoolExecutor(1, 'statekv-transition')
        # rclpy runs transitions in its service's callback, in the group of all timers, and has no public way to change that.
        service = node._service_change_state
        self._change_state, service.callback = service.callback, self._change_later
        service.callback_group = ReentrantCallbackGroup()
        service.callback_group.add_entity(service)

    def submit(self, work: Callable[[], None]) -> None:
        """Do it after what was asked for before."""
        self._thread.submit(work)

    def close(self) -> None:
        """Begin no transition any more; one under way goes on in its thread. Does not wait."""
        self._thread.shutdown(wait=False, cancel_futures=True)

    async def _change_later(self, request: ChangeState.Request, response: ChangeState.Response) -> ChangeState.Response:
        changed = Future()

        def change() -> None:
            try:
                changed.set_result(self._change_state(request, response))
            except Exception as error:
                changed.set_exception(error)
            if self._node.executor is not None:
                self._node.executor.wake()

        try:
            self.submit(change)
        except RuntimeError:    # closed: the node is ending
            response.success = False
            return response
        return await changed
