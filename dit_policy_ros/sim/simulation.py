"""The running simulation: joints driven by position servos, blocks that can be pushed, cameras that can be read."""

import atexit
import weakref
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType

import mujoco
import numpy as np

from dit_policy_ros.sim import offscreen, scene, task

# As plain integers: the model's arrays hold those, and the enumerations do not compare equal to them.
_HINGE, _SLIDE, _FREE = (
    int(kind) for kind in (mujoco.mjtJoint.mjJNT_HINGE, mujoco.mjtJoint.mjJNT_SLIDE, mujoco.mjtJoint.mjJNT_FREE)
)
_JOINT, _EQ_JOINT = int(mujoco.mjtTrn.mjTRN_JOINT), int(mujoco.mjtEq.mjEQ_JOINT)

HOME_NOISE = 0.02  # rad, the most that a joint starts away from the home posture
_SINES, _HERTZ, _RAMP = 4, (0.15, 1.0), 0.5  # of a disturbance: terms, their frequencies, seconds to come up


class OffscreenError(RuntimeError):
    """No picture can be drawn on this machine; the message says what to install."""


class Simulation:
    """The scene of `scene.build_model`, or any MJCF, in steps of its own time.

    model_path: an MJCF file, None for the built-in scene. Of a file are used: its actuated hinges and slides (position
    servos), its cameras, a key frame "home" to start from, and free bodies "red_block", "green_block", "blue_block".
    camera_size: pixels, a side or (height, width). pretty: shadows and antialiasing, slow.

    The rendering context is bound to the thread that first calls `render`: call it, and `close`, from that thread only.
    Everything else may be used from any one thread at a time.
    """

    def __init__(
        self,
        model_path: str | Path | None = None,
        camera_size: int | tuple[int, int] = 128,
        pretty: bool = False,
    ) -> None:
        self.model = scene.build_model(model_path, pretty)
        self.data = mujoco.MjData(self.model)
        actuators = [i for i in range(self.model.nu) if self._drives_joint(i)]
        joints = self.model.actuator_trnid[actuators, 0]
        self.joint_names: tuple[str, ...] = tuple(self.model.joint(j).name for j in joints)
        if not self.joint_names:
            raise ValueError(f"the model {scene.model_name(self.model)!r} has no joint with a position actuator")
        self._ctrl = np.array(actuators)
        self._hinge = self.model.jnt_type[joints] == _HINGE
        self._limited = self.model.jnt_limited[joints].astype(bool)
        self._range = self.model.jnt_range[joints].copy()
        self._qpos, self._dof = self.model.jnt_qposadr[joints], self.model.jnt_dofadr[joints]
        self._block_qpos = self._find_blocks()
        self._camera_size = (camera_size, camera_size) if isinstance(camera_size, int) else camera_size
        self._renderer: mujoco.Renderer | None = None
        self.reset(0)

    def reset(self, seed: int) -> None:
        """Back to time zero, home, blocks at random places: `seed` decides it all. The disturbance goes off."""
        rng = np.random.default_rng(seed)
        mujoco.mj_resetData(self.model, self.data)
        if "home" in (self.model.key(i).name for i in range(self.model.nkey)):
            mujoco.mj_resetDataKeyframe(self.model, self.data, self.model.key("home").id)
        self.set_disturbance(0.0)
        places = task.place_blocks(rng)
        start = self.q + np.where(self._hinge, rng.uniform(-HOME_NOISE, HOME_NOISE, len(self.joint_names)), 0.0)
        start = np.where(self._limited, np.clip(start, *self._range.T), start)
        self.set_configuration(
            dict(zip(self.joint_names, start, strict=True)), {c: places[c] for c in self._block_qpos}
        )
        self._target = self.q

    @property
    def time_ns(self) -> int:
        """Simulated time since the reset, in nanoseconds."""
        return round(self.data.time * 1e9)

    @property
    def timestep(self) -> float:
        """Seconds that one step of the physics takes."""
        return float(self.model.opt.timestep)

    @property
    def q(self) -> np.ndarray:
        """(len(joint_names),) positions, rad (hinge) or m (slide), as an encoder would measure them."""
        return self.data.qpos[self._qpos].copy()

    @property
    def qd(self) -> np.ndarray:
        """(len(joint_names),) velocities, rad/s or m/s."""
        return self.data.qvel[self._dof].copy()

    def blocks(self) -> dict[str, tuple[float, float, float]]:
        """x, y (m) and yaw (rad) of each block's middle, by colour."""
        return {c: self._block_place(address) for c, address in self._block_qpos.items()}

    def set_targets(self, names: Sequence[str], positions: Sequence[float] | np.ndarray) -> None:
        """Where the servos of these joints should go (rad or m); the others keep their targets.

        Raises ValueError, and changes nothing, for a joint not driven, or a position not finite or out of range.
        """
        target = self._target.copy()
        for name, position in zip(names, positions, strict=True):
            i = self._joint(name)
            low, high = self._range[i] if self._limited[i] else (-np.inf, np.inf)
            if not (np.isfinite(position) and low - 1e-6 <= position <= high + 1e-6):
                raise ValueError(f"target of joint {name!r}: {position}, expected {low:.4f} to {high:.4f}")
            target[i] = position
        self._target = target

    def set_disturbance(self, amplitude: float, seed: int = 0) -> None:
        """Push the hinges' servos off their targets, smoothly and at random, by `amplitude` (rad, root mean square).

        It acts inside the simulation, behind whoever commands it: the commands stay those of someone who steers back,
        which is what a policy must learn (Laskey et al. 2017, DART). 0 switches it off.
        """
        rng = np.random.default_rng(seed)
        shape = (_SINES, len(self.joint_names))
        self._sines = 2 * np.pi * np.array([rng.uniform(*_HERTZ, shape), rng.uniform(0, 1, shape)])
        self._amplitude, self._since = amplitude, self.data.time

    def step(self, dt: float) -> None:
        """Let `dt` seconds pass; a multiple of `timestep`, or ValueError."""
        count = round(dt / self.timestep)
        if abs(count * self.timestep - dt) > 1e-9:
            raise ValueError(f"a step of {dt} s is no multiple of the model's time step, {self.timestep} s")
        for _ in range(count):
            self.data.ctrl[self._ctrl] = self._target + self._disturbance()
            mujoco.mj_step(self.model, self.data)

    def render(self, camera: str) -> np.ndarray:
        """A picture (height, width, 3) uint8 RGB from the named camera, of this moment.

        Raises ValueError for a camera that the model lacks, OffscreenError where no picture can be drawn.
        """
        scene.find(self.model, "camera", camera)
        if self._renderer is None:
            self._renderer = self._open_renderer()
        self._renderer.update_scene(self.data, camera)
        return self._renderer.render()

    def set_configuration(self, joints: Mapping[str, float], blocks: Mapping[str, tuple[float, float, float]]) -> None:
        """Put joints (rad or m) and blocks (x, y, yaw) where they are told, at rest; to replay what was recorded."""
        for name, position in joints.items():
            self.data.qpos[self._qpos[self._joint(name)]] = position
        for equality in range(self.model.neq):
            self._follow(equality)
        for colour, (x, y, yaw) in blocks.items():
            if colour not in self._block_qpos:
                raise ValueError(f"no {colour} block in the model; it has: {', '.join(self._block_qpos) or 'none'}")
            address = self._block_qpos[colour]
            height = self.model.qpos0[address + 2]
            pose = [x, y, height, np.cos(yaw / 2), 0, 0, np.sin(yaw / 2)]
            self.data.qpos[address : address + 7] = pose
        self.data.qvel[:] = 0
        mujoco.mj_forward(self.model, self.data)
        self._target = self.q

    def close(self) -> None:
        """Free the rendering context; `render` would open another."""
        if self._renderer is not None:
            self._finalizer()
            self._renderer = None

    def __enter__(self) -> "Simulation":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _drives_joint(self, actuator: int) -> bool:
        if self.model.actuator_trntype[actuator] != _JOINT:
            return False
        kind = self.model.jnt_type[self.model.actuator_trnid[actuator, 0]]
        return kind in (_HINGE, _SLIDE)

    def _find_blocks(self) -> dict[str, int]:
        """Where in qpos each block's free joint is."""
        found = {}
        for colour in scene.COLOURS:
            if f"{colour}_block" in scene.names(self.model, "body"):
                joint = self.model.body(f"{colour}_block").jntadr[0]
                if joint < 0 or self.model.jnt_type[joint] != _FREE:
                    raise ValueError(f"body '{colour}_block' of the model needs a <freejoint/> to be a block")
                found[colour] = int(self.model.jnt_qposadr[joint])
        return found

    def _block_place(self, address: int) -> tuple[float, float, float]:
        x, y, _, w, i, j, k = self.data.qpos[address : address + 7]
        yaw = np.arctan2(2 * (w * k + i * j), 1 - 2 * (j * j + k * k))
        return float(x), float(y), float(yaw)

    def _joint(self, name: str) -> int:
        if name not in self.joint_names:
            raise ValueError(
                f"the model {scene.model_name(self.model)!r} has no driven joint {name!r}; "
                f"it has: {', '.join(self.joint_names)}"
            )
        return self.joint_names.index(name)

    def _disturbance(self) -> np.ndarray | float:
        if not self._amplitude:
            return 0.0
        elapsed = self.data.time - self._since
        omega, phase = self._sines
        noise = np.sqrt(2 / _SINES) * np.sin(omega * elapsed + phase).sum(axis=0)
        return self._amplitude * min(1.0, elapsed / _RAMP) * np.where(self._hinge, noise, 0.0)

    def _follow(self, equality: int) -> None:
        """Move a joint that an equality couples to another, as a gripper's second finger."""
        if self.model.eq_type[equality] == _EQ_JOINT and self.model.eq_obj2id[equality] >= 0:
            leader, follower = (
                self.model.jnt_qposadr[ids[equality]] for ids in (self.model.eq_obj2id, self.model.eq_obj1id)
            )
            moved = self.data.qpos[leader] - self.model.qpos0[leader]
            curve = np.polynomial.polynomial.polyval(moved, self.model.eq_data[equality, :5])
            self.data.qpos[follower] = self.model.qpos0[follower] + curve

    def _open_renderer(self) -> mujoco.Renderer:
        try:
            renderer = mujoco.Renderer(self.model, *self._camera_size)
        except Exception as error:  # each OpenGL library fails in its own way
            raise OffscreenError(offscreen.explain(error)) from error
        self._finalizer = weakref.finalize(self, renderer.close)
        # At exit, before the library that frees it goes, which asked for its own end when the renderer was made.
        # weakref's turn comes too late for that where anybody used it earlier.
        self._finalizer.atexit = False
        atexit.register(self._finalizer)
        return renderer
