"""Towers: the transformers of Hugging Face that pictures and words go through.

Their classes are imported where one is built, because transformers costs more to import than everything else
here together, and a policy without such a tower needs none of it.
"""

import json
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .configuration import ConfigurationError


class TokenizerError(ValueError):
    """No tokenizer can be read from a name or folder."""


def load_tokenizer(name: str | Path, local_only: bool = False) -> Any:
    """The tokenizer in a folder or, unless local_only, of that name on the hub. Raises TokenizerError."""
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(name, local_files_only=local_only)
    except Exception as error:  # which depends on the file that is damaged: the tokenizers' own have no common base
        raise TokenizerError(f"no tokenizer that transformers can read from {str(name)!r}: {error}") from error


def describe(architecture: Any) -> dict[str, Any]:
    """transformers' configuration of a tower as JSON, from which it can be built.

    Defaults are included, because they may differ in another version of transformers; names and versions are not.
    """
    entries = json.loads(architecture.to_json_string(use_diff=False))
    return {key: value for key, value in entries.items() if key not in ("_name_or_path", "transformers_version")}


def load_tower(kind: str, name: str, config: dict[str, Any] | None) -> Any:
    """A tower from a configuration (random weights), or else from a local folder or hub name (its weights).

    kind is transformers' name of the model without its last word: "CLIPText" for CLIPTextModel and
    CLIPTextConfig. Raises ConfigurationError where there is no such model, or it lacks weights.
    """
    import transformers

    model_class, config_class = getattr(transformers, kind + "Model"), getattr(transformers, kind + "Config")
    if config is not None:
        model = model_class(config_class.from_dict(config))
    else:
        try:
            model, report = model_class.from_pretrained(name, dtype=torch.float32, output_loading_info=True)
        except OSError as error:
            raise ConfigurationError(
                f"cannot load {model_class.__name__} from {name!r}: give a local folder with config.json and weights, "
                f"or the name of a model on the Hugging Face hub (needs network). {error}"
            ) from error
        if report["missing_keys"]:
            raise ConfigurationError(f"{name!r} lacks weights of {model_class.__name__}: {report['missing_keys']}")
        # Out of the file's mapping, where they lie anyhow: a product's last bits depend on the alignment of its
        # operands, and a checkpoint's are aligned. Training goes on from one as if it had not stopped.
        for tensor in (*model.parameters(), *model.buffers()):
            tensor.data = tensor.data.clone()
    # Up to transformers 5.5 CLIP's towers sit in a wrapper that 5.6 removes: without it, tensor names are the
    # same in both.
    return getattr(model, "text_model", getattr(model, "vision_model", model))


def reset_tower_buffers(tower: nn.Module, device: torch.device | str) -> None:
    """Makes the tables that a tower does not store in its state_dict anew, on a device.

    A tower built on the meta device has none, and no checkpoint brings them. Raises NotImplementedError for a
    table that this version of transformers has and this function does not know.
    """
    for name, module in tower.named_modules():
        for key in sorted(module._non_persistent_buffers_set):
            module.register_buffer(key, _tower_table(module, key, f"{name}.{key}").to(device), persistent=False)


def _tower_table(module: nn.Module, key: str, where: str) -> torch.Tensor:
    # On the CPU whatever the default device is, so that the last bit does not depend on it.
    if key == "position_ids":
        return torch.arange(module.get_buffer(key).shape[-1], device="cpu").expand(1, -1)
    if key == "inv_freq":  # DINOv3's rotary positions, arXiv 2104.09864 over two axes
        frequency: Any = module
        return 1 / frequency.base ** torch.arange(0, 1, 4 / frequency.head_dim, dtype=torch.float32, device="cpu")
    raise NotImplementedError(
        f"{type(module).__name__} has a table {where} that is unknown here: this version of transformers is newer "
        "than this package; use the one in requirements/"
    )
