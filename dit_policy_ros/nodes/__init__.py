"""The only package that imports rclpy: the policy node, the simulator's node and the demo."""

from importlib.util import find_spec

if find_spec("rclpy") and not find_spec("dit_policy_msgs"):
    raise ImportError(
        "dit_policy_msgs is not built or not sourced: run `make setup` in the repository, or `colcon build "
        "--base-paths` with the repository and its folders msg and training, then source install/setup.bash."
    )
