"""The policy node's parameters: each declared once, with type, range, sentence and whether it can change while running.

A change is checked as a whole before any of it is applied, so a rejected set leaves nothing half-changed. What
contradicts the loaded checkpoint (more `n_action_steps` than its horizon holds) is rejected with a sentence.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import get_args

from rcl_interfaces.msg import SetParametersResult
from rclpy.node import Node
from rclpy.parameter import Parameter

from dit_policy_ros.nodes.declaration import Declaration, Value
from dit_policy_ros.policy.configuration import DiffusionConfig, FlowMatchingConfig
from dit_policy_ros.policy.engine import Precision
from dit_policy_ros.policy.sampling import samplers_of

SAMPLERS = (*samplers_of(DiffusionConfig()), *samplers_of(FlowMatchingConfig()))


DECLARATIONS: tuple[Declaration, ...] = (
    Declaration("checkpoint", "", "Folder of the policy checkpoint to load at configure.", read_only=True),
    Declaration(
        "embodiment",
        "",
        "Embodiment YAML of this robot. Empty: the one stored in the checkpoint. If it differs from the "
        "checkpoint's, configure fails and says which line.",
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

    def _validate(self, changes: list[Parameter]) -> SetParametersResult:
        # Called before anything is set, and possibly rolled back afterwards: it must only look.
        wanted = self._values | {change.name: change.value for change in changes}
        reasons = (declaration.problem(wanted[declaration.name]) for declaration in DECLARATIONS)
        reason = next((each for each in reasons if each is not None), None) or self._constrain(wanted)
        return SetParametersResult(successful=reason is None, reason=reason or "")

    def _apply(self, changes: list[Parameter]) -> None:
        self._values.update({change.name: change.value for change in changes})
        self._on_change([change.name for change in changes])


def markdown_table() -> str:
    """The table of docs/node.md, made from the declarations so that it cannot differ from them."""
    rows = ["| parameter | default | range | when | what |", "|---|---|---|---|---|"]
    for entry in DECLARATIONS:
        bounds = f"{entry.lower} to {entry.upper}" if entry.lower is not None else entry.listed_choices()
        when = "at start" if entry.read_only else "live"
        default = f"`{entry.default!r}`" if isinstance(entry.default, str) else f"`{entry.default}`"
        rows.append(f"| `{entry.name}` | {default} | {bounds} | {when} | {entry.description} |")
    return "\n".join(rows)
