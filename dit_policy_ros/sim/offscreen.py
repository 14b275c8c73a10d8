"""Pictures without a screen: which OpenGL library MuJoCo draws with. Imports no mujoco."""

import ctypes
import os
import sys

PACKAGES = "libegl1 libgl1 libgles2 libgl1-mesa-dri libosmesa6"
_LIBRARIES = {
    "egl": ("libEGL.so.1", "libEGL.so"),
    "osmesa": ("libOSMesa.so.8", "libOSMesa.so.6", "libOSMesa.so"),
}


def _loads(library: str) -> bool:
    try:
        ctypes.CDLL(library)
    except OSError:
        return False
    return True


def choose_backend() -> str | None:
    """Set MUJOCO_GL to egl, else osmesa, by what this machine has, unless it is set; returns the choice, None for none.

    Has an effect only before mujoco is first imported. Elsewhere than on Linux MuJoCo's own choice is left alone.
    """
    if not os.environ.get("MUJOCO_GL") and sys.platform == "linux":
        found = (backend for backend, files in _LIBRARIES.items() if any(map(_loads, files)))
        if backend := next(found, None):
            os.environ["MUJOCO_GL"] = backend
    return os.environ.get("MUJOCO_GL")


def explain(error: BaseException | None) -> str:
    """A sentence for the user when no picture can be drawn: what was tried and what to install."""
    tried = os.environ.get("MUJOCO_GL") or "neither libEGL nor libOSMesa loads"
    why = f" ({error})" if error and str(error) else ""
    return (
        f"MuJoCo cannot draw off screen; MUJOCO_GL: {tried}{why}. On Debian or Ubuntu: "
        f"sudo apt-get install {PACKAGES}; then leave MUJOCO_GL unset, or set it to egl or osmesa before Python starts"
    )
