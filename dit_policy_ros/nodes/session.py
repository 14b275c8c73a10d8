"""What configure loads and cleanup drops, and the questions that can only be asked once a policy is loaded."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import torch

from dit_policy_ros.embodiment import Embodiment, JointLimits
from dit_policy_ros.nodes.declaration import Value
from dit_policy_ros.nodes.parameters import Parameters, sampling
from dit_policy_ros.policy.checkpoint import load_checkpoint
from dit_policy_ros.policy.engine import PolicyEngine, Precision
from dit_policy_ros.policy.modeling import MultitaskDiTPolicy
from dit_policy_ros.runtime.conductor import Conductor
from dit_policy_ros.runtime.decisions import Settings
from dit_policy_ros.runtime.gate import Gate
from dit_policy_ros.runtime.observations import ObservationBuffer
from dit_policy_ros.runtime.pipeline import ChunkPipeline


@dataclass(frozen=True)
class Session:
    """A loaded policy with the robot it drives: from messages to decisions, without ROS."""

    checkpoint: Path
    device: str
    policy: MultitaskDiTPolicy
    embodiment: Embodiment
    differences: list[str]  # to the embodiment of the training, of the kind that the policy does not notice
    observations: ObservationBuffer
    gate: Gate
    pipeline: ChunkPipeline
    conductor: Conductor

    @classmethod
    def load(cls, parameters: Parameters, now_ns: Callable[[], int]) -> Session:
        """Load what the parameters name. Raises ValueError, OSError or a checkpoint's error with the reason."""
        folder = parameters.text("checkpoint")
        if not folder:
            raise ValueError(
                "parameter 'checkpoint' is empty; expected the folder of a trained policy "
                "(-p checkpoint:=FOLDER, or in the parameter file)"
            )
        checkpoint, device = Path(folder), _device(parameters.text("device"))
        # Not mapped: a file that is copied over while the arm moves would end the process.
        policy = load_checkpoint(checkpoint, device=device, mapped=False)
        embodiment, differences = _embodiment(parameters.text("embodiment"), checkpoint)
        reason = contradiction(parameters.values, policy, embodiment.limits)
        if reason is not None:
            raise ValueError(reason)
        precision = cast(Precision, parameters.text("precision"))
        engine = PolicyEngine(policy, precision, compile=parameters.flag("compile"))
        observations = ObservationBuffer(embodiment, policy.config.n_obs_steps)
        gate = Gate(embodiment)
        pipeline = ChunkPipeline(engine, embodiment, observations, now_ns)
        conductor = Conductor(embodiment, gate, observations)
        return cls(checkpoint, device, policy, embodiment, differences, observations, gate, pipeline, conductor)

    def settings(self, parameters: Parameters) -> Settings:
        """The live parameters as the conductor takes them."""
        return parameters.settings(self.policy.config.n_action_steps)

    def apply(self, parameters: Parameters) -> None:
        """Give the gate its live parameters."""
        for name in (
            "position_margin",
            "velocity_margin",
            "acceleration_margin",
            "max_start_distance",
            "max_chunk_age",
        ):
            setattr(self.gate, name, parameters.number(name))


def contradiction(
    values: Mapping[str, Value], policy: MultitaskDiTPolicy, limits: Mapping[str, JointLimits]
) -> str | None:
    """Why the parameters cannot hold together with a policy and an arm's limits, in a sentence; None if they can."""
    config = policy.config
    wanted = int(values["n_action_steps"])
    if wanted > config.max_action_steps:
        return (
            f"n_action_steps {wanted} is more than this checkpoint holds: horizon {config.horizon} - n_obs_steps "
            f"{config.n_obs_steps} + 1 = {config.max_action_steps} at most"
        )
    margin = float(values["position_margin"])
    for joint, limit in limits.items():
        if 2 * margin >= limit.upper - limit.lower:
            return (
                f"position_margin {margin} leaves {joint} no room: its limits are [{limit.lower}, {limit.upper}], "
                f"expected less than {(limit.upper - limit.lower) / 2:.4f}"
            )
    try:
        sampling(values).resolve(config)
    except ValueError as error:
        return str(error)
    return None


def _device(name: str) -> str:
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    return name


def _embodiment(path: str, checkpoint: Path) -> tuple[Embodiment, list[str]]:
    trained_on = Embodiment.load(checkpoint / "embodiment.yaml")
    if not path:
        return trained_on, []
    here = Embodiment.load(path)
    incompatibilities = here.incompatibilities(trained_on)
    if incompatibilities:
        raise ValueError(
            f"{path} is not the robot that {checkpoint} was trained on: "
            + "; ".join(incompatibilities)
            + ". Use the embodiment of the training, or train for this one"
        )
    return here, here.differences(trained_on)
