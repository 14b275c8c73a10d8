"""Tensor names of one model in three dialects: ours, LeRobot's and the original's.

Ours are LeRobot's but for three things. Hugging Face's towers have no wrapper (`text_model`, `vision_model`), as
from transformers 5.6 on; the vision encoders are a list also where there is one for all cameras; the original's
vision tower has timm's names, with query, key and value in one tensor.
"""

import re
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

VISION, TEXT = "observation_encoder.vision_encoders.", "observation_encoder.text_encoder.text_encoder."

_OURS_OF_TIMM = [
    (r"cls_token", "embeddings.class_embedding"),
    (r"pos_embed", "embeddings.position_embedding.weight"),
    (r"patch_embed\.proj\.weight", "embeddings.patch_embedding.weight"),
    (r"norm_pre\.(weight|bias)", r"pre_layrnorm.\1"),
    (r"norm\.(weight|bias)", r"post_layernorm.\1"),
    (r"blocks\.(\d+)\.norm([12])\.(weight|bias)", r"encoder.layers.\1.layer_norm\2.\3"),
    (r"blocks\.(\d+)\.attn\.proj\.(weight|bias)", r"encoder.layers.\1.self_attn.out_proj.\2"),
    (r"blocks\.(\d+)\.mlp\.fc([12])\.(weight|bias)", r"encoder.layers.\1.mlp.fc\2.\3"),
]


def from_lerobot(weights: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], list[str]]:
    """LeRobot's tensors (0.5 or 0.6, any transformers) under our names, and the names of those left out.

    Left out are only tables of positions that transformers before 4.31 stored with the weights.
    """
    ours, dropped = {}, []
    for name, tensor in weights.items():
        if name.endswith("embeddings.position_ids"):
            dropped.append(name)
        else:
            ours[_one_list_of_encoders(without_wrapper(name))] = tensor
    return ours, dropped


def to_lerobot(weights: Mapping[str, Tensor], separate: bool, wrapped: bool) -> dict[str, Tensor]:
    """Our tensors under LeRobot's names.

    separate: one vision encoder a camera. wrapped: transformers up to 5.5 will load them.
    """
    theirs = {}
    for name, tensor in weights.items():
        if wrapped:
            name = name.replace(TEXT, TEXT + "text_model.", 1)
            name = re.sub(rf"^({re.escape(VISION)}\d+\.model\.)", r"\1vision_model.", name)
        if not separate:
            name = name.replace(VISION + "0.", "observation_encoder.vision_encoder.", 1)
        theirs[name] = tensor
    return theirs


def from_original(weights: Mapping[str, Tensor], use_rope: bool) -> tuple[dict[str, Tensor], list[str]]:
    """The original's tensors under our names, and the names of those left out, as for `from_lerobot`."""
    ours, dropped = {}, []
    for name, tensor in weights.items():
        if name.endswith("embeddings.position_ids"):
            dropped.append(name)
            continue
        name = _one_list_of_encoders(without_wrapper(name))
        if not use_rope:
            # One attribute, `attn`, holds either kind of attention there.
            name = re.sub(r"^(noise_predictor\.transformer_blocks\.\d+)\.attn\.", r"\1.multihead_attn.", name)
        if match := re.fullmatch(rf"({re.escape(VISION)}\d+\.model\.)(.+)", name):
            for inner, part in _from_timm(match[2], tensor):
                ours[match[1] + inner] = part
        else:
            ours[name] = tensor
    return ours, dropped


def vision_tower(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The first vision tower of a policy's tensors (our names), without its prefix; empty if there is none."""
    return below(weights, VISION + "0.model.")


def text_tower(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The text tower of a policy's tensors (our names), without its prefix."""
    return below(weights, TEXT)


def below(weights: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The tensors whose names begin with a prefix, without it."""
    return {name.removeprefix(prefix): tensor for name, tensor in weights.items() if name.startswith(prefix)}


def count_layers(names: Iterable[str]) -> int:
    """The number of layers of a tower with these tensors (our names)."""
    return len({match[1] for name in names if (match := re.match(r"encoder\.layers\.(\d+)\.", name))})


def without_wrapper(name: str) -> str:
    """A name without the wrapper around CLIP's towers that transformers 5.6 removed."""
    return re.sub(
        r"(text_encoder\.text_encoder|vision_encoders?(?:\.\d+)?\.model)\.(text|vision)_model\.", r"\1.", name
    )


def _one_list_of_encoders(name: str) -> str:
    return name.replace("observation_encoder.vision_encoder.", VISION + "0.", 1)


def _from_timm(name: str, tensor: Tensor) -> list[tuple[str, Tensor]]:
    """One tensor of timm's VisionTransformer as one or three of Hugging Face's CLIP vision tower."""
    if match := re.fullmatch(r"blocks\.(\d+)\.attn\.qkv\.(weight|bias)", name):
        parts = zip("qkv", tensor.chunk(3), strict=True)
        return [(f"encoder.layers.{match[1]}.self_attn.{which}_proj.{match[2]}", part) for which, part in parts]
    for pattern, replacement in _OURS_OF_TIMM:
        if re.fullmatch(pattern, name):
            tensor = tensor.flatten() if name == "cls_token" else tensor
            return [(re.sub(pattern, replacement, name), tensor.squeeze(0) if name == "pos_embed" else tensor)]
    return [(name, tensor)]  # unknown: the comparison with the model names it


def as_float32(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors in float32; exact for the narrower types."""
    return {name: tensor.to(torch.float32).contiguous() for name, tensor in weights.items()}
