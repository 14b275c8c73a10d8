"""A form for the robot's description, which no foreign checkpoint has."""

from ..configuration import PolicyConfig


def embodiment_form(config: PolicyConfig) -> str:
    """An embodiment.yaml with what the features tell, and TODO, which no reader accepts, for all else."""
    lines = [
        "# Made from a checkpoint that does not say what robot it was trained on.",
        "# Replace each TODO; config/embodiments/ of dit_policy_ros has an example with comments.",
        "name: 'TODO: name'",
        "fps: TODO",
        "instruction: {topic: 'TODO: topic'}",
        "cameras:",
    ]
    for key, (height, width) in config.cameras.items():
        name = key.removeprefix("observation.images.")
        lines.append(
            f"  {name}: {{topic: 'TODO: topic', transport: TODO, width: {width}, height: {height}, max_age: TODO}}"
        )
    lines += [
        "max_camera_skew: TODO",
        f"state: {{topic: 'TODO: topic', joints: TODO, max_age: TODO}}  # {config.state_dim} joints",
        f"action_groups: TODO  # {config.action_dim} joints in all",
    ]
    return "\n".join(lines) + "\n"
