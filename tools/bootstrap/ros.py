"""Which ROS the project uses: the one that is sourced, or, where none is, ROS 2 as Python wheels.

The variable ROS asks for a distribution by name (`make test ROS=jazzy`). Without it the wheels are Kilted's.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

from tools.bootstrap.step import StepFailed

SUPPORTED = ("jazzy", "kilted")
DEFAULT = "kilted"
WHEELS = "wheels"


def asked(environment: Mapping[str, str]) -> str:
    """The distribution that the variable ROS names, DEFAULT without one; StepFailed for one that is not SUPPORTED."""
    name = environment.get("ROS") or DEFAULT
    if name not in SUPPORTED:
        raise StepFailed(f"ROS={name} is not one of {', '.join(SUPPORTED)}", "give ROS=jazzy, or leave ROS away")
    return name


def suffix(environment: Mapping[str, str]) -> str:
    """What ends the names of the environment's folders: nothing for DEFAULT, else the distribution asked for.

    It goes by the variable alone, as tools/run.sh does, so that both always mean the same folders.
    """
    name = asked(environment)
    return "" if name == DEFAULT else f"-{name}"


def wheels_list(environment: Mapping[str, str]) -> str:
    """The list in requirements/ with the wheels of the distribution asked for."""
    return f"ros{suffix(environment)}.txt"


def choose(environment: Mapping[str, str], root: Path, import_rclpy: Callable[[], str | None]) -> str:
    """The distribution that is sourced (one of SUPPORTED), or WHEELS; StepFailed for one that cannot be used.

    ROS counts as sourced if AMENT_PREFIX_PATH has a prefix outside the project: the project's own `.venv` and `install`
    do not make a ROS, nor does ROS_DISTRO alone, which container images set before anything is sourced. `import_rclpy`
    tries it with the Python in use and returns the error, None if it imports. A sourced ROS is never mixed with the
    wheels of another one that the variable ROS names.
    """
    prefixes = [Path(prefix) for prefix in environment.get("AMENT_PREFIX_PATH", "").split(":") if prefix]
    if all(prefix.is_relative_to(root) for prefix in prefixes):
        return WHEELS
    distribution = environment.get("ROS_DISTRO", "")
    another = "or open a shell in which no ROS is sourced, to use the wheels"
    if distribution not in SUPPORTED:
        name = f"ROS 2 {distribution}" if distribution else "a ROS without ROS_DISTRO"
        raise StepFailed(
            f"{name} is sourced (AMENT_PREFIX_PATH={environment['AMENT_PREFIX_PATH']}), which is not one of "
            f"{', '.join(SUPPORTED)}",
            f"source Jazzy or Kilted, {another}",
        )
    if environment.get("ROS") and asked(environment) != distribution:
        raise StepFailed(
            f"ROS={environment['ROS']} is asked for while ROS 2 {distribution} is sourced",
            f"leave ROS away to use what is sourced, {another}",
        )
    if error := import_rclpy():
        raise StepFailed(
            f"ROS 2 {distribution} is sourced, and rclpy does not import with the Python in use: {error}",
            f"sudo apt-get install -y ros-{distribution}-ros-base python3.12-venv python3.12-dev "
            f"(ROS needs the system's Python), {another}",
        )
    return distribution
