"""A question as a behaviour."""
from py_trees.behaviour import Behaviour
from py_trees.common import Status

from statekv_ros.client import Asking, Reply, Result, StateKVClient
from statekv_ros.conditions import parse_condition
from statekv_ros.trees.outputs import Outputs


class Ask(Behaviour):
    """Asks when it is entered; running until the reply is there, with the answer so far as its feedback message.

    SUCCESS: answered. FAILURE: not, or not in full; the feedback message says why and `<key>/error_code` has the code. Whoever
    interrupts it cancels the question.
    """

    def __init__(self, name: str, memory: StateKVClient, question: str, key: str = 'answer', **options):
        """
        Args:
            key: of the outputs on the blackboard; see `Outputs`.
            options: further ones of `StateKVClient.ask_async` (camera, timeout_s, ...).
        """
        super().__init__(name)
        self._memory, self._question, self._options = memory, question, options
        self._outputs = Outputs(self, key)
        self._asking: Asking | None = None

    def initialise(self) -> None:
        self._asking = self._memory.ask_async(self._question, **self._options)

    def update(self) -> Status:
        if not self._asking.done():
            self.feedback_message = self._asking.feedback.text
            return Status.RUNNING
        reply = self._asking.result()
        self._outputs.write(reply.answer, reply.error_code)
        self.feedback_message = reply.answer.text if reply.result is Result.SUCCEEDED else reply.error
        return Status.SUCCESS if self.is_met(reply) else Status.FAILURE

    def terminate(self, new_status: Status) -> None:
        if new_status is Status.INVALID and self._asking is not None and not self._asking.done():
            self._asking.cancel()

    def is_met(self, reply: Reply) -> bool:
        """Whether this reply is a success."""
        return reply.result is Result.SUCCEEDED


class IsTrue(Ask):
    """As `Ask`; SUCCESS only if the answer meets a condition."""

    def __init__(self, name: str, memory: StateKVClient, question: str, condition: str = 'equals yes', key: str = 'answer',
                 **options):
        """condition: 'equals TEXT', 'matches REGEX', 'rises above NUMBER' or 'falls below NUMBER'.

        Raises:
            QuestionError: it cannot be read; ValueError: it is about two answers.
        """
        super().__init__(name, memory, question, key, **options)
        self._condition = parse_condition(condition)
        if self._condition.of_change:
            raise ValueError('condition "changes" is about two answers: use WaitFor')

    def is_met(self, reply: Reply) -> bool:
        return super().is_met(reply) and self._condition.holds('', reply.answer.text)
