"""What becomes of an image before the engine sees it: sampling and loss from header stamps, and the one-place mailbox."""
import math
import random
import threading
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from statekv_ros.errors import ParameterError
from statekv_ros.node.mailbox import Mailbox
from statekv_ros.sampling import Sampler, Verdict

pytestmark = pytest.mark.timeout(120)

MS = 10**6
SECOND = 10**9
START = 1_700_000_000 * SECOND      # a stamp as robots have them: far from zero


def camera(rate_hz: float, count: int, start_ns: int = START) -> list[int]:
    """Header stamps of a steady camera, rounded to nanoseconds as drivers do."""
    return [start_ns + round(i * SECOND / rate_hz) for i in range(count)]


def sampled(sampler: Sampler, stamps: list[int]) -> list[int]:
    """Indices of the images that it takes."""
    return [i for i, stamp in enumerate(stamps) if sampler.judge(stamp) is Verdict.SAMPLE]


# --- sampling ---------------------------------------------------------------------------------------------------------

def test_ten_hz_of_a_thirty_hz_camera_is_every_third_image_for_an_hour():
    sampler = Sampler(10.0)
    assert sampled(sampler, camera(30, 108_000)) == list(range(0, 108_000, 3))
    assert (sampler.frames_in, sampler.sampled, sampler.lost, sampler.refused) == (108_000, 36_000, 0, 0)


@pytest.mark.parametrize('camera_hz,rate_hz', [(29.97, 10.0), (30.0, 7.0), (24.0, 10.0), (60.0, 0.5), (14.99, 5.0)])
def test_rate_holds_for_an_hour_when_it_does_not_divide_the_cameras(camera_hz, rate_hz):
    taken = sampled(Sampler(rate_hz), camera(camera_hz, int(3600 * camera_hz)))
    assert abs(len(taken) - 3600 * rate_hz) <= 1


@given(st.lists(st.integers(-4 * MS, 4 * MS), min_size=1, max_size=300))
def test_jitter_of_an_eighth_of_the_cameras_period_changes_nothing(jitter_ns):
    stamps = [stamp + shift for stamp, shift in zip(camera(30, len(jitter_ns)), jitter_ns)]
    sampler = Sampler(10.0)
    assert sampled(sampler, stamps) == list(range(0, len(stamps), 3))
    assert sampler.lost == 0


@pytest.mark.parametrize('rate_hz', [30.0, 31.0, 100.0, 1000.0])
def test_rate_at_or_above_the_cameras_takes_every_image(rate_hz):
    assert sampled(Sampler(rate_hz), camera(30, 9000)) == list(range(9000))


@given(st.lists(st.integers(1, 3 * SECOND), min_size=1, max_size=200), st.floats(0.1, 100))
def test_no_more_images_than_the_rate_allows_whatever_the_stamps(gaps_ns, rate_hz):
    stamps = [START]
    for gap_ns in gaps_ns:
        stamps.append(stamps[-1] + gap_ns)
    taken = sampled(Sampler(rate_hz), stamps)
    period_ns = round(SECOND / rate_hz)
    assert taken[0] == 0
    # Every sample has a period of the grid to itself.
    assert all(stamps[b] - stamps[a] > (j - i - 1) * period_ns for i, a in enumerate(taken) for j, b in enumerate(taken) if j > i)
    # And no period that images came in goes without one.
    assert all(any(abs(stamp - stamps[i]) < 2 * period_ns for i in taken) for stamp in stamps)


def test_pause_of_a_camera_does_not_bring_a_burst_afterwards():
    stamps = camera(30, 30) + camera(30, 30, START + 60 * SECOND)
    taken = sampled(Sampler(10.0), stamps)
    assert taken == list(range(0, 60, 3))


def test_new_rate_holds_from_the_next_image_on():
    sampler = Sampler(0.01)
    stamps = camera(30, 120)
    assert sampled(sampler, stamps[:30]) == [0]
    sampler.set_rate(10.0)
    assert len(sampled(sampler, stamps[30:60])) in (10, 11), 'still waits for the hundred seconds of the old rate'
    sampler.set_rate(30.0)
    assert len(sampled(sampler, stamps[60:90])) in (28, 29, 30)
    sampler.set_rate(1.0)
    assert len(sampled(sampler, stamps[90:])) in (1, 2)


@pytest.mark.parametrize('rate_hz', [0, 0.0, -1.0, math.nan, math.inf, -math.inf])
def test_rate_that_is_not_a_positive_number_is_refused_and_named(rate_hz):
    with pytest.raises(ParameterError, match=f'rate_hz.*{rate_hz}'):
        Sampler(rate_hz)
    sampler = Sampler(10.0)
    with pytest.raises(ParameterError):
        sampler.set_rate(rate_hz)
    assert sampled(sampler, camera(30, 9)) == [0, 3, 6], 'the rate before stays'


# --- bad stamps -------------------------------------------------------------------------------------------------------

def test_zero_stamp_is_refused_and_leaves_the_others_alone():
    sampler = Sampler(10.0)
    stamps = camera(30, 30)
    for at in (0, 7, 20):
        stamps.insert(at, 0)
    assert sampler.judge(0) is Verdict.NO_STAMP
    good = [i for i, stamp in enumerate(stamps) if stamp]
    assert sampled(sampler, stamps) == good[::3]
    assert (sampler.refused, sampler.restarts, sampler.lost) == (4, 0, 0)


def test_duplicate_stamp_is_refused_whether_its_first_was_sampled_or_not():
    sampler = Sampler(10.0)
    verdicts = [sampler.judge(stamp) for stamp in camera(30, 6) for _ in range(2)]
    assert verdicts[1::2] == [Verdict.DUPLICATE] * 6
    assert verdicts[::2] == [Verdict.SAMPLE, Verdict.SKIP, Verdict.SKIP] * 2
    assert (sampler.frames_in, sampler.refused, sampler.lost) == (6, 6, 0)


def test_stamp_that_goes_back_begins_the_grid_anew_and_is_counted():
    sampler = Sampler(10.0)
    bag = camera(30, 31)
    assert sampled(sampler, bag * 3) == [i for loop in range(3) for i in range(31 * loop, 31 * loop + 31, 3)]
    assert sampler.restarts == 2
    assert sampler.lost == 0, 'the jump back is not a gap'


# --- loss -------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('rate_hz', [10, 30, 60])
@pytest.mark.parametrize('share', [0.0, 0.2, 0.5])
@settings(deadline=None, max_examples=20)
@given(seed=st.integers(0, 2**32))
def test_lost_images_are_estimated_from_gaps_up_to_half_of_them(rate_hz, share, seed):
    chance = random.Random(seed)
    stamps = [stamp + chance.randrange(-2 * MS, 2 * MS) for stamp in camera(rate_hz, 2000)]
    kept = [0, *(i for i in range(1, 2000) if chance.random() >= share)]
    sampler = Sampler(10.0)
    # The first gaps only teach the period; what was lost in them is not known.
    sampled(sampler, [stamps[i] for i in kept[:65]])
    taught = sampler.lost
    sampled(sampler, [stamps[i] for i in kept[65:]])
    # A second and more without an image, at twelve periods or more, is a pause and no loss.
    lost = sum(after - before - 1 for before, after in pairwise(kept[64:]) if after - before < max(rate_hz, 12))
    assert abs(sampler.lost - taught - lost) <= 0.05 * lost


@given(st.lists(st.integers(2 * SECOND, 3600 * SECOND), min_size=1, max_size=5))
def test_pause_is_not_loss(pauses_ns):
    sampler, begin = Sampler(10.0), START
    for pause_ns in (0, *pauses_ns):
        begin += pause_ns
        sampled(sampler, camera(30, 60, begin))
        begin += 60 * SECOND // 30
    assert sampler.lost == 0


@given(st.integers(15, 60), st.integers(1_050 * MS, 3_000 * MS))
def test_a_camera_that_is_back_after_a_second_or_two_lost_nothing(rate_hz, silence_ns):
    sampler, stamps = Sampler(10.0), camera(rate_hz, 60)
    sampled(sampler, stamps + camera(rate_hz, 60, stamps[-1] + silence_ns))
    assert sampler.lost == 0


def test_one_missing_image_of_a_steady_camera_is_one_lost():
    stamps = camera(30, 100)
    del stamps[50]
    sampler = Sampler(10.0)
    sampled(sampler, stamps)
    assert sampler.lost == 1


# --- mailbox ----------------------------------------------------------------------------------------------------------

def test_newest_wins_and_what_it_replaced_is_counted():
    mailbox = Mailbox()
    assert mailbox.take() is None and not mailbox.waiting
    for stamp in (1, 2, 3):
        mailbox.put(f'image {stamp}', stamp)
    assert mailbox.waiting and mailbox.dropped == 2
    arrival = mailbox.take()
    assert (arrival.message, arrival.stamp_ns) == ('image 3', 3) and arrival.waited_ms >= 0
    assert mailbox.take() is None and not mailbox.waiting and mailbox.dropped == 2
    mailbox.put('image 4', 4)
    assert mailbox.dropped == 2, 'a taken image was not replaced'


def test_every_image_is_taken_or_counted_as_dropped_when_threads_race():
    mailbox, count, cameras = Mailbox(), 5000, 4
    finished = threading.Event()
    taken = []

    def watch():
        while not finished.is_set() or mailbox.waiting:
            if (arrival := mailbox.take()) is not None:
                taken.append(arrival.message)

    def send(source):
        for index in range(count):
            mailbox.put((source, index), 1)

    engine = threading.Thread(target=watch)
    senders = [threading.Thread(target=send, args=(source,)) for source in range(cameras)]
    for thread in (engine, *senders):
        thread.start()
    for thread in senders:
        thread.join()
    finished.set()
    engine.join()
    assert len(taken) + mailbox.dropped == cameras * count
    assert len(set(taken)) == len(taken), 'an image was taken twice'
    for source in range(cameras):
        order = [index for sender, index in taken if sender == source]
        assert order == sorted(order), 'an older image came after a newer one'
