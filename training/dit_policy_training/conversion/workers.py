"""Jobs done by processes of this machine. A worker that dies takes only its own bag with it."""

import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Generator
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Any

from dit_policy_training.conversion.jobs import Begun, Done, Event, Job
from dit_policy_training.conversion.manifest import Refusal

# Imported once, in the process that workers are forked from. It does nothing else: its only thread is jemalloc's, which
# knows of forks.
_PRELOADED = ["dit_policy_training.conversion.bag_to_shard"]


def run_in_processes(jobs: list[Job], workers: int) -> Generator[Event, None, None]:
    """Do `jobs` in the given order in `workers` processes. One Done each; closing the iterator kills the workers."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(_PRELOADED)
    waiting = deque(jobs)
    busy: list[_Worker] = []
    try:
        while waiting or busy:
            while waiting and len(busy) < workers:
                busy.append(_Worker(context, waiting.popleft()))
                yield Begun(busy[-1].job.number)
            for ready in wait([worker.connection for worker in busy]):
                worker = next(worker for worker in busy if worker.connection is ready)
                event = worker.event()
                yield event
                if not isinstance(event, Done):
                    continue
                if worker.alive and waiting:
                    yield Begun(worker.give(waiting.popleft()))
                else:
                    worker.stop()
                    busy.remove(worker)
    finally:
        for worker in busy:
            worker.stop()


class _Worker:
    """A process, and the job that it does."""

    def __init__(self, context: Any, job: Job):
        self.connection, theirs = context.Pipe()
        self._process: BaseProcess = context.Process(target=_work, args=(theirs,), daemon=True)
        _start_deaf_to_interrupts(self._process)
        theirs.close()
        self.alive = True
        self.give(job)

    def give(self, job: Job) -> int:
        self.job = job
        self.connection.send(job)
        return job.number

    def event(self) -> Event:
        """What the worker said, or that it died."""
        try:
            event: Event = self.connection.recv()
            return event
        except (EOFError, ConnectionError):
            self.alive = False
            self._process.join()
            return Done(self.job.number, Refusal(self.job.given, _death(self._process.exitcode)))

    def stop(self) -> None:
        """End the process, whatever it does: what it leaves has no final name."""
        self._process.kill()
        self._process.join()
        self.connection.close()


def _start_deaf_to_interrupts(process: BaseProcess) -> None:
    """Ctrl-C goes to every process of the terminal; the one that runs the conversion decides, workers never hear it."""
    # Started here, since its own start would unblock the signal before the workers' server starts.
    resource_tracker.ensure_running()
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        process.start()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _work(connection: Connection) -> None:
    threading.Thread(target=_end_with_parent, daemon=True).start()
    from dit_policy_training.conversion.bag_to_shard import convert_bag  # seconds, if the server has not imported it

    while True:
        try:
            job: Job = connection.recv()
        except EOFError:
            return
        limit_threads(job.threads)
        connection.send(Done(job.number, convert_bag(job, connection.send)))


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def limit_threads(threads: int) -> None:
    """Keep the libraries that would take every core to `threads`."""
    import cv2
    import pyarrow

    cv2.setNumThreads(threads)
    pyarrow.set_cpu_count(threads)


def _death(exit_code: int | None) -> str:
    if exit_code is not None and exit_code < 0:
        name = signal.Signals(-exit_code).name
        why = "; most likely the machine ran out of memory, try fewer --workers" if name == "SIGKILL" else ""
        return f"its worker was killed by {name}{why}"
    return f"its worker ended with status {exit_code}; run the same command again, and report it if that does not help"
