"""The whole line in one process and in simulated time: arm, cameras, conductor, policy, trajectory controller.

Nothing waits for a clock: the inference's latency is a number, so that the loop is the same on any machine, however
busy, and faster than real time. What DDS and threads add is measured elsewhere, by `make bench-node` and the end-to-end
tests. `dit_policy_ros.sim.rollout` is its command line.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import numpy as np

from dit_policy_ros.embodiment import Embodiment
from dit_policy_ros.policy.engine import PolicyEngine
from dit_policy_ros.runtime.conductor import Conductor
from dit_policy_ros.runtime.decisions import Outcome, Settings
from dit_policy_ros.runtime.faults import Trouble
from dit_policy_ros.runtime.gate import Gate
from dit_policy_ros.runtime.observations import ObservationBuffer
from dit_policy_ros.runtime.pipeline import ChunkPipeline, Sampled
from dit_policy_ros.runtime.trajectory import Trajectory
from dit_policy_ros.sim import topics
from dit_policy_ros.sim.scene import ARM_JOINTS
from dit_policy_ros.sim.simulation import Simulation
from dit_policy_ros.sim.task import SETTLED_S, TIME_LIMIT, instruction_for, judge
from dit_policy_ros.sim.trajectory_controller import TrajectoryController

TICK_NS = 10_000_000
CAMERA_TICKS = 7  # 14.3 Hz
FRESH_S = 0.3  # as in the demo, from the scene's beginning to the policy's: it has a history of observations
_START_NS = 10_000_000_000


@dataclass
class Episode:
    """One episode's result; `velocities` (ticks, 7) rad/s are the arm's, `seam_ticks` where chunks took over.

    outcomes: of each inference; missed: of each moment at which there was nothing to infer from. seconds are simulated,
    from the policy's beginning to the verdict; moved: m, by colour.
    """

    success: bool = False
    wrong_block: bool = False
    seconds: float = 0.0
    moved: dict[str, float] = field(default_factory=dict)
    outcomes: list[Outcome] = field(default_factory=list)
    missed: list[Outcome] = field(default_factory=list)
    seam_ticks: list[int] = field(default_factory=list)
    stops: int = 0
    velocities: list[np.ndarray] = field(default_factory=list)


class ClosedLoop:
    """Runs episodes of the demo's task with a policy whose chunks take `latency` s to come.

    blank: it sees black images, a control of what it goes by.
    """

    def __init__(
        self,
        engine: PolicyEngine,
        embodiment: Embodiment,
        simulation: Simulation,
        latency: float,
        blank: bool = False,
    ) -> None:
        self._engine = engine
        self._embodiment = embodiment
        self._simulation = simulation
        self._latency_ns = round(latency * 1e9)
        self._blank = blank

    def run(
        self,
        seed: int,
        target: str,
        settings: Settings,
        troubles: Callable[[float], list[Trouble]] = lambda _: [],
    ) -> Episode:
        """One episode in the scene of that seed, told to push the target's block, until it has succeeded, spoiled
        another block, or run out of time.

        troubles(seconds): what the watchdogs see at that time since the policy began.
        """
        episode = Episode()
        self._prepare(seed, instruction_for(target))
        start, succeeded = self._simulation.blocks(), 0.0
        for seconds in self._ticks(settings, episode, troubles):
            result = judge(target, start, self._simulation.blocks())
            succeeded = succeeded + TICK_NS / 1e9 if result.success else 0.0
            if result.wrong_block or succeeded >= SETTLED_S or seconds >= TIME_LIMIT:
                episode.success, episode.wrong_block = succeeded >= SETTLED_S, result.wrong_block
                episode.seconds, episode.moved = seconds, result.moved
                break
        return episode

    def _prepare(self, seed: int, instruction: str) -> None:
        self._simulation.reset(seed)
        self._now_ns = _START_NS
        self._observations = ObservationBuffer(self._embodiment, self._engine.policy.config.n_obs_steps)
        self._conductor = Conductor(self._embodiment, Gate(self._embodiment), self._observations)
        self._pipeline = ChunkPipeline(self._engine, self._embodiment, self._observations, lambda: self._now_ns)
        self._controller = TrajectoryController(ARM_JOINTS, interpolate_from_desired_state=True)
        self._coming: tuple[int, Sampled] | None = None
        self._conductor.instruct(instruction)

    def _ticks(
        self, settings: Settings, episode: Episode, troubles: Callable[[float], list[Trouble]]
    ) -> Iterator[float]:
        warm_up = round(FRESH_S * 1e9 / TICK_NS)  # the streams begin before the policy does
        for tick in range(10**9):
            self._sense(tick)
            if tick == warm_up:
                self._conductor.start(self._now_ns)
            self._drive(settings, episode, troubles((tick - warm_up) * TICK_NS / 1e9))
            self._actuate()
            episode.velocities.append(self._simulation.qd[self._arm].copy())
            self._simulation.step(TICK_NS / 1e9)
            self._now_ns += TICK_NS
            yield (tick - warm_up) * TICK_NS / 1e9

    @property
    def _arm(self) -> list[int]:
        return [self._simulation.joint_names.index(joint) for joint in ARM_JOINTS]

    def _sense(self, tick: int) -> None:
        simulation, names = self._simulation, self._simulation.joint_names
        self._add(topics.JOINT_STATES, topics.joint_state_fields(names, names, simulation.q, simulation.qd))
        if tick % CAMERA_TICKS == 0:
            self._add(topics.WORKSPACE_IMAGE, topics.image_fields(self._seen("workspace")))
        if (tick + CAMERA_TICKS // 2) % CAMERA_TICKS == 0 or tick == 0:
            self._add(topics.WRIST_IMAGE, topics.compressed_image_fields(self._seen("wrist")))

    def _seen(self, camera: str) -> np.ndarray:
        picture = self._simulation.render(camera)
        return np.zeros_like(picture) if self._blank else picture

    def _add(self, topic: str, fields: Mapping[str, Any]) -> None:
        header = SimpleNamespace(stamp=SimpleNamespace(sec=self._now_ns // 10**9, nanosec=self._now_ns % 10**9))
        self._observations.add(topic, self._now_ns, SimpleNamespace(header=header, **fields))

    def _drive(self, settings: Settings, episode: Episode, troubles: list[Trouble]) -> None:
        if self._coming is not None and self._now_ns >= self._coming[0]:
            sampled, self._coming = self._coming[1], None
            outcome = self._conductor.deliver(sampled, self._now_ns)
            assert outcome is not None
            episode.outcomes.append(outcome)
            if outcome.sent:
                assert outcome.trajectory is not None
                self._command(outcome.trajectory)
                episode.seam_ticks.append(len(episode.velocities))
        directive = self._conductor.tick(self._now_ns, settings, troubles)
        if directive.refusal is not None:
            episode.missed.append(directive.refusal)
        if directive.request is not None:
            self._coming = self._now_ns + self._latency_ns, self._pipeline.sample(directive.request)
        if directive.stop is not None:
            self._command(directive.stop)
            episode.stops += 1

    def _command(self, trajectory: Trajectory) -> None:
        rejection = self._controller.receive(trajectory_message(trajectory), self._now_ns)
        assert rejection is None, rejection

    def _actuate(self) -> None:
        measured = self._simulation.q[self._arm], self._simulation.qd[self._arm]
        targets = self._controller.update(self._now_ns, *measured)[0]
        try:
            self._simulation.set_targets(ARM_JOINTS, targets)
        except ValueError:
            # As in the simulator's node: the controller looks at no limits, the drives behind it keep their targets.
            # So it is where an arm that leans on its end stop, a little beyond the limit, is told to hold.
            self._controller.reset()


def trajectory_message(trajectory: Trajectory) -> Any:
    """A trajectory with the fields of a JointTrajectory with stamp zero."""
    points = []
    for row, seconds in enumerate(trajectory.times):
        time_ns = round(float(seconds) * 1e9)
        since = SimpleNamespace(sec=time_ns // 10**9, nanosec=time_ns % 10**9)
        velocities = [] if trajectory.velocities is None else trajectory.velocities[row]
        points.append(
            SimpleNamespace(
                positions=trajectory.positions[row],
                velocities=velocities,
                accelerations=[],
                effort=[],
                time_from_start=since,
            )
        )
    header = SimpleNamespace(stamp=SimpleNamespace(sec=0, nanosec=0))
    return SimpleNamespace(header=header, joint_names=list(trajectory.joint_names), points=points)
