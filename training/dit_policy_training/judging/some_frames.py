"""The pictures of some moments, decoded once for a policy that is asked about them many times."""

from collections.abc import Iterable, Iterator

import numpy as np
import torch
from torch import Tensor

from dit_policy_ros.policy.modeling import MultitaskDiTPolicy
from dit_policy_ros.policy.preprocessing import Preprocessor
from dit_policy_training.data.frames import Frames
from dit_policy_training.data.windows import Windows

BATCH = 64  # rows decoded at a time


class SomeFrames:
    """Frames of the rows that some windows observe, scaled as the policy scales them first, uint8."""

    description = "pictures of some moments, kept in memory"

    def __init__(self, frames: Frames, windows: Windows, rows: np.ndarray, policy: MultitaskDiTPolicy):
        """rows (N,) are the moments. Raises DatasetError for pictures that cannot be read."""
        self._rows = np.unique(windows.observed(rows))
        encoder = policy.observation_encoder
        parts = np.array_split(self._rows, max(1, -(-len(self._rows) // BATCH)))
        kept: dict[str, list[Tensor]] = {key: [] for key in encoder.cameras}
        for pictures in frames.gather_each(part[:, None] for part in parts):
            for key, preprocessor in zip(encoder.cameras, encoder.preprocessors, strict=True):
                assert isinstance(preprocessor, Preprocessor)
                kept[key].append(_scaled(pictures[key][:, 0], preprocessor))
        self._pictures = {key: torch.cat(some) for key, some in kept.items()}

    @property
    def nbytes(self) -> int:
        """Bytes of the pictures."""
        return sum(pictures.nbytes for pictures in self._pictures.values())

    def gather(self, rows: np.ndarray) -> dict[str, Tensor]:
        """(B, n_obs) rows, all of them kept -> by feature key (B, n_obs, 3, H, W) uint8."""
        places = torch.from_numpy(np.searchsorted(self._rows, rows))
        return {key: pictures[places] for key, pictures in self._pictures.items()}

    def gather_each(self, batches: Iterable[np.ndarray]) -> Iterator[dict[str, Tensor]]:
        """`gather` of one (B, n_obs) after the other."""
        return map(self.gather, batches)


def _scaled(pictures: Tensor, preprocessor: Preprocessor) -> Tensor:
    if pictures.shape[-2:] == preprocessor.resized_shape:
        return pictures
    return (preprocessor.resize(pictures) * 255).round().to(torch.uint8)
