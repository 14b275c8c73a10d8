"""The processes of the fault table: the policy node with its faulty policy, the guard, the robot; DDS between them."""

from __future__ import annotations

import fcntl
import os
import shutil
import socket
import struct
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from asking import ask
from diagnostic_msgs.msg import DiagnosticStatus
from dit_policy_msgs.msg import PolicyStatus
from fault_robot import FaultRobot
from lifecycle_msgs.msg import Transition
from lifecycle_msgs.srv import ChangeState, GetState
from policy_fixtures import INSTRUCTIONS, demo_config, make_stats
from rcl_interfaces.srv import SetParameters
from rclpy.parameter import Parameter
from robot import wait_for
from std_srvs.srv import Trigger

from dit_policy_ros.embodiment import Embodiment
from dit_policy_ros.nodes.processes import Child
from dit_policy_ros.policy.checkpoint import save_checkpoint
from dit_policy_ros.policy.modeling import MultitaskDiTPolicy
from dit_policy_ros.policy.tiny_clip import make_tiny_clip

ROOT = Path(__file__).parents[1]
EMBODIMENT = ROOT / "config/embodiments/sim_arm.yaml"
MOVING = 0.1  # rad/s
_SIOCGIFFLAGS, _SIOCSIFFLAGS, _IFF_UP = 0x8913, 0x8914, 1


def make_checkpoint(folder: Path) -> Path:
    """An untrained policy; what it predicts is replaced in its process."""
    make_tiny_clip(folder / "clip")
    config = demo_config(str(folder / "clip"), n_obs_steps=2, tasks=INSTRUCTIONS)
    save_checkpoint(
        folder / "policy", MultitaskDiTPolicy(config, make_stats(config)), EMBODIMENT.read_text(), "a test's"
    )
    return folder / "policy"


def set_loopback(up: bool) -> None:
    """Take the loopback interface of this network namespace up or down; OSError without the right to."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as any_socket:
        request = struct.pack("16sH14s", b"lo", 0, b"")
        flags = struct.unpack("16sH14s", fcntl.ioctl(any_socket, _SIOCGIFFLAGS, request))[1]
        flags = flags | _IFF_UP if up else flags & ~_IFF_UP
        fcntl.ioctl(any_socket, _SIOCSIFFLAGS, struct.pack("16sH14s", b"lo", flags, b""))


class Stage:
    """The robot in this process, node and guard in theirs. `simulated`: the robot's /clock is everybody's time.

    The node speaks UDP only and the guard shares memory with the robot, so that without the loopback interface the node
    is cut off and the guard is not.
    """

    def __init__(self, folder: Path, simulated: bool) -> None:
        self.folder = folder
        self.simulated = simulated
        folder.mkdir(parents=True)
        self.checkpoint = make_checkpoint(folder)
        self.fault_file = folder / "fault"
        self.strike_with("")
        self.robot = FaultRobot(Embodiment.load(EMBODIMENT), simulated)
        self._starts = 0
        guard = [sys.executable, "-m", "dit_policy_ros.nodes.guard_node", *self._parameters(embodiment=EMBODIMENT)]
        self.guard = Child("guard", guard, folder / "guard.log")
        self.robot.instruct(INSTRUCTIONS[0])
        self.start_node()

    def _parameters(self, **values: object) -> list[str]:
        values |= {"use_sim_time": self.simulated}
        return ["--ros-args", *(word for name, value in values.items() for word in ("-p", f"{name}:={value}"))]

    def start_node(self) -> None:
        """Start the policy node and take it to active."""
        self._starts += 1
        parameters = self._parameters(checkpoint=self.checkpoint, warmup_chunks=1, recovery="automatic")
        self.node = Child(
            "policy node",
            [sys.executable, str(Path(__file__).with_name("faulty_node.py")), *parameters],
            self.folder / f"policy_node_{self._starts}.log",
            {
                "OMP_NUM_THREADS": "1",
                "FASTDDS_BUILTIN_TRANSPORTS": "UDPv4",
                "FAULTS_FILE": str(self.fault_file),
                "PYTHONPATH": f"{ROOT}:{os.environ.get('PYTHONPATH', '')}",
            },
        )
        self._wait_for_answer()
        for transition in (Transition.TRANSITION_CONFIGURE, Transition.TRANSITION_ACTIVATE):
            request = ChangeState.Request(transition=Transition(id=transition))
            answer = self.call(ChangeState, "/dit_policy/change_state", request, 120.0)
            assert answer.success, self.node.last_lines()

    def _wait_for_answer(self) -> None:
        """Until the node answers: a service of one that was killed looks ready for seconds, and answers nothing."""

        def answers() -> bool:
            self.node.check()
            with suppress(AssertionError):
                self.call(GetState, "/dit_policy/get_state", GetState.Request(), 2.0)
                return True
            return False

        wait_for(answers, "the policy node answers", 120.0)

    def close(self) -> None:
        """End all processes."""
        for child in (self.node, self.guard):
            child.stop()
        self.robot.close()

    # --- what is asked of the node -----------------------------------------------------------------------------------

    def call(self, kind: type, name: str, request: object, timeout: float = 30.0) -> Any:
        """A service's answer."""
        node = self.robot.node
        client = node.create_client(kind, name)
        try:
            wait_for(client.service_is_ready, f"service {name} appears", timeout)
            return ask(client, request, timeout, once=True)
        finally:
            node.destroy_client(client)

    def set_parameter(self, name: str, value: object) -> Any:
        """The answer to one parameter set."""
        request = SetParameters.Request(parameters=[Parameter(name, value=value).to_parameter_msg()])
        return self.call(SetParameters, "/dit_policy/set_parameters", request).results[0]

    def resume(self) -> Trigger.Response:
        """The answer to ~/resume."""
        return self.call(Trigger, "/dit_policy/resume", Trigger.Request())

    # --- the policy's faults -----------------------------------------------------------------------------------------

    def strike_with(self, fault: str) -> None:
        """The fault of the policy from its next chunk on; empty: none."""
        new = self.fault_file.with_suffix(".new")
        new.write_text(fault)
        new.replace(self.fault_file)
        if fault:
            Path(f"{self.fault_file}.hits").unlink(missing_ok=True)

    def struck_at(self) -> float | None:
        """When the policy's fault first struck (s), None if it has not yet."""
        hits = Path(f"{self.fault_file}.hits")
        lines = hits.read_text().split() if hits.exists() else []
        return float(lines[0]) if lines else None

    def delete_checkpoint(self) -> None:
        """Away with the files that the node was configured from."""
        shutil.move(self.checkpoint, self.folder / "away")

    def restore_checkpoint(self) -> None:
        """Back with them."""
        shutil.move(self.folder / "away", self.checkpoint)

    # --- what is waited for ------------------------------------------------------------------------------------------

    def wait_until_moving(self, timeout: float = 30.0) -> float:
        """When the arm moved by a chunk accepted from now on (s)."""
        seen = len(self.robot.chunks)

        def moving() -> bool:
            self.node.check()
            fresh = [heard for heard in self.robot.chunks[seen:] if heard.message.verdict == 0 and heard.message.sent]
            return bool(fresh) and self.robot.speed > MOVING

        wait_for(moving, "the arm moves", timeout)
        return time.monotonic()

    def fault_since(self, since: float) -> PolicyStatus | None:
        """The first status with a fault heard after `since` (s)."""
        for heard in [*self.robot.statuses]:
            if heard.at >= since and heard.message.fault:
                return heard
        return None

    def told(self, since: float) -> list[str]:
        """What /diagnostics said was wrong after `since` (s), each sentence once."""
        found = {
            f"{heard.message.name}: {heard.message.message}": None
            for heard in [*self.robot.diagnostics]
            if heard.at >= since and heard.message.level != DiagnosticStatus.OK
        }
        return list(found)
