"""One parameter of a node as a line of a table: the policy node, the simulator and the guard declare theirs with it.

It stands apart from the policy node's table, which names samplers, so that a node without a policy loads no torch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from rcl_interfaces.msg import FloatingPointRange, IntegerRange, ParameterDescriptor

Value = bool | int | float | str


@dataclass(frozen=True)
class Declaration:
    """One parameter: name, default (which fixes its type), sentence, inclusive range, whether it is fixed at start.

    A text parameter may have `choices`, its only values.
    """

    name: str
    default: Value
    description: str
    lower: float | None = None
    upper: float | None = None
    read_only: bool = False
    choices: tuple[str, ...] = ()

    def descriptor(self) -> ParameterDescriptor:
        """The ROS descriptor; rqt_reconfigure draws a bounded number as a slider."""
        descriptor = ParameterDescriptor(description=self.description, read_only=self.read_only)
        if self.choices:
            descriptor.additional_constraints = f"one of {self.listed_choices()}"
        if self.lower is not None and self.upper is not None:
            if isinstance(self.default, int):
                bounds = IntegerRange(from_value=int(self.lower), to_value=int(self.upper), step=1)
                descriptor.integer_range = [bounds]
            else:
                bounds = FloatingPointRange(from_value=float(self.lower), to_value=float(self.upper), step=0.0)
                descriptor.floating_point_range = [bounds]
        return descriptor

    def listed_choices(self) -> str:
        """The choices in words."""
        return ", ".join(choice or '""' for choice in self.choices)

    def problem(self, value: Value) -> str | None:
        """Why a value is none of the choices, in a sentence; ROS itself checks types and ranges."""
        if not self.choices or value in self.choices:
            return None
        return f"{self.name} must be one of {self.listed_choices()}, got '{value}'"


def table(declarations: Sequence[Declaration]) -> str:
    """A document's table of parameters, made from the declarations so that it cannot differ from them."""
    rows = ["| parameter | default | range | when | what |", "|---|---|---|---|---|"]
    for entry in declarations:
        bounds = f"{entry.lower} to {entry.upper}" if entry.lower is not None else entry.listed_choices()
        when = "at start" if entry.read_only else "live"
        default = f"`{entry.default!r}`" if isinstance(entry.default, str) else f"`{entry.default}`"
        rows.append(f"| `{entry.name}` | {default} | {bounds} | {when} | {entry.description} |")
    return "\n".join(rows)
