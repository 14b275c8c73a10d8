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
from tools.bootstrap.step import Step, StepFailed, fingerprint, read, write

ROOT = Path(__file__).resolve().parents[2]
VENV = ROOT / ".venv"
STAMPS = VENV / ".setup"
LOGS = ROOT / ".setup" / "logs"
REQUIREMENTS = ROOT / "requirements"
NOTES = {"packages": " (6 GB: some minutes the first time)", "build": " (half a minute)"}


def steps(distribution: str) -> Iterator[Step]:
    """The steps in their order. Each is asked for after the one before succeeded, so it may look at its result."""
    wheels = distribution == ros.WHEELS
    base = Path(sys.executable)
    headers = sysconfig.get_paths()["include"]
    yield Step(
        "virtual environment",
        STAMPS / "venv",
        fingerprint(VENV, wheels, base.parent),
        lambda log, _: venv.make(VENV, base, with_system=not wheels, log=log),
    )
    pinned = REQUIREMENTS / "uv.txt"
    yield Step("uv", STAMPS / "uv", fingerprint(read(pinned)), lambda log, _: venv.install_uv(VENV, pinned, log))
    lists = [REQUIREMENTS / name for name in ("base.txt", "colcon.txt", *(["ros.txt"] if wheels else []))]
    installed = fingerprint(*(read(path) for path in lists))
    yield Step("packages", STAMPS / "packages", installed, lambda log, _: venv.install_packages(VENV, lists, log))
    if wheels:
        yield Step(
            "ROS wheels",
            STAMPS / "wheels",
            fingerprint(installed, headers, packages.PREFIX_HOOK),
            lambda _, __: packages.relocate_wheels(VENV),
        )
    contents, names = packages.inputs(ROOT)
    yield Step(
        "build",
        ROOT / "install" / ".setup",
        fingerprint(contents=contents, names=names),
        lambda log, afresh: packages.build(ROOT, VENV, wheels, afresh, log),
        basis=fingerprint(ROOT, distribution, headers),  # CMake's cache holds on to these
    )
    if "MUJOCO_GL" not in os.environ:
        backend = STAMPS / "graphics"
        yield Step(
            "graphics",
            STAMPS / "graphics.stamp",
            fingerprint(installed, platform.node()),
            lambda log, _: write(backend, graphics.find_backend(VENV, log)),
            intact=lambda: graphics.loads(read(backend)),
        )


def import_rclpy() -> str | None:
    """The error of importing rclpy with this Python; None if it imports."""
    attempt = subprocess.run([sys.executable, "-c", "import rclpy"], capture_output=True, text=True)
    return None if attempt.returncode == 0 else (attempt.stderr.strip().splitlines() or ["unknown"])[-1]


def main() -> int:
    """Take the steps; 0 on success, 1 with name, cause and remedy of the step that failed, 130 if interrupted."""
    name = "choice of ROS"
    LOGS.mkdir(parents=True, exist_ok=True)
    with (ROOT / ".setup" / "lock").open("a") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX)  # of two at once, the second waits
            for step in steps(ros.choose(os.environ, ROOT, import_rclpy)):
                name = step.name
                if not step.done():
                    take(step)
        except StepFailed as failure:
            print(f"\nset-up failed: {name}\n  cause:  {failure.cause}\n  remedy: {failure.remedy}", file=sys.stderr)
            return 1
        except KeyboardInterrupt:
            print(f"\nset-up interrupted: {name}. Run it again: it continues.", file=sys.stderr)
            return 130
    return 0


def take(step: Step) -> None:
    """Take one step, on one line of the terminal: its name, then its seconds."""
    started = time.monotonic()
    print(f"set-up: {step.name}{NOTES.get(step.name, '')} ... ", end="", flush=True)
    step.run(LOGS)
    print(f"{time.monotonic() - started:.1f} s", flush=True)


if __name__ == "__main__":
    sys.exit(main())
