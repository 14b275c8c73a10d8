"""LeRobot's and the original's checkpoints in our format."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .. import checkpoint as native
from ..modeling import MultitaskDiTPolicy
from ..towers import TokenizerError, load_tokenizer
from . import configurations, tensor_names
from .clip import (
    activation_of,
    clip_tokenizer,
    infer_text,
    infer_vision,
    stored_architecture,
    timm_activation,
)
from .configurations import Mapped, Normalization
from .fields import InteropError, complete_lerobot, flatten_original
from .folder import find_checkpoint, read_object, read_processors, read_stats, read_weights, same_stats
from .form import embodiment_form
from .options import Options, Summary
from .write import CLIP, NATIVE


@dataclass
class _Foreign:
    """A foreign checkpoint: its folder and config.json, its weights under our names.

    tensors: how many of its own these are. dropped: the names of those left out.
    """

    kind: str
    folder: Path
    config: dict[str, Any]
    tensors: int
    weights: dict[str, Tensor]
    dropped: list[str]

    @property
    def is_lerobot(self) -> bool:
        return self.config.get("type") == "multi_task_dit"


def to_native(source: str | Path, target: str | Path, options: Options | None = None) -> Summary:
    """Writes a checkpoint of ours from LeRobot's or the original's. Raises InteropError, CheckpointError."""
    options, target = options or Options(), Path(target)
    options.check("native", target)
    folder, notes = find_checkpoint(Path(source))
    foreign = _read(folder)
    if narrow := sorted({str(tensor.dtype) for tensor in foreign.weights.values() if tensor.dtype != torch.float32}):
        notes.append(f"weights of {', '.join(narrow)} became torch.float32, which is exact")
    foreign.weights = tensor_names.as_float32(foreign.weights)
    mapped, tokenizer = _describe(foreign, options, notes)
    mapped.notes[:0] = notes
    policy = _policy_of(mapped, foreign.weights, tokenizer)
    if not mapped.config.observation_encoder.vision.use_post_layernorm and mapped.config.cameras:
        mapped.notes.append(
            "the vision tower's post_layernorm is kept but not applied: LeRobot reads the CLS before it"
        )
    embodiment = _embodiment(folder, mapped, options)
    native.save_checkpoint(target, policy, embodiment, _card(foreign.kind, folder, mapped))
    tensors = foreign.tensors - len(foreign.dropped)
    return Summary(f"{foreign.kind}, {folder}", tensors, foreign.dropped, mapped.fields, mapped.notes)


def _read(folder: Path) -> _Foreign:
    config = read_object(folder / native.CONFIG)
    if config.get("type") == "multi_task_dit":
        weights = read_weights(folder)
        return _Foreign("LeRobot multi_task_dit", folder, config, len(weights), *tensor_names.from_lerobot(weights))
    if "observation_encoder" in config and "format_version" not in config:
        use_rope = bool(flatten_original(config)["transformer.use_rope"])
        weights = read_weights(folder)
        return _Foreign("the original's", folder, config, len(weights), *tensor_names.from_original(weights, use_rope))
    raise InteropError(
        f"{folder} is neither a LeRobot multi_task_dit (config.json has type {config.get('type')!r}) nor a "
        "checkpoint of multitask_dit_policy"
    )


def _describe(foreign: _Foreign, options: Options, notes: list[str]) -> tuple[Mapped, Any]:
    """Their configuration in our words, and the tokenizer."""
    if (foreign.folder / NATIVE / native.CONFIG).exists():
        return _restored(foreign)
    return (_describe_lerobot if foreign.is_lerobot else _describe_original)(foreign, options, notes)


def _describe_lerobot(foreign: _Foreign, options: Options, notes: list[str]) -> tuple[Mapped, Any]:
    theirs = complete_lerobot(foreign.config)
    processors = read_processors(foreign.folder)
    text_name, vision_name = (options.clip or theirs[f"{part}_encoder_name"] for part in ("text", "vision"))
    tokenizer = clip_tokenizer(text_name)
    text = _text_architecture(text_name, foreign.weights, tokenizer, notes)
    _limit_tokens(tokenizer, theirs, processors.tokenizer, text["max_position_embeddings"], notes)
    vision = None
    if tower := tensor_names.vision_tower(foreign.weights):
        vision = stored_architecture(vision_name, "vision")
        if vision is None:
            vision = _infer_vision(tower, activation_of(theirs["vision_encoder_name"]), notes)
    return configurations.from_lerobot(theirs, processors.normalization, vision, text), tokenizer


def _describe_original(foreign: _Foreign, options: Options, notes: list[str]) -> tuple[Mapped, Any]:
    theirs = flatten_original(foreign.config)
    normalization = Normalization(foreign.config["normalization_mapping"], read_stats(foreign.folder))
    text_name = options.clip or theirs["observation_encoder.text.model"]
    tokenizer = clip_tokenizer(text_name)
    text = _text_architecture(text_name, foreign.weights, tokenizer, notes)
    vision = None
    if tower := tensor_names.vision_tower(foreign.weights):
        vision = _infer_vision(tower, timm_activation(theirs["observation_encoder.vision.backbone"]), notes)
    return configurations.from_original(foreign.config, normalization, vision, text), tokenizer


def _text_architecture(name: str, weights: dict[str, Tensor], tokenizer: Any, notes: list[str]) -> dict[str, Any]:
    text = stored_architecture(name, "text")
    if text is None:
        text = infer_text(tensor_names.text_tower(weights), activation_of(name), tokenizer)
        notes.append("the text tower's configuration is inferred from its tensors (heads of width 64)")
    return text


def _infer_vision(tower: dict[str, Tensor], activation: str, notes: list[str]) -> dict[str, Any]:
    notes.append(f"the vision tower's configuration is inferred from its tensors (heads of width 64, {activation})")
    return infer_vision(tower, activation)


def _limit_tokens(
    tokenizer: Any, theirs: dict[str, Any], step: dict[str, Any], positions: int, notes: list[str]
) -> None:
    """Makes the tokenizer cut instructions where LeRobot's processor does, or raises InteropError.

    theirs: the whole config.json; step: the processor's own settings; positions: what the text tower can read.
    """
    problems = [
        f"tokenizer_{name} {theirs[f'tokenizer_{name}']} in config.json but {step[name]} in policy_preprocessor.json: "
        "make them the same, it cannot be told which one the policy was trained with"
        for name in ("max_length", "padding_side", "truncation")
        if step[name] != theirs[f"tokenizer_{name}"]
    ]
    limit, pads = theirs["tokenizer_max_length"], theirs["tokenizer_padding"] == "max_length"
    if limit < 2 or (pads and limit > positions):
        problems.append(f"tokenizer_max_length {limit}: expected 2 to {positions}, the positions of the text tower")
    if problems:
        raise InteropError("this policy cannot be expressed here:\n  - " + "\n  - ".join(problems))
    if theirs["tokenizer_truncation"]:
        tokenizer.model_max_length = limit
        if limit < positions:
            notes.append(f"instructions are cut after {limit} tokens, as there (kept in the tokenizer's files)")
    else:
        tokenizer.model_max_length = positions
        notes.append(f"instructions of more than {positions} tokens are cut here, with a warning; there they fail")


def _restored(foreign: _Foreign) -> tuple[Mapped, Any]:
    """The configuration, statistics and tokenizer that this program left with its export, if that is unchanged."""
    folder, theirs = foreign.folder, complete_lerobot(foreign.config)
    aside = folder / NATIVE
    config, stats = native.load_config(aside), read_object(aside / native.STATS)
    try:
        tokenizer = load_tokenizer(folder / CLIP, local_only=True)
    except TokenizerError as error:
        raise InteropError(str(error)) from error
    processors = read_processors(folder)
    limit = processors.tokenizer["max_length"]
    exported, expected = configurations.to_lerobot(config, stats, theirs["text_encoder_name"], limit)
    given = processors.normalization.stats
    same = json.loads(json.dumps(exported)) == foreign.config and given.keys() == expected.keys()
    text: Any = config.observation_encoder.text
    same = same and limit == min(tokenizer.model_max_length, text.model_config["max_position_embeddings"])
    if not same or any(not same_stats(given[key], expected[key]) for key in given):
        raise InteropError(
            f"{folder} was exported from a checkpoint whose description, {aside}, does not fit it any more: "
            "its configuration or its statistics were changed; delete that folder to read what LeRobot reads"
        )
    note = f"exported by this program: configuration and statistics are those of {aside}"
    return Mapped(config, stats, configurations.lerobot_fields(theirs), [note]), tokenizer


def _policy_of(mapped: Mapped, weights: dict[str, Tensor], tokenizer: Any) -> MultitaskDiTPolicy:
    """A policy with these weights, or an InteropError that names every tensor that does not fit."""
    try:
        with torch.device("meta"):
            policy = MultitaskDiTPolicy(mapped.config, mapped.stats, tokenizer)
    except ValueError as error:
        raise InteropError(f"this policy cannot be built: {error}") from error
    expected = policy.state_dict()
    problems = native.name_problems(weights.keys(), expected.keys())
    for name in sorted(expected.keys() & weights.keys()):
        if expected[name].shape != weights[name].shape:
            problems.append(f"{name}: {tuple(weights[name].shape)}, expected {tuple(expected[name].shape)}")
        elif not native.is_finite(weights[name]):
            problems.append(f"not finite: {name}")
    if problems:
        raise InteropError(
            "the weights are not those of this configuration (names are this package's):\n  - "
            + "\n  - ".join(problems)
        )
    policy.load_state_dict(weights, strict=True, assign=True)
    policy.reset_buffers("cpu")
    return policy.eval()


def _embodiment(folder: Path, mapped: Mapped, options: Options) -> str:
    if options.embodiment is not None:
        try:
            return options.embodiment.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise InteropError(f"cannot read --embodiment={options.embodiment}: {error}") from error
    if (folder / NATIVE / native.EMBODIMENT).exists():
        return (folder / NATIVE / native.EMBODIMENT).read_text(encoding="utf-8")
    mapped.notes.append(
        f"{native.EMBODIMENT} is a form to fill in: the checkpoint does not say what robot it was trained on, and the "
        "node refuses the form until every TODO has its value (or give --embodiment=FILE)"
    )
    return embodiment_form(mapped.config)


def _card(kind: str, folder: Path, mapped: Mapped) -> str:
    aside = folder / NATIVE / native.MODEL_CARD
    if aside.exists():
        return aside.read_text(encoding="utf-8")
    notes = "".join(f"- {note}\n" for note in mapped.notes)
    return f"# Converted policy\n\nFrom {kind} ({folder.name}) by dit_policy_ros.policy.interop.\n\n{notes}"
