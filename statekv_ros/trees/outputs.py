"""What a behaviour leaves on the blackboard."""
from builtin_interfaces.msg import Time
from py_trees.behaviour import Behaviour
from py_trees.common import Access

from statekv_ros.msg import Alert, Answer

OUTPUTS = ('text', 'stamp', 'pose', 'error_code')


class Outputs:
    """Keys `<prefix>/text`, `/stamp`, `/pose` and `/error_code`, as the C++ node's output ports.

    The stamp (builtin_interfaces/Time) and the pose (geometry_msgs/PoseStamped, None where it is not known) are those of the step
    that the answer looked at most.
    """

    def __init__(self, behaviour: Behaviour, prefix: str):
        self._prefix = prefix
        self._board = behaviour.attach_blackboard_client(name=behaviour.name)
        for output in OUTPUTS:
            self._board.register_key(f'{prefix}/{output}', access=Access.WRITE)

    def write(self, answer: Answer | Alert, error_code: int) -> None:
        """What came; an answer without text leaves that empty."""
        stamp = answer.evidence[0].last_stamp if answer.evidence else answer.last_stamp
        self._set(answer.text, stamp, answer.pose if answer.has_pose else None, error_code)

    def fail(self, error_code: int) -> None:
        """Nothing came."""
        self._set('', Time(), None, error_code)

    def _set(self, *values) -> None:
        for output, value in zip(OUTPUTS, values):
            self._board.set(f'{self._prefix}/{output}', value)
