"""Joint limits out of a robot's URDF, as /robot_description carries it: the tighter of its limits and the embodiment's.

URDF's rules (wiki.ros.org/urdf/XML/joint): <limit lower upper velocity effort> in rad or m; `lower` and `upper` are 0
if left out; revolute and prismatic joints must have a <limit>; a continuous joint turns without end and has, at most, a
velocity. <safety_controller> narrows the range softly. A mimic joint follows another and cannot be commanded.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import replace
from xml.etree import ElementTree
from xml.parsers import expat

from dit_policy_ros.embodiment import JointLimits

_MOVABLE = ("revolute", "prismatic", "continuous")


class UrdfError(Exception):
    """A URDF from which the limits cannot be taken; a sentence for each thing that is wrong."""


def limits_from_urdf(xml: str, joints: Iterable[str], limits: Mapping[str, JointLimits]) -> dict[str, JointLimits]:
    """The limits of these joints: position and velocity, whichever is tighter of the URDF's and `limits`.

    The acceleration, which a URDF does not have, is that of `limits`. Raises UrdfError naming every joint that is not
    in the URDF, cannot be commanded, lacks a limit, or has ranges that do not overlap.
    """
    elements = _joints(xml)
    found, problems = {}, []
    for joint in joints:
        try:
            found[joint] = _tighter(joint, elements.get(joint), limits[joint])
        except UrdfError as error:
            problems.append(str(error))
    if problems:
        raise UrdfError(f"the limits cannot be taken from the URDF: {'; '.join(problems)}")
    return found


def _joints(xml: str) -> dict[str, ElementTree.Element]:
    """The movable parts of <robot>, by name: not the <joint> of a <transmission> or of <ros2_control>."""
    _refuse_entities(xml)
    try:
        root = ElementTree.fromstring(xml)
    except ElementTree.ParseError as error:
        raise UrdfError(f"the URDF is not valid XML: {error}") from error
    if root.tag != "robot":
        raise UrdfError(f"the URDF's first element is <{root.tag}>, expected <robot>")
    elements: dict[str, ElementTree.Element] = {}
    for element in root.findall("joint"):
        name = element.get("name", "")
        if name in elements:
            raise UrdfError(f"the URDF has two joints called '{name}', expected each once")
        elements[name] = element
    return elements


def _refuse_entities(xml: str) -> None:
    """A document type may define entities that grow to gigabytes when read; a URDF needs none."""

    def refuse(*_: object) -> None:
        raise UrdfError("the URDF has a document type declaration, which is refused: it may expand without end")

    parser = expat.ParserCreate()
    parser.StartDoctypeDeclHandler = refuse
    try:
        parser.Parse(xml.encode(), True)
    except expat.ExpatError as error:
        raise UrdfError(f"the URDF is not valid XML: {error}") from error


def _tighter(joint: str, element: ElementTree.Element | None, limits: JointLimits) -> JointLimits:
    if element is None:
        raise UrdfError(f"it has no joint '{joint}'")
    kind = element.get("type", "")
    if kind not in _MOVABLE:
        raise UrdfError(f"'{joint}' is a joint of type '{kind}', expected {', '.join(_MOVABLE)}")
    if element.find("mimic") is not None:
        raise UrdfError(f"'{joint}' mimics another joint and cannot be commanded")
    limit = element.find("limit")
    if limit is None:
        if kind == "continuous":
            return limits
        raise UrdfError(f"'{joint}' has no <limit>")
    velocity = _number(joint, limit, "velocity", None)
    if velocity <= 0:
        raise UrdfError(f"the velocity limit of '{joint}' is {velocity}, expected more than 0")
    limits = replace(limits, velocity=min(limits.velocity, velocity))
    return limits if kind == "continuous" else _narrowed(joint, element, limit, limits)


def _narrowed(joint: str, element: ElementTree.Element, limit: ElementTree.Element, limits: JointLimits) -> JointLimits:
    lower, upper = _number(joint, limit, "lower", 0.0), _number(joint, limit, "upper", 0.0)
    soft = element.find("safety_controller")
    if soft is not None:
        # URDF's default of 0 for a soft limit left out would pin the joint there; here it is then the hard one.
        lower = max(lower, _number(joint, soft, "soft_lower_limit", lower))
        upper = min(upper, _number(joint, soft, "soft_upper_limit", upper))
    lowest, highest = max(lower, limits.lower), min(upper, limits.upper)
    if lowest >= highest:
        raise UrdfError(
            f"'{joint}' may move in [{lower}, {upper}] by the URDF and in [{limits.lower}, {limits.upper}] by the "
            "embodiment, which leaves nothing"
        )
    return replace(limits, lower=lowest, upper=highest)


def _number(joint: str, element: ElementTree.Element, name: str, default: float | None) -> float:
    text = element.get(name)
    if text is None:
        if default is None:
            raise UrdfError(f"the <{element.tag}> of '{joint}' has no {name}")
        return default
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise UrdfError(f"{name} of '{joint}' is '{text}', expected a finite number")
    return value
