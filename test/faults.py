"""The fault table: what goes wrong around a moving arm, between the real processes, and what came of each.

    make test-faults                       # all, some ten minutes; outputs/faults.json
    make test-faults ARGS=--only=camera    # those whose name holds the word

Of each fault: no unsafe command was sent; the arm was at rest within half a second of the watchdog's deadline and
stayed so until the fault was over; the diagnostics named the cause; and the arm moved again as `recovery` says. Exits
with 1 if one does not hold.

It runs in a network namespace of its own (unshare), in which the network can be cut.
"""

from __future__ import annotations

import argparse
import fcntl
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from dit_policy_ros.nodes.domain import claimed_domain, local_environment

OUTPUT = Path("outputs/faults.json")
FOLDER = Path("outputs/faults")
REST_BAR = 0.5  # s
_NAMESPACE = "FAULTS_NAMESPACE"
WATCHED = 1.0  # s that the arm is watched at rest, before the fault is mended
TIMEOUT = 0.5  # s, inference_timeout: the arm still follows its chunk then, which would bring it to rest by itself
PATIENCE = 15.0  # s for the arm to come to rest
FLOOD = 3.0  # s


@dataclass(frozen=True)
class Case:
    """One fault. `deadline` gives the moment (s) by which a watchdog must have seen it, from the injection at `since`.

    expect: "rest", or "goes on" (the arm does not stop), or "safe" (it may do either). cause: what one sentence of
    /diagnostics must match. mend undoes it.
    """

    name: str
    how: str
    inject: Callable[[Any], None]
    mend: Callable[[Any], None]
    deadline: Callable[[Any, float], float]
    cause: str = ""
    recovery: Literal["automatic", "manual"] = "automatic"
    expect: Literal["rest", "goes on", "safe"] = "rest"
    simulated: bool = False
    watchdog: str = ""


@dataclass
class Row:
    """What came of a fault; durations in s, NaN-free: None where something did not happen."""

    fault: str
    injected: str
    recovery: str
    expected: str
    watchdog: str = ""
    deadline: float | None = None
    detected_after: float | None = None
    rest_after: float | None = None
    rest_after_deadline: float | None = None
    recovered_after: float | None = None
    commands: int = 0
    unsafe: list[str] = field(default_factory=list)
    named: str = ""
    told: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)

    @property
    def holds(self) -> bool:
        return not self.problems


# --- the table -------------------------------------------------------------------------------------------------------


def after(seconds: float) -> Callable[[Any, float], float]:
    """A deadline so long after the injection."""
    return lambda stage, since: since + seconds


def fifth_refusal(stage: Any, since: float) -> float:
    """max_consecutive_rejections chunks have been refused."""
    refused = [heard.at for heard in stage.robot.chunks if heard.at >= since and heard.message.verdict]
    return refused[4] if len(refused) > 4 else since


def inference_timeout(stage: Any, since: float) -> float:
    """The chunk that hangs has been waited for so long."""
    struck = stage.struck_at()
    return since if struck is None else struck + TIMEOUT


def mend_robot(stage: Any) -> None:
    stage.robot.mend()


def silence(name: str) -> Callable[[Any], None]:
    return lambda stage: stage.robot.silent.add(name)


def freeze(name: str) -> Callable[[Any], None]:
    return lambda stage: stage.robot.frozen.add(name)


def spoil(name: str, how: Callable[[Any], None]) -> Callable[[Any], None]:
    return lambda stage: stage.robot.spoilt.__setitem__(name, how)


def shrink_raw(message: Any) -> None:
    message.width, message.height, message.step = 96, 96, 288
    message.data = bytes(96 * 96 * 3)


def make_depth(message: Any) -> None:
    message.encoding, message.step = "16UC1", 2 * message.width
    message.data = bytes(2 * message.width * message.height)


def cut_data(message: Any) -> None:
    message.data = bytes(message.data)[:1000]


def shrink_jpeg(message: Any) -> None:
    from fault_robot import jpeg

    message.data = jpeg(96, 96)


def make_compressed_depth(message: Any) -> None:
    message.format = "16UC1; compressedDepth png"


def garble_jpeg(message: Any) -> None:
    message.data = b"\xff\xd8\xff\xe0" + bytes(range(256)) * 8


def jump(message: Any) -> None:
    message.position = [value + 0.5 if name == "panda_joint2" else value
                        for name, value in zip(message.name, message.position, strict=True)]  # fmt: skip


def not_a_number(message: Any) -> None:
    message.position = [float("nan") if name == "panda_joint3" else value
                        for name, value in zip(message.name, message.position, strict=True)]  # fmt: skip


def lose_a_joint(message: Any) -> None:
    index = list(message.name).index("panda_joint5")
    for name in ("name", "position", "velocity"):
        values = list(getattr(message, name))
        del values[index]
        setattr(message, name, values)


def set_clock(seconds: float) -> Callable[[Any], None]:
    def jump_clock(stage: Any) -> None:
        stage.robot.clock_offset_ns += round(seconds * 1e9)

    return jump_clock


def kill_node(stage: Any) -> None:
    stage.node.send(signal.SIGKILL)
    stage.node.wait(10)


def command_somebody_elses(stage: Any) -> None:
    """Hold the arm where it is: a command that is safe, but not the node's."""
    from trajectory_msgs.msg import JointTrajectory, JointTrajectoryPoint

    robot = stage.robot
    point = JointTrajectoryPoint(positions=robot.position.tolist(), velocities=[0.0] * 7)
    point.time_from_start.nanosec = 500_000_000
    robot.intruder.publish(JointTrajectory(joint_names=list(robot.embodiment.action_joints), points=[point]))


def flood_instructions(stage: Any) -> None:
    """Two instructions in turn, a thousand a second."""
    from policy_fixtures import INSTRUCTIONS

    began = time.monotonic()
    for number in range(round(1000 * FLOOD)):
        stage.robot.instruct(INSTRUCTIONS[number % 2])
        time.sleep(max(0.0, began + (number + 1) / 1000 - time.monotonic()))


def flood_parameters(stage: Any) -> None:
    """Good sets and contradictions in turn, a hundred a second; each must be answered as it deserves."""
    from rcl_interfaces.srv import SetParameters
    from rclpy.parameter import Parameter
    from robot import wait_for

    changes: list[tuple[str, object, bool]] = [
        ("speed_scale", 0.5, True), ("n_action_steps", 200, False), ("joining", "rtc", True),
        ("sampler", "magic", False), ("n_action_steps", 5, True), ("speed_scale", 7.0, False),
        ("joining", "replace", True), ("speed_scale", 1.0, True),
    ]  # fmt: skip
    client = stage.robot.node.create_client(SetParameters, "/dit_policy/set_parameters")
    wait_for(client.service_is_ready, "the node's parameters")
    began, answers = time.monotonic(), []
    for number in range(round(100 * FLOOD)):
        name, value, good = changes[number % len(changes)]
        request = SetParameters.Request(parameters=[Parameter(name, value=value).to_parameter_msg()])
        answers.append((name, value, good, client.call_async(request)))
        time.sleep(max(0.0, began + (number + 1) / 100 - time.monotonic()))
    wait_for(lambda: all(future.done() for *_, future in answers), "every parameter set is answered")
    stage.robot.node.destroy_client(client)
    wrong = [(name, value) for name, value, good, future in answers if future.result().results[0].successful != good]
    assert not wrong, f"answered wrongly: {wrong[:3]}"


def nothing(stage: Any) -> None:
    """There is nothing to undo."""


def mend_policy(stage: Any) -> None:
    stage.strike_with("")


def fail_policy(fault: str) -> Callable[[Any], None]:
    return lambda stage: stage.strike_with(fault)


def cut_network(stage: Any) -> None:
    from fault_stage import set_loopback

    set_loopback(False)


def heal_network(stage: Any) -> None:
    from fault_stage import set_loopback

    set_loopback(True)


def reset_parameters(stage: Any) -> None:
    for name, value in (("speed_scale", 1.0), ("n_action_steps", 0), ("joining", "replace")):
        assert stage.set_parameter(name, value).successful


def cases() -> list[Case]:
    """The issue's table, and what else can go wrong around an arm."""
    image, joints = after(0.3), after(0.2)  # max_age of config/embodiments/sim_arm.yaml
    old = "the stream's max_age"
    table = []
    for camera, spoils in (
        ("workspace", (("size", shrink_raw), ("encoding", make_depth), ("garbage", cut_data))),
        ("wrist", (("size", shrink_jpeg), ("encoding", make_compressed_depth), ("garbage", garble_jpeg))),
    ):
        words = {
            "size": "changes its size to 96x96", "encoding": "sends depth instead of colour",
            "garbage": "sends damaged data" if camera == "workspace" else "sends a garbage JPEG",
        }  # fmt: skip
        kind = "raw" if camera == "workspace" else "JPEG"
        table += [
            Case(f"camera_stops_{camera}", f"the {kind} camera falls silent", silence(camera), mend_robot, image,
                 camera, "manual", watchdog=old),
            Case(f"camera_freezes_{camera}", f"the {kind} camera repeats its image, stamp and all", freeze(camera),
                 mend_robot, image, f"{camera}.*(frozen|stamp)", watchdog=old),
        ]  # fmt: skip
        table += [
            Case(f"camera_{what}_{camera}", f"the {kind} camera {words[what]}", spoil(camera, how), mend_robot, image,
                 camera, watchdog=old)
            for what, how in spoils
        ]  # fmt: skip
    table += [
        Case("joints_stop", "the joint states fall silent", silence("state"), mend_robot, joints, "joint_states",
             watchdog=old),
        Case("joints_jump", "panda_joint2 reads 0.5 rad more", spoil("state", jump), mend_robot, after(0.02),
             "panda_joint2.*jumped", "manual", watchdog="at once"),
        Case("joints_nan", "panda_joint3 reads NaN", spoil("state", not_a_number), mend_robot, joints, "panda_joint3",
             "manual", watchdog=old),
        Case("joints_lose_one", "panda_joint5 is missing", spoil("state", lose_a_joint), mend_robot, joints,
             "panda_joint5", watchdog=old),
        Case("inference_throws", "the policy raises an error", fail_policy("throws"), mend_policy, fifth_refusal,
             "fell off the bus", watchdog="the fifth refusal"),
        Case("inference_hangs", "the policy never returns", fail_policy("hangs"), mend_policy, inference_timeout,
             "asked for", "manual", watchdog="inference_timeout"),
        Case("inference_nan", "a NaN among the predicted positions", fail_policy("nan"), mend_policy, fifth_refusal,
             "finite|NaN|nan", watchdog="the fifth refusal"),
        Case("inference_beyond_limits", "predicted positions 10 rad away", fail_policy("beyond"), mend_policy,
             fifth_refusal, r"outside \[", "manual", watchdog="the fifth refusal"),
        Case("inference_takes_5_s", "a chunk takes 5 s", fail_policy("slow"), mend_policy, inference_timeout,
             "asked for", watchdog="inference_timeout"),
        Case("checkpoint_deleted", "the checkpoint's folder is removed", lambda stage: stage.delete_checkpoint(),
             lambda stage: stage.restore_checkpoint(), after(0.0), expect="goes on"),
        Case("controller_dies", "the controller neither listens nor reports, then returns",
             lambda stage: stage.robot.kill_controller(), lambda stage: stage.robot.start_controller(), after(0.5),
             "silent|listens", watchdog="controller_timeout"),
        Case("somebody_elses_command", "another program commands the arm", command_somebody_elses, nothing,
             after(0.02), "somebody else", "manual", watchdog="at once"),
        Case("instruction_flood", "two instructions in turn, 1 kHz, 3 s", flood_instructions, nothing, after(0.0),
             expect="safe"),
        Case("parameter_flood", "good and contradictory sets, 100 Hz, 3 s", flood_parameters, reset_parameters,
             after(0.0), expect="goes on"),
        Case("network_cut", "the node is cut off from robot and guard, and healed", cut_network, heal_network,
             after(0.2), "no heartbeat", watchdog="the guard's timeout"),
        Case("node_frozen", "SIGSTOP to the node, and SIGCONT", lambda stage: stage.node.send(signal.SIGSTOP),
             lambda stage: stage.node.send(signal.SIGCONT), after(0.2), "no heartbeat", watchdog="the guard's timeout"),
        Case("node_killed", "kill -9 of the node, then started again", kill_node, lambda stage: stage.start_node(),
             after(0.2), "no heartbeat", watchdog="the guard's timeout"),
        Case("clock_jumps_back", "/clock goes back 5 s", set_clock(-5.0), nothing, after(0.02), "clock jumped back",
             "manual", simulated=True, watchdog="at once"),
        Case("clock_jumps_forward", "/clock goes on 5 s", set_clock(5.0), nothing, after(0.02),
             "clock jumped forward", simulated=True, watchdog="at once"),
    ]  # fmt: skip
    return table


# --- running it ------------------------------------------------------------------------------------------------------


def run(case: Case, stage: Any) -> Row:
    """Bring the fault about while the arm moves, mend it, and judge."""
    from fault_judge import complaint, rest_since

    row = Row(case.name, case.how, case.recovery, case.expect, case.watchdog)
    robot = stage.robot
    try:
        prepare(case, stage)
    except AssertionError as failure:
        row.problems.append(f"the arm did not move before anything was wrong: {failure}")
        mend_all(stage)
        return row
    since = time.monotonic()
    heard, seen = len(robot.commands), len(robot.chunks)
    mended = recovered = since
    try:
        case.inject(stage)
        if case.expect == "rest":
            watch_rest(stage, since)
        elif case.expect == "goes on":
            wait_for_chunks(stage, seen, 3)
        mended = time.monotonic()
        case.mend(stage)
        recovered = recover(case, stage, row)
        row.recovered_after = recovered - mended
    except AssertionError as failure:
        row.problems.append(f"stuck: {failure}")
        recovered = time.monotonic()
        with suppress(Exception):
            mend_all(stage)
    commands = [command for command in robot.commands[heard:] if command.at <= recovered + 1.0]
    row.commands = len(commands)
    row.unsafe = [
        f"{command.at - since:.3f} s: {reason}"
        for command in commands
        if command.heard and (reason := complaint(command, robot.embodiment))
    ]
    row.told = stage.told(since)
    judge_times(case, stage, row, since, rest_since(robot.motion, mended))
    judge_words(case, row)
    if row.unsafe:
        row.problems.append(f"{len(row.unsafe)} unsafe commands, the first: {row.unsafe[0]}")
    return row


def prepare(case: Case, stage: Any) -> None:
    """All in order, the arm moving, the recovery as the case wants it."""
    assert stage.set_parameter("inference_timeout", TIMEOUT).successful
    for recovery in ("automatic", case.recovery):
        assert stage.set_parameter("recovery", recovery).successful
        stage.wait_until_moving()


def watch_rest(stage: Any, since: float) -> None:
    """Until the arm has been at rest for a while."""
    from fault_judge import rest_since
    from robot import wait_for

    def resting() -> bool:
        rest = rest_since(stage.robot.motion, time.monotonic())
        return rest is not None and time.monotonic() - max(rest, since) > WATCHED

    wait_for(resting, f"the arm comes to rest and stays so for {WATCHED} s", PATIENCE)


def wait_for_chunks(stage: Any, seen: int, count: int) -> None:
    from robot import wait_for

    def enough() -> bool:
        return sum(heard.message.sent for heard in stage.robot.chunks[seen:]) >= count

    wait_for(enough, f"{count} chunks are sent all the same", PATIENCE)


def recover(case: Case, stage: Any, row: Row) -> float:
    """Wait until the arm moves again, resumed by hand if that is how it recovers; when it did (s)."""
    from robot import wait_for

    if case.recovery == "manual" and case.expect == "rest":
        heard, sent = len(stage.robot.statuses), len(stage.robot.commands)
        wait_for(lambda: len(stage.robot.statuses) >= heard + 2, "two statuses after the fault was mended")
        if len(stage.robot.commands) > sent:
            row.problems.append("a command was sent before ~/resume was called")
        wait_for(lambda: stage.resume().success, "~/resume is accepted")
    return float(stage.wait_until_moving())


def judge_times(case: Case, stage: Any, row: Row, since: float, rest: float | None) -> None:
    status = stage.fault_since(since)
    row.detected_after = None if status is None else round(status.at - since, 3)
    deadline = case.deadline(stage, since)
    row.deadline = round(deadline - since, 3)
    if case.expect == "goes on":
        if status is not None:
            row.problems.append(f"a fault where there was none: {status.message.fault_reason}")
        return
    if case.expect == "safe":
        return
    if rest is None:
        row.problems.append("the arm did not come to rest")
        return
    row.rest_after = round(max(0.0, rest - since), 3)
    row.rest_after_deadline = round(max(0.0, rest - deadline), 3)
    if row.rest_after_deadline > REST_BAR:
        row.problems.append(f"at rest {row.rest_after_deadline:.2f} s after the deadline, allowed are {REST_BAR} s")


def judge_words(case: Case, row: Row) -> None:
    if not case.cause:
        return
    named = [sentence for sentence in row.told if re.search(case.cause, sentence, re.DOTALL)]
    row.named = named[0] if named else ""
    if not named:
        row.problems.append(f"/diagnostics never said '{case.cause}'")


def mend_all(stage: Any) -> None:
    """After a case that got stuck: so that the next one has a chance."""
    mend_robot(stage)
    mend_policy(stage)
    heal_network(stage)
    stage.node.send(signal.SIGCONT)


@contextmanager
def staged(folder: Path, simulated: bool) -> Iterator[Any]:
    from fault_stage import Stage

    stage = Stage(folder, simulated)
    try:
        yield stage
    finally:
        stage.close()


def play(chosen: Sequence[Case]) -> list[Row]:
    """All cases, those on simulated time in a company of their own."""
    rows = []
    for simulated in (False, True):
        group = [case for case in chosen if case.simulated == simulated]
        if not group:
            continue
        with staged(FOLDER / ("simulated" if simulated else "system"), simulated) as stage:
            for case in group:
                row = run(case, stage)
                rows.append(row)
                print(f"{'holds' if row.holds else 'FAILS'}  {case.name}  {'; '.join(row.problems)}", flush=True)
    return rows


def publish(rows: Sequence[Row]) -> None:
    """outputs/faults.json, and a table."""
    from rich.console import Console
    from rich.table import Table

    from dit_policy_ros.nodes.demo_report import machine, versions

    content = [asdict(row) | {"holds": row.holds} for row in rows]
    OUTPUT.write_text(json.dumps({"machine": machine(), "versions": versions(), "rows": content}, indent=2) + "\n")
    table = Table("", "fault", "watchdog", "detected", "at rest", "after deadline", "recovery", "moves", "named")
    for row in sorted(rows, key=lambda row: row.holds):
        times = (row.detected_after, row.rest_after, row.rest_after_deadline)
        cells = ["-" if value is None else f"{value:.2f} s" for value in times]
        moves = "-" if row.recovered_after is None else f"{row.recovered_after:.1f} s"
        mark = "[green]holds[/]" if row.holds else "[red]FAILS[/]"
        words = row.named if row.holds else "; ".join(row.problems)
        table.add_row(mark, row.fault, row.watchdog, *cells, row.recovery, moves, words[:90])
    Console(width=200).print(table)


@contextmanager
def alone() -> Iterator[None]:
    """Wait for another run in this folder: the two would disturb each other."""
    OUTPUT.parent.mkdir(exist_ok=True)
    with OUTPUT.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def in_a_namespace() -> bool:
    """Whether this process has a network of its own; where it can, it is started again with one."""
    if os.environ.get(_NAMESPACE):
        return True
    if not shutil.which("unshare") or subprocess.run(["unshare", "-rn", "true"], capture_output=True).returncode:
        return False
    os.environ[_NAMESPACE] = "1"
    os.execvp("unshare", ["unshare", "-rn", sys.executable, *sys.argv])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--only", default="", help="words, comma between them: the faults with one in their names")
    parser.add_argument("--list", action="store_true", help="list the faults and end")
    arguments = parser.parse_args()
    chosen = [case for case in cases() if any(word in case.name for word in arguments.only.split(","))]
    if arguments.list or not chosen:
        print("\n".join(f"{case.name}: {case.how}" for case in cases()))
        return 0 if arguments.list else 1
    if in_a_namespace():
        heal_network(None)
    elif any(case.name == "network_cut" for case in chosen):
        print("no network namespace can be made here (unshare -rn): network_cut is left out", file=sys.stderr)
        chosen = [case for case in chosen if case.name != "network_cut"]
    with alone(), claimed_domain() as domain:
        shutil.rmtree(FOLDER, ignore_errors=True)
        os.environ.update(local_environment(domain))
        if os.environ.get(_NAMESPACE):
            # Nobody else is here, and LOCALHOST would give the node shared memory whatever it is told.
            os.environ.update(ROS_AUTOMATIC_DISCOVERY_RANGE="SUBNET", ROS_STATIC_PEERS="127.0.0.1")
        rows = play(chosen)
        publish(rows)
    return 0 if all(row.holds for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
