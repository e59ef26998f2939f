"""What commands print fits a terminal of 80 columns, nothing cut: with values as long as they get."""
import pytest

from statekv_ros import plan
from statekv_ros.bench import answers, cameras, floor, hours, questions, step, transport
from statekv_ros.demo import print_summary
from statekv_ros.demo.parts import Watcher
from statekv_ros.msg import FrameTiming

MODEL, DEVICE = 'LLaVA-OneVision-0.5B', 'NVIDIA GeForce RTX 5090 Laptop GPU'
STEP = {'step_ms_p50': 1234.567, 'step_ms_p95': 2345.678, 'early_ms': 1234.567, 'late_ms': 1234.567, 'late_over_early': 12.345,
        'max_state_tokens': 8192}
TRANSPORT = {'width': 1920, 'height': 1080, 'shipped_profile': True, 'reliable': False, 'sent': 36000, 'arrived': 36000,
             'percent': 100.0, 'latency_ms_p50': 1234.5, 'latency_ms_p95': 2345.6, 'subscriber_cpu_percent': 100.0}
ANSWERS = {'first_token_ms_p50': 1234.5, 'first_token_ms_p90': 2345.6, 'total_ms_p50': 1234.5, 'total_ms_p90': 2345.6}
PRINTS = {
    'step': (step, {'policies': {'statekv(4096)': STEP, 'window(128)': STEP}, 'steps': 3600}),
    'transport': (transport, {'cases': [TRANSPORT], 'shared_memory_problem': ''}),
    'cameras': (cameras, {'rows': [{'cameras': 8, 'single_ms': 1234.5678, 'batched_ms': 1234.5678, 'batched_over_single': 0.5678,
                                    'single_weight_mb': 123456.7, 'batched_weight_mb': 123456.7}]}),
    'questions': (questions, {'steps': 28800, 'rows': [
        {'questions': 32, 'single_ms': 1234.5678, 'shared_ms': 1234.5678, 'shared_over_single': 0.5678,
         'single_weight_mb': 123456.7, 'shared_weight_mb': 123456.7, 'single_operations': 123456, 'shared_operations': 123456}]}),
    'answers': (answers, {'detailed_format': 'int4', 'rows': [
        {'steps': 28800, 'steps_below_device': 28800, 'tokens': 64, 'token_ms_p50': 1234.5678, **ANSWERS}]}),
    'hours': (hours, {'hours': 24.0, 'steps': 86400, 'step_ratio': 1.0123, 'ratios': {'sparse(8192)': None}, 'rss_mb_per_hour': 12.3,
                      'peak_bytes': {'device': 64 * 10**9, 'host': 64 * 10**9, 'disk': 10**12}, 'disk_bytes': 10**12,
                      'disk_planned_bytes': 10**12, 'steps_below_device': 86400, 'windows': [
                          {'to_s': 86400, 'step_ms_p50': 1234.56, 'detailed_bytes': 64e9, 'rss_bytes': 64e9,
                           'answers': {'sparse(8192)': {'n': 1000} | ANSWERS}}]}),
    'floor': (floor, {'device_name': 'AGX-Orin', 'budget': 4096, 'size': '1920x1080', 'read_tokens': 8192, 'tflops': 42.5,
                      'gb_per_s': 205, 'memory_gb': 64, 'rows': [
                          {'model': MODEL, 'fits': False, 'step_tokens': 1234, 'weights_gb': 123.4, 'vision_tflop': 1.2345,
                           'text_tflop': 12.345, 'compute_ms': 1234.5, 'memory_ms': 1234.5, 'floor_ms': 1234.5,
                           'frames_per_s': 123.4, 'token_ms': 1234.5}]}),
}


@pytest.fixture(autouse=True)
def narrow(monkeypatch):
    monkeypatch.setenv('COLUMNS', '80')


def assert_fits(text: str) -> None:
    assert text.strip() and '…' not in text
    assert not [line for line in text.splitlines() if len(line) > 80]


@pytest.mark.parametrize('command', PRINTS)
def test_a_benchmarks_table_fits(command, capsys):
    module, values = PRINTS[command]
    module._print({'device': DEVICE, 'model': MODEL, 'prefill_policy': 'statekv(4096)', 'answer_policy': 'sparse(8192)'} | values)
    printed = capsys.readouterr().out
    assert_fits(printed)
    for row in values.get('rows', values.get('cases', ())):
        assert all(str(value) in printed for value in row.values() if isinstance(value, int) and not isinstance(value, bool))


def test_the_plan_of_every_published_model_fits(capsys):
    assert plan.main(['--hours', '24', '--fps', '4', '--cameras', '4', '--frame-size', '1920x1080']) == 0
    assert_fits(capsys.readouterr().out)


def test_the_demos_lines_fit(capsys):
    class Client:
        class node:
            create_subscription = staticmethod(lambda *_: None)

        spin_for = staticmethod(lambda _: None)

    watcher = Watcher(Client)
    watcher.steps.append(FrameTiming(frames_processed=28800, frames_sampled=28800, total_ms=123.4, state_tokens=4096, budget=4096,
                                     detailed_bytes=99_900_000, lost=3))
    assert_fits(watcher.watch(.1).plain)
    from rich.console import Console
    print_summary({'frames_in': 28800, 'frames_sampled': 28800, 'frames_processed': 28800, 'dropped': 12345, 'lost': 12345,
                   'rejected': 12345, 'step_ms_p50': 1234.56, 'step_ms_p95': 1234.56, 'step_ms_first_third': 1234.56,
                   'step_ms_last_third': 1234.56, 'state_tokens': 4096, 'budget': 4096, 'detailed_tokens': 28800 * 256,
                   'detailed_mb': 123456.789, 'right': 5, 'answers': [0] * 5}, Console())
    assert_fits(capsys.readouterr().out)
