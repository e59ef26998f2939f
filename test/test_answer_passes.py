"""What a pass of an answer costs: no tensor of scores is large, however long the question, and operations do not grow with what is
held."""
import importlib
import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from conftest import SECOND
from statekv_ros.backbones import load_backbone
from statekv_ros.backbones.tiny import write_tiny_checkpoint
from statekv_ros.kernels import page_votes, paged_attention
from statekv_ros.memory import VideoStream
from statekv_ros.memory.answering import candidates, reading
from statekv_ros.memory.detailed import leaves, table

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


class Launches(Operations):
    """Counts kernels of Triton, which interprets them here, as well."""

    def __init__(self, patch: pytest.MonkeyPatch):
        super().__init__()
        for package, kernels in ((paged_attention, ('forward_kernel', 'combine_kernel', 'mass_kernel')),
                                 (page_votes, ('score_kernel', 'open_kernel', 'votes_kernel', 'places_kernel'))):
            triton = importlib.import_module(f'{package.__name__}.triton')
            patch.setattr(package, 'run', lambda operation, implementation, device, kernel, *others: kernel())
            for name in kernels:
                patch.setattr(triton, name, self._counted(getattr(triton, name)))

    def _counted(self, kernel):
        operations = self

        class Counted:
            def __getitem__(self, grid):
                return operations.left_out(kernel[grid]) if operations.on else kernel[grid]

        return Counted()


def launched(family: str, dtype: str, form: str, steps: tuple[int, ...]) -> list[tuple[float, bool, int]]:
    """Of one more token after so many steps each: operations and launches of a layer, whether token and evidence are those of
    the naive twins, and pages held. Pages are found through leaves where there are more than a few, most of them in 4 bits."""
    with pytest.MonkeyPatch.context() as patch, tempfile.TemporaryDirectory() as folder:
        for module, name, value in ((leaves, 'CHAPTER', 64), (leaves, 'LEAF', 16), (leaves, 'LEAVES', 4), (leaves, 'STRAYS', 4),
                                    (leaves, 'VOLUME', 1), (candidates, 'CHAPTER', 64), (candidates, 'LEAF', 16),
                                    (candidates, 'LEAVES', 4), (candidates, 'STRAYS', 4), (candidates, 'VOLUME', 1),
                                    (table, 'CHAPTER', 64), (table, 'LEAF', 16), (candidates, 'OPEN_LEAVES', 3),
                                    (candidates, '_OPEN_PAGES', 4)):
            patch.setattr(module, name, value)
        checkpoint = write_tiny_checkpoint(Path(folder, 'tiny'), family=family, max_position=10**5)
        backbone = load_backbone(str(checkpoint), device='cpu', dtype=dtype)
        stream, found = VideoStream(backbone, 'statekv(30)', positions='native', detailed_format=form, page_tokens=3), []
        frames = np.random.default_rng(0).integers(0, 255, (8, 64, 64, 3), dtype=np.uint8)
        for count in steps:
            while stream.steps < count:
                stream.step(frames[stream.frames % 8], (stream.frames + 1) * SECOND)
            answers = [stream.begin_answer('where?', 'sparse(12)', max_tokens=6, evidence=99) for _ in range(2)]
            for each in answers:
                while not each.token_ids:
                    each.advance(1)
            answers[0].advance(2)
            with pytest.MonkeyPatch.context() as inner:
                operations = Launches(inner)
                answers[1].advance(1)   # decodes a token, and lays out what all further ones go through
                watched(inner, operations)
                operations.count = 0
                with operations:
                    answers[1].advance(1)
            assert (stream.detailed.pages.leaves.codes.stop > 64) == (count > 40)
            right, ours = ({each.first_stamp_ns: each.share for each in answer.newest_evidence(99)} for answer in answers)
            same = answers[0].token_ids == answers[1].token_ids and ours == pytest.approx(right, abs=1e-3)
            found.append((operations.count / backbone.layout.layers, same, stream.detailed.pages.stop))
        return found


@pytest.mark.timeout(300)
@pytest.mark.parametrize('dtype, form, steps', [('float32', 'bf16', (6, 45, 60)), ('bfloat16', 'int4', (6, 45))])
def test_a_token_takes_at_most_25_launches_in_a_layer_however_much_is_held(dtype, form, steps, interpreter):
    """As on a GPU: kernels of Triton and whatever else of torch is one there, but for views and empty tensors."""
    found = interpreter(launched, 'internvl', dtype, form, steps)
    (few, _, _), *through_leaves = found
    for launches, _, held in through_leaves:
        assert few < launches == through_leaves[0][0] <= 25 and held > 3 * 64, found
    assert dtype != 'float32' or all(same for _, same, _ in found), found
