#!/bin/sh
# Prints the path of a Python 3.12 that can make the project's environment, installing one with uv if there is none.
#
# Every candidate is run: a name on the PATH proves nothing. pyenv, for one, leaves a `python3.12` there that fails
# unless that version is selected, and uv gives up when it meets it.
set -eu
uv_version=$(sed -n 's/^uv==//p' requirements/uv.txt)

# Prints the interpreter behind candidate $1 (that of a virtual environment would vanish with it), or fails.
usable() {
    "$1" -c '
import os, sys, sysconfig
import ensurepip, venv
if sys.version_info[:2] != (3, 12):
    sys.exit("it is Python %d.%d" % sys.version_info[:2])
if not os.path.exists(os.path.join(sysconfig.get_paths()["include"], "Python.h")):
    sys.exit("it has no Python.h: install its development package, on Debian and Ubuntu python3.12-dev")
print(sys._base_executable)' </dev/null
}

if [ -n "${PYTHON:-}" ]; then
    if ! usable "$PYTHON"; then
        echo "PYTHON=$PYTHON cannot be used, as said above. Give a Python 3.12 with venv, or leave PYTHON away." >&2
        exit 1
    fi
    exit 0
fi

candidates() {
    # The interpreter that the environment was made with, so that a second run agrees with the first.
    for environment in ".venv${ROS:+-$ROS}" .venv; do
        [ ! -f "$environment/pyvenv.cfg" ] || echo "$(sed -n 's/^home = //p' "$environment/pyvenv.cfg")/python3.12"
    done
    # ROS belongs to the system's Python.
    [ -z "${AMENT_PREFIX_PATH:-}" ] || echo /usr/bin/python3.12
    # Each one on the PATH: behind a shim that fails there may be one that works.
    (IFS=:; for folder in $PATH; do echo "$folder/python3.12"; done)
    ls -d "${UV_PYTHON_INSTALL_DIR:-${XDG_DATA_HOME:-$HOME/.local/share}/uv/python}"/cpython-3.12*/bin/python3.12 2>/dev/null || true
    ls -d "${PYENV_ROOT:-$HOME/.pyenv}"/versions/3.12*/bin/python 2>/dev/null || true
    (IFS=:; for folder in $PATH; do echo "$folder/python3"; done)
}

search() {
    candidates | while read -r candidate; do
        if [ -x "$candidate" ] && usable "$candidate" 2>/dev/null; then
            break
        fi
    done
}

found=$(search)
if [ -z "$found" ]; then
    echo "no usable Python 3.12 here (with venv and Python.h): installing one with uv" >&2
    uv=uv
    if ! uv --version >/dev/null 2>&1; then
        if ! { python3 -m venv .setup/uv && .setup/uv/bin/python -m pip install --quiet "uv==$uv_version"; } >&2; then
            echo "set-up failed: find Python 3.12" >&2
            echo "  cause:  neither Python 3.12 nor uv is here, and uv could not be installed, as said above" >&2
            echo "  remedy: sudo apt-get install -y python3.12 python3.12-venv python3.12-dev" >&2
            echo "          or install uv (docs.astral.sh/uv), or give PYTHON=/path/to/python3.12; then run this again" >&2
            exit 1
        fi
        uv=.setup/uv/bin/uv
    fi
    if ! $uv python install 3.12 >&2; then
        echo "set-up failed: find Python 3.12" >&2
        echo "  cause:  \`uv python install 3.12\` failed, as said above" >&2
        echo "  remedy: check the network connection and run this again, or give PYTHON=/path/to/python3.12" >&2
        exit 1
    fi
    found=$(search)
fi
if [ -z "$found" ]; then
    echo "set-up failed: find Python 3.12" >&2
    echo "  cause:  uv installed a Python 3.12, but none that works was found afterwards" >&2
    echo "  remedy: give PYTHON=/path/to/python3.12" >&2
    exit 1
fi
echo "$found"
