#!/usr/bin/env bash
# Runs a command in the project's environment: .venv, the built packages, the graphics that set-up found to work, no network.
set -eu
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
# Left by the ROS wheels of another environment, it would keep ours from finding their libraries.
unset _ROS_WHEELS_BOOTSTRAP_COMPLETE
set +u
. "$root/.venv/bin/activate"
. "$root/install/local_setup.bash"
set -u
export MUJOCO_GL="${MUJOCO_GL:-$(cat "$root/.venv/.setup/graphics")}"
export HF_HUB_OFFLINE=1 HF_DATASETS_OFFLINE=1
exec "$@"
