"""The instruction as a vector."""

import logging
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .configuration import ClipTextConfig, ConfigurationError, NoTextConfig, TextConfig
from .recent import Recent
from .towers import TokenizerError, load_tokenizer, load_tower, reset_tower_buffers

logger = logging.getLogger(__name__)

TEXT_CACHE_SIZE = 32768  # 67 MB of CLIP's vectors at most: a large dataset has an instruction an episode


class ClipText(nn.Module):
    """A frozen CLIP text tower's pooled output, then a trained projection.

    The tower runs once an instruction, its output is kept. The projection is trained and so is applied each
    time.
    """

    def __init__(self, config: ClipTextConfig, features_dim: int, tokenizer: Any | None):
        super().__init__()
        self.tokenizer = tokenizer or _load_tokenizer(config)
        self.text_encoder: Any = load_tower("CLIPText", config.model, config.model_config)
        self.text_encoder.requires_grad_(False).eval()
        self.projection = nn.Linear(self.text_encoder.config.hidden_size, features_dim)
        # Its lock is held while a text is encoded: a Hugging Face tokenizer must not be used by two threads at once.
        self._cache: Recent[Tensor] = Recent(TEXT_CACHE_SIZE)
        self.register_load_state_dict_post_hook(lambda module, _: module._cache.clear())

    def forward(self, tasks: Sequence[str]) -> Tensor:
        """B instructions -> (B, features_dim). Raises ValueError for one without words."""
        return self.projection(self.pooled(tasks))

    def pooled(self, tasks: Sequence[str]) -> Tensor:
        """B instructions -> the frozen tower's output (B, tower's width)."""
        for index, task in enumerate(tasks):
            if not isinstance(task, str) or not task.strip():
                raise ValueError(f"task {index} of the batch is {task!r}; expected an instruction in words")
        # A copy, so that what was kept in inference mode may serve a training step.
        return torch.stack([self._cache.get(task, partial(self._encode, task)) for task in tasks])

    @property
    def max_tokens(self) -> int:
        """The length at which an instruction is cut: the tower's positions, or fewer if the tokenizer says so.

        A tokenizer keeps that (`model_max_length`) in its files, and so does a checkpoint.
        """
        return min(self.text_encoder.config.max_position_embeddings, self.tokenizer.model_max_length)

    # Each alone, not as a batch: a feature must not depend, in its last bits, on what else was asked for.
    @torch.no_grad()
    def _encode(self, task: str) -> Tensor:
        limit = self.max_tokens
        tokens = self.tokenizer(task, return_tensors="pt")["input_ids"]
        if tokens.shape[1] > limit:
            logger.warning("This policy reads %d tokens; the end is cut from %r of %d", limit, task, tokens.shape[1])
            tokens = self.tokenizer(task, truncation=True, max_length=limit, return_tensors="pt")["input_ids"]
        device = self.projection.weight.device
        # In full precision, whoever asks first: what is kept must not depend on whether that was a training step.
        with torch.autocast(device.type, enabled=False):
            return self.text_encoder(input_ids=tokens.to(device)).pooler_output[0]

    def reset_buffers(self, device: torch.device | str) -> None:
        """Makes the tables that are not in the state_dict anew, on a device."""
        reset_tower_buffers(self.text_encoder, device)

    def train(self, mode: bool = True) -> "ClipText":
        """The frozen tower stays in evaluation mode."""
        super().train(mode)
        self.text_encoder.eval()
        return self

    def _apply(self, fn: Any, recurse: bool = True) -> "ClipText":
        self._cache.clear()  # another device or dtype
        return super()._apply(fn, recurse)


def make_text_encoder(config: TextConfig, features_dim: int, tokenizer: Any | None) -> ClipText | None:
    """The text encoder a configuration describes, None for a policy without words."""
    if isinstance(config, NoTextConfig):
        return None
    if isinstance(config, ClipTextConfig):
        return ClipText(config, features_dim, tokenizer)
    raise TypeError(f"no text encoder for {type(config).__name__}; registered: clip, none")


def _load_tokenizer(config: ClipTextConfig) -> Any:
    if config.model_config is not None:
        raise ConfigurationError("text.model_config is given: pass the tokenizer as well, a configuration has none")
    try:
        return load_tokenizer(config.model)
    except TokenizerError as error:
        is_path = config.model.count("/") > 1 or config.model.startswith((".", "/"))
        why = "There is no such folder." if is_path and not Path(config.model).is_dir() else error
        raise ConfigurationError(
            f"cannot load a tokenizer from text.model {config.model!r}: give a local folder with the tokenizer's "
            f"files, or the name of a model on the Hugging Face hub (needs network, and HF_HUB_OFFLINE not "
            f"set). Training takes folders by --policy.observation_encoder.text.model=DIR, and .vision.backbone=DIR; "
            f"the demo's small tower is made by python -m dit_policy_ros.policy.tiny_clip --output=DIR. {why}"
        ) from error
