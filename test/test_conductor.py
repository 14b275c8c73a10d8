"""The conductor: when a chunk is asked for, what is sent, when the arm is stopped and when it goes on."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from dit_policy_ros.embodiment import Embodiment
from dit_policy_ros.runtime.chunking import Chunk
from dit_policy_ros.runtime.conductor import QUIET_NS, Conductor
from dit_policy_ros.runtime.decisions import Directive, Outcome, Settings
from dit_policy_ros.runtime.faults import Fault, Trouble
from dit_policy_ros.runtime.gate import Decision, Gate, Verdict
from dit_policy_ros.runtime.observations import ObservationBuffer
from dit_policy_ros.runtime.pipeline import Request, Sampled
from dit_policy_ros.runtime.trajectory import approaches

EMBODIMENT = Embodiment.load(Path(__file__).parents[1] / "config/embodiments/sim_arm.yaml")
HOME = np.array([0.0, -0.4, 0.0, -2.0, 0.0, 2.0, 0.8])
TICK_NS = 10_000_000
STEPS = 16
CAMERA = Trouble(Fault.INPUT, "camera 'wrist' stopped")


class Arm:
    """A conductor with time and an arm that is measured where it has been told to be."""

    def __init__(self, **settings: object) -> None:
        self.now_ns = 50_000_000_000
        self.settings = Settings(**({"n_action_steps": 8, "recovery": "automatic"} | settings))
        self.observations = ObservationBuffer(EMBODIMENT, 1)
        self.gate = Gate(EMBODIMENT)
        self.conductor = Conductor(EMBODIMENT, self.gate, self.observations)
        self.offset = np.zeros(7)  # of the measured arm from the course
        self.conductor.instruct("push")
        self.measure()
        self.conductor.start(self.now_ns)

    def measure(self) -> None:
        course = self.conductor.course
        position = self.offset + (HOME if course is None else course.at(self.now_ns).position)
        stamp = SimpleNamespace(sec=self.now_ns // 10**9, nanosec=self.now_ns % 10**9)
        joints = EMBODIMENT.state.joints
        message = SimpleNamespace(header=SimpleNamespace(stamp=stamp), name=joints, position=position, velocity=[])
        self.observations.add(EMBODIMENT.state.topic, self.now_ns, message)

    def tick(self, *troubles: Trouble) -> Directive:
        self.now_ns += TICK_NS
        self.measure()
        return self.conductor.tick(self.now_ns, self.settings, troubles)

    def ticks(self, seconds: float, *troubles: Trouble) -> list[Directive]:
        return [self.tick(*troubles) for _ in range(round(seconds * 1e9 / TICK_NS))]

    def request(self, within: float = 3.0) -> Request:
        """The next request."""
        for _ in range(round(within * 1e9 / TICK_NS)):
            directive = self.tick()
            if directive.request is not None:
                return directive.request
        raise AssertionError(f"no request within {within} s")

    def sampled(self, request: Request, speed: float = 0.1, latency: float = 0.0, **changes: object) -> Sampled:
        """A chunk of that request, `latency` s later: joint 1 moves at `speed` rad/s from where the arm is."""
        observed_ns = self.now_ns
        start = HOME if self.conductor.course is None else self.conductor.course.at(self.now_ns).position
        self.ticks(latency)
        rows = np.repeat(start[None], STEPS, axis=0)
        rows[:, 0] += speed * request.step_duration * np.arange(1, STEPS + 1)
        fields = {"positions": rows, "inference_duration": latency, "observation_stamp_ns": observed_ns} | changes
        chunk = Chunk(
            sequence=request.sequence,
            joint_names=EMBODIMENT.action_joints,
            step_duration=request.step_duration,
            n_action_steps=request.n_action_steps,
            instruction=request.instruction,
            **fields,
        )
        return Sampled(request, chunk)

    def deliver(self, request: Request, dry_run: bool = False, **chunk: object) -> Outcome | None:
        """What becomes of `sampled` with these arguments."""
        sampled = self.sampled(request, **chunk)
        return self.conductor.deliver(sampled, self.now_ns, dry_run)

    def move(self, latency: float = 0.0) -> Outcome:
        """Get the arm moving."""
        outcome = self.deliver(self.request(), latency=latency)
        assert outcome is not None
        assert outcome.sent, outcome.decision
        return outcome


def refuse(arm: Arm, request: Request) -> Outcome | None:
    return arm.conductor.deliver(Sampled(request, None, Decision(Verdict.INFERENCE_FAILED, "no memory")), arm.now_ns)


@pytest.mark.parametrize(("latency", "margin", "scale"), [(0.0, 0.05, 1.0), (0.25, 0.05, 1.0), (0.25, 0.1, 0.5)])
def test_a_chunk_is_asked_for_when_the_steps_left_fall_to_the_budget(
    latency: float, margin: float, scale: float
) -> None:
    arm = Arm(budget_margin=margin, speed_scale=scale)
    first = arm.move(latency).chunk
    assert first is not None
    request = arm.request(5.0)
    # It should take over 8 steps of 0.1 s (slower by the scale) after the first began.
    expected = 8 * 0.1 / scale - latency - margin
    waited = (arm.now_ns - first.begin_ns) / 1e9
    assert expected <= waited < expected + 0.02
    assert request.step_duration == pytest.approx(0.1 / scale)
    assert request.course is arm.conductor.course
    assert arm.conductor.budget_steps == pytest.approx((latency + margin) * 10 * scale)


def test_one_chunk_at_a_time_and_a_late_one_is_counted() -> None:
    arm = Arm()
    arm.move()
    request = arm.request()
    assert all(directive.request is None for directive in arm.ticks(0.4))
    assert arm.conductor.counts.deadlines_missed == 0
    assert arm.deliver(request, latency=0.3).sent
    assert arm.conductor.counts.deadlines_missed == 1
    assert arm.conductor.latency(50) > 0.1


def test_another_instruction_voids_what_is_sampled_and_what_is_left() -> None:
    arm = Arm()
    arm.move()
    request = arm.request()
    arm.conductor.instruct("pull")
    outcome = arm.deliver(request)
    assert outcome.decision.verdict is Verdict.SUPERSEDED
    assert "'pull'" in outcome.decision.reason
    assert not outcome.sent
    directive = arm.tick()  # at once, not when the budget says so
    assert directive.request.instruction == "pull"
    assert not directive.request.keep_rest
    assert arm.deliver(directive.request).sent
    assert arm.request().keep_rest


def test_without_an_instruction_nothing_is_sampled_and_it_is_said_once_a_step() -> None:
    arm = Arm()
    arm.conductor.instruct("")
    refusals = [directive.refusal for directive in arm.ticks(1.0) if directive.refusal is not None]
    assert 9 <= len(refusals) <= 11
    assert refusals[0].decision.verdict is Verdict.INPUT_MISSING
    assert EMBODIMENT.instruction_topic in refusals[0].decision.reason


def test_trouble_stops_a_moving_arm_from_where_it_has_been_told_to_be() -> None:
    arm = Arm()
    arm.move()
    arm.ticks(0.3)
    reference = arm.conductor.course.at(arm.now_ns + TICK_NS)
    arm.offset = np.full(7, np.nan)  # the sensors fail altogether
    stop = arm.tick(CAMERA).stop
    assert stop is not None
    np.testing.assert_array_equal(stop.velocities[-1], 0.0)
    assert stop.times[-1] <= 0.5
    np.testing.assert_allclose(
        stop.positions[-1], reference.position + reference.velocity * stop.times[-1] / 2, atol=1e-6
    )
    assert arm.conductor.fault == CAMERA
    assert arm.tick(CAMERA).stop is None, "one stop is enough"
    arm.ticks(0.5, CAMERA)
    assert not arm.conductor.moving(arm.now_ns)


def test_finish_chunk_sends_no_stop_and_the_arm_follows_its_chunk_to_rest() -> None:
    arm = Arm(on_fault="finish_chunk")
    end_ns = arm.move() and arm.conductor.course.end_ns
    directives = arm.ticks(2.0, CAMERA)
    assert all(directive.stop is None for directive in directives)
    assert arm.conductor.fault == CAMERA
    assert end_ns < arm.now_ns


def test_trouble_of_an_arm_at_rest_is_not_a_fault_but_holds_chunks_back() -> None:
    arm = Arm()
    nobody = Trouble(Fault.CONTROLLER, "nobody listens")
    assert all(directive == Directive() for directive in arm.ticks(1.0, nobody))
    assert arm.conductor.fault is None
    assert arm.tick().request is not None


def test_automatic_recovery_waits_until_nothing_has_been_wrong_for_a_while() -> None:
    arm = Arm()
    arm.move()
    assert arm.tick(CAMERA).stop is not None
    arm.ticks(0.3)
    asked = arm.tick(CAMERA).request  # whose refusal tells on ~/action_chunk why nothing is sent
    arm.conductor.deliver(Sampled(asked, None, Decision(Verdict.INPUT_STALE, "stale")), arm.now_ns)
    again_ns = arm.now_ns + QUIET_NS
    request = arm.request()
    assert arm.now_ns >= again_ns
    assert arm.deliver(request).sent
    assert arm.conductor.fault is None


def test_manual_recovery_waits_for_resume_and_resume_for_the_end_of_trouble() -> None:
    arm = Arm(recovery="manual")
    assert "no fault" in arm.conductor.resume()
    arm.move()
    arm.tick(CAMERA)
    assert "wrist" in arm.conductor.resume()
    assert all(directive.request is None for directive in arm.ticks(2.0))
    assert arm.conductor.resume() is None
    assert arm.deliver(arm.request()).sent


def test_refused_chunks_in_a_row_stop_the_arm() -> None:
    arm = Arm(max_consecutive_rejections=3, recovery="manual")
    arm.move()
    for _ in range(3):
        assert arm.conductor.fault is None
        assert refuse(arm, arm.request()).decision.verdict is Verdict.INFERENCE_FAILED
    stop = arm.tick().stop
    assert stop is not None
    assert arm.conductor.fault.fault is Fault.REJECTIONS
    assert "3 chunks" in arm.conductor.fault.reason
    assert "no memory" in arm.conductor.fault.reason
    assert arm.conductor.resume() is None
    assert arm.deliver(arm.request()).sent
    assert arm.conductor.counts.consecutive_rejections == 0


def test_a_resting_arm_waits_for_its_cameras_as_long_as_it_takes() -> None:
    arm = Arm(max_consecutive_rejections=3)
    for _ in range(10):
        refusal = Decision(Verdict.INPUT_STALE, "camera 'wrist' is stale")
        arm.conductor.deliver(Sampled(arm.request(), None, refusal), arm.now_ns)
    assert arm.conductor.fault is None
    assert arm.conductor.counts.verdicts[Verdict.INPUT_STALE] == 10


def test_inference_that_hangs_is_a_fault_and_its_late_chunk_is_not_sent() -> None:
    arm = Arm(inference_timeout=0.2)
    arm.move()
    request = arm.request()
    stops = [directive.stop for directive in arm.ticks(0.3) if directive.stop is not None]
    assert len(stops) == 1
    assert arm.conductor.fault.fault is Fault.INFERENCE
    outcome = arm.deliver(request)
    assert outcome.decision.verdict is Verdict.SUPERSEDED
    assert not outcome.sent


@pytest.mark.parametrize("recovery", ["automatic", "manual"])
def test_a_chunk_asked_for_before_a_fault_is_not_sent_after_it(recovery: str) -> None:
    arm = Arm(recovery=recovery)
    arm.move()
    request = arm.request()
    assert arm.tick(CAMERA).stop is not None
    if recovery == "manual":
        arm.tick()
        assert arm.conductor.resume() is None
        assert arm.conductor.moving(arm.now_ns), "still braking"
    else:
        arm.ticks(0.6)
    assert arm.conductor.fault is None
    outcome = arm.deliver(request)
    assert outcome.decision.verdict is Verdict.SUPERSEDED
    assert not outcome.sent
    assert arm.deliver(arm.request()).sent


@pytest.mark.parametrize("seconds", [0.4, -0.4])
def test_nothing_is_sent_before_the_watchdogs_have_looked(seconds: float) -> None:
    arm = Arm()
    arm.move()
    request = arm.request()
    arm.now_ns += round(seconds * 1e9)  # this node stood still, or the clock went back: the inference is told first
    arm.measure()
    outcome = arm.deliver(request)
    assert outcome.decision.verdict is Verdict.SUPERSEDED
    assert f"{seconds:.2f} s ago" in outcome.decision.reason
    assert not outcome.sent


@pytest.mark.parametrize(
    ("trouble", "verdict"),
    [
        (CAMERA, Verdict.INPUT_INVALID),
        (Trouble(Fault.FOREIGN_COMMAND, "somebody else commands the wrist"), Verdict.SUPERSEDED),
        (Trouble(Fault.CONTROLLER, "nobody listens to the wrist"), Verdict.SUPERSEDED),
    ],
)
def test_an_arm_at_rest_is_not_set_in_motion_while_anything_is_wrong(trouble: Trouble, verdict: Verdict) -> None:
    arm = Arm()
    request = arm.request()
    arm.tick(trouble)
    outcome = arm.deliver(request)
    assert outcome.decision.verdict is verdict
    assert "wrist" in outcome.decision.reason
    assert not outcome.sent
    assert not arm.conductor.moving(arm.now_ns)
    assert arm.deliver(arm.request()).sent


@pytest.mark.parametrize("dry_run", [False, True])
def test_where_others_moved_the_resting_arm_chunks_begin_where_it_is(dry_run: bool) -> None:
    arm = Arm(recovery="manual")
    arm.move()
    arm.conductor.rest(arm.now_ns)
    arm.ticks(1.0)
    arm.offset[0] = 0.8
    if dry_run:
        arm.settings = replace(arm.settings, dry_run=True)
        arm.tick()
        arm.settings = replace(arm.settings, dry_run=False)
    else:
        arm.tick(Trouble(Fault.FOREIGN_COMMAND, "somebody else commands the arm"))
    arm.conductor.instruct("push")
    request = arm.request()
    here, _ = arm.observations.measured(EMBODIMENT.action_joints, arm.now_ns)
    outcome = arm.deliver(request, positions=np.repeat(here[None], STEPS, axis=0))
    assert outcome.sent, outcome.decision


def test_a_dry_run_begins_with_the_change_and_not_with_the_next_tick() -> None:
    arm = Arm()
    outcome = arm.deliver(arm.request(), dry_run=True)
    assert outcome.decision.accepted
    assert not outcome.sent


def test_a_dry_run_decides_everything_and_sends_nothing() -> None:
    arm = Arm(dry_run=True)
    first = arm.deliver(arm.request())
    assert first.decision.accepted
    assert first.trajectory is not None
    assert not first.sent
    assert arm.conductor.course is None
    began_ns = arm.now_ns
    assert arm.deliver(arm.request()).decision.accepted
    assert (arm.now_ns - began_ns) / 1e9 > 0.7, "chunks follow each other as if the arm moved"
    assert all(directive.stop is None for directive in arm.ticks(0.2, CAMERA))


def test_a_chunk_of_an_earlier_start_is_never_sent() -> None:
    arm = Arm()
    arm.move()
    request = arm.request()
    stop = arm.conductor.halt(arm.now_ns)
    assert stop is not None
    assert arm.deliver(request) is None
    arm.conductor.start(arm.now_ns)
    assert arm.deliver(request) is None
    assert arm.tick().request is not None


def test_rest_stops_the_arm_until_there_is_another_instruction() -> None:
    arm = Arm()
    arm.move()
    assert arm.conductor.rest(arm.now_ns) is not None
    assert all(directive.request is None for directive in arm.ticks(1.0))
    arm.conductor.instruct("push")
    assert arm.request().instruction == "push"


@pytest.mark.parametrize("jump_s", [-30.0, 30.0])
def test_when_the_clock_jumps_the_arm_stops_from_where_it_was(jump_s: float) -> None:
    arm = Arm()
    arm.move()
    arm.ticks(0.3)
    reference = arm.conductor.course.at(arm.now_ns)
    arm.now_ns += round(jump_s * 1e9)
    stop = arm.tick(Trouble(Fault.CLOCK, "the clock jumped")).stop
    np.testing.assert_allclose(
        stop.positions[-1], reference.position + reference.velocity * stop.times[-1] / 2, atol=0.005
    )
    assert arm.conductor.fault.fault is Fault.CLOCK
    assert arm.deliver(arm.request()).sent


def test_a_clock_that_goes_back_a_little_stops_the_arm_although_no_watchdog_minds() -> None:
    arm = Arm()
    arm.move()
    arm.ticks(0.3)
    reference = arm.conductor.course.at(arm.now_ns)
    arm.now_ns -= 200_000_000 + TICK_NS
    stop = arm.tick().stop
    np.testing.assert_allclose(
        stop.positions[-1], reference.position + reference.velocity * stop.times[-1] / 2, atol=0.005
    )
    assert arm.conductor.fault.fault is Fault.CLOCK
    assert "0.200 s" in arm.conductor.fault.reason


@pytest.mark.parametrize("jump_s", [-30.0, 30.0])
def test_the_arm_is_known_to_move_on_whatever_the_clock_says(jump_s: float) -> None:
    arm = Arm(on_fault="finish_chunk")
    arm.move()
    arm.ticks(0.3)
    before, left_ns = arm.conductor.course.at(arm.now_ns), arm.conductor.course.end_ns - arm.now_ns
    arm.now_ns += round(jump_s * 1e9)
    arm.tick(Trouble(Fault.CLOCK, "the clock jumped"))
    assert arm.conductor.course.end_ns - arm.now_ns == left_ns
    np.testing.assert_array_equal(arm.conductor.course.at(arm.now_ns).velocity, before.velocity)
    assert arm.conductor.halt(arm.now_ns) is not None


def test_an_arm_that_does_not_follow_is_stopped_where_it_is() -> None:
    arm = Arm()
    arm.move()
    arm.ticks(0.3)
    arm.offset = np.full(7, 0.5)
    stop = arm.tick(Trouble(Fault.CONTROLLER, "0.5 rad from its reference")).stop
    measured, _ = arm.observations.measured(EMBODIMENT.action_joints, arm.now_ns)
    np.testing.assert_allclose(stop.positions[-1], measured, atol=0.05)


@pytest.mark.parametrize("far", [0.1, 0.35])
def test_a_stop_keeps_the_speed_limit_wherever_a_controller_begins_it(far: float) -> None:
    arm = Arm()
    speeds = np.minimum(1.5, 0.3 * np.arange(1, STEPS + 1))
    rows = np.repeat(HOME[None], STEPS, axis=0)
    rows[:, 0] += np.cumsum(speeds) * 0.1
    assert arm.deliver(arm.request(), positions=rows).sent
    arm.ticks(0.6)
    arm.gate.max_start_distance = far  # from there on the stop is planned from the measured arm
    arm.offset[0] = -0.2
    reference = arm.conductor.course.at(arm.now_ns + TICK_NS)
    stop = arm.tick(Trouble(Fault.CONTROLLER, "silent")).stop
    measured = replace(reference, position=reference.position + arm.offset)
    limits = [EMBODIMENT.limits[joint].velocity for joint in EMBODIMENT.action_joints]
    assert reference.velocity[0] == pytest.approx(1.5, abs=0.05)
    assert (approaches([reference, measured], stop).speed <= limits).all()


def test_only_what_passes_the_gate_is_sent_and_clamping_is_counted() -> None:
    arm = Arm()
    rows = np.repeat(HOME[None], STEPS, axis=0)
    rows[5:, 3] = 0.0  # the limit is -0.0698; from -2 that is too fast as well
    refused = arm.deliver(arm.request(), positions=rows)
    assert refused.decision.verdict is Verdict.POSITION_LIMIT
    assert refused.trajectory is None
    rows = np.repeat(HOME[None], STEPS, axis=0)
    rows[:, 5] = np.linspace(2.0, 2.2, STEPS)
    rows[8:, 5] += 1.6  # beyond 3.7525 only at the very end
    arm.settings = Settings(8, clamp=True, recovery="automatic")
    outcome = arm.deliver(arm.request(), positions=rows)
    assert outcome.clamped > 0


def test_a_seam_is_measured_only_against_a_chunk_in_motion() -> None:
    arm = Arm()
    assert arm.move().seam is None
    seam = arm.deliver(arm.request(), speed=0.3).seam
    # 0.3 after 0.1 rad/s, the first point in a step: the difference of the ways grows to 0.02 rad and 0.2 rad/s, and
    # its velocity is (0.8 u - 0.6 u^2) rad/s at the share u of that time.
    assert seam.position == pytest.approx(0.02, abs=2e-4)
    assert seam.velocity == pytest.approx(0.8 * 0.75 - 0.6 * 0.75**2, abs=2e-3)


def test_the_steps_that_pass_while_a_moving_arms_chunk_is_sampled_are_dropped() -> None:
    arm = Arm()
    assert arm.move(latency=0.27).steps_dropped == 0, "from rest, the first step is still to come"
    request = arm.request()
    observed_ns = arm.now_ns
    outcome = arm.deliver(request, latency=0.27)
    assert outcome.steps_dropped == 3, (
        "those of 0.1 and 0.2 s, and that of 0.3 s, which would be due within half a step"
    )
    assert outcome.trajectory.times[0] == pytest.approx((observed_ns + 4e8 - arm.now_ns) / 1e9)


def test_after_standing_still_the_arm_is_stopped_only_where_it_is_measured() -> None:
    arm = Arm()
    arm.move()
    arm.ticks(0.3)
    arm.now_ns += 400_000_000  # the process was suspended; meanwhile the guard has stopped the arm somewhere
    assert arm.conductor.tick(arm.now_ns, arm.settings).stop is None, "nobody knows where it is"
    assert arm.conductor.fault.fault is Fault.STALLED
    assert "0.40 s" in arm.conductor.fault.reason
    assert not arm.conductor.moving(arm.now_ns)

    arm = Arm()
    arm.move()
    arm.ticks(0.3)
    arm.now_ns += 400_000_000
    arm.offset = np.full(7, 0.1)
    stop = arm.tick().stop
    measured, _ = arm.observations.measured(EMBODIMENT.action_joints, arm.now_ns)
    np.testing.assert_allclose(stop.positions[-1], measured, atol=0.02)
    assert arm.conductor.fault.fault is Fault.STALLED


def test_inference_that_hangs_is_a_fault_even_when_the_arm_has_come_to_rest_meanwhile() -> None:
    arm = Arm(inference_timeout=3.0, recovery="manual")
    arm.move()
    request = arm.request()
    arm.ticks(2.5)
    assert not arm.conductor.moving(arm.now_ns)
    assert arm.conductor.fault is None
    arm.ticks(1.0)
    assert arm.conductor.fault.fault is Fault.INFERENCE
    assert "ago" in arm.conductor.resume()
    assert arm.deliver(request).decision.verdict is Verdict.SUPERSEDED
    arm.tick()
    assert arm.conductor.resume() is None
    assert arm.deliver(arm.request()).sent
