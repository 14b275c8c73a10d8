"""`make setup`: brings the working copy from any state to a working one; a second run changes nothing."""

from __future__ import annotations

import fcntl
import os
import platform
import subprocess
import sys
import sysconfig
import time
from collections.abc import Iterator
from pathlib import Path

from tools.bootstrap import graphics, packages, ros, venv
from tools.bootstrap.places import Places
from tools.bootstrap.step import Step, StepFailed, fingerprint, read, write

ROOT = Path(__file__).resolve().parents[2]
REQUIREMENTS = ROOT / "requirements"
NOTES = {"packages": " (6 GB: some minutes the first time)", "build": " (half a minute)"}


def steps(places: Places, distribution: str, wheels_list: str) -> Iterator[Step]:
    """The steps in their order. Each is asked for after the one before succeeded, so it may look at its result.

    `distribution` is what `ros.choose` said, `wheels_list` the list in requirements/ of the wheels, if it is wheels.
    """
    wheels = distribution == ros.WHEELS
    environment, stamps = places.venv, places.stamps
    base = Path(sys.executable)
    headers = sysconfig.get_paths()["include"]
    yield Step(
        "virtual environment",
        stamps / "venv",
        fingerprint(environment, wheels, base.parent),
        lambda log, _: venv.make(environment, base, with_system=not wheels, log=log),
    )
    pinned = REQUIREMENTS / "uv.txt"
    yield Step("uv", stamps / "uv", fingerprint(read(pinned)), lambda log, _: venv.install_uv(environment, pinned, log))
    lists = [REQUIREMENTS / name for name in ("base.txt", "colcon.txt", *([wheels_list] if wheels else []))]
    installed = fingerprint(*(read(path) for path in lists))
    yield Step(
        "packages", stamps / "packages", installed, lambda log, _: venv.install_packages(environment, lists, log)
    )
    if wheels:
        yield Step(
            "ROS wheels",
            stamps / "wheels",
            fingerprint(installed, headers, packages.PREFIX_HOOK),
            lambda _, __: packages.relocate_wheels(environment),
        )
    contents, names = packages.inputs(ROOT)
    yield Step(
        "build",
        places.install / ".setup",
        fingerprint(contents=contents, names=names),
        lambda log, afresh: packages.build(places, wheels, afresh, log),
        basis=fingerprint(ROOT, distribution, headers),  # CMake's cache holds on to these
    )
    if "MUJOCO_GL" not in os.environ:
        backend = stamps / "graphics"
        yield Step(
            "graphics",
            stamps / "graphics.stamp",
            fingerprint(installed, platform.node()),
            lambda log, _: write(backend, graphics.find_backend(environment, log)),
            intact=lambda: graphics.loads(read(backend)),
        )


def import_rclpy() -> str | None:
    """The error of importing rclpy with this Python; None if it imports."""
    attempt = subprocess.run([sys.executable, "-c", "import rclpy"], capture_output=True, text=True)
    return None if attempt.returncode == 0 else (attempt.stderr.strip().splitlines() or ["unknown"])[-1]


def main() -> int:
    """Take the steps; 0 on success, 1 with name, cause and remedy of the step that failed, 130 if interrupted."""
    name = "choice of ROS"
    (ROOT / ".setup").mkdir(exist_ok=True)
    with (ROOT / ".setup" / "lock").open("a") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX)  # of two at once, the second waits
            places = Places(ROOT, ros.suffix(os.environ))
            distribution = ros.choose(os.environ, ROOT, import_rclpy)
            for step in steps(places, distribution, ros.wheels_list(os.environ)):
                name = step.name
                if not step.done():
                    take(step, places.step_logs)
        except StepFailed as failure:
            print(f"\nset-up failed: {name}\n  cause:  {failure.cause}\n  remedy: {failure.remedy}", file=sys.stderr)
            return 1
        except KeyboardInterrupt:
            print(f"\nset-up interrupted: {name}. Run it again: it continues.", file=sys.stderr)
            return 130
    return 0


def take(step: Step, logs: Path) -> None:
    """Take one step, on one line of the terminal: its name, then its seconds."""
    started = time.monotonic()
    print(f"set-up: {step.name}{NOTES.get(step.name, '')} ... ", end="", flush=True)
    step.run(logs)
    print(f"{time.monotonic() - started:.1f} s", flush=True)


if __name__ == "__main__":
    sys.exit(main())
