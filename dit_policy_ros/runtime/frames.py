"""Features of camera frames, each computed once: a frame that the next window sees again is not encoded again."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from dit_policy_ros.policy.engine import PolicyEngine


@dataclass(frozen=True)
class _Entry:
    image: np.ndarray
    feature: Tensor


class FrameFeatures:
    """Encodes frames with an engine and keeps the features used last; for one thread.

    A feature is known by camera, stamp and, where the words modulate vision, the instruction. As a stamp may come again
    with another picture (a bag looped, a simulator reset), a kept feature counts only for the very same pixels.
    """

    def __init__(self, engine: PolicyEngine) -> None:
        self._engine = engine
        config = engine.policy.config
        # Two windows of each camera, with and without the instruction.
        self._size = 4 * config.n_obs_steps * max(1, len(config.cameras))
        self._entries: OrderedDict[tuple[str, int, str | None], _Entry] = OrderedDict()

    def __len__(self) -> int:
        return len(self._entries)

    def of(self, camera_key: str, stamp_ns: int, image: np.ndarray, task: str, without_instruction: bool) -> Tensor:
        """The feature (1, image_dim) of a frame (3, H, W) uint8 taken at stamp_ns. Raises as `encode_frame`."""
        key = self._key(camera_key, stamp_ns, task, without_instruction)
        entry = self._kept(key, image)
        if entry is None:
            pixels = torch.as_tensor(image).unsqueeze(0)
            entry = _Entry(image, self._engine.encode_frame(camera_key, pixels, [task], without_instruction))
            self._entries[key] = entry
        self._entries.move_to_end(key)
        while len(self._entries) > self._size:
            self._entries.popitem(last=False)
        return entry.feature

    def _key(self, camera_key: str, stamp_ns: int, task: str, without_instruction: bool) -> tuple[str, int, str | None]:
        words = task if self._engine.policy.text_modulates_vision and not without_instruction else None
        return camera_key, stamp_ns, words

    def _kept(self, key: tuple[str, int, str | None], image: np.ndarray) -> _Entry | None:
        entry = self._entries.get(key)
        return entry if entry is not None and _same(entry.image, image) else None


def _same(kept: np.ndarray, image: np.ndarray) -> bool:
    # The buffer gives the same picture as the same array; comparing the pixels of two cameras would take a while.
    return kept is image or np.array_equal(kept, image)
