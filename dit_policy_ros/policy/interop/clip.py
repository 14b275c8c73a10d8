"""CLIP's towers and tokenizer, of which a foreign checkpoint holds the weights but not the descriptions."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from ..checkpoint import CONFIG
from ..towers import TokenizerError, describe, load_tokenizer
from . import tensor_names
from .fields import InteropError
from .folder import read_object

# The width of a head is 64 in all CLIPs but the largest.
_HEADS_OF_WIDTH = {1280: 16, 1408: 16, 1664: 16}


def clip_tokenizer(name: str) -> Any:
    """The tokenizer of a name or folder. Raises InteropError."""
    try:
        return load_tokenizer(name)
    except TokenizerError as error:
        raise InteropError(
            f"no tokenizer from {name!r}: the checkpoint names it but does not hold it. With a network it comes from "
            f"the hub; without, give --clip=FOLDER, a local copy of that model's tokenizer files. ({error})"
        ) from error


def infer_vision(tower: Mapping[str, Tensor], activation: str) -> dict[str, Any]:
    """transformers' CLIPVisionConfig of a vision tower (our names), from its shapes and its activation's name.

    Exact but for the number of heads, which no shape tells: that of all published CLIPs of this width.
    """
    patches = _tensor(tower, "embeddings.patch_embedding.weight", 4)
    positions = _tensor(tower, "embeddings.position_embedding.weight", 2).shape[0] - 1
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
    return _layers(tower) | {
        "model_type": "clip_text_model",
        "hidden_act": activation,
        "vocab_size": _tensor(tower, "embeddings.token_embedding.weight", 2).shape[0],
        "max_position_embeddings": _tensor(tower, "embeddings.position_embedding.weight", 2).shape[0],
        "layer_norm_eps": 1e-5,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }


def _layers(tower: Mapping[str, Tensor]) -> dict[str, Any]:
    intermediate, width = _tensor(tower, "encoder.layers.0.mlp.fc1.weight", 2).shape
    if width % 64 and width not in _HEADS_OF_WIDTH:
        raise InteropError(
            f"a CLIP tower of width {width} is none that is published, so its number of heads is unknown: give "
            "--clip=FOLDER with a config.json"
        )
    return {
        "hidden_size": width,
        "intermediate_size": intermediate,
        "num_hidden_layers": tensor_names.count_layers(tower),
        "num_attention_heads": _HEADS_OF_WIDTH.get(width, width // 64),
    }


def _tensor(tower: Mapping[str, Tensor], name: str, dims: int) -> Tensor:
    if name not in tower or tower[name].dim() != dims:
        found = tuple(tower[name].shape) if name in tower else "missing"
        raise InteropError(f"the weights are not those of a CLIP: {name} is {found}, expected {dims} dimensions")
    return tower[name]


def stored_architecture(name: str, part: str) -> dict[str, Any] | None:
    """The configuration of a tower ("text" or "vision") in a folder or on the hub; None if there is none."""
    import transformers

    config_class = transformers.CLIPTextConfig if part == "text" else transformers.CLIPVisionConfig
    path = Path(name) / CONFIG
    if Path(name).is_dir():
        stored = read_object(path) if path.exists() else {}
        if f"{part}_config" not in stored and stored.get("model_type") != f"clip_{part}_model":
            return None
    try:
        return describe(config_class.from_pretrained(name))
    except OSError:
        return None


def activation_of(name: str) -> str:
    """OpenAI's CLIPs have QuickGELU; of others no tensor tells."""
    if name.startswith("openai/"):
        return "quick_gelu"
    raise InteropError(
        f"which activation {name!r} has cannot be told from its tensors (GELU or QuickGELU): give --clip=FOLDER with "
        "the config.json of that model"
    )


def timm_activation(name: str) -> str:
    """timm tells it by the name of the model."""
    return "quick_gelu" if "quickgelu" in name else "gelu"
