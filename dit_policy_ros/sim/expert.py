"""A scripted expert: above-behind the block, down, push it over the line, up and away.

It looks at the arm and the blocks every PERIOD and says where the joints should be next. The tool's velocity is a
smooth function of what it sees at that moment, from the measured state and not from an earlier plan, so a pushed arm
(see `Simulation.set_disturbance`) is steered back, and a policy that sees the same can learn the same.
"""

from collections.abc import Mapping
from enum import IntEnum

import numpy as np

from dit_policy_ros.runtime.trajectory import Trajectory
from dit_policy_ros.sim.kinematics import Kinematics
from dit_policy_ros.sim.scene import ARM_JOINTS, BLOCK_SIZE, LINE_X

PERIOD = 0.1  # s, between commands
LAG = 0.03  # s, by which the arm trails its commands; the commands lead by as much
BEHIND = BLOCK_SIZE / 2 + 0.05  # m, from the block's middle back to the tool, before the push
TRAVEL_Z, PUSH_Z, RETREAT_Z = 0.11, 0.022, 0.13  # m, heights of the tool
OVER = LINE_X + 0.045  # m, how far the block's middle is pushed
TRAVEL, DESCEND, PUSH, RETREAT = 0.20, 0.14, 0.11, 0.16  # m/s
MAX_CHANGE = 0.06  # m/s, of the tool's velocity, per PERIOD


class Stage(IntEnum):
    """What the expert is about; stages follow in this order, and fall back if the block slips away."""

    APPROACH = 0
    LOWER = 1
    PUSH = 2
    RETREAT = 3
    DONE = 4


class Expert:
    """Pushes the block of one colour; one instance an episode.

    kinematics: of the arm whose joints `command` is told and tells, in its order.
    """

    def __init__(self, kinematics: Kinematics, target: str) -> None:
        self._kinematics = kinematics
        self._target = target
        self._velocity: np.ndarray = np.zeros(3)
        self.stage = Stage.APPROACH

    def command(self, q: np.ndarray, blocks: Mapping[str, tuple[float, float, float]]) -> Trajectory | None:
        """What to do next, for measured joints `q` (7,) rad and blocks (x, y, yaw); None once the task is done.

        A moving point at PERIOD, then a stop, as controllers refuse a way that ends in motion; the next command
        comes first and replaces it.
        """
        tool, _ = self._kinematics.forward(q)
        block = np.array(blocks[self._target][:2])
        self.stage = self._next_stage(tool, block)
        if self.stage is Stage.DONE:
            return None
        change = self._wanted_velocity(tool, block) - self._velocity
        self._velocity = self._velocity + change * min(1.0, MAX_CHANGE / max(float(np.linalg.norm(change)), 1e-9))
        goal, speed = self._kinematics.move(q, self._velocity, PERIOD + LAG)
        return Trajectory(
            joint_names=ARM_JOINTS,
            times=np.array([PERIOD, 2 * PERIOD]),
            positions=np.stack([goal, goal + speed * PERIOD / 2]),
            velocities=np.stack([speed, np.zeros_like(speed)]),
        )

    def _next_stage(self, tool: np.ndarray, block: np.ndarray) -> Stage:
        aside = abs(tool[1] - block[1])
        ahead = block[0] - tool[0]
        if self.stage is Stage.RETREAT:
            return Stage.DONE if tool[2] > RETREAT_Z - 0.02 else Stage.RETREAT
        if block[0] > OVER:
            return Stage.RETREAT
        if self.stage is Stage.PUSH:
            return Stage.PUSH if aside < 0.03 and ahead > 0 else Stage.APPROACH
        if self.stage is Stage.LOWER:
            if aside > 0.03 or ahead < BLOCK_SIZE / 2:
                return Stage.APPROACH
            return Stage.PUSH if tool[2] < PUSH_Z + 0.012 else Stage.LOWER
        return Stage.LOWER if np.hypot(ahead - BEHIND, aside) < 0.03 else Stage.APPROACH

    def _wanted_velocity(self, tool: np.ndarray, block: np.ndarray) -> np.ndarray:
        behind = np.array([block[0] - BEHIND, block[1]])
        match self.stage:
            case Stage.APPROACH:
                return _towards(tool, np.array([*behind, TRAVEL_Z]), TRAVEL, gain=4.0, least=0.08)
            case Stage.LOWER:
                return _towards(tool, np.array([*behind, PUSH_Z]), DESCEND, gain=5.0, least=0.06)
            case Stage.PUSH:
                return np.array([PUSH, 3.0 * (block[1] - tool[1]), 4.0 * (PUSH_Z - tool[2])])
            case _:
                return _towards(
                    tool, np.array([tool[0] - 0.08, tool[1], RETREAT_Z + 0.03]), RETREAT, gain=5.0, least=0.1
                )


def _towards(tool: np.ndarray, goal: np.ndarray, speed: float, gain: float, least: float) -> np.ndarray:
    """Straight to the goal, slowing down in proportion to the distance left."""
    left = goal - tool
    distance = max(float(np.linalg.norm(left)), 1e-9)
    return left / distance * min(speed, max(gain * distance, least))
