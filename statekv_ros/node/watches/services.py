"""~/watch, ~/unwatch, ~/watches and ~/alert. No callback computes or waits."""
import threading
from collections.abc import Callable

from rclpy.callback_groups import CallbackGroup
from rclpy.lifecycle import LifecycleNode
from rclpy.qos import DurabilityPolicy, QoSProfile
from rclpy.task import Future

from statekv_ros.errors import Code, QuestionError, StateKVError
from statekv_ros.msg import Alert as AlertMessage
from statekv_ros.msg import Watches
from statekv_ros.node import messages
from statekv_ros.node.engine import Engine
from statekv_ros.node.parameters import Parameters
from statekv_ros.node.pictures import Darkroom
from statekv_ros.node.pictures.evidence import evidence_pictures
from statekv_ros.node.services import DEEP
from statekv_ros.node.watches.kept import KeptWatches
from statekv_ros.node.watches.watch import Alert, define
from statekv_ros.srv import Unwatch, Watch

_LATCHED = QoSProfile(depth=1, durability=DurabilityPolicy.TRANSIENT_LOCAL)
# For who waits for one watch: its alert may come before the subscription is found.
_ALERTS = QoSProfile(depth=20, durability=DurabilityPolicy.TRANSIENT_LOCAL)


class WatchServices:
    """Serves all four.

    Attributes:
        kept: what takes the watches over a restart; None where nothing does.
    """

    def __init__(self, node: LifecycleNode, group: CallbackGroup, settings: Parameters, engine: Callable[[], Engine],
                 wake: Callable[[], None], darkroom: Darkroom):
        """
        Args:
            group: a reentrant one.
            engine: raises QuestionError while there is none.
            wake: has the executor look at what a future of ours was given by another thread.
            darkroom: where pictures are looked up.
        """
        self._node, self._settings, self._engine, self._wake, self._darkroom = node, settings, engine, wake, darkroom
        self.kept: KeptWatches | None = None
        self._lock = threading.Lock()       # a list must not overtake a newer one
        self._listed: tuple[object, int] = None, 0      # table and version
        self._alerts = node.create_lifecycle_publisher(AlertMessage, '~/alert', _ALERTS)
        self._list = node.create_publisher(Watches, '~/watches', _LATCHED)
        node.create_service(Watch, '~/watch', self._watch, qos_profile=DEEP, callback_group=group)
        node.create_service(Unwatch, '~/unwatch', self._unwatch, qos_profile=DEEP, callback_group=group)

    def tell(self, alert: Alert, frame_id: str) -> None:
        """Publish an alert, with a picture of what its answer looked at most. From the engine's thread."""
        now = self._node.get_clock().now().to_msg()
        self._node.get_logger().info(f'alert of watch {alert.id}: {alert.definition.condition!r} of '
                                     f'{alert.definition.question[:80]!r}: {alert.before[:80]!r} -> {alert.result.text[:80]!r}')

        def publish() -> None:
            try:
                pictures = evidence_pictures(self._engine().cameras, [(alert.definition.camera, alert.result.evidence[:1])])
            except StateKVError:    # the node is being cleaned up; an alert is worth something without it, too
                pictures = {}
            self._alerts.publish(messages.alert(alert, now, frame_id, pictures))

        if not self._darkroom.show(publish):
            self._alerts.publish(messages.alert(alert, now, frame_id))

    def publish(self) -> None:
        """The list, if it is another one than it was. From any thread."""
        with self._lock:
            try:
                table = self._engine().checks.table
            except QuestionError:       # no model and no watches: as before it was configured
                listed, watches = (None, 0), []
            else:
                for watch in table.expire():
                    self._node.get_logger().info(f'watch {watch.id} has ended: its time is over')
                listed, watches = (table, table.version), table.all()
            if listed != self._listed:
                message = Watches(watches=[messages.watch_state(watch) for watch in watches])
                message.header.stamp = self._node.get_clock().now().to_msg()
                self._list.publish(message)
                self._listed = listed

    async def _watch(self, request: Watch.Request, response: Watch.Response) -> Watch.Response:
        try:
            engine, limit = self._engine(), self._settings['max_question_chars']
            if len(request.question) > limit:
                raise QuestionError(f'question has {len(request.question)} characters, {limit} are allowed: shorten it, or '
                                    'raise the parameter "max_question_chars"')
            definition = define(
                list(engine.cameras), self._settings['watch_answer_policy'], self._settings['max_tokens'],
                question=request.question, camera=request.camera, condition=request.condition,
                every_steps=request.every_steps, every_s=request.every_s, debounce=request.debounce,
                expires_s=request.expires_s, max_tokens=request.max_tokens, answer_policy=request.answer_policy)
            response.id = engine.checks.table.add(definition).id
        except StateKVError as error:
            response.error, response.error_code = str(error), error.code
            return response
        await self._saved(engine)
        response.success = True
        return response

    async def _unwatch(self, request: Unwatch.Request, response: Unwatch.Response) -> Unwatch.Response:
        try:
            engine = self._engine()
            response.ended = engine.checks.table.remove(request.id)
        except StateKVError as error:
            response.error, response.error_code = str(error), error.code
            return response
        await self._saved(engine)
        response.success, response.error_code = True, Code.NONE
        return response

    async def _saved(self, engine: Engine) -> None:
        """Until a restart would know of it: who got the reply can rely on it."""
        self.publish()
        if (kept := self.kept) is None:
            return
        saved = Future()

        def done() -> None:
            saved.set_result(None)
            self._wake()

        kept.save(engine.checks.table, done)
        await saved
