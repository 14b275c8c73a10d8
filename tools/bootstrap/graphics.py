"""Off-screen rendering for MuJoCo: proved by drawing a picture, its libraries installed where that is allowed."""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
from pathlib import Path

from tools.bootstrap.step import StepFailed, command

BACKENDS = {"egl": ("libEGL.so.1",), "osmesa": ("libOSMesa.so.8", "libOSMesa.so.6")}
LIBRARIES = ("libegl1", "libgl1", "libgles2", "libgl1-mesa-dri")
OPTIONAL = "libosmesa6"  # newer distributions have dropped it; EGL does without
PROOF = """
import mujoco
model = mujoco.MjModel.from_xml_string(
    '<mujoco><worldbody><light pos="0 0 2"/><geom size="1"/>'
    '<camera name="c" pos="0 -4 0" xyaxes="1 0 0 0 0 1"/></worldbody></mujoco>')
data = mujoco.MjData(model)
mujoco.mj_forward(model, data)
with mujoco.Renderer(model, 32, 32) as renderer:
    renderer.update_scene(data, "c")
    picture = renderer.render()
assert picture.max() > 50 and picture.min() < 20, "the picture is empty"
"""


def find_backend(venv: Path, log: Path) -> str:
    """The MUJOCO_GL that draws here, its libraries installed if need be; StepFailed with the line to run if not."""
    backend = drawing_backend(venv, log)
    if backend is None:
        install_libraries(log)
        backend = drawing_backend(venv, log)
    if backend is None:
        raise StepFailed(
            f"MuJoCo draws with none of {', '.join(BACKENDS)} although their libraries are installed\n  log:    {log}",
            "look into the log for the driver's complaint, or choose one with MUJOCO_GL=",
        )
    return backend


def loads(backend: str | None) -> bool:
    """Whether the library of a backend that drew before is still there."""
    for library in BACKENDS.get(backend or "", ()):
        try:
            ctypes.CDLL(library)
        except OSError:
            continue
        return True
    return False


def drawing_backend(venv: Path, log: Path) -> str | None:
    """The first backend that draws a sphere in a process of its own: a missing driver may crash or hang."""
    for backend in BACKENDS:
        environment = os.environ | {"MUJOCO_GL": backend}
        try:
            command([venv / "bin" / "python", "-c", PROOF], log, "", environment, timeout=120)
        except StepFailed:
            continue
        return backend
    return None


def install_libraries(log: Path) -> None:
    """Install the libraries by apt as root or by a sudo that asks nothing; StepFailed with the line to run if not."""
    line = f"sudo apt-get install -y {' '.join((*LIBRARIES, OPTIONAL))}"
    privilege = as_root()
    if privilege is None or not shutil.which("apt-get"):
        raise StepFailed("MuJoCo cannot draw: its GL libraries are missing", f"run once, then try again:\n    {line}")
    environment = os.environ | {"DEBIAN_FRONTEND": "noninteractive"}
    apt = [*privilege, "apt-get"]
    remedy = f"run this by hand, then try again:\n    {line}"
    command([*apt, "update"], log, remedy, environment)
    install = [*apt, "install", "-y", "--no-install-recommends", *LIBRARIES]
    try:
        command([*install, OPTIONAL], log, remedy, environment)
    except StepFailed:
        command(list(install), log, remedy, environment)


def as_root() -> list[str] | None:
    """What to put before a command that needs root; None if this user may not."""
    if os.geteuid() == 0:
        return []
    if shutil.which("sudo") and subprocess.run(["sudo", "-n", "true"], capture_output=True).returncode == 0:
        return ["sudo", "-n"]
    return None
