"""The client's ends of ~/watch, ~/unwatch and ~/alert, in a callback group of their own."""
import time
from collections.abc import Callable

from rclpy.callback_groups import ReentrantCallbackGroup
from rclpy.client import Client
from rclpy.clock import Clock, ClockType
from rclpy.node import Node
from rclpy.qos import DurabilityPolicy, QoSProfile
from rclpy.subscription import Subscription
from rclpy.task import Future

from statekv_ros.client.action import DEEP
from statekv_ros.client.asking import GRACE_S
from statekv_ros.client.spinning import Spinning
from statekv_ros.errors import Code
from statekv_ros.msg import Alert
from statekv_ros.srv import Unwatch, Watch

_LOOK_S = 0.05


class WatchRefused(RuntimeError):
    """The node does not watch for that, or is not there.

    Attributes:
        error_code: a constant of action/Ask.action; 0 where no node was heard of.
    """

    def __init__(self, sentence: str, error_code: int = 0):
        super().__init__(sentence)
        self.error_code = error_code


class WatchEnds:
    """Makes and ends watches, and hears their alerts. From any thread."""

    def __init__(self, node: Node, memory: str, group: ReentrantCallbackGroup, spinning: Spinning):
        self._node, self._memory, self._group, self._spinning = node, memory, group, spinning
        self._watch = node.create_client(Watch, f'{memory}/watch', qos_profile=DEEP, callback_group=group)
        self._unwatch = node.create_client(Unwatch, f'{memory}/unwatch', qos_profile=DEEP, callback_group=group)
        self._subscriptions: list[Subscription] = []

    def watch(self, request: Watch.Request, timeout_s: float) -> Future:
        """Of the response; of one that says why where none comes in time."""
        return self._send(self._watch, request, Watch.Response, timeout_s)

    def unwatch(self, id: str, timeout_s: float) -> Future:
        """The same of the end of a watch."""
        return self._send(self._unwatch, Unwatch.Request(id=id), Unwatch.Response, timeout_s)

    def response(self, future: Future, timeout_s: float):
        """Wait for it. Raises WatchRefused."""
        if not self._spinning.wait(future.done, timeout_s + GRACE_S):
            raise WatchRefused(f'the executor of node {self._node.get_name()!r} ran no callback of this request in '
                               f'{timeout_s + GRACE_S:g} s: is anybody spinning it, and are all its threads blocked?')
        response = future.result()
        if not response.success:
            raise WatchRefused(response.error, response.error_code)
        return response

    def _send(self, client: Client, request, kind: type, timeout_s: float) -> Future:
        """Now, or once a node is found; a timer notices what does not happen."""
        told, end, sent = Future(), time.monotonic() + timeout_s, []

        def finish(response) -> None:
            if not told.done():
                self._node.destroy_timer(timer)
                for future in sent:
                    client.remove_pending_request(future)
                told.set_result(response)
                self._spinning.notify()

        def look() -> None:
            if not sent and client.service_is_ready():
                sent.append(client.call_async(request))
                sent[0].add_done_callback(lambda future: finish(future.result()))
            elif time.monotonic() > end:
                finish(kind(error=f'no reply from {self._memory!r} within {timeout_s:g} s', error_code=Code.TIMEOUT) if sent else
                       kind(error=f'no memory node {self._memory!r}: is it running, in this namespace and ROS_DOMAIN_ID?'))

        timer = self._node.create_timer(_LOOK_S, look, self._group, Clock(clock_type=ClockType.STEADY_TIME))
        look()
        return told

    def on_alert(self, callback: Callable[[Alert], None], id: str) -> Callable[[], None]:
        """Call it with each alert of that watch, those from before too, or with all that come from now on where the id is empty,
        until what is returned is called."""
        qos = QoSProfile(depth=100, durability=DurabilityPolicy.TRANSIENT_LOCAL if id else DurabilityPolicy.VOLATILE)
        subscription = self._node.create_subscription(
            Alert, f'{self._memory}/alert', lambda alert: callback(alert) if id in ('', alert.id) else None, qos,
            callback_group=self._group)
        self._subscriptions.append(subscription)

        def stop() -> None:
            if subscription in self._subscriptions:
                self._subscriptions.remove(subscription)
                self._node.destroy_subscription(subscription)
        return stop

    def destroy(self) -> None:
        for client in (self._watch, self._unwatch):
            self._node.destroy_client(client)
        for subscription in self._subscriptions:
            self._node.destroy_subscription(subscription)
        self._subscriptions.clear()
