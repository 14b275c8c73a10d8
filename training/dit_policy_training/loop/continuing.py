"""Going on with a run: what must be as it was, what may change, and what a change means."""

from collections.abc import Iterator
from typing import Any

import draccus
import yaml

from dit_policy_training.loop.options import TrainConfig
from dit_policy_training.loop.state import Counters, SavedState

_MAY_CHANGE = (  # without a word: no step depends on it
    "output_dir",
    "dataset_path",  # the fingerprint tells whether it is the same data
    "dataset_repo_id",
    "dataset_revision",
    "datasets",  # but for their weights
    "embodiment",
    "overwrite",
    "checkpoint_path",
    "finetune",
    "batch_size",  # only the product with processes and accumulation counts
    "gradient_accumulation_steps",
    "num_workers",
    "cache",
    "cache_limit_gb",
    "cache_disk_limit_gb",
    "cache_dir",
    "save_freq",
    "keep_checkpoints",
    "log_freq",
    "validation.freq",
    "validation.samples",
    "tracking",
)
_MUST_NOT_CHANGE = {
    "policy": "it is the checkpoint's; another one starts anew, with --finetune from its weights",
    "seed": "the order of samples and the noise follow from it",
    "optimizer.type": "its moments are the other one's",
    "validation.episode_share": "episodes that were trained on would be held out",
}


def check_same_run(config: TrainConfig, saved: SavedState, samples_per_step: int, fingerprint: str) -> list[str]:
    """What of a run is otherwise than at its checkpoint and may be, a line each.

    Raises ValueError naming everything that may not.
    """
    before, now = flat(yaml.safe_load(saved.settings)), flat(draccus.encode(config))
    refused = list(_refused_counters(config, before, saved.counters, samples_per_step, fingerprint))
    notes = []
    for key in [key for key in {**now, **before} if before.get(key) != now.get(key)]:
        change = f"{key}: {before.get(key)} -> {now.get(key)}"
        if reason := next((why for name, why in _MUST_NOT_CHANGE.items() if _within(key, name)), None):
            refused.append(f"{change} ({reason})")
        elif not any(_within(key, name) for name in _MAY_CHANGE):
            notes.append(change + _consequence(key, config))
    weights = [[source["weight"] for source in each.get("datasets") or []] for each in (before, now)]
    if all(weights) and weights[0] != weights[1]:
        notes.append(f"weights of the datasets: {weights[0]} -> {weights[1]}")
    if refused:
        raise ValueError(
            f"{saved.folder.parent} is of a run that differs from this one in what may not change:\n  - "
            + "\n  - ".join(refused)
            + "\nTo go on, leave these as they were; to start a new run from the weights, give --finetune and another "
            "output_dir"
        )
    return notes


def _refused_counters(
    config: TrainConfig, before: dict[str, Any], counters: Counters, samples_per_step: int, fingerprint: str
) -> Iterator[str]:
    if counters.samples_per_step != samples_per_step:
        yield (
            f"samples a step: {counters.samples_per_step} -> {samples_per_step} (batch_size x processes x "
            f"gradient_accumulation_steps; {counters.processes} processes made the checkpoint)"
        )
    if counters.fingerprint != fingerprint:
        yield "the data: another dataset, or this one has changed since"
    if (before.get("ema_decay") == 0) != (config.ema_decay == 0):
        yield f"ema_decay: {before.get('ema_decay')} -> {config.ema_decay} (an average cannot begin or end midway)"


def _within(key: str, name: str) -> bool:
    return key == name or key.startswith(f"{name}.")


def _consequence(key: str, config: TrainConfig) -> str:
    if key == "train_steps" and config.scheduler.type == "cosine":
        return " (the learning rate follows the cosine of that length from here on)"
    if key in ("device", "use_amp", "amp_dtype", "compile", "num_threads"):
        return " (the last digits will differ from those of the run so far)"
    return ""


def flat(settings: Any, prefix: str = "") -> dict[str, Any]:
    """Nested settings with dots between the names; an empty group is a value."""
    if not isinstance(settings, dict) or not settings:
        return {prefix: settings}
    flattened: dict[str, Any] = {}
    for key, value in settings.items():
        flattened |= flat(value, f"{prefix}.{key}" if prefix else str(key))
    return flattened
