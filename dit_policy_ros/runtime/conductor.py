"""The conductor: when the next chunk is due, how it joins the one in motion, what goes to the arm, when it must stop.

Without ROS and without a clock or a thread of its own: the node calls `tick` a hundred times a second and `deliver`
when a chunk has been sampled, both under one lock; a simulation calls the same functions with its own time.

Timing. Row j of a chunk is due (j + 1) steps after its observation, and the next chunk should take over when
n_action_steps of them have been executed. So it is asked for when what is left of them, by the clock, has shrunk to the
budget: the 95th percentile of the measured latency plus a margin. If it comes late, the arm follows the spare tail of
its chunk, which ends at rest.

Faults. Whatever a watchdog reports while the arm moves becomes the fault: the arm is brought to rest, at once or at the
end of its chunk (`on_fault`), and nothing is sent until the fault is over, by itself once nothing has been wrong for
half a second, or by `resume` (`recovery`). While the arm rests, trouble only holds back the next chunk.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence
from dataclasses import replace

from dit_policy_ros.embodiment import Embodiment
from dit_policy_ros.runtime.beginnings import Beginnings
from dit_policy_ros.runtime.chunking import Chunk, drop_elapsed
from dit_policy_ros.runtime.course import JITTER_NS, Course
from dit_policy_ros.runtime.decisions import Counts, Directive, Outcome, Settings
from dit_policy_ros.runtime.faults import Fault, Trouble
from dit_policy_ros.runtime.gate import Decision, Gate, Verdict
from dit_policy_ros.runtime.joining import blend, seam
from dit_policy_ros.runtime.messages import MessageError
from dit_policy_ros.runtime.observations import ObservationBuffer, ObservationError
from dit_policy_ros.runtime.pipeline import Request, Sampled
from dit_policy_ros.runtime.trajectory import Point, Trajectory, stop

QUIET_NS = 500_000_000  # nothing may have been wrong for so long before the arm moves again by itself
_KEPT_LATENCIES = 200
_STALL_NS = 200_000_000  # as long as the guard waits by default: from then on it may have stopped the arm
_EVEN_AT_REST = (Fault.REJECTIONS, Fault.INFERENCE)  # not to be waited out, wherever the arm has come to rest meanwhile
# After these a resting arm, and its controller's reference with it, may be anywhere.
_MOVED_BY_OTHERS = (Fault.FOREIGN_COMMAND, Fault.GUARD, Fault.CLOCK, Fault.STALLED)
_INPUT_VERDICTS = (Verdict.INPUT_MISSING, Verdict.INPUT_STALE, Verdict.INPUT_SKEWED, Verdict.INPUT_INVALID)
_NS = 1_000_000_000


class Conductor:
    """See the module. All times are of the clock that stamps the observations; calls must not overlap."""

    def __init__(self, embodiment: Embodiment, gate: Gate, observations: ObservationBuffer) -> None:
        self._embodiment = embodiment
        self._gate = gate
        self._beginnings = Beginnings(gate, observations)
        self._epoch = 0
        self._running = False
        self._latencies: deque[float] = deque(maxlen=_KEPT_LATENCIES)
        self._latency_p95 = 0.0
        self.instruction = ""
        self._forget_motion()
        self.counts = Counts()

    def _forget_motion(self) -> None:
        self.course: Course | None = None
        self.chunk: Chunk | None = None
        self.fault: Trouble | None = None
        self._settings = Settings(n_action_steps=1)
        self._in_flight: Request | None = None
        self._instruction_changed = False
        self._takeover_ns: int | None = None  # when the next chunk should take over; None: as soon as it can be had
        self._retry_ns: int | None = None  # not before then, after a refusal
        self._last_tick_ns: int | None = None
        self._troubles: list[Trouble] = []
        self._troubled_ns = 0  # the last moment at which anything was wrong
        self._sequence = 0
        self._valid_from = 0  # chunks of earlier requests are void

    # --- start, stop, instruction -------------------------------------------------------------------------------------

    @property
    def running(self) -> bool:
        """Whether chunks are asked for."""
        return self._running

    def start(self, now_ns: int) -> None:
        """Begin, with the arm taken to be at rest where it is measured."""
        self._forget_motion()
        self.counts = Counts()
        self._latencies.clear()
        self._latency_p95 = 0.0
        self._running = True
        self._epoch += 1
        self._last_tick_ns = now_ns

    def halt(self, now_ns: int) -> Trajectory | None:
        """End; the trajectory that brings the arm to rest, if it moves. What is in flight will not be sent."""
        stopping = self._bring_to_rest(now_ns)
        self._running = False
        self._epoch += 1
        self._in_flight = None
        return stopping

    def rest(self, now_ns: int) -> Trajectory | None:
        """Forget the instruction and bring the arm to rest, as `halt`; the next instruction starts it again."""
        self.instruct("")
        return self._bring_to_rest(now_ns)

    def instruct(self, text: str) -> None:
        """Follow another instruction from the next seam on: what is in motion, or sampled, of the old one is void."""
        if text != self.instruction:
            self.instruction = text
            self._instruction_changed = True

    def resume(self) -> str | None:
        """End the fault; or why that cannot be, in a sentence."""
        if self.fault is None:
            return "there is no fault to resume from"
        lasting = [trouble for trouble in self._troubles if trouble.fault is not Fault.REJECTIONS]
        if lasting:
            return f"cannot resume yet: {lasting[0].reason}"
        self._recover()
        return None

    @property
    def troubles(self) -> tuple[Trouble, ...]:
        """What was wrong at the latest tick, whether it became the fault or only holds back the next chunk."""
        return tuple(self._troubles) if self._running else ()

    def moving(self, now_ns: int) -> bool:
        """Whether the controllers have something left to follow."""
        return self.course is not None and now_ns < self.course.end_ns

    # --- timing -------------------------------------------------------------------------------------------------------

    @property
    def budget(self) -> float:
        """How long before it should take over a chunk is asked for, s."""
        return self._latency_p95 + self._settings.budget_margin

    @property
    def budget_steps(self) -> float:
        """The same in steps of a chunk."""
        return self.budget * self._embodiment.fps * self._settings.speed_scale

    def latency(self, percentile: float) -> float:
        """Percentile of the latest latencies, from asking for a chunk to having it, s; NaN before the first."""
        ordered = sorted(self._latencies)  # numpy's percentile costs ten times as much
        return ordered[math.ceil(percentile / 100 * (len(ordered) - 1))] if ordered else float("nan")

    def due_in(self, now_ns: int) -> float:
        """Time until the next chunk is asked for, s; at most 0 if it is due. Infinite while none can be."""
        if not self._running or self._in_flight is not None or not self.instruction:
            return float("inf")
        if self._instruction_changed or self._takeover_ns is None:
            due_ns = now_ns
        else:
            due_ns = self._takeover_ns - round(self.budget * _NS)
        return (max(due_ns, self._retry_ns or due_ns) - now_ns) / _NS

    # --- tick ---------------------------------------------------------------------------------------------------------

    def tick(self, now_ns: int, settings: Settings, troubles: Sequence[Trouble] = ()) -> Directive:
        """What is to be done now; `troubles` is what the watchdogs see at this moment."""
        if not self._running:
            return Directive()
        self._settings = settings
        stopping = self._watch(now_ns, self._take_note(now_ns, troubles))
        if stopping is not None:
            return Directive(stop=stopping)
        others = any(self._sees(fault) for fault in _MOVED_BY_OTHERS)
        if (others or settings.dry_run) and not self.moving(now_ns):
            self.course = None
        return self._next(now_ns)

    def _take_note(self, now_ns: int, troubles: Sequence[Trouble]) -> int:
        """Of the troubles, and of what the clock did since the last tick; returns when the arm was last known to move.

        That is now, unless this node stood still: an arm whose course ended meanwhile was perhaps stopped by the guard.
        """
        told = self._sees(Fault.CLOCK)
        self._troubles = [*troubles, *self._own_troubles(now_ns)]
        jumped = self._sees(Fault.CLOCK) and not told  # a watchdog tells of one jump for some time
        assert self._last_tick_ns is not None
        before_ns, self._last_tick_ns = self._last_tick_ns, now_ns
        if jumped or now_ns < before_ns:
            if self.course is not None:  # the controllers go on from where they were at the last tick
                self.course = self.course.shifted(now_ns - before_ns)
            self._start_afresh(now_ns)
        elif now_ns - before_ns > _STALL_NS:
            seconds = (now_ns - before_ns) / _NS
            reason = f"this node stood still for {seconds:.2f} s: was its process suspended, or starved?"
            self._troubles.insert(0, Trouble(Fault.STALLED, reason))
            self._start_afresh(now_ns)
            return before_ns
        return now_ns

    def _sees(self, fault: Fault) -> bool:
        return any(trouble.fault is fault for trouble in self._troubles)

    def _own_troubles(self, now_ns: int) -> list[Trouble]:
        found = []
        back_ns = (self._last_tick_ns or 0) - now_ns
        if back_ns > JITTER_NS:  # however little it is: the streams' stamps now come a second time
            found.append(Trouble(Fault.CLOCK, f"the clock went back by {back_ns / _NS:.3f} s: was the time set?"))
        limit = self._settings.inference_timeout
        if self._in_flight is not None and now_ns - self._in_flight.made_ns > limit * _NS:
            waited = (now_ns - self._in_flight.made_ns) / _NS
            reason = f"chunk {self._in_flight.sequence} was asked for {waited:.2f} s ago, allowed are {limit} s"
            found.append(Trouble(Fault.INFERENCE, f"{reason}; is the device busy or hung?"))
        most = self._settings.max_consecutive_rejections
        if self.fault is None and self.counts.consecutive_rejections >= most:
            reason = f"{self.counts.consecutive_rejections} chunks in a row were refused, the last one: "
            found.append(Trouble(Fault.REJECTIONS, reason + self.counts.last.reason))
        return found

    def _watch(self, now_ns: int, moved_ns: int) -> Trajectory | None:
        """Turn trouble into the fault, or end the fault; the stop that an arm needs which moved at moved_ns."""
        if self._troubles:
            self._troubled_ns = now_ns
            lasting = any(trouble.fault in _EVEN_AT_REST for trouble in self._troubles)
            if self.fault is None and (self.moving(moved_ns) or lasting):
                self.fault = self._troubles[0]
                self.counts.faults[self.fault.fault] += 1
                self._valid_from = self._sequence
                if self._settings.on_fault == "stop":
                    return self._bring_to_rest(now_ns, moved_ns)
        elif self.fault is not None and self._settings.recovery == "automatic":
            # A clock that went back makes the quiet time begin anew.
            self._troubled_ns = min(self._troubled_ns, now_ns)
            if now_ns - self._troubled_ns >= QUIET_NS:
                self._recover()
        return None

    def _recover(self) -> None:
        self.fault = None
        if self._last_tick_ns is not None and not self.moving(self._last_tick_ns):
            # Meanwhile the controller may have been restarted, or the arm moved by other hands.
            self.course = None
        self.counts.consecutive_rejections = 0
        self._takeover_ns = self._retry_ns = None

    def _start_afresh(self, now_ns: int) -> None:
        """No time noted before means anything any more, and no chunk asked for then."""
        self._takeover_ns = self._retry_ns = None
        self._valid_from = self._sequence
        if self._in_flight is not None:
            self._in_flight = replace(self._in_flight, made_ns=now_ns)

    def _next(self, now_ns: int) -> Directive:
        if not self.instruction:
            return self._without_instruction(now_ns)
        if self.due_in(now_ns) > 0:
            return Directive()
        # Trouble with an input is left to the pipeline, whose refusal tells it on ~/action_chunk; all other trouble,
        # and a fault not yet recovered from, keep the policy from being asked.
        only_inputs = bool(self._troubles) and all(trouble.fault is Fault.INPUT for trouble in self._troubles)
        if (self._troubles or self.fault is not None) and not only_inputs:
            return Directive()
        request = self._request(now_ns)
        self._in_flight = request
        self._instruction_changed = False
        return Directive(request=request)

    def _without_instruction(self, now_ns: int) -> Directive:
        if self._in_flight is not None or now_ns < (self._retry_ns or now_ns):
            return Directive()
        topic = self._embodiment.instruction_topic
        reason = f"no instruction: publish one on '{topic}', or call ~/set_instruction"
        outcome = Outcome(self._request(now_ns), Decision(Verdict.INPUT_MISSING, reason))
        self._retry_ns = now_ns + _NS // self._embodiment.fps
        self._count(outcome.decision)
        return Directive(refusal=outcome)

    def _request(self, now_ns: int) -> Request:
        settings = self._settings
        request = Request(
            epoch=self._epoch,
            sequence=self._sequence,
            made_ns=now_ns,
            instruction=self.instruction,
            n_action_steps=settings.n_action_steps,
            step_duration=1.0 / self._embodiment.fps / settings.speed_scale,
            sampling=settings.sampling,
            joining=settings.joining,
            course=self.course if self.moving(now_ns) else None,
            keep_rest=not self._instruction_changed,
            ready_in=self.budget,
        )
        self._sequence += 1
        return request

    # --- deliver ------------------------------------------------------------------------------------------------------

    def deliver(self, sampled: Sampled, now_ns: int, dry_run: bool = False) -> Outcome | None:
        """Decide on a chunk that has been sampled; None if the motion it was meant for is over.

        dry_run: nothing is to be sent from this moment on, whatever the settings of the last tick say.
        """
        request = sampled.request
        if not self._running or request.epoch != self._epoch:
            return None
        made_ns = self._in_flight.made_ns if self._in_flight is not None else request.made_ns
        self._in_flight = None
        outcome = self._outcome(sampled, now_ns, dry_run or self._settings.dry_run)
        if sampled.chunk is not None:
            self._note_latency((now_ns - made_ns) / _NS)
        if outcome.trajectory is None:
            superseded = outcome.decision.verdict is Verdict.SUPERSEDED
            self._retry_ns = None if superseded else now_ns + _NS // self._embodiment.fps
            # An arm that rests may wait for its cameras as long as it takes.
            if outcome.decision.verdict not in _INPUT_VERDICTS or self.moving(now_ns):
                self.counts.consecutive_rejections += 1
        self._count(outcome.decision)
        return outcome

    def abandon(self) -> None:
        """What is in flight will never be delivered."""
        self._in_flight = None

    def _note_latency(self, seconds: float) -> None:
        self._latencies.append(max(0.0, seconds))
        self._latency_p95 = self.latency(95)

    def _count(self, decision: Decision) -> None:
        self.counts.verdicts[decision.verdict] += 1
        self.counts.last = decision

    def _outcome(self, sampled: Sampled, now_ns: int, dry_run: bool) -> Outcome:
        request, chunk = sampled.request, sampled.chunk
        outcome = Outcome(request, Decision(Verdict.ACCEPTED), chunk, steps_committed=sampled.steps_committed)
        if chunk is None:
            assert sampled.refusal is not None
            return replace(outcome, decision=sampled.refusal)
        void = self._void(request, now_ns)
        if void is not None:
            return replace(outcome, decision=void)
        return self._admit(outcome, chunk, now_ns, dry_run)

    def _void(self, request: Request, now_ns: int) -> Decision | None:
        """Why a request's chunk may not be sent, however good it is."""
        if self._instruction_changed:
            reason = f"the instruction changed to '{self.instruction}' while the chunk was sampled"
            return Decision(Verdict.SUPERSEDED, reason)
        if self.fault is not None:
            reason = f"the arm was brought to rest while the chunk was sampled: {self.fault.reason}"
            return Decision(Verdict.SUPERSEDED, reason)
        if request.sequence < self._valid_from:
            reason = "while the chunk was sampled the arm was brought to rest, or the clock jumped; that is over by now"
            return Decision(Verdict.SUPERSEDED, reason)
        assert self._last_tick_ns is not None
        unseen_ns = now_ns - self._last_tick_ns
        if not -JITTER_NS <= unseen_ns <= _STALL_NS:
            # The next tick will find that the clock jumped, or that this node stood still, and stop the arm.
            reason = f"the watchdogs last looked {unseen_ns / _NS:.2f} s ago, by a clock that may have jumped"
            return Decision(Verdict.SUPERSEDED, reason)
        # Of an arm at rest: it is not set in motion to be stopped at the next tick. That this chunk itself is late is
        # over with it.
        for trouble in self._troubles:
            if trouble.fault is Fault.INPUT:
                return Decision(Verdict.INPUT_INVALID, trouble.reason)
            if trouble.fault is not Fault.INFERENCE:
                return Decision(Verdict.SUPERSEDED, f"trouble came while the chunk was sampled: {trouble.reason}")
        return None

    def _admit(self, outcome: Outcome, chunk: Chunk, now_ns: int, dry_run: bool) -> Outcome:
        try:
            measured = self._beginnings.measured(self.course, now_ns)
        except (ObservationError, MessageError) as error:
            return replace(outcome, decision=Decision(Verdict[error.code], str(error)))
        if outcome.request.course is None:
            # It has rested ever since: whatever stopped it would have made the chunk void.
            chunk = replace(chunk, rested_ns=max(0, now_ns - chunk.observation_stamp_ns))
        rows, times, dropped = drop_elapsed(chunk, now_ns)
        clamped = 0
        if self._settings.clamp:
            rows, clamped = self._gate.clamp(rows)
        course = self.course if self.moving(now_ns) else None
        if outcome.request.joining == "blend" and course is not None and outcome.request.keep_rest:
            rows = blend(rows, chunk.due_times_ns[dropped:], course)
        starts = self._beginnings.of_chunk(self.course, measured, now_ns)
        admission = self._gate.admit(
            rows, times, chunk.joint_names, starts, measured.position, chunk.observation_stamp_ns, now_ns
        )
        trajectory = admission.trajectory
        outcome = replace(
            outcome,
            decision=admission.decision,
            chunk=chunk,
            steps_dropped=dropped,
            trajectory=trajectory,
            sent=trajectory is not None and not dry_run,
            seam=None if trajectory is None or course is None else seam(course, trajectory, now_ns),
            clamped=clamped,
        )
        if trajectory is not None:
            self._adopt(outcome, chunk, trajectory, starts, now_ns)
        return outcome

    def _adopt(
        self, outcome: Outcome, chunk: Chunk, trajectory: Trajectory, starts: Sequence[Point], now_ns: int
    ) -> None:
        """The chunk is accepted: from now on the arm follows it."""
        counts = self.counts
        if self._takeover_ns is not None and now_ns > self._takeover_ns and outcome.request.course is not None:
            counts.deadlines_missed += 1
        if outcome.sent:
            self.course = Course.follow(trajectory, starts[0], now_ns, self.course, starts[1:])
        self.chunk = chunk
        self._takeover_ns = chunk.begin_ns + round(chunk.n_action_steps * chunk.step_duration * _NS)
        self._retry_ns = None
        counts.consecutive_rejections = 0
        counts.clamped += outcome.clamped

    # --- rest ---------------------------------------------------------------------------------------------------------

    def _bring_to_rest(self, now_ns: int, moved_ns: int | None = None) -> Trajectory | None:
        """A stop from where the arm has been told to be; None if it rests, or did at moved_ns if that is given."""
        if not self.moving(now_ns if moved_ns is None else moved_ns):
            return None
        assert self.course is not None
        begins = self._beginnings.of_stop(self.course, self._troubles, now_ns)
        if not begins:
            self.course = None
            return None
        trajectory = stop(self._embodiment.action_joints, begins[0], self._gate.limits, begins[1:])
        self.course = Course.follow(trajectory, begins[0], now_ns, self.course, begins[1:])
        self._takeover_ns = None
        return trajectory
