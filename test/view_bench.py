"""What an open page costs the node: `python test/view_bench.py`. The frame step and the node's processor time with the page open in a
browser and without any page, in blocks in turn, in one run; and what one request for a picture takes of it.

The node has a core to itself, as where the browser is another machine's. What a browser does beside it slows a core down all the same,
so without a page the same pages are open on another node, at home on the other cores: all that is different is whose they are.
What several pages cost together is divided among them. Needs two cores, Chromium and Playwright."""
import argparse
import json
import os
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
from playwright.sync_api import Browser, Page, sync_playwright

from statekv_ros.srv import Frames
from test_view import BROWSER, FLAGS, WAIT_MS, Live, PageProcess, has_picture

_TICKS = os.sysconf('SC_CLK_TCK')
_SETTLE_S = 5.0


def processor_s(pid: int) -> float:
    """Seconds of processor time that a process and all its threads have taken."""
    fields = Path(f'/proc/{pid}/stat').read_text().rpartition(')')[2].split()
    return (int(fields[11]) + int(fields[12])) / _TICKS


def block(live: Live, pages: list[Page], seconds: float) -> dict:
    """One span of time: median milliseconds of a frame step, how many, the node's processor time for each (ms), and live pictures that a
    page showed, those while it settled included."""
    for page in pages:
        page.evaluate('performance.clearResourceTimings()')
    live.graph.spin(_SETTLE_S)
    first, before = len(live.graph.timings), processor_s(live.node.process.pid)
    live.graph.spin(seconds)
    steps = live.graph.timings[first:]
    assert steps, 'no frame step in a block: give more --seconds'
    processor_ms = 1e3 * (processor_s(live.node.process.pid) - before) / len(steps)
    shown = [page.evaluate("performance.getEntriesByType('resource').filter(each => each.name.includes('/picture?')).length")
             for page in pages]
    return {'steps': len(steps), 'step_ms': statistics.median(step.total_ms for step in steps), 'processor_ms': processor_ms,
            'pictures': statistics.fmean(shown)}


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


def move(pid: int, core: int) -> None:
    """Give a core to all threads of a process, and what it begins later."""
    for thread in os.listdir(f'/proc/{pid}/task'):
        os.sched_setaffinity(int(thread), {core})


def with_pages(browser: Browser, live: Live, seconds: float, of: Live, count: int) -> dict:
    """A block of a node's, while pages of one are open."""
    served = [PageProcess(of.domain) for _ in range(count)]
    shown = [browser.new_page(viewport={'width': 1400, 'height': 900}) for _ in served]
    for page in shown:
        page.set_default_timeout(WAIT_MS)
    for page, process in zip(shown, served):
        page.goto(process.address())
        page.wait_for_function(has_picture('.sk-live img'))
    found = block(live, shown, seconds)
    for page, process in zip(shown, served):
        page.close()
        process.end()
    return found


def summary(blocks: list[dict]) -> dict:
    """Means over blocks, of milliseconds; pictures that a page showed in one."""
    return {'steps': sum(one['steps'] for one in blocks), **{key: round(statistics.fmean(one[key] for one in blocks), 2)
                                                                    for key in ('step_ms', 'processor_ms', 'pictures')}}


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
    parser.add_argument('--pages', type=int, default=2, help='open at a time; default: %(default)s')
    parser.add_argument('--requests', type=int, default=300, help='of a picture, to count what one takes; default: %(default)s')
    args = parser.parse_args()
    if args.blocks < 2:
        parser.error(f'--blocks must be at least 2, to tell an interval, got {args.blocks}')
    core, *others = sorted(os.sched_getaffinity(0))
    if not others:
        parser.error('two cores are needed: one for the node, one for the browser')
    os.sched_setaffinity(0, others)     # this process, and what it begins
    found = {'with': [], 'without': []}
    with tempfile.TemporaryDirectory() as folder, sync_playwright() as driver:
        browser, lives = None, []
        try:
            for name in ('own', 'other'):
                (Path(folder) / name).mkdir()
                lives.append(live := Live(Path(folder) / name))
                live.page.end()
                live.start_node()
                live.graph.wait(lambda: len(live.graph.timings) > 5, 'frame steps')
                if name == 'own':
                    move(live.node.process.pid, core)
            own, other = lives
            browser = driver.chromium.launch(executable_path=BROWSER, args=FLAGS, headless=True)

            def add(kind: str, of: Live) -> None:
                found[kind].append(with_pages(browser, own, args.seconds, of, args.pages))

            add('without', other)
            for _ in range(args.blocks):
                add('with', own)
                add('without', other)
                print({kind: summary(found[kind][-1:]) for kind in found}, flush=True)
            request = round(request_ms(own, args.requests), 3)
        finally:
            if browser is not None:
                browser.close()
            for live in lives:
                live.close()
    print(json.dumps({'request_ms': request, **{kind: summary(blocks) for kind, blocks in found.items()},
                      **{f'{key}_ratio_of_a_page': ratio(found, key, args.pages) for key in ('step_ms', 'processor_ms')}}, indent=2))


if __name__ == '__main__':
    begun = time.monotonic()
    main()
    print(f'{time.monotonic() - begun:.0f} s')
