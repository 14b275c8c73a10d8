"""The settings of a run that starts from a checkpoint: those of the checkpoint, what a file says, what is given."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import draccus
import yaml

from dit_policy_ros.policy.checkpoint import CheckpointError, load_config
from dit_policy_training.loop.state import read_state

_OF_THE_DATASET = ("input_features", "output_features", "tasks", "action_state_indices")  # of a policy's configuration
_CONFIG = "config.json"  # of a policy's folder
_CHOICES = ("vision", "text", "objective")
_NO_DATASET: dict[str, Any] = {"dataset_path": None, "dataset_repo_id": "", "dataset_revision": "", "datasets": []}


def with_checkpoint(arguments: Sequence[str], file: Path) -> list[str]:
    """The arguments of a command line, which name a checkpoint, on top of its settings, which are written to `file`.

    A run that goes on has all of its settings, --finetune those of the policy. What --config=FILE says goes before
    them, and before that what the command line says. Without a checkpoint the arguments come back as they are. Raises
    CheckpointError for a checkpoint that cannot serve, ValueError for a file of settings that is not there, or is none.
    """
    config = given(arguments, "config") or given(arguments, "config_path")
    stated = _read(Path(config)) if config else {}
    checkpoint = given(arguments, "checkpoint_path") or stated.get("checkpoint_path")
    if not checkpoint or "--help" in arguments:
        return list(arguments)
    _check_is_checkpoint(Path(checkpoint))
    finetune = given(arguments, "finetune") or str(stated.get("finetune", False))
    base = _for_new_run(Path(checkpoint)) if finetune.lower() == "true" else _of_run(Path(checkpoint))
    if any(stated.get(name) or given(arguments, name) for name in ("dataset_path", "dataset_repo_id", "datasets")):
        base |= _NO_DATASET  # the checkpoint's would be a second one beside it
    settings = overlaid(base, stated)
    for option, kind in _chosen(arguments):
        settings = overlaid(settings, _nested(option, {"type": kind}))
    file.write_text(yaml.safe_dump(settings, sort_keys=False), encoding="utf-8")
    return [f"--config_path={file}", *_without(arguments, ("config", "config_path"))]


def given(arguments: Sequence[str], name: str) -> str:
    """What a command line says of an option, by `--name=value`, `--name value` or, if it is a switch, `--name`."""
    value = ""
    for argument, following in zip(arguments, [*arguments, ""][1:], strict=True):
        if argument.startswith(f"--{name}="):
            value = argument.partition("=")[2]
        elif argument == f"--{name}":
            value = following if following and not following.startswith("--") else "true"
    return value


def overlaid(base: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """Nested settings with others over them; a choice of another `type` has other fields, and takes the whole place."""
    result = dict(base)
    for key, value in changes.items():
        old = result.get(key)
        groups = isinstance(old, dict) and isinstance(value, dict)
        result[key] = overlaid(result[key], value) if groups and not _chosen_anew(key, result[key], value) else value
    return result


def _chosen_anew(key: str, old: dict[str, Any], new: dict[str, Any]) -> bool:
    return key in _CHOICES and new.get("type", old.get("type")) != old.get("type")


def _chosen(arguments: Sequence[str]) -> list[tuple[str, str]]:
    """The choices that a command line makes, such as ("policy.objective", "diffusion")."""
    names = {argument.removeprefix("--").partition("=")[0] for argument in arguments if argument.startswith("--")}
    places = sorted(name.removesuffix(".type") for name in names if name.endswith(".type"))
    return [(place, given(arguments, f"{place}.type")) for place in places if place.rpartition(".")[2] in _CHOICES]


def _nested(option: str, value: dict[str, Any]) -> dict[str, Any]:
    for part in reversed(option.split(".")):
        value = {part: value}
    return value


def _without(arguments: Sequence[str], names: Sequence[str]) -> list[str]:
    kept, skip = [], False
    for argument in arguments:
        if skip:
            skip = False
            continue
        name, equals, _ = argument.removeprefix("--").partition("=")
        if argument.startswith("--") and name in names:
            skip = not equals
            continue
        kept.append(argument)
    return kept


def _read(file: Path) -> dict[str, Any]:
    if not file.is_file():
        raise ValueError(f"--config={file}: there is no such file")
    try:
        content = yaml.safe_load(file.read_text(encoding="utf-8")) or {}
    except yaml.YAMLError as error:
        raise ValueError(f"{file} is not YAML: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{file} holds no settings: expected lines such as `batch_size: 64`, see config/training/")
    return content


def _check_is_checkpoint(folder: Path) -> None:
    if (folder / _CONFIG).is_file():
        return
    for last in (folder / "checkpoints" / "last", folder / "last"):
        if (last / _CONFIG).is_file():
            raise CheckpointError(
                f"checkpoint_path {folder} is a run, of which one checkpoint is needed: its last is {last}"
            )
    lacks = f"has no {_CONFIG}" if folder.is_dir() else "is no folder" if folder.exists() else "does not exist"
    raise CheckpointError(f"checkpoint_path {folder} {lacks}; a run's checkpoints are as RUN/checkpoints/last")


def _of_run(checkpoint: Path) -> dict[str, Any]:
    settings: dict[str, Any] = yaml.safe_load(read_state(checkpoint).settings)
    checkpoint = checkpoint.resolve()
    # The run may have been moved as a whole.
    place = {"output_dir": str(checkpoint.parent.parent)} if checkpoint.parent.name == "checkpoints" else {}
    return settings | place | {"finetune": False, "overwrite": False}


def _for_new_run(checkpoint: Path) -> dict[str, Any]:
    policy = draccus.encode(load_config(checkpoint))
    return {"policy": {key: value for key, value in policy.items() if key not in _OF_THE_DATASET}}
