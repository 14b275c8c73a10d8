"""The policy that a run trains: a new one, one from another's weights, or the one of the run that goes on."""

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from torch import Tensor

from dit_policy_ros.policy.checkpoint import CheckpointError, load_checkpoint, load_config, tokenizer_of
from dit_policy_ros.policy.configuration import Feature, PolicyConfig
from dit_policy_ros.policy.modeling import MultitaskDiTPolicy
from dit_policy_training.data.statistics import stats
from dit_policy_training.data.windows import Windows


def new_policy(config: PolicyConfig, windows: Windows, weights_of: Path | None = None) -> MultitaskDiTPolicy:
    """A policy for a dataset, with its statistics; with the weights of a checkpoint if one is given.

    Raises ValueError for a configuration that does not fit the dataset, or a checkpoint of another architecture.
    """
    table = windows.table
    config = replace(
        config,
        input_features=table.input_features,
        output_features=table.output_features,
        action_state_indices=table.action_state_indices,
        tasks=table.tasks,
    )
    config.validate()
    described = config.observation_encoder.text
    own_tokenizer = weights_of is not None and getattr(described, "model_config", None) is not None
    tokenizer = tokenizer_of(weights_of, load_config(weights_of)) if weights_of and own_tokenizer else None
    policy = MultitaskDiTPolicy(config, stats(windows, config.action_mode), tokenizer)
    if weights_of is not None:
        weights = load_checkpoint(weights_of).state_dict()
        if differences := architecture_differences(weights, policy.state_dict()):
            raise CheckpointError(
                f"{weights_of} is of another architecture than this run's policy:\n  - "
                + "\n  - ".join(differences)
                + "\n"
                + _advice(load_config(weights_of), config)
            )
        policy.load_state_dict(weights)
    return policy


def _advice(theirs: PolicyConfig, ours: PolicyConfig) -> str:
    """What to do about weights that do not fit: the dataset's part of an architecture is not for an option to mend."""
    there, here = ({key: _size(feature) for key, feature in _features(each).items()} for each in (theirs, ours))
    if there != here:
        told = [
            f"{key} ({there.get(key, 'none')} there, {here.get(key, 'none')} here)"
            for key in sorted({*there, *here})
            if there.get(key) != here.get(key)
        ]
        return f"The dataset differs from the checkpoint's in {', '.join(told)}: these weights are for one like that"
    return "Leave out the --policy options (and those of a --config file) that differ: its own are taken then"


def _features(config: PolicyConfig) -> dict[str, Feature]:
    return {**config.input_features, **config.output_features}


def _size(feature: Feature) -> str:
    """What of a feature the weights depend on: a picture is scaled."""
    return "a camera" if feature.type == "VISUAL" else f"{feature.shape[0]} numbers"


def policy_of_run(checkpoint: Path) -> MultitaskDiTPolicy:
    """The policy of a checkpoint, to be trained on. Its weights are copied out of the file's mapping."""
    policy = load_checkpoint(checkpoint, mapped=False)
    for weight in policy.parameters():
        weight.data = weight.data.clone()  # aligned and laid out as those of a new policy
    return policy


def architecture_differences(theirs: Mapping[str, Tensor], ours: Mapping[str, Tensor]) -> list[str]:
    """In what two models' tensors differ, a line for each group of them; empty if they fit."""
    groups: dict[tuple[str, str], list[str]] = defaultdict(list)
    for name in sorted({*theirs, *ours}):
        group = ".".join(name.split(".")[:2])
        if name not in ours:
            groups[group, "only in the checkpoint"].append(name)
        elif name not in theirs:
            groups[group, "missing in the checkpoint"].append(name)
        elif theirs[name].shape != ours[name].shape:
            shapes = f"{name} {tuple(theirs[name].shape)} there, {tuple(ours[name].shape)} here"
            groups[group, "of other shapes"].append(shapes)
    return [
        f"{group}: {len(names)} tensor{'s' * (len(names) > 1)} {what}, such as {names[0]}"
        for (group, what), names in groups.items()
    ]
