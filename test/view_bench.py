"""What an open page costs the node: `python test/view_bench.py`. The frame step and the node's processor time with the page open in a
browser and without any page, in blocks in turn, in one run; and what one request for a picture takes of it. Needs Chromium and Playwright."""
import argparse
import json
import os
import statistics
import tempfile
import time
from pathlib import Path

from playwright.sync_api import sync_playwright

from statekv_ros.srv import Frames
from test_view import BROWSER, FLAGS, Live, PageProcess, has_picture

_TICKS = os.sysconf('SC_CLK_TCK')
_SETTLE_S = 5.0


def processor_s(pid: int) -> float:
    """Seconds of processor time that a process and all its threads have taken."""
    fields = Path(f'/proc/{pid}/stat').read_text().rpartition(')')[2].split()
    return (int(fields[11]) + int(fields[12])) / _TICKS


def block(live: Live, seconds: float) -> dict:
    """One span of time: milliseconds of each frame step, and the node's processor time for each (ms)."""
    live.graph.spin(_SETTLE_S)
    first, before = len(live.graph.timings), processor_s(live.node.process.pid)
    live.graph.spin(seconds)
    steps = live.graph.timings[first:]
    assert steps, 'no frame step in a block: give more --seconds'
    return {'step_ms': [step.total_ms for step in steps],
            'processor_ms': 1e3 * (processor_s(live.node.process.pid) - before) / len(steps)}


def request_ms(live: Live, count: int) -> float:
    """The node's processor time (ms) for one request of one picture, no frame step meanwhile."""
    live.player.kill()
    live.graph.spin(_SETTLE_S)
    pid, client = live.node.process.pid, live.graph.node.create_client(Frames, '/statekv/frames')
    live.graph.wait(client.service_is_ready, 'the frames service')
    begun, before = time.monotonic(), processor_s(pid)
    live.graph.spin(_SETTLE_S)
    idle = (processor_s(pid) - before) / (time.monotonic() - begun)
    stamp, begun, before = live.graph.timings[-1].header.stamp, time.monotonic(), processor_s(pid)
    for _ in range(count):
        assert live.graph.response(client.call_async(Frames.Request(stamps=[stamp]))).success
    return 1e3 * (processor_s(pid) - before - idle * (time.monotonic() - begun)) / count


def summary(blocks: list[dict]) -> dict:
    step_ms = [ms for one in blocks for ms in one['step_ms']]
    return {'steps': len(step_ms), 'step_ms_p50': round(statistics.median(step_ms), 2),
            'processor_ms_a_step': round(statistics.median(one['processor_ms'] for one in blocks), 2)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('--blocks', type=int, default=6, help='of each kind; default: %(default)s')
    parser.add_argument('--seconds', type=float, default=20.0, help='of a block; default: %(default)s')
    parser.add_argument('--requests', type=int, default=300, help='of a picture, to count what one takes; default: %(default)s')
    args = parser.parse_args()
    if args.blocks < 2:
        parser.error(f'--blocks must be at least 2, to tell the noise, got {args.blocks}')
    found = {'with': [], 'without': []}
    with tempfile.TemporaryDirectory() as folder, sync_playwright() as driver:
        live = Live(Path(folder))
        live.page.end()
        browser = driver.chromium.launch(executable_path=BROWSER, args=FLAGS, headless=True)
        try:
            live.start_node()
            live.graph.wait(lambda: len(live.graph.timings) > 5, 'frame steps')
            for _ in range(args.blocks):
                found['without'].append(block(live, args.seconds))
                served = PageProcess(live.domain)
                page = browser.new_page(viewport={'width': 1400, 'height': 900})
                page.goto(served.address())
                page.wait_for_function(has_picture('.sk-live img'))
                found['with'].append(block(live, args.seconds))
                print({kind: summary(found[kind][-1:]) for kind in ('with', 'without')}, flush=True)
                page.close()
                served.end()
            found['request_ms'] = round(request_ms(live, args.requests), 3)
        finally:
            browser.close()
            live.close()
    told = {'request_ms': found.pop('request_ms'), **{kind: summary(blocks) for kind, blocks in found.items()}}
    half = [summary(found['without'][begin::2]) for begin in (0, 1)]
    for key in ('step_ms_p50', 'processor_ms_a_step'):
        told[f'{key}_ratio'] = round(told['with'][key] / told['without'][key], 3)
        told[f'{key}_noise'] = round(half[0][key] / half[1][key], 3)       # the blocks without a page against each other
    print(json.dumps(told, indent=2))


if __name__ == '__main__':
    begun = time.monotonic()
    main()
    print(f'{time.monotonic() - begun:.0f} s')
