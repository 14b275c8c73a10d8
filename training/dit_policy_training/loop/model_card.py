"""What a checkpoint says of itself to whoever finds it: model_card.md."""

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from dit_policy_training.data.table import Table

_MOST_TOLD = 200  # episodes


def model_card(table: Table, settings: str, results: Mapping[str, Any], held_out: Sequence[int] = ()) -> str:
    """Markdown that says what a policy was trained on, how, and how far: `settings` is YAML, `results` name: value.

    `held_out` are the numbers of the episodes that it was not trained on, of several datasets counted through.
    """
    counts = Counter(table.tasks[index] for index in table.task_index[table.episode_starts])
    cameras = ", ".join(
        f"{key.removeprefix('observation.images.')} {width}x{height}"
        for key, (_, height, width) in table.image_shapes.items()
    )
    robot = f" for `{table.embodiment.name}`" if table.embodiment is not None else ""
    takes = ["camera images"] if table.image_shapes else []
    takes += ["the robot's state"] if table.state_names else []
    lines = [
        f"# Multitask DiT policy{robot}",
        "",
        f"Takes {', '.join([*takes, 'an instruction'])}; gives a chunk of actions.",
        "",
        "## Data",
        "",
        f"- dataset `{table.name}`: {table.episodes} episodes, {len(table)} frames at {table.fps} Hz",
        f"- held out, not trained on: {_told(held_out)}",
        f"- cameras: {cameras or 'none'}",
        f"- state: {', '.join(table.state_names) or 'none'}",
        f"- action: {', '.join(table.action_names)}",
        "- instructions, by episodes they begin:",
        *(f"  - `{task}`: {counts[task]}" for task in table.tasks),
        "",
        "An instruction not in this list is outside what the policy was trained on. So are another robot, other camera "
        "poses and other objects.",
        "",
        "## Training",
        "",
        *(f"- {name}: {value}" for name, value in results.items()),
        "",
        "```yaml",
        settings.rstrip(),
        "```",
        "",
    ]
    return "\n".join(lines)


def _told(episodes: Sequence[int]) -> str:
    if not episodes:
        return "none"
    more = f" and {len(episodes) - _MOST_TOLD} more" if len(episodes) > _MOST_TOLD else ""
    return f"{len(episodes)} episodes: {', '.join(str(each) for each in episodes[:_MOST_TOLD])}{more}"
