"""The promise of a flat cost per frame, measured by the command that users run."""
import json
import subprocess
import sys

import pytest


@pytest.mark.timeout(300)
def test_statekv_stays_flat_while_full_attention_grows():
    command = [sys.executable, '-m', 'statekv_ros.bench.cli', 'step', '--policy', 'statekv,window,full', '--frames', '400', '--json']
    output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    policies = json.loads(output.strip().splitlines()[-1])['policies']
    print(json.dumps(policies, indent=1))
    statekv, window, full = (policies[name] for name in ('statekv(512)', 'window(16)', 'full'))
    # A ratio of medians taken in turn, so a slow machine is slow on both sides of it.
    assert statekv['late_over_early'] <= 1.10
    assert window['late_over_early'] <= 1.10
    assert full['late_over_early'] > 1.2
    assert statekv['max_state_tokens'] == statekv['budget'] == 512
    assert full['max_state_tokens'] == full['detailed_tokens']


def test_bad_arguments_are_named():
    for arguments, word in ((['--policy', 'magic'], 'magic'), (['--frames', '3'], '--frames'), (['--budget', '0'], 'budget')):
        run = subprocess.run([sys.executable, '-m', 'statekv_ros.bench.cli', 'step', *arguments], capture_output=True, text=True)
        assert run.returncode == 2 and word in run.stderr and 'Traceback' not in run.stderr
