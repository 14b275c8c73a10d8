"""Which of several candidate chunks to execute: bidirectional decoding (Liu et al., arXiv 2408.17355).

A policy that knows several ways to do a task may take another one with every chunk, and so none to the end. Of the
candidates of one observation the best is the one that goes on with the chunk in motion (backward coherence, eq. 3)
and that a good policy would rather propose than a bad one (forward contrast, eq. 4). Distances are Euclidean for each
step and summed over the steps; give actions whose dimensions are comparable, such as normalised ones.
"""

import torch
from torch import Tensor


def choose_candidate(
    candidates: Tensor, in_motion: Tensor | None = None, decay: float = 0.9, weaker: Tensor | None = None
) -> Tensor:
    """The best candidate's index for each observation, (B,) int64.

    candidates (B, N, T, A); in_motion (B or 1, M, A), M at most T, the rest of the chunk in motion, row 0 at the
    candidates' first step; weaker (B, K, T, A), chunks of a weaker policy, such as an earlier checkpoint. With neither
    of the two it is the candidate closest to all others, which no outlier is.
    """
    loss = candidates.new_zeros(candidates.shape[:2])
    if in_motion is not None:
        loss = loss + backward_coherence(candidates, in_motion, decay)
    if weaker is not None or in_motion is None:
        loss = loss + forward_contrast(candidates, weaker)
    return loss.argmin(dim=1)


def backward_coherence(candidates: Tensor, in_motion: Tensor, decay: float) -> Tensor:
    """Distance to the chunk in motion over the steps both have, (B, N); step i counts decay^i.

    candidates (B, N, T, A), in_motion (B or 1, M, A). Raises ValueError if M exceeds T.
    """
    steps = in_motion.shape[1]
    if steps > candidates.shape[2]:
        raise ValueError(f"the chunk in motion has {steps} steps left, more than the candidates' {candidates.shape[2]}")
    distance = (candidates[:, :, :steps] - in_motion.unsqueeze(1)).norm(dim=-1)
    return (distance * decay ** torch.arange(steps, device=distance.device)).sum(dim=-1)


def forward_contrast(candidates: Tensor, weaker: Tensor | None) -> Tensor:
    """Mean distance to all candidates (the positive set) less that to the weaker policy's chunks, if any, (B, N).

    candidates (B, N, T, A), weaker (B, K, T, A). Each candidate's distance to itself is 0, so that the mean over N is
    the paper's sum over the others, divided by N. Raises ValueError for a weaker policy's chunks of another shape.
    """
    if weaker is not None and weaker.shape[2:] != candidates.shape[2:]:
        raise ValueError(
            f"the weaker policy's chunks have shape {tuple(weaker.shape[2:])} (steps, actions), the candidates "
            f"{tuple(candidates.shape[2:])}"
        )
    contrast = _distances(candidates, candidates).mean(dim=-1)
    return contrast if weaker is None else contrast - _distances(candidates, weaker).mean(dim=-1)


def _distances(first: Tensor, second: Tensor) -> Tensor:
    """Distances of chunks (B, N, T, A) and (B, K, T, A) to each other, (B, N, K)."""
    return (first.unsqueeze(2) - second.unsqueeze(1)).norm(dim=-1).sum(dim=-1)
