"""The inference thread: newest wins, every result and error arrives, close() joins, latencies are true."""

from __future__ import annotations

import logging
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator

import pytest

from dit_policy_ros.runtime.inference import InferenceWorker


class Results:
    """Collects what the worker delivers, and lets a test wait for it."""

    def __init__(self) -> None:
        self.delivered: list[tuple[object, BaseException | None]] = []
        self.threads: list[threading.Thread] = []
        self._arrived = threading.Semaphore(0)

    def __call__(self, result: object, error: BaseException | None) -> None:
        self.delivered.append((result, error))
        self.threads.append(threading.current_thread())
        self._arrived.release()

    def wait(self, count: int) -> None:
        for _ in range(count):
            assert self._arrived.acquire(timeout=30), f"only {len(self.delivered)} results came"


@pytest.fixture
def results() -> Results:
    return Results()


@pytest.fixture
def worker(results: Results) -> Iterator[InferenceWorker]:
    worker = InferenceWorker(results)
    yield worker
    worker.close()


def blocking() -> tuple[Callable[[], str], threading.Event, threading.Event]:
    begun, go = threading.Event(), threading.Event()

    def work() -> str:
        begun.set()
        assert go.wait(30)
        return "first"

    return work, begun, go


def test_results_come_from_one_thread_that_is_not_the_callers(worker: InferenceWorker, results: Results) -> None:
    for k in range(3):
        worker.submit(lambda k=k: k)
        results.wait(1)
    assert results.delivered == [(0, None), (1, None), (2, None)]
    assert len(set(results.threads)) == 1
    assert results.threads[0] is not threading.current_thread()


def test_of_those_waiting_the_newest_wins(worker: InferenceWorker, results: Results) -> None:
    work, begun, go = blocking()
    worker.submit(work)
    assert begun.wait(30)
    assert worker.busy
    for k in range(5):
        worker.submit(lambda k=k: k)
    go.set()
    results.wait(2)
    assert [result for result, _ in results.delivered] == ["first", 4]


@pytest.mark.parametrize("error", [ValueError("no"), MemoryError(), SystemExit(3), KeyboardInterrupt()])
def test_every_exception_is_delivered_and_the_thread_lives(
    worker: InferenceWorker, results: Results, error: BaseException
) -> None:
    def fail() -> None:
        raise error

    worker.submit(fail)
    results.wait(1)
    assert results.delivered == [(None, error)]
    worker.submit(lambda: "on")
    results.wait(1)
    assert results.delivered[-1] == ("on", None)


def test_a_callback_that_fails_is_logged_and_the_thread_lives(caplog: pytest.LogCaptureFixture) -> None:
    seen = threading.Semaphore(0)

    def callback(result: object, error: BaseException | None) -> None:
        seen.release()
        raise RuntimeError(f"cannot take {result}")

    worker = InferenceWorker(callback)
    with caplog.at_level(logging.ERROR):
        for k in range(2):
            worker.submit(lambda k=k: k)
            assert seen.acquire(timeout=30)
        assert worker.close(30)
    assert "cannot take 0" in caplog.text
    assert "cannot take 1" in caplog.text


def test_close_waits_for_what_runs_and_drops_what_waits(results: Results) -> None:
    worker = InferenceWorker(results)
    work, begun, go = blocking()
    worker.submit(work)
    assert begun.wait(30)
    worker.submit(lambda: "never")
    assert worker.close(0.05) is False
    go.set()
    assert worker.close(30) is True
    assert results.delivered == [("first", None)]
    assert worker.close() is True
    with pytest.raises(RuntimeError, match="closed"):
        worker.submit(lambda: "late")


def test_close_from_the_callback_does_not_wait_for_itself() -> None:
    ended: list[bool] = []
    worker = InferenceWorker(lambda result, error: ended.append(worker.close()))
    worker.submit(lambda: None)
    worker._thread.join(30)
    assert ended == [False]
    assert worker.close() is True


def settled(worker: InferenceWorker, results: Results) -> None:
    """Waits until the thread has done all there was, by a request of its own."""
    worker.submit(lambda: "settled")
    results.wait(1)
    assert results.delivered[-1] == ("settled", None)


def test_offered_work_is_done_when_there_is_nothing_else_and_delivers_nothing(
    worker: InferenceWorker, results: Results
) -> None:
    done = threading.Event()
    assert worker.offer(lambda: done.set() or "not to be delivered")
    assert done.wait(30)
    settled(worker, results)
    assert len(results.delivered) == 1
    assert worker.offers_failed == 0


def test_nothing_is_taken_while_a_request_runs_or_waits(worker: InferenceWorker, results: Results) -> None:
    work, begun, go = blocking()
    worker.submit(work)
    assert begun.wait(30)
    assert not worker.offer(lambda: pytest.fail("done"))
    worker.submit(lambda: "second")
    assert not worker.offer(lambda: pytest.fail("done"))
    go.set()
    results.wait(2)
    settled(worker, results)
    assert worker.offers_failed == 0


def test_a_request_waits_for_offered_work_that_has_begun(worker: InferenceWorker, results: Results) -> None:
    work, begun, go = blocking()
    assert worker.offer(work)
    assert begun.wait(30)
    assert not worker.busy
    assert not worker.offer(lambda: pytest.fail("done"))
    worker.submit(lambda: "chunk")
    assert worker.busy
    assert results.delivered == []
    go.set()
    results.wait(1)
    assert results.delivered == [("chunk", None)]


def test_a_request_drops_offered_work_that_has_not_begun(results: Results) -> None:
    in_callback, leave = threading.Event(), threading.Event()

    def on_result(result: object, error: BaseException | None) -> None:
        in_callback.set()
        assert leave.wait(30)
        results(result, error)

    worker = InferenceWorker(on_result)
    try:
        worker.submit(lambda: "first")
        assert in_callback.wait(30)  # the thread still has the first one in hand
        worker._running = False  # as in the moment between two requests, which no test can catch
        assert worker.offer(lambda: pytest.fail("done"))
        worker.submit(lambda: "second")
        leave.set()
        results.wait(2)
        settled(worker, results)
        assert [result for result, _ in results.delivered] == ["first", "second", "settled"]
        assert worker.offers_failed == 0
    finally:
        leave.set()
        worker.close()


@pytest.mark.parametrize("error", [ValueError("no picture"), SystemExit(3)])
def test_offered_work_that_fails_is_logged_and_counted(
    worker: InferenceWorker, results: Results, error: BaseException, caplog: pytest.LogCaptureFixture
) -> None:
    begun = threading.Event()

    def fail() -> None:
        begun.set()
        raise error

    with caplog.at_level(logging.ERROR):
        assert worker.offer(fail)
        assert begun.wait(30)
        settled(worker, results)
    assert worker.offers_failed == 1
    assert type(error).__name__ in caplog.text


def test_close_drops_offered_work_and_takes_none(results: Results) -> None:
    worker = InferenceWorker(results)
    work, begun, go = blocking()
    assert worker.offer(work)
    assert begun.wait(30)
    assert worker.close(0.01) is False
    go.set()
    assert worker.close(30) is True
    assert not worker.offer(lambda: None)
    assert results.delivered == []


def test_a_program_that_forgets_to_close_still_ends() -> None:
    code = (
        "from dit_policy_ros.runtime.inference import InferenceWorker\n"
        "InferenceWorker(lambda result, error: None).submit(lambda: 1)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], timeout=60, capture_output=True, check=False)
    assert done.returncode == 0, done.stderr
