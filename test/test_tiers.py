"""Steps that leave the device for a tier below it are read as if they had stayed, a few at a time where little is staged."""
import pytest
import torch

from statekv_ros.memory.detailed.cache import EXACT_STEPS
from statekv_ros.memory.detailed.tiers import HostTier
from test_packed_memory import FAMILIES, PAGE, QUESTION, backbones, held, logits_of, stamp, stream_of  # noqa: F401

FORMATS = ['bf16', 'int8', 'int4']
STEPS = {'bf16': 60, 'int8': 120, 'int4': 160}     # frames
POLICIES = ('all', 'sparse(45)', 'sparse(10)', 'last(12)', 'retrieve(3)')


class Below:
    """A tier that has what it is given, until it is told otherwise; what `Disk` and the store are in a node."""
    as_computed = False

    def __init__(self):
        self.steps: dict[int, dict[str, torch.Tensor]] = {}
        self.broken: set[int] = set()
        self._gone: list[int] = []
        self.reads = 0

    def holds(self, step):
        return step in self.steps

    def read(self, step, part, dtype, shape, index=()):
        self.reads += 1
        if step in self.broken:
            raise LookupError(step)
        whole = self.steps[step][part]
        assert whole.dtype == dtype and whole.shape == shape
        return whole[index].clone()

    def gone(self):
        gone, self._gone = self._gone, []
        return gone

    def forget(self, *steps):
        for step in steps:
            del self.steps[step]
            self._gone.append(step)

    def clear(self):
        self.steps.clear()


def small(backbone, frames, form, positions='', below=(), host_bytes=2**40):
    """A stream that has room on the device for its exact steps and about as many bytes again."""
    step = max(record.tokens for record in stream_of(backbone, frames, 4, form).detailed.records())
    return stream_of(backbone, frames, STEPS[form], form, positions=positions, host_bytes=host_bytes, below=below,
                     max_detailed_bytes=(EXACT_STEPS + 2) * 4 * step * backbone.layout.bytes_per_token * 4 // 6)


@pytest.mark.parametrize('positions, form, family', [
    *(('lazy_shift', form, family) for form in FORMATS for family in FAMILIES), ('native', 'int4', 'qwen3_vl'),
    ('contiguous', 'int4', 'eagle2_5'), ('contiguous', 'bf16', 'internvl')])
def test_an_answer_is_the_same_wherever_the_steps_are(positions, form, family, backbones, frames, monkeypatch):  # noqa: F811
    backbone = backbones[family]
    stream = small(backbone, frames, form, positions)
    whole = stream_of(backbone, frames, STEPS[form], form, positions=positions)
    assert len(stream.detailed.far.steps) > 10
    assert stream.detailed_tokens == whole.detailed_tokens and not stream.forgotten_frames
    for policy in POLICIES:
        ours, right = (s.begin_answer(QUESTION, policy, max_tokens=4, evidence=99) for s in (stream, whole))
        difference = (logits_of(ours, monkeypatch) - logits_of(right, monkeypatch)).abs().max()
        assert difference < 1e-4, (policy, difference)
        assert ours.token_ids == right.token_ids
        shares = [{e.first_stamp_ns: e.share for e in answering.result().evidence} for answering in (ours, right)]
        assert shares[0] == pytest.approx(shares[1], abs=1e-4)
        assert ours.result().frames_covered == right.result().frames_covered
    assert stream.detailed.far.bytes
