"""The virtual environment `.venv`: made, adopted, mended after a move, and filled with the pinned packages."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

from tools.bootstrap.step import StepFailed, command, read, write

NETWORK = "check the network connection and the free space of the disk, and run it again: it continues"


def make(venv: Path, base: Path, with_system: bool, log: Path) -> None:
    """Leave a working environment of the interpreter `base` at `venv`, keeping the one that is there if it works."""
    if venv.exists() and not works(venv, base, with_system):
        shutil.rmtree(venv)
    if not venv.exists():
        options = ["--system-site-packages"] if with_system else []
        command([base, "-m", "venv", *options, venv], log, f"check that `{base} -m venv` works and the disk has space")
    mend_after_move(venv)


def works(venv: Path, base: Path, with_system: bool) -> bool:
    """Whether the environment is of `base`, runs, has a whole pip, and sees the system's packages as wanted."""
    configuration = (read(venv / "pyvenv.cfg") or "").splitlines()
    wanted = {f"home = {base.parent}", f"include-system-site-packages = {str(with_system).lower()}"}
    if not wanted <= set(configuration):
        return False
    if "VIRTUAL_ENV=" not in (read(venv / "bin" / "activate") or ""):  # what venv writes last
        return False
    if "pip" in half_installed(site_packages(venv)):
        return False
    question = "import sys, pip; sys.exit(sys.version_info[:2] != (3, 12))"
    try:
        answer = subprocess.run([venv / "bin" / "python", "-c", question], capture_output=True, timeout=60)
    except (OSError, subprocess.TimeoutExpired):
        return False
    return answer.returncode == 0


def mend_after_move(venv: Path) -> bool:
    """Rewrite the environment's own path where it was made under another one; True if something was rewritten.

    `bin/activate` records the path. It also stands in the first line of each script, in pyvenv.cfg and in .pth files.
    """
    activate = read(venv / "bin" / "activate") or ""
    recorded = re.search(r"^\s*(?:export )?VIRTUAL_ENV=['\"]?([^'\"\n]+)['\"]?$", activate, re.MULTILINE)
    if recorded is None or recorded[1] == str(venv):
        return False
    old, new = recorded[1].encode(), str(venv).encode()
    scripts = [path for path in (venv / "bin").iterdir() if path.is_file() and not path.is_symlink()]
    # `activate` last: after an interruption the old path is still on record, and the rest is done again.
    scripts.sort(key=lambda path: path.name == "activate")
    for path in [venv / "pyvenv.cfg", *site_packages(venv).glob("*.pth"), *scripts]:
        content = path.read_bytes()
        # A path is followed by anything but more of a name: /a/.venv is not in /a/.venv-2.
        changed = re.sub(re.escape(old) + rb"(?![\w.-])", new, content)
        if changed != content and b"\0" not in content:
            write(path, changed.decode())
    return True


def install_uv(venv: Path, pinned: Path, log: Path) -> None:
    """Install the pinned uv by pip, as pip is what an environment starts with."""
    pip = [str(venv / "bin" / "python"), "-m", "pip", "install", "--disable-pip-version-check"]
    command([*pip, "-r", str(pinned)], log, NETWORK)


def install_packages(venv: Path, lists: list[Path], log: Path) -> None:
    """Install exactly the pinned packages; the lists are complete, so that nothing needs resolving."""
    broken = sorted(half_installed(site_packages(venv)))
    again = [option for name in broken for option in ("--reinstall-package", name)]
    files = [option for path in lists for option in ("-r", str(path))]
    # Compiled now, since where PYTHONDONTWRITEBYTECODE is set each node would compile torch anew, ten seconds a start.
    uv = [venv / "bin" / "uv", "pip", "install", "--python", venv / "bin" / "python", "--no-deps", "--compile-bytecode"]
    command([*map(str, uv), *again, *files], log, NETWORK)


def half_installed(packages: Path) -> Iterator[str]:
    """Names of installed packages of which files are missing or cut short, as an interrupted installation leaves them.

    Their metadata may be there already, so that an installer takes them for installed. Sizes are not compared for what
    the set-up itself rewrites: scripts and CMake files.
    """
    for metadata in packages.glob("*.dist-info"):
        record = read(metadata / "RECORD")
        if record is None or any(not is_whole(packages, line) for line in record.splitlines()):
            if not (metadata / "METADATA").exists():
                shutil.rmtree(metadata)  # without it no installer knows the name, and it would stay for ever
            yield metadata.name.split("-")[0].replace("_", "-").lower()


def is_whole(packages: Path, line: str) -> bool:
    """Whether a file of a RECORD is there with the size that the RECORD gives (lines are `path,hash,size`)."""
    name, _, size = line.rsplit(",", 2)
    path = packages / name.strip('"')
    if path.suffix == ".pyc":
        return True
    try:
        found = path.stat().st_size
    except OSError:
        return False
    rewritten = path.suffix == ".cmake" or path.parent.name == "bin"
    return rewritten or not size or found == int(size)


def site_packages(venv: Path) -> Path:
    """The folder of the environment's packages; StepFailed if there is none."""
    for path in (venv / "lib").glob("python3.*/site-packages"):
        return path
    raise StepFailed(f"{venv} has no site-packages", f"remove {venv} and run it again")
