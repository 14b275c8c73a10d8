"""The conductor set in motion: the beat, the inference thread and the arm's controllers, under one lock."""

from __future__ import annotations

import math
import threading
from collections import Counter, deque
from collections.abc import Callable, Sequence
from functools import partial
from typing import Protocol, cast

import numpy as np
from rclpy.impl.rcutils_logger import RcutilsLogger

from dit_policy_ros.nodes.account import Account
from dit_policy_ros.nodes.arm import Arm
from dit_policy_ros.nodes.parameters import Parameters
from dit_policy_ros.nodes.session import Session
from dit_policy_ros.runtime.decisions import Outcome
from dit_policy_ros.runtime.faults import Fault, Trouble
from dit_policy_ros.runtime.gate import Decision, Verdict
from dit_policy_ros.runtime.inference import InferenceWorker
from dit_policy_ros.runtime.pipeline import Sampled
from dit_policy_ros.runtime.trajectory import Trajectory

_FLUSH_S = 1.0  # longer than a stop
_CLOSE_S = 10.0  # longer than any chunk that is not hung
_KEPT_COSTS = 200
_AHEAD_STEPS = 1.0  # a frame this much older than the chunk's start, in steps, will hardly be the newest by then


class Watch(Protocol):
    """A watchdog: what it sees wrong at this moment."""

    def check(self, now_ns: int) -> list[Trouble]:
        """Empty if all is well."""


class Motion:
    """The moving part of a session. `beat` is called by the beat's thread, everything else by the executor's.

    `tell(outcome, now_ns)` is called after each decision, by the thread that took it, and `on_fault()` when a fault
    or a kind of trouble begins or ends. Closing it ends the inference thread and the outlets.
    """

    def __init__(
        self,
        session: Session,
        arm: Arm,
        watches: Sequence[Watch],
        parameters: Parameters,
        tell: Callable[[Outcome, int], None],
        on_fault: Callable[[], None],
        now_ns: Callable[[], int],
        log: RcutilsLogger,
    ) -> None:
        self._session = session
        self._arm = arm
        self._watches = watches
        self._tell = tell
        self._on_fault = on_fault
        self._now_ns = now_ns
        self._log = log
        self._lock = threading.Lock()  # around the conductor and every command: between two there is none out of turn
        self._fresh_image = False
        self._soon = ""  # the instruction of the next chunk, if that is due so soon that frames are encoded for it
        self._encoded_ahead = 0
        self._own_cpu: deque[float] = deque(maxlen=_KEPT_COSTS)
        self._fault: Trouble | None = None
        self._kinds_of_trouble: set[Fault] = set()
        self._last_verdict = Verdict.ACCEPTED
        self.apply(parameters)
        self.worker = InferenceWorker(self._on_result)

    # --- by the executor ---------------------------------------------------------------------------------------------

    def apply(self, parameters: Parameters) -> None:
        """Take the live parameters, all at once: no chunk sees half a change."""
        with self._lock:
            self._session.apply(parameters)
            self._settings = self._session.settings(parameters)
            self._encode_ahead = parameters.flag("encode_ahead")
            self._arm.watch_foreign_commands = parameters.flag("watch_foreign_commands")
            self._arm.limit(parameters.number("controller_timeout"), parameters.number("max_tracking_error"))

    def start(self) -> None:
        """Begin to sample chunks."""
        with self._lock:
            self._own_cpu.clear()
            self._last_verdict = Verdict.ACCEPTED
            self._session.conductor.start(self._now_ns())

    def stop(self) -> None:
        """Bring the arm to rest and sample no more."""
        with self._lock:
            now_ns = self._now_ns()
            self._send(self._session.conductor.halt(now_ns), now_ns)
        self._see_fault()

    def rest(self) -> None:
        """Bring the arm to rest and forget the instruction; the next one goes on."""
        with self._lock:
            now_ns = self._now_ns()
            self._send(self._session.conductor.rest(now_ns), now_ns)

    def instruct(self, text: str) -> None:
        """Follow another instruction."""
        with self._lock:
            self._session.conductor.instruct(text)

    def resume(self) -> str | None:
        """End the fault; or why not, in a sentence."""
        with self._lock:
            reason = self._session.conductor.resume()
        self._see_fault()
        return reason

    def image_arrived(self) -> None:
        """A camera's message is in the buffer: its features are made ahead of the chunk, if that is due soon."""
        self._fresh_image = True
        self._offer_to_encode()

    @property
    def running(self) -> bool:
        """Whether chunks are sampled."""
        return self._session.conductor.running

    def account(self) -> Account:
        """How everything stands now."""
        with self._lock:
            conductor = self._session.conductor
            counts = conductor.counts
            return Account(
                running=conductor.running,
                moving=conductor.moving(self._now_ns()),
                fault=conductor.fault,
                troubles=conductor.troubles,
                verdicts=Counter(counts.verdicts),
                last=counts.last,
                consecutive_rejections=counts.consecutive_rejections,
                deadlines_missed=counts.deadlines_missed,
                clamped=counts.clamped,
                faults=sum(counts.faults.values()),
                budget_steps=conductor.budget_steps,
                latency_p50=conductor.latency(50),
                latency_p95=conductor.latency(95),
                latency_p99=conductor.latency(99),
                encoded_ahead=self._encoded_ahead,
                encoding_failed=self.worker.offers_failed,
                own_cpu_p50=float(np.median(self._own_cpu)) if self._own_cpu else math.nan,
            )

    @property
    def fault(self) -> Trouble | None:
        """Why the arm was brought to rest, if it was."""
        return self._session.conductor.fault

    def close(self) -> None:
        """End the inference thread and the outlets. Raises RuntimeError if the inference does not end."""
        # The arm first: no beat streams positions any more, and half a stop would be a jerk. An answer that does not
        # come means nothing: DDS asks for it every 3 s only.
        self._arm.flush(_FLUSH_S)
        ended = self.worker.close(_CLOSE_S)
        self._arm.close()
        if not ended:
            raise RuntimeError(f"the inference has not ended within {_CLOSE_S} s; is the device hung? End the process")

    # --- by the beat -------------------------------------------------------------------------------------------------

    def beat(self) -> None:
        """One look at everything: is a chunk due, is something wrong, is a position due."""
        now_ns = self._now_ns()
        troubles = self._troubles(now_ns) if self.running else []
        with self._lock:
            conductor = self._session.conductor
            directive = conductor.tick(now_ns, self._settings, troubles)
            self._send(directive.stop, now_ns)
            if directive.request is not None:
                self.worker.submit(partial(self._session.pipeline.sample, directive.request))
            self._arm.beat(now_ns)
            due_in, text = conductor.due_in(now_ns), conductor.instruction
        self._see_fault()
        if directive.refusal is not None:
            self._conclude(directive.refusal, now_ns)
        self._soon = text if due_in * self._session.embodiment.fps < _AHEAD_STEPS else ""
        self._offer_to_encode()

    def _offer_to_encode(self) -> None:
        """By two threads: of two offers at once the worker takes one, and the other thread comes again soon."""
        text = self._soon
        if text and self._fresh_image and self._encode_ahead:
            ahead = partial(self._session.pipeline.encode_ahead, text, self._settings.sampling)
            self._fresh_image = not self.worker.offer(ahead)
            self._encoded_ahead += not self._fresh_image

    def _troubles(self, now_ns: int) -> list[Trouble]:
        found = [trouble for watch in self._watches for trouble in watch.check(now_ns)]
        # In a dry run somebody else may drive the arm, and no controller need be there.
        return found if self._settings.dry_run else found + self._arm.check(now_ns)

    def _send(self, trajectory: Trajectory | None, now_ns: int) -> None:
        if trajectory is None:
            return
        course = self._session.conductor.course
        assert course is not None  # the conductor follows what it hands out
        self._arm.send(trajectory, course.at(now_ns), now_ns)

    def _see_fault(self) -> None:
        kinds = {trouble.fault for trouble in self._session.conductor.troubles}
        if kinds != self._kinds_of_trouble:
            self._kinds_of_trouble = kinds
            self._on_fault()
        before, fault = self._fault, self._session.conductor.fault
        if fault == before:
            return
        self._fault = fault
        if fault is None:
            self._log.info("the fault is over")
        else:
            self._log.error(f"the arm is brought to rest ({fault.fault.name.lower()}): {fault.reason}")
        self._on_fault()

    # --- by the inference thread -------------------------------------------------------------------------------------

    def _on_result(self, result: object, error: BaseException | None) -> None:
        if error is not None:
            # The pipeline turns what can go wrong into a refusal; this is a defect, and the next beat tries again.
            self._log.error(f"the inference thread failed: {error!r}", throttle_duration_sec=1.0)
            with self._lock:
                self._session.conductor.abandon()
            return
        sampled = cast(Sampled, result)
        with self._lock:
            now_ns = self._now_ns()
            # The settings of the last tick are some milliseconds old: too old for one who has switched to a dry run.
            outcome = self._session.conductor.deliver(sampled, now_ns, self._settings.dry_run)
            if outcome is not None and outcome.sent:
                self._send(outcome.trajectory, now_ns)
        if outcome is None:
            return
        self._conclude(outcome, now_ns)
        if outcome.chunk is not None:
            with self._lock:
                self._own_cpu.append(sampled.own_cpu())

    def _conclude(self, outcome: Outcome, now_ns: int) -> None:
        self._log_change(outcome.decision)
        self._tell(outcome, now_ns)

    def _log_change(self, decision: Decision) -> None:
        if decision.verdict is self._last_verdict:
            return  # said once when it begins; the counts are in /diagnostics
        self._last_verdict = decision.verdict
        if decision.verdict is Verdict.ACCEPTED:
            self._log.info("chunks are accepted again")
        else:
            self._log.warning(f"no chunk sent ({decision.verdict.name.lower()}): {decision.reason}")
