"""A checkpoint of ours in LeRobot's format."""

import dataclasses
import shutil
import tempfile
from pathlib import Path
from typing import Any

import draccus
import torch
from safetensors.torch import save_file

from .. import checkpoint as native
from ..checkpoint import write_json
from ..configuration import ClipTextConfig, DiffusionConfig, FlowMatchingConfig, PolicyConfig
from ..modeling import MultitaskDiTPolicy
from ..text import ClipText
from . import configurations, tensor_names
from .fields import InteropError
from .folder import POSTPROCESSOR, PREPROCESSOR
from .options import Options, Summary

CLIP, NATIVE = "clip", "native"
"""Folders of an export: the towers LeRobot builds its encoders from, and what its format has no place for."""


def to_lerobot(source: str | Path, target: str | Path, options: Options | None = None) -> Summary:
    """Writes a checkpoint of ours as LeRobot 0.6 loads it. Raises InteropError, CheckpointError."""
    options = options or Options()
    source, target = Path(source), Path(target)
    options.check("lerobot", target)
    policy = native.load_checkpoint(source)
    config = _with_sampler(policy.config, options)
    clip = str((target / CLIP).resolve())
    theirs, stats = configurations.to_lerobot(config, policy.stats, clip, _max_tokens(policy))
    state = policy.state_dict()
    separate = config.observation_encoder.vision.use_separate_encoder_per_camera
    weights = tensor_names.to_lerobot(state, separate, wrapped=not options.flat_names)
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{target.name}.", dir=target.parent) as name:
        partial = Path(name) / "checkpoint"
        partial.mkdir()
        save_file(weights, partial / native.WEIGHTS, metadata={"format": "pt"})
        write_json(partial / native.CONFIG, theirs)
        _write_processors(partial, theirs, stats, clip)
        _write_clip(partial / CLIP, policy, config)
        _write_native(partial / NATIVE, source, config, policy.stats)
        native.replace_folder(target, partial)
    fields = configurations.lerobot_fields(theirs)
    return Summary(f"native, {source}", len(weights), [], fields, _export_notes(config, clip))


def _with_sampler(config: PolicyConfig, options: Options) -> PolicyConfig:
    """The configuration with the sampler chosen for the export."""
    if options.sampler is None and options.steps is None:
        return config
    objective: Any = config.objective
    chosen = {"sampler": options.sampler, "denoising_steps": options.steps}
    changes: dict[str, Any] = {name: value for name, value in chosen.items() if value is not None}
    if isinstance(objective, DiffusionConfig):
        changes["timestep_spacing"] = "leading"
    try:
        changed = dataclasses.replace(config, objective=dataclasses.replace(objective, **changes))
        changed.validate()
    except ValueError as error:
        raise InteropError(f"this policy cannot be sampled by --sampler and --steps as given: {error}") from error
    return changed


def _max_tokens(policy: MultitaskDiTPolicy) -> int:
    text = policy.observation_encoder.text_encoder
    return text.max_tokens if isinstance(text, ClipText) else 0  # a policy without words is refused by name


def _export_notes(config: PolicyConfig, clip: str) -> list[str]:
    vision: Any = config.observation_encoder.vision
    objective = config.objective
    kept = {
        "tasks": bool(config.tasks),
        "state_noise": config.state_noise > 0,
        "vision.random_shift": vision.random_shift > 0,
        **{f"vision.{name}": getattr(vision, name) > 0 for name in ("brightness", "contrast", "saturation", "hue")},
        "objective.noise_draws": objective.noise_draws > 1,
    }
    notes = [f"LeRobot takes CLIP and its tokenizer from {clip}; if the folder moves, change both names in config.json"]
    if names := [name for name, is_set in kept.items() if is_set]:
        notes.append(f"only in {NATIVE}/, as LeRobot has no such thing; of no effect on actions: {', '.join(names)}")
    if isinstance(objective, FlowMatchingConfig | DiffusionConfig):
        notes.append(f"default sampler: {objective.sampler}, {objective.denoising_steps} steps")
    return notes


def _write_processors(folder: Path, theirs: dict[str, Any], stats: dict[str, dict[str, Any]], clip: str) -> None:
    """LeRobot's pipelines around the policy, as its own save_pretrained writes them."""
    features = theirs["input_features"] | theirs["output_features"]
    modes = theirs["normalization_mapping"]
    tokenizer = {
        "max_length": theirs["tokenizer_max_length"],
        "task_key": "task",
        "padding_side": "right",
        "padding": "max_length",
        "truncation": True,
        "tokenizer_name": clip,
    }
    device = {"registry_name": "device_processor", "config": {"device": "cpu", "float_dtype": None}}
    into = f"{PREPROCESSOR}_step_4_normalizer_processor.safetensors"
    out = f"{POSTPROCESSOR}_step_0_unnormalizer_processor.safetensors"
    before: list[dict[str, Any]] = [
        {"registry_name": "rename_observations_processor", "config": {"rename_map": {}}},
        {"registry_name": "to_batch_processor", "config": {}},
        {"registry_name": "tokenizer_processor", "config": tokenizer},
        device,
        {
            "registry_name": "normalizer_processor",
            "config": {"eps": 1e-8, "features": features, "norm_map": modes},
            "state_file": into,
        },
    ]
    after: list[dict[str, Any]] = [
        {
            "registry_name": "unnormalizer_processor",
            "config": {"eps": 1e-8, "features": theirs["output_features"], "norm_map": modes},
            "state_file": out,
        },
        device,
    ]
    write_json(folder / f"{PREPROCESSOR}.json", {"name": PREPROCESSOR, "steps": before})
    write_json(folder / f"{POSTPROCESSOR}.json", {"name": POSTPROCESSOR, "steps": after})
    flat = {
        f"{key}.{name}": torch.as_tensor(value, dtype=torch.float32)
        for key, entry in stats.items()
        for name, value in entry.items()
    }
    save_file(flat, folder / into)
    save_file(flat, folder / out)


def _write_clip(folder: Path, policy: MultitaskDiTPolicy, config: PolicyConfig) -> None:
    """The towers and the tokenizer as a CLIP that LeRobot can build its encoders from before it loads the weights."""
    import transformers

    text: Any = config.observation_encoder.text
    vision: Any = config.observation_encoder.vision
    state = policy.state_dict()
    assert isinstance(text, ClipTextConfig)
    towers = {f"text_model.{name}": tensor for name, tensor in tensor_names.text_tower(state).items()}
    settings: dict[str, Any] = {"text_config": text.model_config}
    if config.cameras:
        towers |= {f"vision_model.{name}": tensor for name, tensor in tensor_names.vision_tower(state).items()}
        settings["vision_config"] = vision.backbone_config
    folder.mkdir()
    transformers.CLIPConfig(**settings).save_pretrained(folder)
    save_file(towers, folder / native.WEIGHTS, metadata={"format": "pt"})
    policy.observation_encoder.text_encoder.tokenizer.save_pretrained(folder)  # type: ignore[union-attr]


def _write_native(folder: Path, source: Path, config: PolicyConfig, stats: dict[str, dict[str, Any]]) -> None:
    """What LeRobot's format has no place for."""
    folder.mkdir()
    write_json(folder / native.CONFIG, {"format_version": native.FORMAT_VERSION} | draccus.encode(config))
    write_json(folder / native.STATS, stats)
    for name in (native.EMBODIMENT, native.MODEL_CARD):
        if (source / name).exists():
            shutil.copyfile(source / name, folder / name)
