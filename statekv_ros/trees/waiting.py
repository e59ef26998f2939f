"""A standing question as a behaviour."""
from collections.abc import Callable

from py_trees.behaviour import Behaviour
from py_trees.common import Status
from rclpy.task import Future

from statekv_ros.client import StateKVClient
from statekv_ros.msg import Alert
from statekv_ros.trees.outputs import Outputs


class WaitFor(Behaviour):
    """Has the node watch for something when it is entered; running until the alert comes, which is SUCCESS.

    FAILURE: the node does not watch for that, or is not there; the feedback message says why. The watch ends with the behaviour's
    running, however that ends; a watch of the same fields that somebody else asked for is the same one, and ends too.
    """

    def __init__(self, name: str, memory: StateKVClient, question: str, condition: str = 'equals yes', key: str = 'alert',
                 **options):
        """
        Args:
            key: of the outputs on the blackboard; see `Outputs`.
            options: further ones of `StateKVClient.watch_async` (camera, debounce, every_s, ...).
        """
        super().__init__(name)
        self._memory, self._question, self._condition, self._options = memory, question, condition, options
        self._outputs = Outputs(self, key)
        self._response: Future | None = None
        self._alert: Alert | None = None
        self._stop: Callable[[], None] | None = None     # hearing alerts

    def initialise(self) -> None:
        self._alert = None
        self._response = self._memory.watch_async(self._question, condition=self._condition, **self._options)

    def update(self) -> Status:
        if not self._response.done():
            return Status.RUNNING
        response = self._response.result()
        if not response.success:
            self._outputs.fail(response.error_code)
            self.feedback_message = response.error
            return Status.FAILURE
        if self._stop is None:      # an alert that came before is heard, too
            self._stop = self._memory.on_alert(self._note, response.id)
        if self._alert is None:
            return Status.RUNNING
        self._outputs.write(self._alert, 0)
        self.feedback_message = f'{self._alert.text_before} -> {self._alert.text}'
        return Status.SUCCESS

    def terminate(self, new_status: Status) -> None:
        """The watch ends, also one whose id is still to come."""
        if self._stop is not None:
            self._stop()
            self._stop = None
        response, self._response = self._response, None
        if response is not None:
            response.add_done_callback(lambda future: self._memory.unwatch_async(future.result().id)
                                       if future.result().success else None)

    def _note(self, alert: Alert) -> None:
        self._alert = self._alert or alert
