"""The files of a foreign checkpoint's folder: which folder, its JSON, weights, statistics and processors.

Whatever is wrong with a file is an InteropError that names it.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from .. import checkpoint as native
from ..checkpoint import CheckpointError
from .configurations import Normalization
from .fields import InteropError

PREPROCESSOR, POSTPROCESSOR = "policy_preprocessor", "policy_postprocessor"

_KNOWN_STEPS = {
    "rename_observations_processor",
    "to_batch_processor",
    "tokenizer_processor",
    "device_processor",
    "normalizer_processor",
    "unnormalizer_processor",
}

# Of LeRobot's TokenizerProcessorStep, where policy_preprocessor.json lacks them.
_TOKENIZER_DEFAULTS = {"max_length": 512, "padding_side": "right", "padding": "max_length", "truncation": True}


@dataclass
class Processors:
    """What LeRobot's processors do. tokenizer: the settings of its TokenizerProcessorStep."""

    normalization: Normalization
    tokenizer: dict[str, Any]


def find_checkpoint(folder: Path) -> tuple[Path, list[str]]:
    """The folder that holds a foreign config.json, at or below the given one, and why that one.

    Averaged weights are preferred to the last ones, the last step to earlier ones. Raises InteropError.
    """
    if not folder.is_dir():
        raise InteropError(f"no checkpoint at {folder}: the folder does not exist")
    if (folder / native.CONFIG).exists():
        notes = []
        if folder.name == "pretrained_model" and (folder.parent / "pretrained_model_ema").is_dir():
            notes.append("these are the last weights, as named; the averaged ones are in pretrained_model_ema beside")
        return folder, notes
    for name, note in (
        ("pretrained_model_ema", "averaged weights: pretrained_model_ema is preferred to pretrained_model"),
        ("pretrained_model", "the last weights: there is no pretrained_model_ema"),
    ):
        if (folder / name / native.CONFIG).exists():
            return folder / name, [note]
    steps = folder / "checkpoints" if (folder / "checkpoints").is_dir() else folder
    numbered = sorted((path for path in steps.iterdir() if path.name.isdigit()), key=lambda path: int(path.name))
    if numbered:
        found, notes = find_checkpoint(numbered[-1])
        return found, [f"step {numbered[-1].name}, the last of {len(numbered)}", *notes]
    raise InteropError(
        f"no checkpoint at {folder}: expected config.json and model.safetensors there, in pretrained_model/ or in "
        "checkpoints/STEP/pretrained_model/"
    )


def read_object(path: Path) -> dict[str, Any]:
    """A JSON file that holds an object. Raises InteropError."""
    try:
        content = native.read_json(path)
    except CheckpointError as error:
        raise InteropError(str(error)) from error
    if not isinstance(content, dict):
        raise InteropError(f"{path} holds a {type(content).__name__}, expected an object of fields")
    return content


def read_weights(folder: Path) -> dict[str, Tensor]:
    """The tensors of a checkpoint. Raises InteropError, CheckpointError for a pickle."""
    path = folder / native.WEIGHTS
    if not path.exists():
        pickles = sorted(file.name for file in folder.iterdir() if file.suffix in native.PICKLE_SUFFIXES)
        also = f"; {', '.join(pickles)} may be a pickle, which can run any code when read, and is never read" * bool(
            pickles
        )
        raise InteropError(f"{folder} lacks {native.WEIGHTS}{also}")
    native.refuse_pickle(path)
    return _read_tensors(path)


def read_processors(folder: Path) -> Processors:
    """What LeRobot's processors do, from their files. Raises InteropError for steps this reader does not know."""
    steps = [step for name in (PREPROCESSOR, POSTPROCESSOR) for step in _steps(folder / f"{name}.json")]
    problems: list[str] = []
    normalizers, tokenizers = [], []
    for step in steps:
        name, settings = str(step.get("registry_name") or step.get("class")), step.get("config", {})
        if name not in _KNOWN_STEPS:
            problems.append(f"a processing step {name}, which this reader does not know")
        if name == "rename_observations_processor" and settings.get("rename_map"):
            problems.append(f"rename_map {settings['rename_map']}: give the dataset's names to the features instead")
        if settings.get("normalize_observation_keys") is not None:
            problems.append("normalize_observation_keys: some features are not normalised as their kind is")
        if name in ("normalizer_processor", "unnormalizer_processor"):
            modes = settings.get("norm_map", {})
            if not isinstance(modes, Mapping):
                problems.append(f"norm_map of {name} is {modes!r}, expected an object")
            normalizers.append((modes, _state(folder, step)))
        if name == "tokenizer_processor":
            tokenizers.append(_TOKENIZER_DEFAULTS | settings)
    if len(normalizers) != 2:
        problems.append(f"expected one normalizer_processor and one unnormalizer_processor, found {len(normalizers)}")
    if len(tokenizers) != 1:
        problems.append(f"expected one tokenizer_processor, found {len(tokenizers)}")
    if problems:
        raise InteropError(f"the processors of {folder} cannot be expressed here:\n  - " + "\n  - ".join(problems))
    (modes, stats), (out_modes, out_stats) = normalizers
    if modes.get("ACTION") != out_modes.get("ACTION") or not same_stats(
        stats.get("action", {}), out_stats.get("action", {})
    ):
        raise InteropError(f"{folder}: actions are normalised in one way and un-normalised in another")
    return Processors(Normalization(modes, stats), tokenizers[0])


def _steps(path: Path) -> list[dict[str, Any]]:
    steps = read_object(path).get("steps")
    if not isinstance(steps, list) or not all(
        isinstance(step, dict) and isinstance(step.get("config", {}), dict) for step in steps
    ):
        raise InteropError(f"{path} has no list of steps, each with its config")
    return steps


def _state(folder: Path, step: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """A normalising step's statistics by feature key."""
    stats: dict[str, dict[str, Any]] = {}
    if not step.get("state_file"):
        return stats
    path = folder / str(step["state_file"])
    if not path.is_file():
        raise InteropError(f"{folder} lacks {path.name}, the statistics that its processors normalise with")
    for name, tensor in _read_tensors(path).items():
        key, _, statistic = name.rpartition(".")
        stats.setdefault(key, {})[statistic] = tensor.tolist()
    return stats


def read_stats(folder: Path) -> dict[str, dict[str, Any]]:
    """The original's statistics by feature key. Raises InteropError."""
    path = folder / native.STATS
    stats = read_object(path)
    for key, entry in stats.items():
        if not isinstance(entry, dict):
            raise InteropError(f"{path} holds no statistics of {key}: {entry!r}, expected an object of lists")
        for name, values in entry.items():
            try:
                torch.as_tensor(values, dtype=torch.float64)
            except (TypeError, ValueError, RuntimeError) as error:
                raise InteropError(f"{path}: {name} of {key} is no list of numbers ({error})") from error
    return stats


def same_stats(given: Mapping[str, Any], expected: Mapping[str, Any]) -> bool:
    """Whether one feature's statistics are the same in float32."""
    return given.keys() == expected.keys() and all(
        torch.equal(torch.as_tensor(given[name], dtype=torch.float32), torch.as_tensor(value, dtype=torch.float32))
        for name, value in expected.items()
    )


def _read_tensors(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise InteropError(f"{path} cannot be read ({error}): the file is damaged, copy it again") from error
