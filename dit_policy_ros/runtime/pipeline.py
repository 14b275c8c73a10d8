"""One chunk from end to end, without ROS: window -> policy -> drop what has elapsed -> gate -> trajectories.

The node calls this in its inference thread. Whatever goes wrong comes back as an Outcome with a verdict and a reason;
only an accepted outcome carries trajectories, so there is nothing to publish when a check failed.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

import numpy as np
import torch

from dit_policy_ros.embodiment import Embodiment
from dit_policy_ros.policy.modeling import MultitaskDiTPolicy
from dit_policy_ros.policy.sampling import Sampling
from dit_policy_ros.runtime.chunking import Chunk, drop_elapsed
from dit_policy_ros.runtime.gate import Decision, Gate, Verdict
from dit_policy_ros.runtime.messages import MessageError
from dit_policy_ros.runtime.observations import Observation, ObservationBuffer, ObservationError
from dit_policy_ros.runtime.trajectory import Trajectory, plan


@dataclass(frozen=True)
class Request:
    """What the next chunk is asked for: its number, the instruction, and the live parameters as they are now."""

    sequence: int
    instruction: str
    n_action_steps: int
    denoising_steps: int | None


@dataclass(frozen=True)
class Outcome:
    """What came of a request. `trajectories` (by action group) is empty unless the decision is ACCEPTED."""

    request: Request
    decision: Decision
    chunk: Chunk | None = None
    steps_dropped: int = 0
    trajectories: Mapping[str, Trajectory] = field(default_factory=dict)


class ChunkPipeline:
    """Samples chunks of a policy from the observations buffered, and lets only safe ones through.

    `now_ns` reads the clock that stamps the observations (the node's clock, or a bag's).
    """

    def __init__(
        self,
        policy: MultitaskDiTPolicy,
        embodiment: Embodiment,
        observations: ObservationBuffer,
        gate: Gate,
        now_ns: Callable[[], int],
    ) -> None:
        self._policy = policy
        self._embodiment = embodiment
        self._observations = observations
        self._gate = gate
        self._now_ns = now_ns
        self._device = next(policy.parameters()).device

    def warm_up(self, chunks: int) -> float:
        """Sample `chunks` chunks of grey images and a centred arm; returns the last one's duration in seconds.

        The first samples allocate, compile and fill caches; done here, none of that falls on the moving arm.
        """
        n_obs_steps = self._policy.config.n_obs_steps
        batch: dict[str, object] = {
            f"observation.images.{camera.name}": torch.full(
                (1, n_obs_steps, 3, camera.height, camera.width), 127, dtype=torch.uint8, device=self._device
            )
            for camera in self._embodiment.cameras
        }
        joints = len(self._embodiment.state.joints)
        batch["observation.state"] = torch.zeros(1, n_obs_steps, joints, device=self._device)
        tasks = self._policy.config.tasks or ["warm up"]
        seconds = 0.0
        for number in range(chunks):
            started = time.perf_counter()
            self._policy.predict_chunk(batch | {"task": [tasks[number % len(tasks)]]}).cpu()
            seconds = time.perf_counter() - started
        return seconds

    def next_chunk(self, request: Request) -> Outcome:
        """Sample, time and check one chunk of the newest moment that every stream has reached."""
        try:
            observation = self._observations.latest(self._now_ns())
            chunk = self._sample(observation, request)
        except (ObservationError, MessageError) as error:
            return Outcome(request, Decision(Verdict[error.code], str(error)))
        except Exception as error:  # of the model or the device, out of memory among them
            reason = f"sampling failed with {type(error).__name__}: {error}"
            return Outcome(request, Decision(Verdict.INFERENCE_FAILED, reason))
        return self._admit(chunk, request)

    def _sample(self, observation: Observation, request: Request) -> Chunk:
        started = time.perf_counter()
        batch: dict[str, object] = {
            key: torch.as_tensor(value).unsqueeze(0).to(self._device) for key, value in observation.tensors().items()
        }
        batch["task"] = [request.instruction]
        actions = self._policy.predict_chunk(batch, Sampling(denoising_steps=request.denoising_steps))
        positions = actions[0].cpu().numpy().astype(np.float64)  # also waits for the device
        return Chunk(
            observation_stamp_ns=observation.stamp_ns,
            sequence=request.sequence,
            joint_names=self._embodiment.action_joints,
            positions=positions,
            step_duration=1.0 / self._embodiment.fps,
            n_action_steps=request.n_action_steps,
            instruction=request.instruction,
            inference_duration=time.perf_counter() - started,
        )

    def _admit(self, chunk: Chunk, request: Request) -> Outcome:
        now_ns = self._now_ns()
        outcome = Outcome(request, Decision(Verdict.ACCEPTED, ""), chunk)
        try:
            position, velocity = self._observations.measured(chunk.joint_names, now_ns)
        except (ObservationError, MessageError) as error:
            return replace(outcome, decision=Decision(Verdict[error.code], str(error)))
        positions, times, dropped = drop_elapsed(chunk, now_ns)
        decision = self._gate.check(positions, times, chunk.joint_names, position, chunk.observation_stamp_ns, now_ns)
        if decision.verdict is not Verdict.ACCEPTED:
            return replace(outcome, decision=decision, steps_dropped=dropped)
        trajectories = {}
        first = 0
        for group in self._embodiment.action_groups:
            columns = slice(first, first + len(group.joints))
            first = columns.stop
            trajectories[group.name] = plan(
                tuple(group.joints),
                positions[:, columns],
                times,
                position[columns],
                None if velocity is None else velocity[columns],
            )
        return replace(outcome, decision=decision, steps_dropped=dropped, trajectories=trajectories)
