"""Where the tool is for given joints, and which joints put it where it should be."""

from collections.abc import Sequence

import mujoco
import numpy as np

from dit_policy_ros.sim import scene

TOOL_DOWN = np.diag([1.0, -1.0, -1.0])  # the tool's axes in the world: x ahead, z into the table
# The upper arm's and the forearm's roll. Held at zero, six joints' worth of arm is left, each pose of the upright tool
# has one answer, and it stays smooth where the forearm hangs straight down, parallel to the last joint's axis.
STILL_JOINTS = ("panda_joint3", "panda_joint5")
STILL_WEIGHT = 0.3  # m/rad, of a still joint's error beside the tool's
DAMPING = 1e-5  # m^2, beside the squared singular values, which are above 1e-2 over the table
RATE, SUBSTEPS = 2.0, 3  # while moving: 1/s, at which errors of rotation and posture decay; steps of integration


class Unreachable(ValueError):
    """No joint angles within the limits bring the tool to the wanted pose."""


class Kinematics:
    """Forward and inverse kinematics of one chain of hinges, on a state of its own.

    joints: the chain's joints, in the order of every `q` here (rad). site: the tool. Joints among STILL_JOINTS are kept
    near zero, which uses up what a seven-jointed arm has to spare.
    """

    def __init__(
        self,
        model: mujoco.MjModel,
        joints: Sequence[str] = scene.ARM_JOINTS,
        site: str = scene.TOOL_SITE,
    ) -> None:
        self._model = model
        self._data = mujoco.MjData(model)
        ids = [scene.find(model, "joint", name) for name in joints]
        self._site = scene.find(model, "site", site)
        self._qpos, self._dof = model.jnt_qposadr[ids], model.jnt_dofadr[ids]
        self.lower, self.upper = model.jnt_range[ids].T.copy()
        self._still = STILL_WEIGHT * np.eye(len(joints))[[name in STILL_JOINTS for name in joints]]

    def forward(self, q: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The tool's position (3,) in metres and rotation matrix (3, 3) in the world."""
        self._data.qpos[self._qpos] = q
        mujoco.mj_kinematics(self._model, self._data)
        return self._data.site_xpos[self._site].copy(), self._data.site_xmat[self._site].reshape(3, 3).copy()

    def jacobian(self, q: np.ndarray) -> np.ndarray:
        """(6, len(q)): the tool's linear (m/s) and angular (rad/s) velocity in the world for each joint's rad/s."""
        self.forward(q)
        mujoco.mj_comPos(self._model, self._data)
        linear, angular = np.zeros((2, 3, self._model.nv))
        mujoco.mj_jacSite(self._model, self._data, linear, angular, self._site)
        return np.vstack([linear, angular])[:, self._dof]

    def move(self, q: np.ndarray, linear: np.ndarray, duration: float) -> tuple[np.ndarray, np.ndarray]:
        """Joints, and their velocities, after moving the tool from `q` at `linear` (3,) m/s for `duration` seconds.

        Meanwhile the tool turns back to TOOL_DOWN and the still joints to zero, in proportion to the error. Within the
        joints' limits; a joint at its limit stays there.
        """
        velocity = np.zeros_like(q)
        for _ in range(SUBSTEPS):
            turn = RATE * self._error(q, np.zeros(3), TOOL_DOWN)[3:]
            velocity = self._joint_step(q, np.concatenate([linear, turn]), RATE)
            q = np.clip(q + velocity * duration / SUBSTEPS, self.lower, self.upper)
        return q, velocity

    def solve(
        self,
        q: np.ndarray,
        position: np.ndarray,
        rotation: np.ndarray = TOOL_DOWN,
        tolerance: float = 1e-4,
        iterations: int = 60,
    ) -> np.ndarray:
        """Joints that bring the tool to `position` (m) and `rotation`, within the joints' limits, starting from `q`.

        Raises Unreachable if position (m) or rotation (rad) stays further off than `tolerance`.
        """
        q = np.clip(q, self.lower, self.upper)
        for _ in range(iterations):
            error = self._error(q, position, rotation)
            if np.abs(error).max() < tolerance:
                return q
            step = self._joint_step(q, error, 1.0)
            q = np.clip(q + step * min(1.0, 0.3 / np.abs(step).max()), self.lower, self.upper)
        left = np.abs(self._error(q, position, rotation))
        raise Unreachable(
            f"the tool cannot reach {np.round(position, 3).tolist()} m: {left[:3].max():.4f} m and "
            f"{left[3:].max():.4f} rad remain after {iterations} steps of inverse kinematics"
        )

    def _joint_step(self, q: np.ndarray, twist: np.ndarray, still_gain: float) -> np.ndarray:
        """Damped least squares (Wampler 1986; Nakamura and Hanafusa 1986) of the tool's twist and the still joints."""
        rows = np.vstack([self.jacobian(q), self._still])
        wanted = np.concatenate([twist, -still_gain * self._still @ q])
        return np.linalg.solve(rows.T @ rows + DAMPING * np.eye(len(q)), rows.T @ wanted)

    def _error(self, q: np.ndarray, position: np.ndarray, rotation: np.ndarray) -> np.ndarray:
        now, axes = self.forward(q)
        turn = 0.5 * np.cross(axes.T, rotation.T).sum(axis=0)  # rotation vector, to first order
        return np.concatenate([position - now, turn])
