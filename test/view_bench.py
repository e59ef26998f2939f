"""What an open page costs the node: `python test/view_bench.py`. The frame step and the node's processor time with the page open in a
browser and without any page, in blocks in turn, in one run; and what one request for a picture takes of it.

The node has a core to itself, as where the browser is another machine's, and a program that does nothing keeps the others busy in
either kind of block: else the browser's work would show in the core's clock, and pass for the node's. Several pages are opened at a
time, each served by a process of its own, and what they cost together is divided among them: what one costs is less than a core's speed
changes from one minute to the next. Needs two cores, Chromium and Playwright."""
import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from playwright.sync_api import Browser, Page, sync_playwright

from statekv_ros.srv import Frames
from test_view import BROWSER, FLAGS, Live, PageProcess, has_picture

_TICKS = os.sysconf('SC_CLK_TCK')
_SETTLE_S = 5.0


def processor_s(pid: int) -> float:
    """Seconds of processor time that a process and all its threads have taken."""
    fields = Path(f'/proc/{pid}/stat').read_text().rpartition(')')[2].split()
    return (int(fields[11]) + int(fields[12])) / _TICKS


def block(live: Live, seconds: float) -> dict:
    """One span of time: median milliseconds of a frame step, how many, and the node's processor time for each (ms)."""
    live.graph.spin(_SETTLE_S)
    first, before = len(live.graph.timings), processor_s(live.node.process.pid)
    live.graph.spin(seconds)
    steps = live.graph.timings[first:]
    assert steps, 'no frame step in a block: give more --seconds'
    return {'steps': len(steps), 'step_ms': statistics.median(step.total_ms for step in steps),
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


def apart(pid: int) -> None:
    """Give all threads of a process, and what it begins later, the first core, and this process and its later children the others."""
    first, *others = sorted(os.sched_getaffinity(0))
    for thread in os.listdir(f'/proc/{pid}/task'):
        os.sched_setaffinity(int(thread), {first})
    os.sched_setaffinity(0, others)


def opened(browser: Browser, served: PageProcess) -> Page:
    """A page that shows the live picture."""
    page = browser.new_page(viewport={'width': 1400, 'height': 900})
    page.goto(served.address())
    page.wait_for_function(has_picture('.sk-live img'))
    return page


def summary(blocks: list[dict]) -> dict:
    """Means over blocks, of milliseconds."""
    return {'steps': sum(one['steps'] for one in blocks), **{key: round(statistics.fmean(one[key] for one in blocks), 2)
                                                                    for key in ('step_ms', 'processor_ms')}}


def ratio(found: dict[str, list[dict]], key: str, pages: int) -> dict:
    """With a page over without: mean over blocks with pages, each beside the ones before and after it, and its 95 % interval
    (percentiles of 10,000 resamplings of blocks)."""
    before = [one[key] for one in found['without']]
    pairs = np.log([one[key] / ((begin + end) / 2) for one, begin, end in zip(found['with'], before, before[1:])])
    means = np.random.default_rng(0).choice(pairs, (10_000, len(pairs))).mean(axis=1)
    least, middle, most = 1 + (np.exp([np.quantile(means, .025), pairs.mean(), np.quantile(means, .975)]) - 1) / pages
    return {'ratio': round(middle, 4), 'least': round(least, 4), 'most': round(most, 4)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--blocks', type=int, default=12, help='with pages, each between two without; default: %(default)s')
    parser.add_argument('--seconds', type=float, default=12.0, help='of a block; default: %(default)s')
    parser.add_argument('--pages', type=int, default=4, help='open at a time; default: %(default)s')
    parser.add_argument('--requests', type=int, default=300, help='of a picture, to count what one takes; default: %(default)s')
    args = parser.parse_args()
    if args.blocks < 2:
        parser.error(f'--blocks must be at least 2, to tell an interval, got {args.blocks}')
    if len(os.sched_getaffinity(0)) < 2:
        parser.error('two cores are needed: one for the node, one for the browser')
    found = {'with': [], 'without': []}
    with tempfile.TemporaryDirectory() as folder, sync_playwright() as driver:
        live = Live(Path(folder))
        live.page.end()
        browser = busy = None
        try:
            live.start_node()
            live.graph.wait(lambda: len(live.graph.timings) > 5, 'frame steps')
            apart(live.node.process.pid)
            busy = [subprocess.Popen(['nice', '-n', '19', sys.executable, '-c', 'while True: pass'])
                    for _ in os.sched_getaffinity(0)]
            browser = driver.chromium.launch(executable_path=BROWSER, args=FLAGS, headless=True)
            found['without'].append(block(live, args.seconds))
            for _ in range(args.blocks):
                served = [PageProcess(live.domain) for _ in range(args.pages)]
                shown = [opened(browser, each) for each in served]
                found['with'].append(block(live, args.seconds))
                for page, process in zip(shown, served):
                    page.close()
                    process.end()
                found['without'].append(block(live, args.seconds))
                print({kind: summary(found[kind][-1:]) for kind in ('with', 'without')}, flush=True)
            request = round(request_ms(live, args.requests), 3)
        finally:
            for process in busy or ():
                process.kill()
            if browser is not None:
                browser.close()
            live.close()
    print(json.dumps({'request_ms': request, **{kind: summary(blocks) for kind, blocks in found.items()},
                      **{f'{key}_ratio_of_a_page': ratio(found, key, args.pages) for key in ('step_ms', 'processor_ms')}}, indent=2))


if __name__ == '__main__':
    begun = time.monotonic()
    main()
    print(f'{time.monotonic() - begun:.0f} s')
