"""The node under trial: begun, watched, asked, begun again when it died, and looked at when all is over."""
import os
import re
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from lifecycle_msgs.msg import Transition
from lifecycle_msgs.srv import ChangeState, GetState

from campaign.record import Record
from campaign.resources import Usage, usage
from live import Graph, NodeProcess, new_domain
from statekv_ros.node.action_server import RESULTS_KEPT_S
from statekv_ros.srv import Query

REPLY_S = 60.0          # longer than any time limit that a question has here: what is not there by then is lost
_START_S = 180.0        # until a node that imports and loads beside everything else on a busy machine is active
_RESEND_S = 1.0
_SETTLE_S = RESULTS_KEPT_S + 5.0    # and Fast DDS forgets a killed peer after 20 s
# A small bound on the memory that a warm-up reaches, so that growth after it is a leak.
PARAMETERS = {'model': 'patrol', 'reliability': 'reliable', 'rate_hz': '1000.0', 'budget': 144,
              'device_cache_mb': 1, 'max_tokens': 12, 'answer_timeout_s': '20.0', 'diagnostics_period_s': '0.05'}


def transition_request(transition: int) -> ChangeState.Request:
    """A request for a lifecycle transition (lifecycle_msgs/Transition id)."""
    request = ChangeState.Request()
    request.transition.id = transition
    return request


class Broken(Exception):
    """The node did not do what it promises; the first argument is the kind of failure, the second what happened."""


def send_until(wait: Callable, send: Callable[[], None], done: Callable[[], bool], what: str) -> int:
    """Send an image, and another one each second until `done()`; returns how many were sent.

    One that is sent before both sides know each other is lost for good, and so is one for a subscription that is gone, which
    its publisher still counts.

    Args:
        wait: as `Subject.wait` or `Graph.wait`.
        send: publishes an image with a new stamp.
    """
    sent, due = 0, 0.0

    def sent_and_done() -> bool:
        nonlocal sent, due
        if (now := time.monotonic()) >= due:
            send()
            sent, due = sent + 1, now + _RESEND_S
        return done()

    wait(sent_and_done, what)
    return sent


class Subject:
    """A node process and a graph beside it.

    Attributes:
        begun_again: how often the node had to be started anew.
        change_client: of its change_state service.
    """

    def __init__(self, record: Record, **parameters):
        os.environ['PYTHONFAULTHANDLER'] = '1'      # SIGABRT then writes where every thread of a hung node stands
        self.record, self.begun_again = record, 0
        self._parameters = PARAMETERS | parameters
        try:
            self._begin()
        except BaseException:
            self.__exit__(None)     # there is no `with` yet that would
            raise

    def __enter__(self) -> 'Subject':
        return self

    def __exit__(self, kind, *_) -> None:
        self.graph.close()
        self.node.stop()

    @property
    def engine(self) -> tuple[int, str, dict[str, str]]:
        """Level, message and values of the engine's status on the newest /diagnostics."""
        return self.graph.health.get('engine', (0, '', {}))

    @contextmanager
    def judged(self, number: int | tuple[int, int], given: str | Callable[[], str]) -> Iterator[None]:
        """Around the work of a trial: a broken promise is written down, and a dead or hung node is started anew.

        given: the trial's input in words, or a function that tells it when something broke.
        """
        try:
            yield
        except (Broken, AssertionError) as broken:      # what `live` waits for in vain is an AssertionError
            kind, detail = broken.args if isinstance(broken, Broken) else ('lost', str(broken))
            if kind == 'hang':
                self.node.stop(signal.SIGABRT)
            if not self.node.alive:
                detail = f'{detail}\n{self.node.log[-3600:]}'
            self.record.fail(kind, number, given if isinstance(given, str) else given(), detail)
            if not self.node.alive:
                self._restart()

    def wait(self, until, what: str, seconds: float = REPLY_S):
        """Spin until `until()`; Broken when the node dies or time runs out meanwhile."""
        end = time.monotonic() + seconds
        while not (value := until()):
            if not self.node.alive:
                raise Broken('death', f'the node ended with exit code {self.node.process.returncode}, waiting for {what}')
            if time.monotonic() > end:
                raise Broken(*self._silence(what, seconds))
            self.graph.executor.spin_once(0.02)
        return value

    def call(self, client, request):
        """A service's response; Broken when none comes."""
        self.wait(client.service_is_ready, f'service {client.srv_name}')
        future = client.call_async(request)
        self.wait(future.done, f'a response of {client.srv_name}')
        return future.result()

    def ask(self, question: str = 'what is in view?', **fields) -> Query.Response:
        """The response to a question; Broken when none comes."""
        return self.call(self.graph.query, Query.Request(question=question, **fields))

    def change(self, transition: int) -> bool:
        """Ask for a lifecycle transition."""
        return self.call(self.change_client, transition_request(transition)).success

    def state(self) -> str:
        """The lifecycle state's name, from the node's own service."""
        return self.call(self._get_state, GetState.Request()).current_state.label

    def activate(self) -> None:
        """To active, from wherever it is."""
        if self.state() == 'unconfigured':
            self.change(Transition.TRANSITION_CONFIGURE)
            self.wait_for_engine('inactive')
        if self.state() != 'active':
            self.change(Transition.TRANSITION_ACTIVATE)
        self.wait_for_engine('active')

    def count(self, camera: str, counter: str) -> int:
        """A camera's counter on the newest /diagnostics; 0 before the first."""
        return int(self.graph.health.get(camera, (0, '', {}))[2].get(counter, 0))

    def wait_for_engine(self, state: str, seconds: float = REPLY_S) -> None:
        """Until /diagnostics shows this lifecycle state and no loading model."""
        self.wait(lambda: self.engine[2].get('state') == state and 'loading' not in str(self.engine), f'state {state}', seconds)

    def usage(self, then: Usage | None = None) -> Usage:
        """What the node holds; with `then`, once it has settled to that or has had time to."""
        end = time.monotonic() + _SETTLE_S
        while True:
            now = usage(self.node.process.pid)
            if then is None or time.monotonic() > end or (
                    now.threads <= then.threads and now.fds <= then.fds and now.rss_mb <= then.rss_mb + self.record.slack_mb):
                return now
            self.graph.spin(0.25)

    def conclude(self) -> None:
        """After all trials: resources, a clean end, and a log without tracebacks."""
        if not self.begun_again and self.node.alive:
            self.record.after = self.usage(self.record.before)
            self.record.judge_resources()
        code, seconds = self.node.stop()
        if code != 0:
            self.record.fail_whole('unclean end', f'SIGINT, exit code {code} after {seconds:.1f} s\n{self.node.log[-800:]}')
        tracebacks = re.findall(r'^Traceback .*?^(\S.*?)$', self.node.log, re.MULTILINE | re.DOTALL)
        if tracebacks:
            self.record.fail_whole('traceback in the log', f'{len(tracebacks)}, the last: {tracebacks[-1]}')

    def _begin(self) -> None:
        domain = new_domain()       # a lock that a killed process left in shared memory spoils the domain for those after it
        # Not a fork: of the libraries' files it would take into memory bit by bit what it uses, which looks like a leak.
        self.node = NodeProcess(self.record.folder, domain, warm=False, **self._parameters)
        self.graph = Graph(domain)
        self.change_client = self.graph.node.create_client(ChangeState, '/statekv/change_state')
        self._get_state = self.graph.node.create_client(GetState, '/statekv/get_state')
        if self._parameters.get('autostart') != 'false':
            self.wait_for_engine('active', _START_S)

    def _restart(self) -> None:
        self.begun_again += 1
        self.graph.close()
        self._begin()

    def _silence(self, what: str, seconds: float) -> tuple[str, str]:
        """Whether all of the node is silent, or only what was waited for."""
        count, end = self.graph.health_count, time.monotonic() + 10.0
        while self.graph.health_count == count and time.monotonic() < end and self.node.alive:
            self.graph.executor.spin_once(0.02)
        if self.graph.health_count == count:
            return 'hang', f'no {what} in {seconds:g} s, and no /diagnostics'
        return 'lost', f'no {what} in {seconds:g} s; the node lives: {self.engine}'
