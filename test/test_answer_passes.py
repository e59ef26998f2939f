"""What a pass of an answer costs: no tensor of scores is large, however long the question, and operations do not grow with what is
held."""
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from conftest import SECOND
from statekv_ros.backbones import load_backbone
from statekv_ros.backbones.tiny import write_tiny_checkpoint
from statekv_ros.memory import VideoStream
from statekv_ros.memory.answering import candidates, choosing, reading
from statekv_ros.memory.detailed import leaves

LONG = 'where did you last see it? ' * 30
POLICIES = ('all', 'sparse(40)', 'retrieve(4)', 'last(6)', 'state')
BOUND = 2**13


@pytest.fixture(scope='module')
def backbone(tmp_path_factory):
    path = write_tiny_checkpoint(tmp_path_factory.mktemp('passes') / 'tiny', family='internvl', max_position=10**5)
    return load_backbone(str(path), device='cpu', dtype='float32')


def stream_of(backbone, frames, count: int, **options) -> VideoStream:
    stream = VideoStream(backbone, 'statekv(30)', **options)
    for index in range(count):
        stream.step(frames[index % len(frames)], (index + 1) * SECOND)
    return stream


class Operations(TorchDispatchMode):
    """Counts, while `on`, the operations that are a kernel on a GPU, and keeps the most elements that a softmax had."""

    def __init__(self):
        super().__init__()
        self.on, self.count, self.largest = False, 0, 0

    def left_out(self, function):
        """The same, counted as one."""
        def once(*args, **kwargs):
            self.on, self.count = False, self.count + 1
            try:
                return function(*args, **kwargs)
            finally:
                self.on = True

        return once

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if self.on and not _is_view(function, args, result):
            self.count += 1
            if function.overloadpacket.__name__ in ('exp', 'exp_', '_softmax', '_log_softmax', 'softmax'):
                self.largest = max(self.largest, result.numel())
        return result


def _is_view(function, args: tuple, result) -> bool:
    """Whether it only looks at what is there, or makes room."""
    name, first = function.overloadpacket.__name__, result[0] if isinstance(result, (tuple, list)) else result
    if not isinstance(first, torch.Tensor) or name.startswith(('empty', 'new_empty')):
        return True
    if name.endswith('_'):
        return False
    own = first.untyped_storage().data_ptr()
    return any(isinstance(arg, torch.Tensor) and arg.untyped_storage().data_ptr() == own for arg in args)


def watched(monkeypatch, operations: Operations) -> None:
    """Only what the memory does itself is looked at: `Reading.attend`."""
    attend = reading.Reading.attend

    def spy(self, *arguments):
        operations.on = True
        try:
            return attend(self, *arguments)
        finally:
            operations.on = False

    monkeypatch.setattr(reading.Reading, 'attend', spy)


@pytest.mark.parametrize('form', ['bf16', 'int4'])
@pytest.mark.parametrize('policy', POLICIES)
def test_a_long_question_makes_no_large_tensor_and_is_answered_as_without_the_bound(policy, form, backbone, frames, monkeypatch):
    stream = stream_of(backbone, frames, 20, detailed_format=form)
    options = {'answer_policy': policy, 'max_tokens': 4, 'evidence': 999}
    question = len(backbone.tokenize_question(LONG))
    answers, operations = [], Operations()
    for bound in (reading.MOST_SCORES, BOUND):
        monkeypatch.setattr(reading, 'MOST_SCORES', bound)
        monkeypatch.setattr('statekv_ros.kernels.paged_attention.naive.PIECE', bound)
        answering = stream.begin_answer(LONG, **options)
        if bound == BOUND:
            watched(monkeypatch, operations)
        with operations:
            while not answering.advance(question if bound == BOUND or policy != 'sparse(40)' else answering._reading.most_tokens):
                pass
        answers.append(answering.result())
    assert operations.largest <= BOUND < question * backbone.q_heads * 40, 'it would have been larger'
    free, bounded = answers
    if policy == 'sparse(40)':      # what is read at once chooses together, so shorter slices choose otherwise
        assert len(bounded.token_ids) == 4
    else:
        assert bounded.token_ids == free.token_ids
        assert [share.first_stamp_ns for share in bounded.evidence] == [share.first_stamp_ns for share in free.evidence]
        assert [e.share for e in bounded.evidence] == pytest.approx([e.share for e in free.evidence], abs=1e-5)


def test_four_tokens_of_a_question_are_read_in_the_time_of_one_of_an_answers(backbone, frames, monkeypatch):
    passes, forward = [], type(backbone).forward
    monkeypatch.setattr(type(backbone), 'forward', lambda self, inputs, memory: passes.append(inputs.tokens) or forward(
        self, inputs, memory))
    question = len(backbone.tokenize_question('where?'))
    answering = stream_of(backbone, frames, 12).begin_answer('where?', 'sparse(40)', max_tokens=8)
    for budget in (1, 2, 5, 8):
        passes.clear()
        answering.advance(budget)
        assert sum(1 if tokens == 1 else tokens / 4 for tokens in passes) <= budget, passes
        assert len([tokens for tokens in passes if tokens > 1]) <= 1, 'what a slice reads of a question is read at once'
        if answering.token_ids:
            break
        assert passes == [4 * budget]
    assert answering.token_ids and question > 4


def test_a_pass_takes_as_many_operations_whatever_is_held(backbone, frames, monkeypatch):
    """Few pages, many of them, and so many that they are found through leaves."""
    for module, name, value in ((leaves, 'CHAPTER', 64), (leaves, 'LEAVES', 4), (candidates, 'CHAPTER', 64),
                                (candidates, 'LEAVES', 4), (choosing, 'OPEN_LEAVES', 3)):
        monkeypatch.setattr(module, name, value)
    counts = {}
    for steps in (12, 30, 150, 300):
        answering = stream_of(backbone, frames, steps, positions='native').begin_answer('where?', 'sparse(40)', max_tokens=6)
        while not answering.token_ids:
            answering.advance(1)
        operations = Operations()
        with monkeypatch.context() as patch:
            # A kernel of its own on a GPU. What stands for it here masks where pages of unlike lengths were chosen, else not.
            patch.setattr(reading, 'paged_attention', operations.left_out(reading.paged_attention))
            watched(patch, operations)
            with operations:
                answering.advance(1)    # decodes a token
        counts[steps] = operations.count / backbone.layout.layers
    assert counts[12] <= counts[30] <= counts[150] == counts[300] < 70, counts
