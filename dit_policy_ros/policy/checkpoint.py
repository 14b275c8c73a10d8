"""A policy as a folder that needs nothing else: no network, no hub cache, no pickle.

model.safetensors     all weights, the frozen text tower's included
config.json           PolicyConfig with the encoders' own (Hugging Face) configurations filled in
tokenizer/            the tokenizer's files
dataset_stats.json    the statistics the policy normalises with
embodiment.yaml       the robot it was trained on
model_card.md         for the reader
"""

import copy
import json
import shutil
import tempfile
from pathlib import Path
from typing import Any

import draccus
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from .configuration import ClipTextConfig, ClipVisionConfig, PolicyConfig
from .modeling import MultitaskDiTPolicy

FORMAT_VERSION = 1
WEIGHTS, CONFIG, TOKENIZER, STATS = "model.safetensors", "config.json", "tokenizer", "dataset_stats.json"
EMBODIMENT, MODEL_CARD = "embodiment.yaml", "model_card.md"


class CheckpointError(ValueError):
    """A checkpoint folder that is incomplete, damaged or not of this model; the message says what to do."""


def save_checkpoint(folder: str | Path, policy: MultitaskDiTPolicy, embodiment_yaml: str, model_card: str) -> None:
    """Writes the folder, replacing one that exists. What stands at `folder` is at all times complete.

    The folder is made under another name beside its place and then renamed, so an interruption leaves the old
    checkpoint (or, within an instant, none but the old one's complete copy `.NAME.old`). Raises
    CheckpointError for weights that are not finite.
    """
    folder = Path(folder)
    weights = {name: tensor.detach().cpu().contiguous() for name, tensor in policy.state_dict().items()}
    if bad := _not_finite(weights):
        raise CheckpointError(f"not saved to {folder}: weights are not finite: {_listed(bad)}")
    folder.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", suffix=".partial", dir=folder.parent))
    try:
        partial.chmod(0o755)  # mkdtemp's folders are private
        save_file(weights, partial / WEIGHTS, metadata={"format": "pt"})
        (partial / WEIGHTS).chmod(0o644)
        _write_json(partial / CONFIG, {"format_version": FORMAT_VERSION} | draccus.encode(_self_contained(policy)))
        policy.observation_encoder.text_encoder.tokenizer.save_pretrained(partial / TOKENIZER)
        _write_json(partial / STATS, policy.stats)
        (partial / EMBODIMENT).write_text(embodiment_yaml, encoding="utf-8")
        (partial / MODEL_CARD).write_text(model_card, encoding="utf-8")
        _replace(folder, partial)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def load_checkpoint(folder: str | Path, device: str | torch.device = "cpu") -> MultitaskDiTPolicy:
    """The policy in evaluation mode on a device. Raises CheckpointError."""
    folder = Path(folder)
    _check_files(folder)
    config = load_config(folder)
    stats = _read_json(folder / STATS)
    try:
        policy = MultitaskDiTPolicy(config, stats, _load_tokenizer(folder / TOKENIZER))
    except ValueError as error:
        raise CheckpointError(f"checkpoint {folder}: {error}") from error
    policy.load_state_dict(_load_weights(folder / WEIGHTS, policy.state_dict()), strict=True)
    return policy.to(device).eval()


def load_config(folder: str | Path) -> PolicyConfig:
    """The configuration of a checkpoint, without its weights. Raises CheckpointError."""
    path = Path(folder) / CONFIG
    content = _read_json(path)
    version = content.pop("format_version", None) if isinstance(content, dict) else None
    if version != FORMAT_VERSION:
        raise CheckpointError(
            f"{path}: format_version is {version}, this version of dit_policy_ros reads {FORMAT_VERSION}: "
            "use the version that wrote the checkpoint"
        )
    try:
        return draccus.decode(PolicyConfig, content)
    except Exception as error:  # draccus has no common base for what decoding may raise
        raise CheckpointError(f"{path} is not a policy's configuration: {error}") from error


def _self_contained(policy: MultitaskDiTPolicy) -> PolicyConfig:
    """The configuration with the encoders' architectures in it, so that loading asks no hub."""
    config = copy.deepcopy(policy.config)
    encoder, described = policy.observation_encoder, config.observation_encoder
    if isinstance(described.text, ClipTextConfig):
        described.text.model_config = _architecture(encoder.text_encoder.text_encoder)
    if isinstance(described.vision, ClipVisionConfig) and encoder.cameras:
        described.vision.backbone_config = _architecture(encoder.vision_encoders[0].model)
    return config


def _architecture(tower: Any) -> dict[str, Any]:
    # Defaults included: they may differ in another version of transformers.
    entries = json.loads(tower.config.to_json_string(use_diff=False))
    return {key: value for key, value in entries.items() if key not in ("_name_or_path", "transformers_version")}


def _check_files(folder: Path) -> None:
    if not folder.is_dir():
        raise CheckpointError(
            f"no checkpoint at {folder}: the folder does not exist; give the folder that training wrote, "
            f"holding {WEIGHTS} and {CONFIG}"
        )
    missing = [name for name in (WEIGHTS, CONFIG, TOKENIZER, STATS, EMBODIMENT) if not (folder / name).exists()]
    if missing:
        raise CheckpointError(
            f"checkpoint {folder} is incomplete: it lacks {', '.join(missing)}; "
            "copy the whole folder that training wrote"
        )


def _load_tokenizer(folder: Path) -> Any:
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError, KeyError, ImportError) as error:  # it may ask for what reads yet another format
        raise CheckpointError(f"{folder} holds no tokenizer that transformers can read: {error}") from error


def _load_weights(path: Path, expected: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of a file that must hold exactly the expected ones: names, shapes, types, finite."""
    try:
        with safe_open(path, framework="pt") as file:
            found = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path} cannot be read ({error}): the file is damaged, copy it again") from error
    problems = []
    if missing := sorted(expected.keys() - found.keys()):
        problems.append(f"missing: {_listed(missing)}")
    if unexpected := sorted(found.keys() - expected.keys()):
        problems.append(f"unexpected: {_listed(unexpected)}")
    for name in sorted(expected.keys() & found.keys()):
        have, want = found[name], expected[name]
        if have.shape != want.shape or have.dtype != want.dtype:
            problems.append(f"{name}: {_described(have)} in the file, {_described(want)} in the model")
    if bad := _not_finite(found):
        problems.append(f"not finite: {_listed(bad)}")
    if problems:
        raise CheckpointError(
            f"{path} does not hold this model (it must come from the same training run as its {CONFIG}):\n  - "
            + "\n  - ".join(problems)
        )
    return found


def _not_finite(tensors: dict[str, Tensor]) -> list[str]:
    return [name for name, tensor in tensors.items() if not tensor.isfinite().all()]


def _described(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} {tuple(tensor.shape)}"


def _listed(names: list[str]) -> str:
    return ", ".join(names)


def _replace(folder: Path, partial: Path) -> None:
    old = folder.with_name(f".{folder.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if folder.exists():
        folder.rename(old)
    partial.rename(folder)
    shutil.rmtree(old, ignore_errors=True)


def _write_json(path: Path, content: Any) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror}") from error
    except ValueError as error:
        raise CheckpointError(f"{path} is not JSON: {error}") from error
