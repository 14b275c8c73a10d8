"""Configurations of one model in three dialects: ours, LeRobot's `multi_task_dit` and the original's.

What has one meaning and two names stands in tables (fields.py). Here is what the others do otherwise: each
such habit is a value of our configuration, and what has none is refused by name, all of it at once.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import draccus
import torch

from ..checkpoint import reasons
from ..configuration import (
    ACTION,
    STATE,
    ClipTextConfig,
    ClipVisionConfig,
    DiffusionConfig,
    FlowMatchingConfig,
    PolicyConfig,
)
from ..normalization import NEGLIGIBLE, Stats
from .fields import (
    LEROBOT,
    LEROBOT_OBJECTIVE,
    OBJECTIVE,
    ORIGINAL,
    ORIGINAL_OBJECTIVE,
    TEXT,
    VISION,
    InteropError,
    complete_lerobot,
    copy_fields,
    flatten_original,
    look_up,
    put,
)


@dataclass
class Normalization:
    """How another program normalises: its mode of each kind of feature, and the statistics by feature key."""

    modes: Mapping[str, str]
    stats: Stats


@dataclass
class Mapped:
    """A configuration in our words.

    fields: [their name, our name, value]. notes: what the reader should know, a sentence each.
    """

    config: PolicyConfig
    stats: dict[str, dict[str, Any]]
    fields: list[tuple[str, str, str]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def from_lerobot(
    theirs: Mapping[str, Any], normalization: Normalization, vision: dict[str, Any] | None, text: dict[str, Any]
) -> Mapped:
    """LeRobot's config.json in our words.

    vision, text: transformers' configurations of the towers. Raises InteropError listing all that has no word.
    """
    theirs = complete_lerobot(theirs)
    objective = theirs["objective"]
    table = LEROBOT | LEROBOT_OBJECTIVE[objective]
    problems = []
    if theirs["tokenizer_padding_side"] != "right":
        problems.append("tokenizer_padding_side left: CLIP's positions would shift, expected right")
    ours: dict[str, Any] = {}
    fields = copy_fields(theirs, ours, table)
    if objective == "diffusion":
        fields += _set_diffusion(theirs, ours, problems, clips=theirs["clip_sample"])
    put(ours, f"{OBJECTIVE}.type", objective)
    notes = _drop_unfitting_crop(ours, theirs)
    return _finish(theirs, ours, fields, notes, problems, normalization, vision, text, use_post_layernorm=False)


def from_original(
    theirs: Mapping[str, Any], normalization: Normalization, vision: dict[str, Any] | None, text: dict[str, Any]
) -> Mapped:
    """The original's config.json in our words; arguments and errors as for `from_lerobot`."""
    flat = flatten_original(theirs)
    kind = flat["objective.type"]
    table = ORIGINAL | ORIGINAL_OBJECTIVE[kind]
    problems = []
    if flat.get("observation_encoder.vision.type") != "clip":
        problems.append(
            "observation_encoder.vision.type must be clip: timm's DINOv3 is another model than transformers'"
        )
    ours: dict[str, Any] = {}
    fields = copy_fields(flat, ours, table)
    if kind == "diffusion":
        inner = {key.removeprefix("objective."): value for key, value in flat.items()}
        # It stores clip_sample and its range but never passes them on: diffusers' defaults are what runs.
        fields += _set_diffusion(inner | {"clip_sample_range": 1.0}, ours, problems, clips=True)
    put(ours, f"{OBJECTIVE}.type", kind)
    return _finish(theirs, ours, fields, [], problems, normalization, vision, text, use_post_layernorm=True)


def to_lerobot(
    config: PolicyConfig, stats: Stats, clip: str, max_tokens: int = 77
) -> tuple[dict[str, Any], dict[str, dict[str, Any]]]:
    """Our configuration as LeRobot's config.json, and the statistics its processors are to use.

    clip: the name or folder LeRobot will load CLIP's towers from; it must contain "clip". max_tokens: the length at
    which instructions are cut. Raises InteropError listing all that LeRobot has no word for.
    """
    if problems := _not_in_lerobot(config):
        raise InteropError("LeRobot's multi_task_dit has no way to express this:\n  - " + "\n  - ".join(problems))
    encoded = draccus.encode(config)
    objective = "diffusion" if isinstance(config.objective, DiffusionConfig) else "flow_matching"
    table = LEROBOT | LEROBOT_OBJECTIVE[objective]
    theirs: dict[str, Any] = {"type": "multi_task_dit", "objective": objective}
    theirs |= {name: look_up(encoded, path) for name, path in table.items()}
    theirs |= {
        "vision_encoder_name": clip,
        "text_encoder_name": clip,
        "tokenizer_max_length": max_tokens,
        "input_features": encoded["input_features"],
        "output_features": encoded["output_features"],
        "normalization_mapping": {key: encoded["normalization_mapping"][key] for key in ("VISUAL", "STATE", "ACTION")},
        "device": "cpu",
        "push_to_hub": False,
    }
    if not config.cameras:  # unused there, but its default crop is checked
        theirs |= {"image_crop_shape": None, "image_resize_shape": None}
    if isinstance(config.objective, DiffusionConfig):
        theirs |= {
            "noise_scheduler_type": config.objective.sampler.upper(),
            "num_inference_steps": config.objective.denoising_steps,
            "beta_schedule": "squaredcos_cap_v2",
            "clip_sample": config.objective.clip_range is not None,
            "clip_sample_range": config.objective.clip_range or 1.0,
        }
    return theirs, lerobot_stats(config, stats)


def lerobot_stats(config: PolicyConfig, stats: Stats) -> dict[str, dict[str, Any]]:
    """The statistics with which LeRobot's processors give what our normalisation gives on the training data.

    Pictures: the encoder's mean and deviation, for every camera. A dimension that was constant, c, and is 0
    here, would be -1 there; it gets min and max around c. For actions these are so near that what comes
    back is c within 1e-6 of its size (of 1 for small values).
    """
    given: dict[str, dict[str, Any]] = {}
    for key, mode in ((STATE, config.normalization_mapping["STATE"]), (ACTION, config.normalization_mapping["ACTION"])):
        if key not in stats:
            continue
        entry = {name: torch.as_tensor(value, dtype=torch.float64).flatten() for name, value in stats[key].items()}
        if mode == "MIN_MAX" and config.normalized_constant == 0:
            low, high = entry["min"], entry["max"]
            centre = (low + high) / 2
            constant = constants(low, high)
            half = torch.ones_like(centre) if key == STATE else NEGLIGIBLE * centre.abs().clamp_min(1)
            entry |= {
                "min": torch.where(constant, centre - half, low),
                "max": torch.where(constant, centre + half, high),
            }
        given[key] = {name: value.tolist() for name, value in entry.items()}
    vision = config.observation_encoder.vision
    for key in config.cameras:
        if config.normalization_mapping["VISUAL"] == "MEAN_STD":
            given[key] = {
                "mean": [[[value]] for value in vision.image_mean],
                "std": [[[value]] for value in vision.image_std],
            }
    return given


def constants(low: torch.Tensor, high: torch.Tensor) -> torch.Tensor:
    """Which dimensions our normalisation takes for constant, bool; low and high as in the statistics."""
    return (high - low) / 2 <= NEGLIGIBLE * ((low + high) / 2).abs().clamp_min(1)


def _not_in_lerobot(config: PolicyConfig) -> list[str]:
    """What LeRobot cannot express of a configuration, a sentence each."""
    vision, objective = config.observation_encoder.vision, config.objective
    found = []
    if config.action_mode != "absolute":
        found.append("action_mode relative: its actions are absolute")
    if not isinstance(config.observation_encoder.text, ClipTextConfig):
        found.append("text none: it always reads an instruction")
    if not config.state_dim:
        found.append("no observation.state: it cannot do without")
    if config.environment_state_dim:
        found.append("observation.environment_state: its encoder leaves it out")
    if config.instruction_dropout > 0 or config.guidance_scale != 1:
        found.append("instruction_dropout and guidance_scale: it has no classifier-free guidance")
    if config.max_delay > 0:
        found.append("max_delay: it has no training-time action conditioning")
    if config.normalized_constant not in (0, -1):
        found.append(f"normalized_constant {config.normalized_constant}: a constant dimension is -1 there")
    if config.cameras:
        found += _vision_not_in_lerobot(config, vision)
    if isinstance(objective, FlowMatchingConfig) and objective.timestep_scale != 1:
        found.append(f"objective.timestep_scale {objective.timestep_scale}: it embeds t as it is")
    if objective.sampler not in ("ddpm", "ddim", "euler", "rk4"):
        found.append(f"objective.sampler {objective.sampler}: export with --sampler ddim (ddpm) or euler (rk4)")
    if isinstance(objective, DiffusionConfig):
        found += _diffusion_not_in_lerobot(objective)
    return found


def _vision_not_in_lerobot(config: PolicyConfig, vision: Any) -> list[str]:
    if not isinstance(vision, ClipVisionConfig):
        return [f"vision {type(vision).get_choice_name(type(vision))}: its pictures go through CLIP"]
    found = []
    if vision.text_pooling:
        found.append("vision.text_pooling: it reads the CLS token alone")
    if vision.use_post_layernorm:
        found.append("vision.use_post_layernorm: it reads the CLS token before the last norm")
    if len(set(config.cameras.values())) > 1:
        found.append(f"cameras of different sizes {config.cameras}: it takes one size")
    if vision.resize_mode == "cover" and vision.resize_shape is not None:
        for key, (height, width) in config.cameras.items():
            if height * vision.resize_shape[1] != width * vision.resize_shape[0]:
                found.append(
                    f"vision.resize_mode cover: {key} of {(height, width)} keeps its aspect ratio here and is "
                    f"stretched to {vision.resize_shape} there"
                )
    return found


def _diffusion_not_in_lerobot(objective: DiffusionConfig) -> list[str]:
    found = []
    if objective.prediction_type == "v_prediction":
        found.append("objective.prediction_type v_prediction: it predicts epsilon or sample")
    all_steps = objective.denoising_steps == objective.num_train_timesteps
    if objective.timestep_spacing == "trailing" and not all_steps:
        found.append(
            f"objective.timestep_spacing trailing with {objective.denoising_steps} of {objective.num_train_timesteps} "
            "steps: its spacing is leading; export with --sampler ddim --steps N, which makes it so"
        )
    return found


def _set_diffusion(
    theirs: Mapping[str, Any], ours: dict[str, Any], problems: list[str], clips: bool
) -> list[tuple[str, str, str]]:
    """What the two dialects of diffusion mean to us; returns the fields taken over."""
    schedule = theirs.get("beta_schedule", "squaredcos_cap_v2")
    if schedule != "squaredcos_cap_v2":
        problems.append(f"beta_schedule {schedule}: expected squaredcos_cap_v2, the only one here")
    steps = theirs.get("num_inference_steps")
    values = [
        ("noise_scheduler_type", "sampler", str(theirs.get("noise_scheduler_type", "DDPM")).lower()),
        ("num_inference_steps", "denoising_steps", theirs.get("num_train_timesteps", 100) if steps is None else steps),
        ("(diffusers' default)", "timestep_spacing", "leading"),
        ("clip_sample(_range)", "clip_range", theirs.get("clip_sample_range", 1.0) if clips else None),
    ]
    for _, name, value in values:
        put(ours, f"{OBJECTIVE}.{name}", value)
    return [(their_name, f"{OBJECTIVE}.{name}", json.dumps(value)) for their_name, name, value in values]


def _drop_unfitting_crop(ours: dict[str, Any], theirs: Mapping[str, Any]) -> list[str]:
    """LeRobot leaves out a crop that does not fit the pictures, and says so only in its log."""
    crop, resize = (look_up(ours, f"{VISION}.{name}") for name in ("crop_shape", "resize_shape"))
    shapes = [feature["shape"][1:] for feature in theirs["input_features"].values() if feature["type"] == "VISUAL"]
    if not crop or all(size[i] >= crop[i] for size in ([resize] if resize else shapes) for i in (0, 1)):
        return []
    put(ours, f"{VISION}.crop_shape", None)
    return [f"image_crop_shape {tuple(crop)} does not fit the pictures: LeRobot does not crop then, nor does this"]


def _finish(
    theirs: Mapping[str, Any],
    ours: dict[str, Any],
    fields: list[tuple[str, str, str]],
    notes: list[str],
    problems: list[str],
    normalization: Normalization,
    vision: dict[str, Any] | None,
    text: dict[str, Any],
    use_post_layernorm: bool,
) -> Mapped:
    """What both dialects have in common: features, statistics, towers, and the habits of both."""
    ours["input_features"] = dict(theirs["input_features"])
    ours["output_features"] = dict(theirs["output_features"])
    for key, feature in theirs["input_features"].items():
        if feature["type"] == "ENV":
            del ours["input_features"][key]
            notes.append(f"{key} is left out: their encoder does not use it")
    put(ours, f"{VISION}.type", "clip")
    put(ours, f"{VISION}.resize_mode", "stretch" if look_up(ours, f"{VISION}.resize_shape") else "cover")
    put(ours, f"{VISION}.use_post_layernorm", use_post_layernorm)
    put(ours, f"{VISION}.backbone_config", vision)
    put(ours, f"{TEXT}.type", "clip")
    put(ours, f"{TEXT}.model_config", text)
    ours["normalized_constant"] = -1.0
    stats = _set_normalization(ours, normalization, notes, problems)
    config = None
    if not problems:
        try:
            config = draccus.decode(PolicyConfig, ours)
            config.validate()
        except Exception as error:  # draccus has no common base for what decoding may raise
            problems.append(reasons(error))
    if config is None:
        raise InteropError("this policy cannot be expressed here:\n  - " + "\n  - ".join(problems))
    return Mapped(config, stats, fields, notes)


def _set_normalization(
    ours: dict[str, Any], given: Normalization, notes: list[str], problems: list[str]
) -> dict[str, dict[str, Any]]:
    """Modes and statistics; returns those of state and action, which a checkpoint of ours stores."""
    features = ours["input_features"] | ours["output_features"]
    ours["normalization_mapping"] = modes = {"VISUAL": "IDENTITY", "STATE": "IDENTITY", "ACTION": "IDENTITY"}
    stats: dict[str, dict[str, Any]] = {}
    for kind, key in (("STATE", STATE), ("ACTION", ACTION)):
        mode = given.modes.get(kind, "IDENTITY")
        if mode not in ("MIN_MAX", "MEAN_STD", "IDENTITY"):
            problems.append(f"normalization of {kind} is {mode}: expected MIN_MAX, MEAN_STD or IDENTITY")
        elif key in features and key not in given.stats and mode != "IDENTITY":
            notes.append(f"{key} has no statistics: it is not normalised there, nor here")
        elif key in features:
            modes[kind] = mode
            stats[key] = {
                name: torch.as_tensor(value).flatten().tolist() for name, value in given.stats.get(key, {}).items()
            }
            if mode == "MIN_MAX":
                notes += _note_constants(key, stats[key])
    cameras = [key for key, feature in features.items() if feature["type"] == "VISUAL"]
    _set_image_statistics(ours, cameras, given, notes, problems)
    return stats


def _set_image_statistics(
    ours: dict[str, Any], cameras: list[str], given: Normalization, notes: list[str], problems: list[str]
) -> None:
    mode = given.modes.get("VISUAL", "IDENTITY")
    with_stats = [key for key in cameras if key in given.stats]
    if not cameras or mode == "IDENTITY":
        return
    if mode not in ("MEAN_STD", "MIN_MAX"):
        problems.append(f"normalization of VISUAL is {mode}: expected MEAN_STD, MIN_MAX or IDENTITY")
    elif not with_stats:
        notes.append("the cameras have no statistics: their pictures are not normalised there, nor here")
    else:
        wanted = ("mean", "std") if mode == "MEAN_STD" else ("min", "max")
        found = {tuple(tuple(_channels(given.stats[key], name)) for name in wanted) for key in with_stats}
        if len(found) > 1 or len(with_stats) < len(cameras):
            problems.append(
                "the cameras' statistics differ: one normalisation serves all cameras here; statistics of "
                f"{', '.join(with_stats)} of the cameras {', '.join(cameras)}"
            )
            return
        first, second = (torch.tensor(values, dtype=torch.float64) for values in next(iter(found)))
        if len(first) != 3 or len(second) != 3:
            problems.append(f"a camera's statistics have {len(first)} values, expected 3, one a colour")
            return
        mean, std = (first, second) if mode == "MEAN_STD" else ((first + second) / 2, (second - first) / 2)
        ours["normalization_mapping"]["VISUAL"] = "MEAN_STD"
        put(ours, f"{VISION}.image_mean", mean.tolist())
        put(ours, f"{VISION}.image_std", std.tolist())


def _channels(entry: Mapping[str, Any], name: str) -> list[float]:
    return torch.as_tensor(entry[name], dtype=torch.float64).flatten().tolist() if name in entry else []


def _note_constants(key: str, entry: Mapping[str, Any]) -> list[str]:
    low, high = (torch.as_tensor(entry.get(name, []), dtype=torch.float64) for name in ("min", "max"))
    if low.shape != high.shape:
        return []  # the policy's own check names it
    dimensions = constants(low, high).nonzero().flatten().tolist()
    if not dimensions:
        return []
    return [
        f"{key}: dimension {', '.join(map(str, dimensions))} never changed in the data; a value that differs from "
        "the constant is ignored here, and divided by almost nothing there"
    ]


def lerobot_fields(theirs: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    """[LeRobot's field, ours, value] of its config.json, as far as the two have one meaning."""
    return copy_fields(theirs, {}, LEROBOT | LEROBOT_OBJECTIVE[theirs["objective"]])
