"""The micro-batcher: what runs together, what does not, and that nothing waits for ever."""

import threading
import time
from concurrent.futures import CancelledError, wait

import pytest

from speeder.serving.http.batcher import Batcher, Closed, Lane, QueueFull

SOON = 30  # seconds until a result must be there, however busy the machine


class Recorder:
    """A lane's work: doubles numbers, remembers its batches, fails where it meets `bad`, and can be held up."""

    def __init__(self):
        self.batches: list[list] = []
        self.threads: set[int] = set()
        self.free, self.entered = threading.Event(), threading.Event()
        self.free.set()

    def __call__(self, jobs: list) -> list:
        self.batches.append(list(jobs))
        self.threads.add(threading.get_ident())
        self.entered.set()
        assert self.free.wait(SOON)
        if "bad" in jobs:
            raise ValueError("a bad job")
        return [2 * job for job in jobs]

    def hold(self):
        self.free.clear()
        self.entered.clear()


def started(*lanes, **options):
    batcher = Batcher(lanes, **options)
    batcher.start()
    return batcher


def test_what_waits_runs_together_in_one_thread_and_in_order():
    work = Recorder()
    batcher = started(Lane("double", work, max_batch=4, capacity=100))
    work.hold()
    first = batcher.submit("double", 1)
    assert work.entered.wait(SOON)
    rest = [batcher.submit("double", job) for job in range(2, 12)]
    assert batcher.depth("double") == 10
    work.free.set()
    assert [future.result(SOON) for future in [first, *rest]] == [2 * job for job in range(1, 12)]
    assert work.batches == [[1], [2, 3, 4, 5], [6, 7, 8, 9], [10, 11]]
    assert len(work.threads) == 1 and threading.get_ident() not in work.threads
    assert batcher.close(SOON)


def test_the_first_request_waits_for_company_but_not_longer_than_told():
    work = Recorder()
    batcher = started(
        Lane("patient", work, max_batch=2, capacity=9, max_wait=600),
        Lane("brief", work, max_batch=2, capacity=9, max_wait=0.3),
    )
    alone = batcher.submit("patient", 1)
    time.sleep(0.05)
    together = batcher.submit("patient", 2)  # the batch is full, and leaves at once
    assert (alone.result(SOON), together.result(SOON)) == (2, 4)
    assert work.batches == [[1, 2]]
    began = time.monotonic()
    assert batcher.submit("brief", 3).result(SOON) == 6
    assert time.monotonic() - began >= 0.29
    batcher.close(SOON)


def test_a_failing_request_fails_alone():
    work = Recorder()
    batcher = started(Lane("double", work, max_batch=8, capacity=9))
    work.hold()
    head = batcher.submit("double", 0)
    assert work.entered.wait(SOON)
    futures = {job: batcher.submit("double", job) for job in (1, "bad", 3)}
    work.free.set()
    assert (head.result(SOON), futures[1].result(SOON), futures[3].result(SOON)) == (0, 2, 6)
    with pytest.raises(ValueError, match="a bad job"):
        futures["bad"].result(SOON)
    assert batcher.submit("double", 4).result(SOON) == 8  # the thread lives on
    batcher.close(SOON)


def test_a_wrong_number_of_results_is_a_fault():
    batcher = started(Lane("lost", lambda jobs: [], max_batch=2, capacity=2))
    with pytest.raises(RuntimeError, match="expected 1 results, got 0"):
        batcher.submit("lost", 1).result(SOON)
    batcher.close(SOON)


def test_whoever_leaves_makes_room_and_is_not_run():
    work = Recorder()
    batcher = started(Lane("double", work, max_batch=8, capacity=2))
    work.hold()
    running = batcher.submit("double", 0)
    assert work.entered.wait(SOON)
    leaving, staying = batcher.submit("double", 1), batcher.submit("double", 2)
    with pytest.raises(QueueFull) as refused:
        batcher.submit("double", 3)
    assert refused.value.retry_after >= 1
    assert leaving.cancel() and not running.cancel()
    late = batcher.submit("double", 4)
    work.free.set()
    assert (staying.result(SOON), late.result(SOON)) == (4, 8)
    assert [2, 4] in work.batches and all(1 not in batch for batch in work.batches)
    with pytest.raises(CancelledError):
        leaving.result(SOON)
    batcher.close(SOON)


def test_the_wait_that_a_full_queue_asks_for_follows_the_pace():
    lane = Lane("slow", lambda jobs: jobs, max_batch=2, capacity=9)
    lane.batch_seconds = 1.5
    assert lane.retry_after() == 1
    lane.waiting.extend([object()] * 5)  # three batches
    assert lane.retry_after() == 5


def test_lanes_take_turns():
    order, gate = [], threading.Event()

    def work(name):
        def run(jobs):
            assert gate.wait(SOON)
            order.append(name)
            return jobs

        return run

    batcher = started(
        Lane("many", work("many"), max_batch=1, capacity=99),
        Lane("few", work("few"), max_batch=1, capacity=9),
    )
    futures = [batcher.submit("many", job) for job in range(6)] + [
        batcher.submit("few", job) for job in range(2)
    ]
    gate.set()
    wait(futures, SOON)
    assert "few" in order[:3] and order.count("few") == 2 and order[:5].count("few") == 2
    batcher.close(SOON)


def test_closing_runs_what_waits_and_takes_no_more():
    work = Recorder()
    batcher = started(Lane("double", work, max_batch=2, capacity=9, max_wait=60))
    futures = [batcher.submit("double", job) for job in range(3)]
    assert batcher.close(SOON)
    assert [future.result(0) for future in futures] == [0, 2, 4]
    with pytest.raises(Closed):
        batcher.submit("double", 1)
    assert not batcher.healthy(SOON)


def test_a_stuck_batch_shows_itself_and_observers_hear_of_each():
    heard = []

    class Observer:
        def batch(self, lane, size, seconds):
            heard.append((lane, size, seconds))

    work = Recorder()
    batcher = started(Lane("double", work, max_batch=2, capacity=9), observer=Observer())
    assert batcher.healthy(0.0)
    work.hold()
    future = batcher.submit("double", 1)
    assert work.entered.wait(SOON)
    time.sleep(0.05)
    assert not batcher.healthy(0.01) and batcher.healthy(SOON)
    work.free.set()
    future.result(SOON)
    batcher.close(SOON)
    assert [entry[:2] for entry in heard] == [("double", 1)] and heard[0][2] >= 0.05
