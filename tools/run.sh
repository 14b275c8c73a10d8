#!/usr/bin/env bash
# Runs a command in the project's environment: .venv, the built packages, the graphics that set-up found to work, no network.
# ROS=jazzy takes the environment of that name, as set-up does.
set -eu
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
suffix=${ROS:+-$ROS}
suffix=${suffix#-kilted}
# As a sourced ROS says it, for who must know.
[ -z "${ROS:-}" ] || export ROS_DISTRO=$ROS
# Left by the ROS wheels of another environment, it would keep ours from finding their libraries.
unset _ROS_WHEELS_BOOTSTRAP_COMPLETE
set +u
. "$root/.venv$suffix/bin/activate"
. "$root/install$suffix/local_setup.bash"
set -u
export MUJOCO_GL="${MUJOCO_GL:-$(cat "$root/.venv$suffix/.setup/graphics")}"
export HF_HUB_OFFLINE=1 HF_DATASETS_OFFLINE=1
exec "$@"
