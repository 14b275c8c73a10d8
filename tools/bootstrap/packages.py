"""The three colcon packages: the wheels' ROS made fit to build against, then the build."""

from __future__ import annotations

import os
import re
import shutil
import sysconfig
from pathlib import Path

from tools.bootstrap.places import Places
from tools.bootstrap.step import StepFailed, command, write
from tools.bootstrap.venv import site_packages

# Every Python of the environment, colcon's and the entry points' among them, must find the wheels as a ROS prefix.
PREFIX_HOOK = (
    "import os, sys; known = [p for p in os.environ.get('AMENT_PREFIX_PATH', '').split(':') if p and p != sys.prefix]; "
    "os.environ['AMENT_PREFIX_PATH'] = ':'.join([*known, sys.prefix])\n"
)


def relocate_wheels(venv: Path) -> None:
    """Make the ROS wheels a prefix to build against.

    Their CMake exports name the headers of Python and numpy where the wheels' builder had them. numpy's are given
    relative to the prefix, so that moving the environment does not invalidate them.
    """
    python_headers = sysconfig.get_paths()["include"]
    for path in (venv / "share").rglob("*.cmake"):
        text = path.read_text()
        moved = re.sub(r"/opt/python/cp312-cp312/include/python3\.12", python_headers, text)
        moved = re.sub(r"/opt/python/cp312-cp312/lib", "${_IMPORT_PREFIX}/lib", moved)
        if moved != text:
            write(path, moved)
    write(site_packages(venv) / "dit_policy_ros_prefix.pth", PREFIX_HOOK)


def inputs(root: Path) -> tuple[list[Path], list[Path]]:
    """What a build depends on: files by their contents, and files by their names (those are linked, not copied)."""
    packages = (root, root / "msg", root / "training")
    described_by = ("package.xml", "setup.py", "setup.cfg", "CMakeLists.txt")
    contents = [
        *(package / name for package in packages for name in described_by),
        *(root / "msg").rglob("*.msg"),
        *(root / "msg").rglob("*.srv"),
        *(root / "msg").rglob("*.action"),
        root / "colcon_defaults.yaml",
    ]
    names = [*(root / "launch").rglob("*.py"), *(root / "config").rglob("*.*"), *(root / "checkpoints").rglob("*")]
    return [path for path in contents if path.is_file()], names


def build(places: Places, wheels: bool, afresh: bool, log: Path) -> None:
    """Build the packages into the environment's `install`, from nothing if `afresh`."""
    require_tools()
    if afresh:
        for folder in (places.build, places.install, places.log):
            shutil.rmtree(folder, ignore_errors=True)
    venv = places.venv
    environment = dict(os.environ)
    environment["PATH"] = f"{venv / 'bin'}:{environment['PATH']}"
    environment["VIRTUAL_ENV"] = str(venv)
    environment.setdefault("MAKEFLAGS", f"-j{os.cpu_count() or 1}")
    environment.pop("_ROS_WHEELS_BOOTSTRAP_COMPLETE", None)
    if wheels:
        environment["AMENT_PREFIX_PATH"] = str(venv)
        environment["CMAKE_PREFIX_PATH"] = str(venv)
    python = venv / "bin" / "python"
    colcon: list[str | Path] = [python, "-m", "colcon", "--log-base", places.log]
    folders: list[str | Path] = ["--build-base", places.build, "--install-base", places.install]
    options = ["--cmake-args", "-DBUILD_TESTING=OFF", f"-DPython3_EXECUTABLE={python}"]
    command(
        [*colcon, "build", *folders, *options],
        log,
        f"mend what the compiler or colcon names above and run it again; if ROS or the compiler changed, remove "
        f"{places.build.name}/",
        environment,
    )


def require_tools() -> None:
    """StepFailed if there is no C++ compiler or make."""
    compilers = [os.environ.get("CXX", ""), "c++", "g++", "clang++"]
    missing = []
    if not any(name and shutil.which(name.split()[0]) for name in compilers):
        missing.append("g++")
    if not shutil.which("make"):
        missing.append("make")
    if missing:
        install = f"sudo apt-get install -y {' '.join(missing)}"
        raise StepFailed(f"the messages need {' and '.join(missing)} to build", install)
