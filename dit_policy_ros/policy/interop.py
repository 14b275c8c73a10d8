"""Other people's checkpoints: read LeRobot's and the original's, write LeRobot's.

    python -m dit_policy_ros.policy.interop SRC DST --to native|lerobot

Reads LeRobot's `multi_task_dit` (0.5 and 0.6) and brysonjones/multitask_dit_policy. SRC is a checkpoint's folder
or one above it, as training left it; averaged weights (`pretrained_model_ema`) are preferred. Only safetensors
are read, never a pickle.

A foreign checkpoint holds the weights of CLIP's towers but neither the tokenizer nor the towers' configuration:
these come from the folder or hub name it tells, or from `--clip=FOLDER`. If that has no configuration, it is
inferred from the tensors where that is exact.

What LeRobot's format has no place for (the embodiment, the tasks, the exact statistics) is written into a folder
`native/` beside it, which LeRobot does not read; converted back, it gives the same checkpoint.
"""

import argparse
import dataclasses
import json
import shutil
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import draccus
import torch
from rich.console import Console
from rich.table import Table
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from . import checkpoint as native
from . import interop_config, interop_names
from .checkpoint import CheckpointError
from .configuration import ClipTextConfig, DiffusionConfig, FlowMatchingConfig, PolicyConfig
from .interop_config import InteropError, Mapped, Normalization
from .modeling import MultitaskDiTPolicy

PREPROCESSOR, POSTPROCESSOR = "policy_preprocessor", "policy_postprocessor"
CLIP, NATIVE = "clip", "native"

# The width of a head is 64 in all CLIPs but the largest.
_HEADS_OF_WIDTH = {1280: 16, 1408: 16, 1664: 16}


@dataclass
class Options:
    """Choices of a conversion.

    clip: a local folder with CLIP's tokenizer (and its config.json, if at hand), instead of the name in the
    checkpoint. embodiment: the robot's description, which foreign checkpoints lack. sampler, steps: what an
    export to LeRobot samples with by default, instead of the checkpoint's choice. flat_names: write the tensor
    names of transformers 5.6 and later.
    """

    clip: str | None = None
    embodiment: Path | None = None
    sampler: str | None = None
    steps: int | None = None
    flat_names: bool = False
    overwrite: bool = False


@dataclass
class Summary:
    """What a conversion did. tensors: the number carried over; dropped: names of those left out."""

    source: str
    tensors: int
    dropped: list[str]
    fields: list[tuple[str, str, str]]
    notes: list[str] = field(default_factory=list)


def to_native(source: str | Path, target: str | Path, options: Options | None = None) -> Summary:
    """Writes a checkpoint of ours from LeRobot's or the original's. Raises InteropError, CheckpointError."""
    options = options or Options()
    folder, notes = find_checkpoint(Path(source))
    target = _free(Path(target), options)
    their_config = _read_json(folder / native.CONFIG)
    weights = _read_weights(folder)
    if their_config.get("type") == "multi_task_dit":
        kind = "LeRobot multi_task_dit"
        ours, dropped = interop_names.from_lerobot(weights)
    elif "observation_encoder" in their_config and "format_version" not in their_config:
        kind = "the original's"
        ours, dropped = interop_names.from_original(weights, bool(their_config["transformer"].get("use_rope")))
    else:
        raise InteropError(
            f"{folder} is neither a LeRobot multi_task_dit (config.json has type {their_config.get('type')!r}) nor a "
            "checkpoint of multitask_dit_policy"
        )
    if narrow := sorted({str(tensor.dtype) for tensor in ours.values() if tensor.dtype != torch.float32}):
        notes.append(f"weights of {', '.join(narrow)} became torch.float32, which is exact")
    ours = interop_names.as_float32(ours)
    mapped, tokenizer = _describe(folder, their_config, ours, options, notes)
    mapped.notes[:0] = notes
    policy = _policy_of(mapped, ours, tokenizer)
    if not mapped.config.observation_encoder.vision.use_post_layernorm and mapped.config.cameras:
        mapped.notes.append(
            "the vision tower's post_layernorm is kept but not applied: LeRobot reads the CLS before it"
        )
    embodiment = _embodiment(folder, mapped, options)
    card = _card(kind, folder, mapped)
    native.save_checkpoint(target, policy, embodiment, card)
    return Summary(f"{kind}, {folder}", len(weights) - len(dropped), dropped, mapped.fields, mapped.notes)


def to_lerobot(source: str | Path, target: str | Path, options: Options | None = None) -> Summary:
    """Writes a checkpoint of ours as LeRobot 0.6 loads it. Raises InteropError, CheckpointError."""
    options = options or Options()
    source = Path(source)
    policy = native.load_checkpoint(source)
    target = _free(Path(target), options)
    config = _with_sampler(policy.config, options)
    clip = str((target / CLIP).resolve())
    theirs, stats = interop_config.to_lerobot(config, policy.stats, clip)
    state = policy.state_dict()
    separate = config.observation_encoder.vision.use_separate_encoder_per_camera
    weights = interop_names.to_lerobot(state, separate, wrapped=not options.flat_names)
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{target.name}.", dir=target.parent) as name:
        partial = Path(name) / "checkpoint"
        partial.mkdir()
        save_file(weights, partial / native.WEIGHTS, metadata={"format": "pt"})
        _write_json(partial / native.CONFIG, theirs)
        _write_processors(partial, theirs, stats, clip)
        _write_clip(partial / CLIP, policy, config)
        _write_native(partial / NATIVE, source, config, policy.stats)
        native.replace_folder(target, partial)
    fields = interop_config.lerobot_fields(theirs)
    return Summary(f"native, {source}", len(weights), [], fields, _export_notes(config, clip))


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


def infer_vision(tower: Mapping[str, Tensor], activation: str) -> dict[str, Any]:
    """transformers' CLIPVisionConfig of a vision tower (our names), from its shapes and its activation's name.

    Exact but for the number of heads, which no shape tells: that of all published CLIPs of this width.
    """
    patches = tower["embeddings.patch_embedding.weight"]
    positions = tower["embeddings.position_embedding.weight"].shape[0] - 1
    side = round(positions**0.5)
    if side * side != positions:
        raise InteropError(f"{positions} positions of patches are no square: give --clip=FOLDER with a config.json")
    return _layers(tower) | {
        "model_type": "clip_vision_model",
        "hidden_act": activation,
        "image_size": side * patches.shape[-1],
        "patch_size": patches.shape[-1],
        "layer_norm_eps": 1e-5,
    }


def infer_text(tower: Mapping[str, Tensor], activation: str, tokenizer: Any) -> dict[str, Any]:
    """transformers' CLIPTextConfig of a text tower (our names), as `infer_vision`, with the tokenizer's tokens."""
    vocabulary = tower["embeddings.token_embedding.weight"].shape[0]
    return _layers(tower) | {
        "model_type": "clip_text_model",
        "hidden_act": activation,
        "vocab_size": vocabulary,
        "max_position_embeddings": tower["embeddings.position_embedding.weight"].shape[0],
        "layer_norm_eps": 1e-5,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }


def _layers(tower: Mapping[str, Tensor]) -> dict[str, Any]:
    intermediate, width = tower["encoder.layers.0.mlp.fc1.weight"].shape
    if width % 64 and width not in _HEADS_OF_WIDTH:
        raise InteropError(
            f"a CLIP tower of width {width} is none that is published, so its number of heads is unknown: give "
            "--clip=FOLDER with a config.json"
        )
    return {
        "hidden_size": width,
        "intermediate_size": intermediate,
        "num_hidden_layers": interop_names.count_layers(tower),
        "num_attention_heads": _HEADS_OF_WIDTH.get(width, width // 64),
    }


def _describe(
    folder: Path, theirs: dict[str, Any], weights: dict[str, Tensor], options: Options, notes: list[str]
) -> tuple[Mapped, Any]:
    """Their configuration in our words, and the tokenizer."""
    if (restored := _restored(folder, theirs)) is not None:
        return restored, native.load_tokenizer(folder / CLIP)
    is_lerobot = theirs.get("type") == "multi_task_dit"
    if is_lerobot:
        text_name, vision_name = theirs["text_encoder_name"], theirs["vision_encoder_name"]
        normalization = _lerobot_normalization(folder)
    else:
        encoder = theirs["observation_encoder"]
        text_name, vision_name = encoder["text"]["model"], encoder["vision"]["backbone"]
        normalization = Normalization(theirs.get("normalization_mapping", {}), _read_stats(folder))
    text_name = options.clip or text_name
    tokenizer = _tokenizer(text_name)
    text = _stored_architecture(text_name, "text")
    if text is None:
        text = infer_text(interop_names.text_tower(weights), _activation(text_name), tokenizer)
        notes.append("the text tower's configuration is inferred from its tensors (heads of width 64)")
    vision = None
    if tower := interop_names.vision_tower(weights):
        vision = _stored_architecture(options.clip or vision_name, "vision") if is_lerobot else None
        if vision is None:
            activation = _activation(vision_name) if is_lerobot else _timm_activation(vision_name)
            vision = infer_vision(tower, activation)
            notes.append(
                f"the vision tower's configuration is inferred from its tensors (heads of width 64, {activation})"
            )
    read = interop_config.from_lerobot if is_lerobot else interop_config.from_original
    return read(theirs, normalization, vision, text), tokenizer


def _restored(folder: Path, theirs: dict[str, Any]) -> Mapped | None:
    """The configuration and statistics that this program left beside its export, if the export is unchanged."""
    aside = folder / NATIVE
    if not (aside / native.CONFIG).exists():
        return None
    config, stats = native.load_config(aside), _read_json(aside / native.STATS)
    exported, expected_stats = interop_config.to_lerobot(config, stats, theirs["text_encoder_name"])
    expected = json.loads(json.dumps(exported))
    given = _lerobot_normalization(folder).stats
    same = expected == theirs and given.keys() == expected_stats.keys()
    if not same or any(not _same_stats(given[key], expected_stats[key]) for key in given):
        raise InteropError(
            f"{folder} was exported from a checkpoint whose description, {aside}, does not fit it any more: "
            "its configuration or its statistics were changed; delete that folder to read what LeRobot reads"
        )
    fields = interop_config.lerobot_fields(theirs)
    return Mapped(
        config, stats, fields, [f"exported by this program: configuration and statistics are those of {aside}"]
    )


def _same_stats(given: Mapping[str, Any], expected: Mapping[str, Any]) -> bool:
    return given.keys() == expected.keys() and all(
        torch.equal(torch.as_tensor(given[name], dtype=torch.float32), torch.as_tensor(value, dtype=torch.float32))
        for name, value in expected.items()
    )


def _policy_of(mapped: Mapped, weights: dict[str, Tensor], tokenizer: Any) -> MultitaskDiTPolicy:
    """A policy with these weights, or an InteropError that names every tensor that does not fit."""
    try:
        with torch.device("meta"):
            policy = MultitaskDiTPolicy(mapped.config, mapped.stats, tokenizer)
    except ValueError as error:
        raise InteropError(f"this policy cannot be built: {error}") from error
    expected = policy.state_dict()
    problems = [f"missing: {name}" for name in sorted(expected.keys() - weights.keys())]
    problems += [f"unexpected: {name}" for name in sorted(weights.keys() - expected.keys())]
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


def _read_weights(folder: Path) -> dict[str, Tensor]:
    path = folder / native.WEIGHTS
    if not path.exists():
        pickles = sorted(file.name for file in folder.iterdir() if file.suffix in native.PICKLE_SUFFIXES)
        also = f"; {', '.join(pickles)} may be a pickle, which can run any code when read, and is never read" * bool(
            pickles
        )
        raise InteropError(f"{folder} lacks {native.WEIGHTS}{also}")
    native.refuse_pickle(path)
    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise InteropError(f"{path} cannot be read ({error}): the file is damaged, copy it again") from error


def _lerobot_normalization(folder: Path) -> Normalization:
    """What LeRobot's processors do, from their files. Raises InteropError for steps this reader does not know."""
    pre, post = (_read_json(folder / f"{name}.json") for name in (PREPROCESSOR, POSTPROCESSOR))
    known = {"rename_observations_processor", "to_batch_processor", "tokenizer_processor", "device_processor"}
    known |= {"normalizer_processor", "unnormalizer_processor"}
    problems = []
    normalizers = []
    for step in [*pre["steps"], *post["steps"]]:
        name, settings = step.get("registry_name") or step.get("class"), step.get("config", {})
        if name not in known:
            problems.append(f"a processing step {name}, which this reader does not know")
        if name == "rename_observations_processor" and settings.get("rename_map"):
            problems.append(f"rename_map {settings['rename_map']}: give the dataset's names to the features instead")
        if settings.get("normalize_observation_keys") is not None:
            problems.append("normalize_observation_keys: some features are not normalised as their kind is")
        if name in ("normalizer_processor", "unnormalizer_processor"):
            normalizers.append((settings.get("norm_map", {}), _state(folder, step)))
    if len(normalizers) != 2:
        problems.append(f"expected one normalizer_processor and one unnormalizer_processor, found {len(normalizers)}")
    if problems:
        raise InteropError(f"the processors of {folder} cannot be expressed here:\n  - " + "\n  - ".join(problems))
    (modes, stats), (out_modes, out_stats) = normalizers
    if modes.get("ACTION") != out_modes.get("ACTION") or not _same_stats(
        stats.get("action", {}), out_stats.get("action", {})
    ):
        raise InteropError(f"{folder}: actions are normalised in one way and un-normalised in another")
    return Normalization(modes, stats)


def _state(folder: Path, step: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """A normalising step's statistics by feature key."""
    stats: dict[str, dict[str, Any]] = {}
    if step.get("state_file"):
        path = folder / step["state_file"]
        if not path.exists():
            raise InteropError(f"{folder} lacks {path.name}, the statistics that its processors normalise with")
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118
                key, statistic = name.rsplit(".", 1)
                stats.setdefault(key, {})[statistic] = file.get_tensor(name).tolist()
    return stats


def _read_stats(folder: Path) -> dict[str, dict[str, Any]]:
    stats = _read_json(folder / native.STATS)
    if not isinstance(stats, dict):
        raise InteropError(f"{folder / native.STATS} holds no statistics by feature key")
    return stats


def _tokenizer(name: str) -> Any:
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise InteropError(
            f"no tokenizer from {name!r}: the checkpoint names it but does not hold it. With a network it comes from "
            f"the hub; without, give --clip=FOLDER, a local copy of that model's tokenizer files. ({error})"
        ) from error


def _stored_architecture(name: str, part: str) -> dict[str, Any] | None:
    """The configuration of a tower ("text" or "vision") in a folder or on the hub; None if there is none."""
    import transformers

    config_class = transformers.CLIPTextConfig if part == "text" else transformers.CLIPVisionConfig
    path = Path(name) / native.CONFIG
    if Path(name).is_dir():
        stored = _read_json(path) if path.exists() else {}
        if f"{part}_config" not in stored and stored.get("model_type") != f"clip_{part}_model":
            return None
    try:
        entries = json.loads(config_class.from_pretrained(name).to_json_string(use_diff=False))
    except OSError:
        return None
    return {key: value for key, value in entries.items() if key not in ("_name_or_path", "transformers_version")}


def _activation(name: str) -> str:
    """OpenAI's CLIPs have QuickGELU; of others no tensor tells."""
    if name.startswith("openai/"):
        return "quick_gelu"
    raise InteropError(
        f"which activation {name!r} has cannot be told from its tensors (GELU or QuickGELU): give --clip=FOLDER with "
        "the config.json of that model"
    )


def _timm_activation(name: str) -> str:
    return "quick_gelu" if "quickgelu" in name else "gelu"


def _embodiment(folder: Path, mapped: Mapped, options: Options) -> str:
    if options.embodiment is not None:
        return options.embodiment.read_text(encoding="utf-8")
    if (folder / NATIVE / native.EMBODIMENT).exists():
        return (folder / NATIVE / native.EMBODIMENT).read_text(encoding="utf-8")
    mapped.notes.append(
        f"{native.EMBODIMENT} is a form to fill in: the checkpoint does not say what robot it was trained on, and the "
        "node refuses the form until every TODO has its value (or give --embodiment=FILE)"
    )
    return embodiment_form(mapped.config)


def embodiment_form(config: PolicyConfig) -> str:
    """An embodiment.yaml with what the features tell, and TODO, which no reader accepts, for all else."""
    lines = [
        "# Made from a checkpoint that does not say what robot it was trained on.",
        "# Replace each TODO; config/embodiments/ of dit_policy_ros has an example with comments.",
        "name: 'TODO: name'",
        "fps: TODO",
        "instruction: {topic: 'TODO: topic'}",
        "cameras:",
    ]
    for key, (height, width) in config.cameras.items():
        name = key.removeprefix("observation.images.")
        lines.append(
            f"  {name}: {{topic: 'TODO: topic', transport: TODO, width: {width}, height: {height}, max_age: TODO}}"
        )
    lines += [
        f"state: {{topic: 'TODO: topic', joints: TODO, max_age: TODO}}  # {config.state_dim} joints",
        f"action_groups: TODO  # {config.action_dim} joints in all",
    ]
    return "\n".join(lines) + "\n"


def _card(kind: str, folder: Path, mapped: Mapped) -> str:
    aside = folder / NATIVE / native.MODEL_CARD
    if aside.exists():
        return aside.read_text(encoding="utf-8")
    notes = "".join(f"- {note}\n" for note in mapped.notes)
    return f"# Converted policy\n\nFrom {kind} ({folder.name}) by dit_policy_ros.policy.interop.\n\n{notes}"


def _with_sampler(config: PolicyConfig, options: Options) -> PolicyConfig:
    """The configuration with the sampler chosen for the export."""
    if options.sampler is None and options.steps is None:
        return config
    objective: Any = config.objective
    changes: dict[str, Any] = {"sampler": options.sampler or objective.sampler}
    changes["denoising_steps"] = options.steps or objective.denoising_steps
    if isinstance(objective, DiffusionConfig):
        changes["timestep_spacing"] = "leading"
    changed = dataclasses.replace(config, objective=dataclasses.replace(objective, **changes))
    changed.validate()
    return changed


def _export_notes(config: PolicyConfig, clip: str) -> list[str]:
    vision: Any = config.observation_encoder.vision
    objective = config.objective
    kept = {
        "tasks": bool(config.tasks),
        "state_noise": config.state_noise > 0,
        "vision.random_shift": vision.random_shift > 0,
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
    _write_json(folder / f"{PREPROCESSOR}.json", {"name": PREPROCESSOR, "steps": before})
    _write_json(folder / f"{POSTPROCESSOR}.json", {"name": POSTPROCESSOR, "steps": after})
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
    towers = {f"text_model.{name}": tensor for name, tensor in interop_names.text_tower(state).items()}
    settings: dict[str, Any] = {"text_config": text.model_config}
    if config.cameras:
        towers |= {f"vision_model.{name}": tensor for name, tensor in interop_names.vision_tower(state).items()}
        settings["vision_config"] = vision.backbone_config
    folder.mkdir()
    transformers.CLIPConfig(**settings).save_pretrained(folder)
    save_file(towers, folder / native.WEIGHTS, metadata={"format": "pt"})
    policy.observation_encoder.text_encoder.tokenizer.save_pretrained(folder)  # type: ignore[union-attr]


def _write_native(folder: Path, source: Path, config: PolicyConfig, stats: dict[str, dict[str, Any]]) -> None:
    """What LeRobot's format has no place for."""
    folder.mkdir()
    _write_json(folder / native.CONFIG, {"format_version": native.FORMAT_VERSION} | draccus.encode(config))
    _write_json(folder / native.STATS, stats)
    for name in (native.EMBODIMENT, native.MODEL_CARD):
        if (source / name).exists():
            shutil.copyfile(source / name, folder / name)


def _free(target: Path, options: Options) -> Path:
    if target.exists() and not options.overwrite:
        raise InteropError(f"{target} exists: name another folder, or say --overwrite")
    return target


def _read_json(path: Path) -> Any:
    try:
        return native.read_json(path)
    except CheckpointError as error:
        raise InteropError(str(error)) from error


def _write_json(path: Path, content: Any) -> None:
    path.write_text(json.dumps(content, indent=4) + "\n", encoding="utf-8")


def print_summary(summary: Summary, console: Console) -> None:
    """The summary as tables."""
    console.print(f"[bold]from[/bold] {summary.source}")
    console.print(f"[bold]tensors[/bold] {summary.tensors} carried over, {len(summary.dropped)} left out")
    for name in summary.dropped:
        console.print(f"  left out: {name} (a table of positions, which is no weight)")
    table = Table()
    for heading in ("their field", "our field", "value"):
        table.add_column(heading, overflow="fold")
    for row in summary.fields:
        table.add_row(*row)
    console.print(table)
    for note in summary.notes:
        console.print(f"- {note}", highlight=False, soft_wrap=True)


def main(arguments: list[str] | None = None) -> int:
    """The command line; returns its exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m dit_policy_ros.policy.interop", description=(__doc__ or "").split("\n\n")[0]
    )
    parser.add_argument("source", metavar="SRC", type=Path, help="a checkpoint's folder")
    parser.add_argument("target", metavar="DST", type=Path, help="the folder to write")
    parser.add_argument("--to", required=True, choices=["native", "lerobot"], help="the format of DST")
    parser.add_argument("--clip", help="local folder with CLIP's tokenizer (and config.json), for --to native")
    parser.add_argument("--embodiment", type=Path, help="the robot's YAML file, for --to native")
    parser.add_argument("--sampler", help="the export's default sampler, for --to lerobot: ddpm, ddim, euler, rk4")
    parser.add_argument("--steps", type=int, help="the export's default number of steps, for --to lerobot")
    parser.add_argument(
        "--flat-names", action="store_true", help="tensor names of transformers 5.6 and later, for --to lerobot"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace DST if it exists")
    given = vars(parser.parse_args(arguments))
    source, target, to = (given.pop(name) for name in ("source", "target", "to"))
    try:
        summary = (to_native if to == "native" else to_lerobot)(source, target, Options(**given))
    except (InteropError, CheckpointError) as error:
        print(f"not converted: {error}", file=sys.stderr)
        return 1
    print_summary(summary, Console())
    return 0


if __name__ == "__main__":
    sys.exit(main())
