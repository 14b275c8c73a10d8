"""The fields of LeRobot's and the original's config.json: their names in ours, their defaults, their types.

What has one meaning and two names stands in tables, read in both directions.
"""

import json
from collections.abc import Mapping
from typing import Any

VISION, TEXT, TRANSFORMER, OBJECTIVE = (
    "observation_encoder.vision",
    "observation_encoder.text",
    "transformer",
    "objective",
)

_COMMON = ["n_obs_steps", "horizon", "n_action_steps", "do_mask_loss_for_padding"]
_NET = ["hidden_dim", "num_layers", "num_heads", "dropout", "use_positional_encoding", "use_rope", "rope_base"]

LEROBOT = {name: name for name in _COMMON} | {
    **{name: f"{TRANSFORMER}.{name}" for name in _NET},
    "timestep_embed_dim": f"{TRANSFORMER}.timestep_embed_dim",
    "vision_encoder_name": f"{VISION}.backbone",
    "use_separate_rgb_encoder_per_camera": f"{VISION}.use_separate_encoder_per_camera",
    "vision_encoder_lr_multiplier": f"{VISION}.lr_multiplier",
    "image_resize_shape": f"{VISION}.resize_shape",
    "image_crop_shape": f"{VISION}.crop_shape",
    "image_crop_is_random": f"{VISION}.crop_is_random",
    "text_encoder_name": f"{TEXT}.model",
}
"""LeRobot's fields and ours of the same meaning."""

LEROBOT_OBJECTIVE = {
    "diffusion": {
        "num_train_timesteps": f"{OBJECTIVE}.num_train_timesteps",
        "prediction_type": f"{OBJECTIVE}.prediction_type",
    },
    "flow_matching": {
        "sigma_min": f"{OBJECTIVE}.sigma_min",
        "num_integration_steps": f"{OBJECTIVE}.denoising_steps",
        "integration_method": f"{OBJECTIVE}.sampler",
        "timestep_sampling_strategy": f"{OBJECTIVE}.timestep_sampling",
        "timestep_sampling_s": f"{OBJECTIVE}.beta_scale",
        "timestep_sampling_alpha": f"{OBJECTIVE}.beta_alpha",
        "timestep_sampling_beta": f"{OBJECTIVE}.beta_beta",
    },
}

_LEROBOT_OTHERWISE = [
    "noise_scheduler_type",
    "num_inference_steps",
    "beta_schedule",
    "clip_sample",
    "clip_sample_range",
    "type",
    "device",
    "use_amp",
    "use_peft",
    "push_to_hub",
    "repo_id",
    "private",
    "tags",
    "license",
    "pretrained_path",
    "pretrained_revision",
    "optimizer_lr",
    "optimizer_betas",
    "optimizer_eps",
    "optimizer_weight_decay",
    "scheduler_name",
    "scheduler_warmup_steps",
    "drop_n_last_frames",
    "beta_start",
    "beta_end",
    "tokenizer_padding",
    "tokenizer_truncation",
    "input_features",
    "output_features",
    "normalization_mapping",
    "objective",
    "tokenizer_max_length",
    "tokenizer_padding_side",
]

LEROBOT_DEFAULTS: dict[str, Any] = {
    "n_obs_steps": 2,
    "horizon": 32,
    "n_action_steps": 24,
    "objective": "diffusion",
    "noise_scheduler_type": "DDPM",
    "num_train_timesteps": 100,
    "beta_schedule": "squaredcos_cap_v2",
    "prediction_type": "epsilon",
    "clip_sample": True,
    "clip_sample_range": 1.0,
    "num_inference_steps": None,
    "sigma_min": 0.0,
    "num_integration_steps": 100,
    "integration_method": "euler",
    "timestep_sampling_strategy": "beta",
    "timestep_sampling_s": 0.999,
    "timestep_sampling_alpha": 1.5,
    "timestep_sampling_beta": 1.0,
    "hidden_dim": 512,
    "num_layers": 6,
    "num_heads": 8,
    "dropout": 0.1,
    "use_positional_encoding": False,
    "timestep_embed_dim": 256,
    "use_rope": True,
    "rope_base": 10000.0,
    "vision_encoder_name": "openai/clip-vit-base-patch16",
    "use_separate_rgb_encoder_per_camera": False,
    "vision_encoder_lr_multiplier": 0.1,
    "image_resize_shape": None,
    "image_crop_shape": (224, 224),
    "image_crop_is_random": True,
    "text_encoder_name": "openai/clip-vit-base-patch16",
    "tokenizer_max_length": 77,
    "tokenizer_padding": "max_length",
    "tokenizer_padding_side": "right",
    "tokenizer_truncation": True,
    "do_mask_loss_for_padding": False,
}
"""What a field that is missing from LeRobot's config.json is there (multi_task_dit of 0.6); ours differ."""

ORIGINAL = {name: name for name in _COMMON} | {
    **{f"transformer.{name}": f"{TRANSFORMER}.{name}" for name in _NET},
    "transformer.diffusion_step_embed_dim": f"{TRANSFORMER}.timestep_embed_dim",
    "observation_encoder.vision.backbone": f"{VISION}.backbone",
    **{
        f"observation_encoder.vision.{name}": f"{VISION}.{name}"
        for name in ("use_separate_encoder_per_camera", "lr_multiplier", "resize_shape", "crop_shape", "crop_is_random")
    },
    "observation_encoder.text.model": f"{TEXT}.model",
}
"""The original's fields, dotted, and ours of the same meaning."""

ORIGINAL_OBJECTIVE = {
    "diffusion": {
        "objective.num_train_timesteps": f"{OBJECTIVE}.num_train_timesteps",
        "objective.prediction_type": f"{OBJECTIVE}.prediction_type",
    },
    "flow_matching": {
        "objective.sigma_min": f"{OBJECTIVE}.sigma_min",
        "objective.num_integration_steps": f"{OBJECTIVE}.denoising_steps",
        "objective.integration_method": f"{OBJECTIVE}.sampler",
        "objective.timestep_sampling.type": f"{OBJECTIVE}.timestep_sampling",
        "objective.timestep_sampling.s": f"{OBJECTIVE}.beta_scale",
        "objective.timestep_sampling.alpha": f"{OBJECTIVE}.beta_alpha",
        "objective.timestep_sampling.beta": f"{OBJECTIVE}.beta_beta",
    },
}
_ORIGINAL_OTHERWISE = [
    "objective.type",
    "objective.objective_name",
    "objective.noise_scheduler_type",
    "objective.num_inference_steps",
    "objective.beta_schedule",
    "objective.clip_sample",
    "objective.clip_sample_range",
    "objective.beta_start",
    "objective.beta_end",
    "objective.timestep_sampling.strategy_name",
    "observation_encoder.vision.type",
    "observation_encoder.text.type",
    "drop_n_last_frames",
    "device",
    "optimizer_lr",
    "optimizer_betas",
    "optimizer_eps",
    "optimizer_weight_decay",
]


class InteropError(ValueError):
    """A checkpoint that cannot be expressed in the other format; the message lists every reason."""


FEATURES = ("input_features", "output_features")


def complete_lerobot(theirs: Mapping[str, Any]) -> dict[str, Any]:
    """LeRobot's config.json with its own defaults where a field is missing.

    Raises InteropError naming each field that is unknown or of another type than LeRobot's, and features that
    are missing.
    """
    known = {*LEROBOT, *_all_of(LEROBOT_OBJECTIVE), *_LEROBOT_OTHERWISE}
    problems = _unknown(theirs, known) + _feature_problems(theirs)
    for name, default in LEROBOT_DEFAULTS.items():
        if name in theirs and not _is_like(theirs[name], name, default):
            problems.append(f"{name} is {theirs[name]!r}, expected a value like {default!r}")
    if theirs.get("objective", "diffusion") not in (*LEROBOT_OBJECTIVE,):
        problems.append(f"objective is {theirs['objective']!r}, expected {' or '.join(LEROBOT_OBJECTIVE)}")
    _refuse(problems)
    return LEROBOT_DEFAULTS | dict(theirs)


def flatten_original(theirs: Mapping[str, Any]) -> dict[str, Any]:
    """The original's config.json with dotted names, but for its features and their normalisation.

    Raises InteropError naming each field that is unknown or missing: its program always writes them all.
    """
    flat = flatten({key: value for key, value in theirs.items() if key not in (*FEATURES, "normalization_mapping")})
    kind = flat.get("objective.type")
    known = {*ORIGINAL, *_all_of(ORIGINAL_OBJECTIVE), *_ORIGINAL_OTHERWISE}
    problems = _unknown(flat, known) + _feature_problems(theirs)
    if kind not in (*ORIGINAL_OBJECTIVE,):
        problems.append(f"objective.type is {kind!r}, expected {' or '.join(ORIGINAL_OBJECTIVE)}")
    else:
        wanted = [*ORIGINAL, *ORIGINAL_OBJECTIVE[kind]]
        if kind == "diffusion":
            wanted += ["objective.noise_scheduler_type", "objective.num_inference_steps"]
        elif flat.get("objective.timestep_sampling.type") == "uniform":  # it has no beta distribution then
            wanted = [name for name in wanted if not name.startswith("objective.timestep_sampling.")]
        problems += [f"{name} is missing" for name in wanted if name not in flat]
    for name in ("observation_encoder.vision.backbone", "observation_encoder.text.model"):
        if name in flat and not isinstance(flat[name], str):
            problems.append(f"{name} is {flat[name]!r}, expected a name")
    if not isinstance(theirs.get("normalization_mapping"), Mapping):
        problems.append("normalization_mapping is missing or no object")
    _refuse(problems)
    return flat


def _refuse(problems: list[str]) -> None:
    if problems:
        raise InteropError("this policy cannot be expressed here:\n  - " + "\n  - ".join(problems))


def _unknown(theirs: Mapping[str, Any], known: set[str]) -> list[str]:
    return [f"{name}: a field this reader does not know" for name in theirs if name not in {*known, *FEATURES}]


def _all_of(tables: Mapping[str, Mapping[str, str]]) -> list[str]:
    return [name for table in tables.values() for name in table]


def _feature_problems(theirs: Mapping[str, Any]) -> list[str]:
    problems = []
    for group in FEATURES:
        features = theirs.get(group)
        if not isinstance(features, Mapping) or not features:
            problems.append(f"{group} is missing or no object with features")
            continue
        for key, feature in features.items():
            shape = feature.get("shape") if isinstance(feature, Mapping) else None
            if not _is_shape(shape) or not isinstance(feature.get("type"), str):
                problems.append(f"{group}.{key} is {feature!r}, expected a type and a shape of positive whole numbers")
            elif feature["type"] == "VISUAL" and len(shape or []) != 3:
                problems.append(f"{group}.{key} has shape {shape}, expected (colours, height, width)")
    return problems


def _is_like(value: Any, name: str, default: Any) -> bool:
    """Whether a value of LeRobot's field is of the type its own configuration declares."""
    if name in ("image_resize_shape", "image_crop_shape"):
        return value is None or (_is_shape(value) and len(value) == 2)
    if name == "num_inference_steps":
        return value is None or _is_count(value)
    if isinstance(default, float):
        return isinstance(value, int | float) and not isinstance(value, bool)
    return type(value) is type(default)


def _is_shape(value: Any) -> bool:
    return isinstance(value, list | tuple) and bool(value) and all(_is_count(size) for size in value)


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def copy_fields(
    theirs: Mapping[str, Any], ours: dict[str, Any], table: Mapping[str, str]
) -> list[tuple[str, str, str]]:
    """Takes over the fields of a table that are there, and tells which."""
    for name, path in table.items():
        if name in theirs:
            put(ours, path, theirs[name])
    return [(name, path, json.dumps(theirs[name])) for name, path in table.items() if name in theirs]


def put(tree: dict[str, Any], path: str, value: Any) -> None:
    """Writes a value at a dotted path, making the mappings above it."""
    *parents, last = path.split(".")
    for name in parents:
        tree = tree.setdefault(name, {})
    tree[last] = value


def look_up(tree: Mapping[str, Any], path: str) -> Any:
    """The value at a dotted path, None where there is none."""
    value: Any = tree
    for name in path.split("."):
        value = value.get(name) if isinstance(value, Mapping) else None
    return value


def flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested mappings as one with dotted names."""
    flat: dict[str, Any] = {}
    for name, value in tree.items():
        flat |= flatten(value, f"{prefix}{name}.") if isinstance(value, Mapping) else {f"{prefix}{name}": value}
    return flat
