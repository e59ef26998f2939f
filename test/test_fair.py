"""Policies that are compared are treated alike: none is replayed while others are not, none copies its grouped heads."""
import json

import pytest
import torch

from statekv_ros.backbones import load_backbone
from statekv_ros.backbones.tiny import write_tiny_checkpoint
from statekv_ros.bench import cli
from statekv_ros.evaluation.plan import parse_policies
from statekv_ros.evaluation.run import make_memory
from statekv_ros.memory import stream
from statekv_ros.memory.carried import causal


class OnGpu(torch.Tensor):
    """A tensor on the CPU that says it is on a GPU."""
    is_cuda = True


@pytest.fixture
def graphs_of(monkeypatch) -> dict[str, set]:
    """{kind of prefill policy: what its streams were told about CUDA graphs}."""
    told: dict[str, set] = {}
    monkeypatch.setattr(stream, 'make_graphs', lambda graphs, backbone, kind: told.setdefault(kind, set()).add(graphs))
    return told


def test_the_step_benchmark_replays_no_policy_or_all_and_says_so(graphs_of, capsys):
    command = ['step', '--policy', 'statekv,window,full', '--frames', '200', '--runs', '1', '--size', '32x32']
    assert cli.main([*command, '--json']) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])['replayed'] is False
    assert graphs_of == {'statekv': {'off'}, 'window': {'off'}, 'full': {'off'}}


def test_the_evaluation_replays_no_policy(graphs_of, tmp_path):
    backbone = load_backbone(str(write_tiny_checkpoint(tmp_path / 'tiny')))
    for policy in parse_policies(['statekv(64) x all', 'window(2) x all', 'full x all', 'none x last(4)']):
        make_memory(backbone, policy)
    assert graphs_of == {'statekv': {'off'}, 'window': {'off'}, 'full': {'off'}, 'none': {'off'}}


def test_attention_without_importance_reads_grouped_heads_where_they_lie(monkeypatch):
    torch.manual_seed(0)
    query, key, value = torch.randn(1, 6, 3, 32), torch.randn(1, 2, 8, 32), torch.randn(1, 2, 8, 32)
    right = causal.causal_attention(query, key, value, 0.2)
    attend, heads = causal.scaled_dot_product_attention, []

    def spy(query, key, value, **options):
        heads.append(key.shape[1])
        return attend(query.as_subclass(torch.Tensor), key, value, **options)

    monkeypatch.setattr(causal, 'scaled_dot_product_attention', spy)
    output = causal.causal_attention(query.as_subclass(OnGpu), key, value, 0.2)
    assert heads == [2]
    torch.testing.assert_close(output, right, rtol=1e-5, atol=1e-6)
