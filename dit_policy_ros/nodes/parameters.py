"""The policy node's parameters: each declared once, with type, range, sentence and whether it can change while running.

A change is checked as a whole before any of it is applied, so a rejected set leaves nothing half-changed. What
contradicts the loaded checkpoint (more `n_action_steps` than its horizon holds) is rejected with a sentence.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import cast, get_args

from rcl_interfaces.msg import SetParametersResult
from rclpy.node import Node
from rclpy.parameter import Parameter

from dit_policy_ros.nodes.declaration import Declaration, Value, table
from dit_policy_ros.policy.configuration import DiffusionConfig, FlowMatchingConfig
from dit_policy_ros.policy.engine import Precision
from dit_policy_ros.policy.sampling import Sampling, samplers_of
from dit_policy_ros.runtime.decisions import OnFault, Recovery, Settings
from dit_policy_ros.runtime.joining import JOININGS, Joining

LIMITS_FROM = ("embodiment", "robot_description")
SAMPLERS = (*samplers_of(DiffusionConfig()), *samplers_of(FlowMatchingConfig()))


DECLARATIONS: tuple[Declaration, ...] = (
    Declaration("checkpoint", "", "Folder of the policy checkpoint to load at configure.", read_only=True),
    Declaration(
        "embodiment",
        "",
        "Embodiment YAML of this robot. Empty: the one stored in the checkpoint. Where the policy would notice a "
        "difference (name, fps, cameras' names and sizes, joints and their order) configure fails and says which line; "
        "other differences are logged.",
        read_only=True,
    ),
    Declaration("device", "auto", "torch device of the policy: auto, cpu, cuda or cuda:N.", read_only=True),
    Declaration(
        "precision",
        "fp32",
        "Number type of the policy's matrix products: bf16 and fp16 are faster where the processor has them, and "
        "inexact; the error, in action units, is measured at configure (see diagnostics, fast_path).",
        read_only=True,
        choices=get_args(Precision),
    ),
    Declaration(
        "compile",
        False,
        "Put the transformer through torch.compile at configure, which takes a minute. Meant for GPUs: on a CPU the "
        "engine is faster without.",
        read_only=True,
    ),
    Declaration(
        "warmup_chunks",
        3,
        "Chunks sampled at configure before the first real one; their latency is not counted.",
        1,
        20,
        read_only=True,
    ),
    Declaration(
        "limits_from",
        "embodiment",
        "Where the joints' position and velocity limits come from: the embodiment, or the tighter of the embodiment's "
        "and the URDF's on the topic robot_description, without which the node then does not become active.",
        read_only=True,
        choices=LIMITS_FROM,
    ),
    Declaration(
        "command_rate",
        100.0,
        "Rate of the position commands to action groups with `interface: position`, in Hz.",
        10.0,
        500.0,
        read_only=True,
    ),
    Declaration("heartbeat_rate", 20.0, "Rate of ~/heartbeat, in Hz.", 10.0, 50.0, read_only=True),
    Declaration(
        "instruction",
        "",
        "What the arm should do, in words: the same as publishing it on the instruction topic. One that came by topic, "
        "service or action is written back here. It cannot be emptied while one is in force.",
    ),
    Declaration(
        "n_action_steps",
        0,
        "Steps of a chunk executed before the next chunk takes over; at most horizon - n_obs_steps + 1. "
        "0: as the checkpoint says. Takes effect at the next chunk.",
        0,
        256,
    ),
    Declaration(
        "denoising_steps",
        0,
        "Denoising (or integration) steps for a chunk: fewer are faster, more are finer. 0: as the checkpoint "
        "says. Takes effect at the next chunk.",
        0,
        1000,
    ),
    Declaration(
        "sampler",
        "",
        "How noise becomes actions: ddpm, ddim or dpm_solver++ for a diffusion policy; euler, heun (two network calls "
        "a step but the last) or rk4 (four) for flow matching. Empty: as the checkpoint says. Takes effect at the next "
        "chunk.",
        choices=("", *SAMPLERS),
    ),
    Declaration(
        "guidance_scale",
        0.0,
        "How much the instruction counts: beyond 1 its effect is exaggerated, for a policy that ignores it; needs one "
        "trained with instruction_dropout. 0: as the checkpoint says. Takes effect at the next chunk.",
        0.0,
        20.0,
    ),
    Declaration(
        "joining",
        "rtc",
        "How a chunk joins the one in motion: replace (it takes over at once), blend (a weighted mean over the steps "
        "that both have, as in ACT's temporal ensembling) or rtc (real-time chunking: sampled so that it goes on from "
        "the steps that will have been executed). Takes effect at the next chunk.",
        choices=JOININGS,
    ),
    Declaration(
        "speed_scale",
        1.0,
        "Speed of execution as a fraction of that learnt: below 1 the steps are stretched in time. Takes effect at the "
        "next chunk.",
        0.05,
        1.0,
    ),
    Declaration(
        "dry_run",
        False,
        "Do everything but publish to the controllers. Switched on while the arm moves, it lets the arm follow what "
        "was sent to its end.",
    ),
    Declaration(
        "clamp_to_limits",
        False,
        "Move a chunk's positions that lie outside the limits onto them, counted, instead of refusing the chunk.",
    ),
    Declaration(
        "position_margin",
        0.0,
        "How far inside the position limits the arm is kept, in rad (m for a prismatic joint).",
        0.0,
        0.5,
    ),
    Declaration(
        "velocity_margin",
        1.0,
        "A chunk may be as fast as the velocity limit times this.",
        0.05,
        1.0,
    ),
    Declaration(
        "acceleration_margin",
        2.0,
        "The change of speed between a chunk's steps may be the acceleration limit times this. Above 1 because the "
        "differences of steps exaggerate noise that the controller's spline smooths away.",
        0.1,
        10.0,
    ),
    Declaration(
        "max_start_distance",
        0.35,
        "Largest distance of a chunk's first step from the measured arm, in rad (m for a prismatic joint); "
        "a chunk that starts farther away is refused.",
        0.0,
        3.2,
    ),
    Declaration(
        "max_chunk_age",
        1.0,
        "Largest age of the observation behind a chunk when it would be sent, in s; an older chunk is refused.",
        0.01,
        10.0,
    ),
    Declaration(
        "max_consecutive_rejections",
        5,
        "So many chunks refused in a row bring the arm to rest, as a fault.",
        1,
        100,
    ),
    Declaration(
        "on_fault",
        "stop",
        "What a fault does to a moving arm: stop (it is braked at once) or finish_chunk (it follows what was sent, "
        "which ends at rest).",
        choices=get_args(OnFault),
    ),
    Declaration(
        "recovery",
        "manual",
        "How it goes on after a fault: manual (call ~/resume, or deactivate and activate) or automatic (once nothing "
        "has been wrong for half a second).",
        choices=get_args(Recovery),
    ),
    Declaration(
        "inference_timeout",
        1.0,
        "A chunk that takes longer is a fault, in s.",
        0.05,
        30.0,
    ),
    Declaration(
        "budget_margin",
        0.02,
        "How much earlier than the inference's 95th percentile demands the next chunk is started, in s.",
        0.0,
        1.0,
    ),
    Declaration(
        "encode_ahead",
        True,
        "Encode camera images as they arrive, so that a chunk waits only for the newest.",
    ),
    Declaration(
        "controller_timeout",
        0.5,
        "A controller whose ~/controller_state was heard and then not for so long is a fault, in s.",
        0.05,
        10.0,
    ),
    Declaration(
        "max_tracking_error",
        0.5,
        "A controller that reports a joint farther from its reference is a fault, in rad (m for a prismatic joint).",
        0.01,
        3.2,
    ),
    Declaration(
        "watch_foreign_commands",
        True,
        "Commands of somebody else on a controller's topic are a fault.",
    ),
)


class Parameters:
    """Declares the table on a node, keeps the current values, and accepts or rejects each change as a whole.

    `constrain(values)` may return a sentence that says why a set of values cannot hold together (or None); it is given
    all values, the changed ones included. `on_change(names)` runs after an accepted change has been applied.
    """

    def __init__(
        self,
        node: Node,
        constrain: Callable[[Mapping[str, Value]], str | None],
        on_change: Callable[[Iterable[str]], None],
    ) -> None:
        self._constrain = constrain
        self._on_change = on_change
        self._values: dict[str, Value] = {}
        for declaration in DECLARATIONS:
            descriptor = declaration.descriptor()
            parameter = node.declare_parameter(declaration.name, declaration.default, descriptor)
            reason = declaration.problem(parameter.value)
            if reason is not None:
                raise ValueError(f"parameter {reason}")
            self._values[declaration.name] = parameter.value
        node.add_on_set_parameters_callback(self._validate)
        node.add_post_set_parameters_callback(self._apply)

    def __getitem__(self, name: str) -> Value:
        return self._values[name]

    @property
    def values(self) -> dict[str, Value]:
        """All values as they are now."""
        return dict(self._values)

    def text(self, name: str) -> str:
        """The value of a text parameter."""
        return str(self._values[name])

    def integer(self, name: str) -> int:
        """The value of an integer parameter."""
        return int(self._values[name])

    def number(self, name: str) -> float:
        """The value of a floating-point parameter, SI units."""
        return float(self._values[name])

    def flag(self, name: str) -> bool:
        """The value of a yes-or-no parameter."""
        return bool(self._values[name])

    def settings(self, n_action_steps: int) -> Settings:
        """What the conductor needs; `n_action_steps` is the checkpoint's, for where the parameter leaves it open."""
        return Settings(
            n_action_steps=self.integer("n_action_steps") or n_action_steps,
            sampling=sampling(self._values),
            joining=cast(Joining, self.text("joining")),
            speed_scale=self.number("speed_scale"),
            clamp=self.flag("clamp_to_limits"),
            dry_run=self.flag("dry_run"),
            max_consecutive_rejections=self.integer("max_consecutive_rejections"),
            on_fault=cast(OnFault, self.text("on_fault")),
            recovery=cast(Recovery, self.text("recovery")),
            inference_timeout=self.number("inference_timeout"),
            budget_margin=self.number("budget_margin"),
        )

    def _validate(self, changes: list[Parameter]) -> SetParametersResult:
        # Called before anything is set, and possibly rolled back afterwards: it must only look.
        wanted = self._values | {change.name: change.value for change in changes}
        reasons = (declaration.problem(wanted[declaration.name]) for declaration in DECLARATIONS)
        reason = next((each for each in reasons if each is not None), None) or self._constrain(wanted)
        return SetParametersResult(successful=reason is None, reason=reason or "")

    def _apply(self, changes: list[Parameter]) -> None:
        self._values.update({change.name: change.value for change in changes})
        self._on_change([change.name for change in changes])


def sampling(values: Mapping[str, Value]) -> Sampling:
    """How a chunk is sampled, by the parameters; what they leave open is as the checkpoint says."""
    return Sampling(
        sampler=str(values["sampler"]) or None,
        denoising_steps=int(values["denoising_steps"]) or None,
        guidance_scale=float(values["guidance_scale"]) or None,
    )


def markdown_table() -> str:
    """The table of docs/node.md."""
    return table(DECLARATIONS)
