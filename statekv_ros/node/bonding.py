"""A bond with Nav2's lifecycle manager: it hears at once when this process has died, and takes the robot's nodes down in order."""
from rclpy.lifecycle import LifecycleNode

try:
    from bondpy.bondpy import Bond
except ImportError:     # the package bondpy is not there; nor is Nav2, most often
    Bond = None

# As Nav2's own nodes have them: the manager knows a bond by topic and node name.
_TOPIC = 'bond'
_HEARTBEAT_TIMEOUT_S = 4.0


class LifecycleBond:
    """Held while the node is active; nothing where the package bondpy is not installed or no period is given."""

    def __init__(self, node: LifecycleNode, period_s: float):
        """period_s: between two heartbeats, in seconds; 0: no bond."""
        self._node, self._period_s = node, period_s
        self._bond = None

    def hold(self) -> None:
        """Begin to send heartbeats; also while nobody listens yet, since the manager begins after the transition."""
        if Bond is None or not self._period_s or self._bond is not None:
            return
        self._bond = Bond(Owner(self._node), _TOPIC, self._node.get_name())
        self._bond.set_heartbeat_period(self._period_s)
        self._bond.set_heartbeat_timeout(_HEARTBEAT_TIMEOUT_S)
        self._bond.start()

    def let_go(self) -> None:
        """Say that this was on purpose, and send no more."""
        bond, self._bond = self._bond, None
        if bond is not None:
            bond.shutdown()


class Owner:
    """The node as bondpy sees it. bondpy destroys its publisher and subscription without the node's knowledge, and an executor
    that waits for what was destroyed fails for good; here the node does it."""

    def __init__(self, node: LifecycleNode):
        self._node = node

    def __getattr__(self, name: str):
        return getattr(self._node, name)

    def create_publisher(self, *arguments):
        return _Entity(self._node.create_publisher(*arguments), self._node.destroy_publisher)

    def create_subscription(self, *arguments):
        return _Entity(self._node.create_subscription(*arguments), self._node.destroy_subscription)


class _Entity:
    def __init__(self, entity, destroy):
        self._entity, self._destroy = entity, destroy

    def __getattr__(self, name: str):
        return getattr(self._entity, name)

    def destroy(self) -> None:
        self._destroy(self._entity)
