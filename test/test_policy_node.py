"""The policy node as a process of its own, driven over DDS: what it sends, and all that it refuses to act on."""

from __future__ import annotations

import itertools
import math
import shutil
import signal
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import yaml
from policy_fixtures import INSTRUCTIONS, demo_config, make_stats
from safetensors.torch import load_file, save_file

pytest.importorskip("rclpy", reason="ROS 2 is not installed; make setup brings it")

from action_msgs.msg import GoalStatus
from dit_policy_msgs.action import ExecuteInstruction
from dit_policy_msgs.msg import PolicyStatus
from rclpy.qos import DurabilityPolicy
from robot import LATCHED, Robot, wait_for
from std_msgs.msg import String
from trajectory_msgs.msg import JointTrajectory

from dit_policy_ros.embodiment import Embodiment, JointLimits
from dit_policy_ros.nodes.account import NOTHING_DONE
from dit_policy_ros.nodes.parameters import DECLARATIONS, markdown_table
from dit_policy_ros.nodes.processes import Child
from dit_policy_ros.nodes.session import contradiction
from dit_policy_ros.policy.checkpoint import save_checkpoint
from dit_policy_ros.policy.modeling import MultitaskDiTPolicy
from dit_policy_ros.policy.tiny_clip import make_tiny_clip
from dit_policy_ros.runtime.faults import Fault, Trouble
from dit_policy_ros.runtime.gate import Verdict

pytestmark = pytest.mark.ros

EMBODIMENT = Path(__file__).parents[1] / "config/embodiments/sim_arm.yaml"
STEP_S = 0.1
TRANSITIONS = {"unconfigured": [], "inactive": ["configure"], "active": ["configure", "activate"]}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An untrained policy whose actions stay within 2 mrad of the measured joints, so that all of them are safe."""
    folder = tmp_path_factory.mktemp("checkpoint")
    make_tiny_clip(folder / "clip")
    config = demo_config(str(folder / "clip"), n_obs_steps=2, tasks=INSTRUCTIONS)
    stats = make_stats(config)
    stats["action"] = {"min": [-0.002] * 7, "max": [0.002] * 7, "mean": [0.0] * 7, "std": [0.001] * 7}
    save_checkpoint(folder / "policy", MultitaskDiTPolicy(config, stats), EMBODIMENT.read_text(), "a test's")
    return folder / "policy"


def start_node(log: Path, namespace: str, **parameters: object) -> Child:
    settings = {"warmup_chunks": 1, "recovery": "automatic", **parameters}
    arguments = [word for name, value in settings.items() for word in ("-p", f"{name}:={value}")]
    command = [
        sys.executable,
        "-m",
        "dit_policy_ros.nodes.policy_node",
        "--ros-args",
        "-r",
        f"__ns:={namespace}",
    ]
    return Child("policy node", [*command, *arguments], log, {"OMP_NUM_THREADS": "1"})


def is_stop(trajectory: JointTrajectory) -> bool:
    """A stop is short; a chunk is 1.3 s or longer."""
    end = trajectory.points[-1].time_from_start
    return end.sec + end.nanosec * 1e-9 < 1.0 and list(trajectory.points[-1].velocities) == [0.0] * 7


@pytest.fixture(scope="module")
def robot() -> Iterator[object]:
    robot = Robot(Embodiment.load(EMBODIMENT))
    yield robot
    robot.close()


@pytest.fixture(scope="module")
def node(checkpoint: Path, robot, tmp_path_factory: pytest.TempPathFactory) -> Iterator[object]:
    child = start_node(tmp_path_factory.mktemp("log") / "policy_node.log", "/", checkpoint=checkpoint)
    try:
        assert robot.transition("configure"), child.last_lines()
        yield child
    finally:
        assert child.stop() == 0
        assert "Traceback" not in child.log.read_text()


@pytest.fixture
def active(node, robot) -> Iterator[object]:
    """An active node with an instruction, all its inputs in order; put back in order afterwards."""

    robot.instruct(INSTRUCTIONS[0])
    assert robot.transition("activate")
    robot.wait_for_verdict(Verdict.ACCEPTED)  # of this activation: an earlier one's may still be the last heard
    yield robot
    robot.mend()
    assert robot.transition("deactivate")


def refused(robot, verdict: Verdict) -> str:
    """The reason of a refusal, after proof that nothing but a stop was sent to the controller from then on."""

    def sent() -> int:
        return sum(not is_stop(trajectory) for trajectory in robot.trajectories)

    chunk = robot.wait_for_verdict(verdict)
    before = sent()
    robot.wait_for_verdict(verdict)
    robot.wait_for_verdict(verdict)
    assert sent() == before
    return chunk.reason


def test_the_document_lists_the_parameters_as_they_are_declared() -> None:
    document = (Path(__file__).parents[1] / "docs/node.md").read_text()
    assert markdown_table() in document, "run markdown_table() of nodes/parameters.py and paste it into docs/node.md"


def test_chunks_go_out_as_the_controller_wants_them(active) -> None:
    robot = active
    wanted = robot.wait_for_verdict(Verdict.ACCEPTED)
    trajectory = robot.trajectories[-1]
    times = [point.time_from_start.sec + point.time_from_start.nanosec * 1e-9 for point in trajectory.points]
    assert trajectory.joint_names == list(robot.embodiment.action_joints)
    assert (trajectory.header.stamp.sec, trajectory.header.stamp.nanosec) == (0, 0)
    assert times[0] > 0
    np.testing.assert_allclose(np.diff(times)[:-1], STEP_S, atol=1e-6)
    assert times[-1] - times[-2] >= STEP_S - 1e-6  # the last one brakes, and may take longer for it
    assert list(trajectory.points[-1].velocities) == [0.0] * 7
    assert any(abs(v) > 0 for v in trajectory.points[0].velocities)
    # horizon 16 with n_obs_steps 2 leaves 15 rows; those not dropped are all sent, the tail behind n_action_steps too
    assert (wanted.steps, wanted.dims) == (15, 7)
    assert len(trajectory.points) == wanted.steps - wanted.steps_dropped


def test_positions_sent_are_near_the_arm_whatever_order_its_joints_come_in(active) -> None:
    robot = active
    robot.positions |= {name: 0.1 * number for number, name in enumerate(robot.embodiment.state.joints[:3], start=1)}
    measured = [robot.positions[name] for name in robot.embodiment.action_joints]

    def last_error() -> float:
        return float(np.abs(np.array(robot.trajectories[-1].points[0].positions) - measured).max())

    wait_for(lambda: last_error() < 0.01, "the first step follows the measured joints")


def test_chunks_follow_each_other_n_action_steps_apart_and_it_is_live(active) -> None:
    robot = active

    def interval_s(steps: int) -> float:
        stamps = []
        while len(stamps) < 4:
            chunk = robot.wait_for_verdict(Verdict.ACCEPTED)
            if chunk.n_action_steps == steps:
                stamps.append(chunk.observation_stamp.sec + chunk.observation_stamp.nanosec * 1e-9)
        return float(np.median(np.diff(stamps)))

    # From observation to observation it is n_action_steps less the budget, which is the machine's business.
    assert robot.set_parameter("n_action_steps", 3).successful
    short = interval_s(3)
    assert robot.set_parameter("n_action_steps", 9).successful
    assert interval_s(9) > short + 3 * STEP_S
    assert robot.set_parameter("n_action_steps", 0).successful


def test_contradictory_parameters_are_rejected_with_a_sentence(active) -> None:
    robot = active
    result = robot.set_parameter("n_action_steps", 16)
    assert not result.successful
    assert "horizon 16 - n_obs_steps 2 + 1 = 15" in result.reason
    assert not robot.set_parameter("denoising_steps", 1_000_000).successful
    assert robot.set_parameter("denoising_steps", 2).successful
    assert robot.set_parameter("denoising_steps", 0).successful
    result = robot.set_parameter("sampler", "newton")
    assert not result.successful
    assert 'one of "", ddpm' in result.reason
    assert "euler, heun, rk4 (the policy's objective is flow_matching)" in robot.set_parameter("sampler", "ddim").reason
    assert "instruction_dropout" in robot.set_parameter("guidance_scale", 2.0).reason
    assert "one of replace, blend, rtc, got 'glue'" in robot.set_parameter("joining", "glue").reason
    assert "one of stop, finish_chunk, got 'go_on'" in robot.set_parameter("on_fault", "go_on").reason
    assert "one of manual, automatic, got 'never'" in robot.set_parameter("recovery", "never").reason
    assert not robot.set_parameter("speed_scale", 1.5).successful
    assert not robot.set_parameter("velocity_margin", 1.2).successful
    assert not robot.set_parameter("max_consecutive_rejections", 0).successful
    assert "read" in robot.set_parameter("checkpoint", "elsewhere").reason
    assert f"'{INSTRUCTIONS[0]}' stays in force" in robot.set_parameter("instruction", " ").reason


def test_a_margin_that_leaves_a_joint_no_room_is_a_contradiction() -> None:
    policy = SimpleNamespace(config=demo_config("unused", n_obs_steps=2))
    limits = {"finger": JointLimits(lower=0.0, upper=0.04, velocity=0.2, acceleration=1.0)}
    values = {entry.name: entry.default for entry in DECLARATIONS}
    assert contradiction(values | {"position_margin": 0.01}, policy, limits) is None
    reason = contradiction(values | {"position_margin": 0.02}, policy, limits)
    assert reason is not None
    assert "leaves finger no room" in reason
    assert "less than 0.02" in reason


def test_of_parameters_set_together_a_contradiction_rejects_all(active) -> None:
    robot = active
    before = robot.parameters()
    result = robot.set_together({"speed_scale": 0.5, "n_action_steps": 4, "joining": "glue"})
    assert not result.successful
    assert robot.parameters() == before
    assert robot.set_together({"speed_scale": 0.5, "n_action_steps": 4}).successful
    chunk = robot.wait_for_verdict(Verdict.ACCEPTED)
    while chunk.n_action_steps != 4:
        chunk = robot.wait_for_verdict(Verdict.ACCEPTED)
    assert chunk.step_duration.nanosec == 2 * STEP_S * 1e9  # both of one change, never one without the other
    assert robot.set_together({"speed_scale": 1.0, "n_action_steps": 0}).successful


def test_what_is_dumped_can_be_loaded(active) -> None:
    robot = active
    fixed = {entry.name for entry in DECLARATIONS if entry.read_only}
    dumped = robot.parameters()
    assert {entry.name for entry in DECLARATIONS} <= set(dumped)
    live = {name: value for name, value in dumped.items() if name in {e.name for e in DECLARATIONS} - fixed}
    for name, value in live.items():
        assert robot.set_parameter(name, value).successful, name
    assert robot.parameters() == dumped
    robot.wait_for_verdict(Verdict.ACCEPTED)


def test_every_parameter_is_described_with_its_range_or_its_choices() -> None:
    for entry in DECLARATIONS:
        descriptor = entry.descriptor()
        assert descriptor.description.endswith("."), entry.name
        assert descriptor.read_only == entry.read_only
        number = isinstance(entry.default, int | float) and not isinstance(entry.default, bool)
        assert bool(descriptor.integer_range or descriptor.floating_point_range) == number, entry.name
        if entry.choices:
            assert all(choice in descriptor.additional_constraints for choice in entry.choices)


def test_the_configuration_file_lists_every_parameter_with_its_default() -> None:
    document = yaml.safe_load((Path(__file__).parents[1] / "config/dit_policy.yaml").read_text())
    assert document["/**/dit_policy"]["ros__parameters"] == {entry.name: entry.default for entry in DECLARATIONS}


def test_the_sampler_changes_while_it_runs(active) -> None:
    robot = active
    assert robot.set_parameter("sampler", "heun").successful
    robot.wait_for_verdict(Verdict.ACCEPTED)
    assert robot.set_parameter("sampler", "").successful


def test_the_way_of_joining_changes_while_it_runs_and_the_seam_is_told(active) -> None:
    robot = active
    for joining in ("blend", "rtc", "replace"):
        assert robot.set_parameter("joining", joining).successful
        chunk = robot.wait_for_verdict(Verdict.ACCEPTED)
        while chunk.joining != joining or math.isnan(chunk.seam_velocity):  # until one takes over from another
            chunk = robot.wait_for_verdict(Verdict.ACCEPTED)
        assert chunk.sent
        assert 0 <= chunk.seam_position < 0.1  # the policy keeps within 2 mrad of the arm
        assert (chunk.steps_committed > 0) <= (joining == "rtc")


def test_a_dry_run_does_everything_but_command(active) -> None:
    robot = active
    assert robot.set_parameter("dry_run", True).successful
    wait_for(lambda: not robot.wait_for_verdict(Verdict.ACCEPTED).sent, "a chunk that is accepted and not sent")
    sent = len(robot.trajectories)
    predicted = len(robot.predicted)
    for _ in range(3):
        assert not robot.wait_for_verdict(Verdict.ACCEPTED).sent
    assert len(robot.trajectories) == sent
    wait_for(lambda: len(robot.predicted) > predicted, "the prediction is still told")
    wait_for(lambda: robot.status.dry_run and not robot.status.moving, "the status says that it is a dry run")
    assert robot.set_parameter("dry_run", False).successful
    wait_for(lambda: len(robot.trajectories) > sent, "commands again")


def test_after_a_fault_the_arm_waits_for_resume_if_recovery_is_manual(active) -> None:
    robot = active
    answer = robot.resume()
    assert not answer.success
    assert "no fault" in answer.message
    robot.silent = {"wrist"}  # before the next line, so that nothing but this is a fault to be resumed from
    assert robot.set_parameter("recovery", "manual").successful
    wait_for(lambda: robot.status.fault == PolicyStatus.FAULT_INPUT, "the status names the fault")
    assert "wrist_camera/image_raw/compressed" in robot.status.fault_reason
    wait_for(lambda: is_stop(robot.trajectories[-1]), "the arm is braked")
    answer = robot.resume()
    assert not answer.success
    assert "wrist_camera/image_raw/compressed" in answer.message
    robot.silent = set()
    sent = len(robot.trajectories)
    wait_for(lambda: robot.resume().success, "resume is possible once the camera is back")
    # Nothing had been sent until then, however long the camera had been back.
    assert len(robot.trajectories) <= sent + 1
    robot.wait_for_verdict(Verdict.ACCEPTED)
    wait_for(lambda: robot.status.fault == PolicyStatus.FAULT_NONE, "the status says that it is over")
    assert robot.set_parameter("recovery", "automatic").successful


def test_heartbeats_count_up_and_tell_whether_the_arm_moves(active) -> None:
    robot = active
    first = len(robot.heartbeats)
    wait_for(lambda: len(robot.heartbeats) > first + 20, "heartbeats come")
    numbers = [beat.sequence for beat in robot.heartbeats[first:]]
    assert numbers == list(range(numbers[0], numbers[0] + len(numbers)))
    assert all(0.02 <= beat.period <= 0.1 for beat in robot.heartbeats)
    wait_for(lambda: robot.heartbeats[-1].moving, "one says that the arm moves")
    assert robot.transition("deactivate")
    wait_for(lambda: not robot.heartbeats[-1].moving, "one says that it rests")
    assert robot.transition("activate")


def test_predicted_and_commanded_joints_are_near_each_other_and_the_arm(active) -> None:
    robot = active
    robot.predicted.clear()
    robot.commanded.clear()
    wait_for(lambda: len(robot.predicted) > 5 and len(robot.commanded) > 5, "both are told")
    measured = [robot.positions[name] for name in robot.embodiment.action_joints]
    for message in (robot.predicted[-1], robot.commanded[-1]):
        assert message.name == list(robot.embodiment.action_joints)
        np.testing.assert_allclose(message.position, measured, atol=0.01)
        assert message.header.stamp.sec > 0


def test_the_status_is_latched_for_those_who_come_late(active) -> None:
    infos = active.node.get_publishers_info_by_topic("dit_policy/status")
    assert [info.qos_profile.durability for info in infos] == [DurabilityPolicy.TRANSIENT_LOCAL]


def test_the_instruction_is_a_parameter_too(active) -> None:
    robot = active
    assert robot.set_parameter("instruction", INSTRUCTIONS[1]).successful
    while robot.wait_for_verdict(Verdict.ACCEPTED).instruction != INSTRUCTIONS[1]:
        pass
    assert robot.set_instruction(INSTRUCTIONS[0]).success
    wait_for(lambda: robot.parameters()["instruction"] == INSTRUCTIONS[0], "the service's is written back")
    while robot.wait_for_verdict(Verdict.ACCEPTED).instruction != INSTRUCTIONS[0]:
        pass


def test_a_chunk_sampled_for_another_instruction_is_not_sent(active) -> None:
    robot = active
    seen = len(robot.chunks)
    others = itertools.cycle(INSTRUCTIONS[:2])

    def superseded() -> object:
        robot.instruct(next(others))
        return [chunk for chunk in robot.chunks[seen:] if chunk.verdict == Verdict.SUPERSEDED]

    chunk = wait_for(superseded, "a chunk is superseded")[0]
    assert not chunk.sent
    assert "the instruction changed to" in chunk.reason
    robot.instruct(INSTRUCTIONS[0])
    while robot.wait_for_verdict(Verdict.ACCEPTED).instruction != INSTRUCTIONS[0]:
        pass


def test_the_action_runs_with_feedback_until_it_is_cancelled(active) -> None:
    robot = active
    goal = robot.execute(INSTRUCTIONS[1])
    assert goal.accepted
    wait_for(lambda: goal.feedback and goal.feedback[-1].chunks_sent >= 3, "feedback of three chunks")
    last = goal.feedback[-1]
    assert last.verdict == Verdict.ACCEPTED
    assert last.elapsed.sec + last.elapsed.nanosec > 0
    assert last.latency.sec + last.latency.nanosec > 0
    wait_for(lambda: robot.status.instruction == INSTRUCTIONS[1], "its instruction is in force")
    goal.cancel()
    status, result = goal.wait()
    assert (status, result.code) == (GoalStatus.STATUS_CANCELED, ExecuteInstruction.Result.CANCELED)
    assert result.chunks_sent >= 3
    wait_for(lambda: is_stop(robot.trajectories[-1]), "the arm is braked")
    assert "no instruction" in refused(robot, Verdict.INPUT_MISSING)
    wait_for(lambda: robot.parameters()["instruction"] == "", "the parameter is emptied")
    assert robot.set_instruction(INSTRUCTIONS[0]).success  # and the next one starts the arm again
    robot.wait_for_verdict(Verdict.ACCEPTED)


def test_the_action_succeeds_at_its_time_limit_with_the_arm_at_rest(active) -> None:
    robot = active
    goal = robot.execute(INSTRUCTIONS[1], time_limit=1)
    status, result = goal.wait()
    assert (status, result.code) == (GoalStatus.STATUS_SUCCEEDED, ExecuteInstruction.Result.TIME_LIMIT)
    assert "1.0 s" in result.message
    wait_for(lambda: is_stop(robot.trajectories[-1]), "the arm is braked")
    refused(robot, Verdict.INPUT_MISSING)


def test_another_goal_and_another_instruction_preempt_the_action(active) -> None:
    robot = active
    first = robot.execute(INSTRUCTIONS[1])
    second = robot.execute(INSTRUCTIONS[1])
    status, result = first.wait()
    assert (status, result.code) == (GoalStatus.STATUS_ABORTED, ExecuteInstruction.Result.PREEMPTED)
    assert robot.set_instruction(INSTRUCTIONS[0]).success
    status, result = second.wait()
    assert (status, result.code) == (GoalStatus.STATUS_ABORTED, ExecuteInstruction.Result.PREEMPTED)
    assert INSTRUCTIONS[0] in result.message
    robot.wait_for_verdict(Verdict.ACCEPTED)  # the arm follows the instruction that came


def test_a_fault_ends_the_action_if_somebody_must_resume(active) -> None:
    robot = active
    goal = robot.execute(INSTRUCTIONS[1])
    wait_for(lambda: goal.feedback and goal.feedback[-1].chunks_sent >= 1, "a chunk is sent")
    robot.silent = {"workspace"}  # before the next line, so that nothing but this is a fault to be resumed from
    assert robot.set_parameter("recovery", "manual").successful
    status, result = goal.wait()
    assert (status, result.code) == (GoalStatus.STATUS_ABORTED, ExecuteInstruction.Result.FAULT)
    assert "workspace_camera/image_raw" in result.message
    assert not robot.execute(INSTRUCTIONS[1]).accepted
    robot.wait_for_log("a fault has not been resumed from")
    robot.silent = set()
    wait_for(lambda: robot.resume().success, "resume is possible once the camera is back")
    assert robot.set_parameter("recovery", "automatic").successful


def test_goals_that_cannot_be_run_are_rejected(active) -> None:
    robot = active
    assert not robot.execute("  ").accepted
    robot.wait_for_log("its instruction is empty")
    goal = robot.execute(INSTRUCTIONS[1])
    assert robot.transition("deactivate")
    status, result = goal.wait()
    assert (status, result.code) == (GoalStatus.STATUS_ABORTED, ExecuteInstruction.Result.DEACTIVATED)
    assert not robot.execute(INSTRUCTIONS[1]).accepted
    robot.wait_for_log("the node is not active")
    assert robot.transition("activate")


def test_a_camera_that_stops_stops_the_chunks(active) -> None:
    active.silent = {"wrist"}
    assert "wrist_camera/image_raw/compressed" in refused(active, Verdict.INPUT_STALE)
    active.silent = set()
    active.wait_for_verdict(Verdict.ACCEPTED)


def test_joint_states_that_stop_stop_the_chunks(active) -> None:
    active.silent = {"state"}
    assert "joint_states" in refused(active, Verdict.INPUT_STALE)


def test_images_of_another_size_are_refused(active) -> None:
    active.image_size["workspace"] = (64, 48)
    reason = refused(active, Verdict.INPUT_INVALID)
    assert "64x48" in reason
    assert "128x128" in reason


def test_images_of_another_encoding_are_refused(active) -> None:
    active.encoding = "16UC1"
    reason = refused(active, Verdict.INPUT_INVALID)
    assert "16UC1" in reason
    assert "rgb8" in reason


def test_missing_joints_are_refused_by_name(active) -> None:
    active.joint_names = [name for name in active.joint_names if name != "panda_joint5"]
    assert "panda_joint5" in refused(active, Verdict.INPUT_INVALID)


def test_nan_in_joint_states_is_refused_by_name(active) -> None:
    active.positions["panda_joint2"] = float("nan")
    assert "panda_joint2" in refused(active, Verdict.INPUT_INVALID)


def test_an_arm_outside_its_limits_is_refused_with_joint_and_limit(active) -> None:
    active.positions["panda_joint1"] = 3.0  # the chunk starts there, and the limit is 2.8973
    reason = refused(active, Verdict.POSITION_LIMIT)
    assert "panda_joint1" in reason
    assert "2.897" in reason


def test_an_empty_instruction_is_refused_and_an_unknown_one_runs_with_a_warning(active) -> None:
    robot = active
    answer = robot.set_instruction("  ")
    assert not answer.success
    assert "empty" in answer.message
    assert INSTRUCTIONS[0] in answer.message
    assert robot.set_instruction("open the drawer").success
    robot.wait_for_log("not trained on 'open the drawer'")
    while robot.wait_for_verdict(Verdict.ACCEPTED).instruction != "open the drawer":
        pass

    wait_for(lambda: robot.status.instruction == "open the drawer", "the status tells the instruction")
    assert not robot.status.instruction_known


def test_deactivate_ends_with_a_stop_and_then_silence(active) -> None:
    robot = active

    def deactivated_in_motion() -> bool:
        """On a busy machine the chunk may be over before the transition comes; then there is nothing to stop."""
        robot.wait_for_verdict(Verdict.ACCEPTED)
        before = len(robot.trajectories)
        assert robot.transition("deactivate")
        wait_for(lambda: not robot.heartbeats[-1].moving, "the arm rests")
        stopped = any(is_stop(trajectory) for trajectory in robot.trajectories[before:])
        return stopped or not robot.transition("activate")

    wait_for(deactivated_in_motion, "a stop comes")
    sent, answered = len(robot.trajectories), time.monotonic()
    stop = robot.trajectories[-1]
    assert is_stop(stop)
    measured = [robot.positions[name] for name in robot.embodiment.action_joints]
    # Where the arm is, but for what a chunk in motion may be ahead of it.
    np.testing.assert_allclose(stop.points[-1].positions, measured, atol=0.05)
    wait_for(lambda: time.monotonic() - answered > 1.0, "a second passes")  # longer than n_action_steps
    assert len(robot.trajectories) == sent
    assert robot.transition("activate")
    robot.wait_for_verdict(Verdict.ACCEPTED)


def test_the_fault_is_told_first_and_then_each_other_kind_of_trouble_once() -> None:
    late, later = Trouble(Fault.INPUT, "late by 1 s"), Trouble(Fault.INPUT, "late by 2 s")
    account = replace(NOTHING_DONE, fault=late, troubles=(Trouble(Fault.CLOCK, "jumped"), later))
    assert account.wrong == "late by 1 s; also: jumped"
    assert replace(account, fault=None).wrong == "jumped; also: late by 2 s"
    assert NOTHING_DONE.wrong == ""


def test_diagnostics_count_what_was_refused(active) -> None:
    from diagnostic_msgs.msg import DiagnosticArray

    arrays: list[DiagnosticArray] = []
    subscription = active.node.create_subscription(DiagnosticArray, "/diagnostics", arrays.append, 10)
    active.silent = {"workspace"}
    refused(active, Verdict.INPUT_STALE)

    def told() -> object:
        statuses = [array.status[0] for array in arrays]
        values = {pair.key: pair.value for pair in statuses[-1].values} if statuses else {}
        counted = int(values.get("verdict.input_stale", 0)) >= 1
        return (statuses[-1], values) if counted and statuses[-1].level == statuses[-1].ERROR else None

    status, values = wait_for(told, "an error in /diagnostics, with the refusals counted")
    active.node.destroy_subscription(subscription)
    assert values["fault"] == "input"
    assert int(values["verdict.accepted"]) >= 1
    assert values["fast_path.transformer"].startswith("in use: the actions differ by")
    assert "ResNet" in values["fast_path.vision"]
    assert float(values["input.wrist.rate"]) > 1
    assert float(values["input.workspace.age"]) > 0.3
    assert float(values["inference_p99"]) >= float(values["inference_p50"]) > 0
    assert float(values["beat.lateness_p99.idle"]) >= 0
    assert int(values["encoded_ahead"]) >= 1
    assert values["encoding_failed"] == "0"
    assert "workspace_camera/image_raw" in status.message


def spoiled(checkpoint: Path, folder: Path, how: str) -> dict[str, object]:
    """The parameters of a node that must not configure."""
    parameters: dict[str, object] = {"checkpoint": folder / "policy"}
    if how == "absent":
        return parameters
    shutil.copytree(checkpoint, folder / "policy")
    weights = folder / "policy" / "model.safetensors"
    tensors = load_file(weights)
    if how == "missing tensor":
        del tensors["noise_predictor.output_proj.weight"]
    elif how == "extra tensor":
        tensors["not_of_this_model"] = torch.zeros(3)
    elif how == "another embodiment":
        text = EMBODIMENT.read_text()
        wrist = text.index("wrist:")
        (folder / "other.yaml").write_text(text[:wrist] + text[wrist:].replace("width: 128", "width: 96", 1))
        parameters["embodiment"] = folder / "other.yaml"
    elif how == "too many action steps":
        parameters["n_action_steps"] = 200
    save_file(tensors, weights)
    return parameters


SPOILED = {
    "absent": "policy",
    "missing tensor": "noise_predictor.output_proj.weight",
    "extra tensor": "not_of_this_model",
    "another embodiment": "cameras.wrist.width: 96 here, 128 there",
    "too many action steps": "n_action_steps 200",
}


@pytest.mark.timeout(180)
def test_configure_fails_with_the_reason_and_leaves_the_node_unconfigured(checkpoint: Path, tmp_path: Path) -> None:
    """All cases at once, each in its own namespace: a process takes seconds to import torch."""

    embodiment = Embodiment.load(EMBODIMENT)
    cases = {}
    for number, how in enumerate(SPOILED):
        folder = tmp_path / str(number)
        folder.mkdir()
        cases[how] = start_node(folder / "node.log", f"/broken{number}", **spoiled(checkpoint, folder, how))
    for number, (how, child) in enumerate(cases.items()):
        robot = Robot(embodiment, f"/broken{number}")
        try:
            assert not robot.transition("configure"), how
            assert robot.state() == "unconfigured", how
        finally:
            robot.close()
            status = child.stop()
        log = child.log.read_text()
        assert SPOILED[how] in log, how
        assert "Traceback" not in log, how
        assert status == 0, how


WRONG_FROM_THE_START = {
    "joining": ("glue", "one of replace, blend, rtc"),
    "speed_scale": (7.5, "speed_scale"),
    "warmup_chunks": (0, "warmup_chunks"),
}


@pytest.mark.timeout(180)
def test_a_parameter_that_is_wrong_from_the_start_ends_the_node_with_a_sentence(tmp_path: Path) -> None:
    children = {
        name: start_node(tmp_path / f"{name}.log", f"/wrong_{name}", **{name: value})
        for name, (value, _) in WRONG_FROM_THE_START.items()
    }
    for name, child in children.items():
        assert child.wait(120) == 1, name
        log = child.log.read_text()
        assert WRONG_FROM_THE_START[name][1] in log, name
        assert "Traceback" not in log, name


URDF = """<robot name="arm">{}</robot>"""
JOINT = (
    '<joint name="panda_joint{n}" type="revolute"><parent link="l{n}"/><child link="m{n}"/>'
    '<limit lower="{lower}" upper="{upper}" velocity="2.0" effort="9"/></joint>'
)


@pytest.mark.timeout(180)
def test_the_limits_of_the_urdf_are_waited_for_and_hold(checkpoint: Path, tmp_path: Path) -> None:
    robot = Robot(Embodiment.load(EMBODIMENT), "/urdf")
    child = start_node(tmp_path / "node.log", "/urdf", checkpoint=checkpoint, limits_from="robot_description")
    try:
        assert robot.transition("configure"), child.last_lines()
        assert not robot.transition("activate")
        robot.wait_for_log("none came yet on '/urdf/robot_description'")
        # Joint 4 rests at -1.5, which this robot does not reach.
        joints = [JOINT.format(n=n, lower=-1.0 if n == 4 else -2.5, upper=2.5) for n in range(1, 8)]
        publisher = robot.node.create_publisher(String, "robot_description", LATCHED)
        publisher.publish(String(data=URDF.format("".join(joints))))
        robot.instruct(INSTRUCTIONS[0])
        wait_for(lambda: robot.transition("activate"), "the node becomes active", 60.0)
        chunk = robot.wait_for_verdict(Verdict.POSITION_LIMIT)
        assert "panda_joint4" in chunk.reason
        assert robot.trajectories == []
    finally:
        robot.close()
        assert child.stop() == 0
    assert "Traceback" not in child.log.read_text()


@pytest.mark.timeout(240)
def test_signals_stop_the_arm_and_end_with_zero_in_every_state(checkpoint: Path, tmp_path: Path) -> None:

    embodiment = Embodiment.load(EMBODIMENT)
    cases = [(state, number) for state in TRANSITIONS for number in (signal.SIGINT, signal.SIGTERM)]
    children = [
        start_node(tmp_path / f"{index}.log", f"/signal{index}", checkpoint=checkpoint) for index in range(len(cases))
    ]
    for index, ((state, number), child) in enumerate(zip(cases, children, strict=True)):
        robot = Robot(embodiment, f"/signal{index}")
        try:
            assert robot.state() == "unconfigured"
            for transition in TRANSITIONS[state]:
                assert robot.transition(transition), (state, child.last_lines())
            if state == "active":
                robot.instruct(INSTRUCTIONS[1])
                robot.wait_for_verdict(Verdict.ACCEPTED)
            child.send(number)
            assert child.wait(20) == 0, (state, number)
            assert "Traceback" not in child.log.read_text()
            if state == "active":
                stop = wait_for(lambda robot=robot: is_stop(robot.trajectories[-1]), "the last message is a stop")
                assert stop
                wait_for(lambda robot=robot: not robot.heartbeats[-1].moving, "the last heartbeat says that it rests")
            else:
                assert robot.trajectories == []
        finally:
            robot.close()
            child.stop()
