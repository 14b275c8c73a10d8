"""Is each encoded frame of a dataset's videos, byte for byte, the one in its shard? Merging only copies them.

No frame is decoded, so that all frames are held against the shards even where only a few pictures are compared.
"""

from collections.abc import Sequence
from pathlib import Path

import av
import numpy as np
import pandas as pd

from dit_policy_training.conversion import lerobot_format as lerobot
from dit_policy_training.conversion.encoders import VideoError
from dit_policy_training.conversion.findings import Findings
from dit_policy_training.conversion.reloaded import Reloaded
from dit_policy_training.conversion.videos import payloads_in


def check_videos(opened: Reloaded, shards: Sequence[Path], findings: Findings) -> None:
    """Each mp4 holds as many frames as its episodes have rows (one that is lost shifts all after it): its shards'."""
    places = [place for shard in shards for place in _episodes(shard, findings)]
    for key in opened.lerobot.meta.video_keys:
        found: dict[Path, np.ndarray] = {}
        for path, due in opened.video_rows(key).items():
            where = path.relative_to(opened.root)
            try:
                found[path] = payloads_in(path)
            except (VideoError, av.FFmpegError, OSError, IndexError) as error:
                findings.add("videos", f"{where}: no readable frames ({error}) for {due} rows of {key}; convert again")
                continue
            if len(found[path]) != due:
                wrong = f"{where}: {len(found[path])} frames for {due} rows of {key}; convert again"
                findings.add("videos", wrong)
                del found[path]
        if len(places) == len(opened.episodes):  # else it is told where episodes are counted
            _compare(opened, key, found, places, findings)


def _compare(
    opened: Reloaded,
    key: str,
    found: dict[Path, np.ndarray],
    places: Sequence[tuple[Path, pd.Series]],
    findings: Findings,
) -> None:
    read, sampled = Path(), np.empty(0, np.uint64)
    for number, ((shard, row), episode) in enumerate(zip(places, opened.episodes, strict=True)):
        here = opened.root / opened.lerobot.meta.get_video_file_path(number, key)
        chunk, file = (int(row[f"videos/{key}/{part}_index"]) for part in ("chunk", "file"))
        there = shard / lerobot.VIDEOS.format(video_key=key, chunk_index=chunk, file_index=file)
        if here not in found:
            continue
        if there != read:
            try:
                read, sampled = there, payloads_in(there)
            except (VideoError, av.FFmpegError, OSError, IndexError) as error:
                findings.add("packets", f"{there}: no readable frames ({error}); remove the shard and convert again")
                read, sampled = there, np.empty(0, np.uint64)
        ours = _part(found[here], episode, key, opened.fps)
        theirs = _part(sampled, row, key, opened.fps)
        if len(ours) == len(theirs):
            for frame in np.flatnonzero(ours != theirs):
                where = f"episode {number} (of {shard.name}), frame {frame}"
                findings.add("packets", f"{where}: {key} is not as encoded in the shard; merge again")
        elif len(sampled):
            wrong = f"{len(ours)} encoded frames of {key}, the shard has {len(theirs)}; convert again"
            findings.add("packets", f"episode {number} (of {shard.name}): {wrong}")


def _part(payloads: np.ndarray, episode: "pd.Series | dict[str, float]", key: str, fps: int) -> np.ndarray:
    first = round(float(episode[f"videos/{key}/from_timestamp"]) * fps)
    return payloads[first : first + int(episode["length"])]


def _episodes(shard: Path, findings: Findings) -> list[tuple[Path, pd.Series]]:
    """The shard with each of its rows of meta/episodes."""
    try:
        tables = [pd.read_parquet(path) for path in sorted((shard / "meta" / "episodes").glob("*/*.parquet"))]
    except (OSError, ValueError) as error:
        findings.add("packets", f"{shard}: meta/episodes cannot be read: {error}; remove the shard and convert again")
        return []
    return [(shard, row) for table in tables for _, row in table.iterrows()]
