"""Pictures kept in memory, kept in a file, decoded on the way: the same ones, and what speaks against each in words."""

import errno
import fcntl
import os
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from dit_policy_training.data import disk, frames
from dit_policy_training.data.errors import DatasetError
from dit_policy_training.data.frames import batches, gather, open_frames
from dit_policy_training.data.order import SampleOrder
from dit_policy_training.data.table import Table, load_table
from dit_policy_training.data.windows import Windows
from torch.nn import functional as F

SIDE, HAND = "observation.images.side", "observation.images.hand"
HALF = {SIDE: lambda x: F.avg_pool2d(x.float() / 255, 2)}


@pytest.fixture(scope="module")
def table(dataset: Path) -> Table:
    return load_table(dataset)


@pytest.fixture
def copied(dataset: Path, tmp_path: Path) -> Path:
    return shutil.copytree(dataset, tmp_path / "copy")


def all_of(opened: frames.Frames, rows: int) -> dict[str, torch.Tensor]:
    return opened.gather(np.arange(rows)[:, None])


def same(one: dict[str, Any], other: dict[str, Any]) -> bool:
    return one.keys() == other.keys() and all(
        torch.equal(value, other[key]) if isinstance(value, torch.Tensor) else value == other[key]
        for key, value in one.items()
    )


@pytest.mark.parametrize("kind", ["dataset", "png_dataset"])
def test_every_way_gives_the_same_pictures(kind: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    table = load_table(request.getfixturevalue(kind))
    windows, rows = Windows(table, 2, 6), np.random.default_rng(0).integers(0, len(table), 40)
    expected = gather(windows, open_frames(table, cache="memory"), rows)
    for cache, workers in (("memory", 3), ("disk", 2), ("disk", 0), ("off", 0)):
        opened = open_frames(table, cache=cache, num_workers=workers, cache_dir=tmp_path)  # type: ignore[arg-type]
        assert same(gather(windows, opened, rows), expected), (cache, workers)


@pytest.mark.timeout(300)
def test_streamed_batches_come_in_order_whatever_the_number_of_processes(table: Table) -> None:
    windows, order = Windows(table, 2, 6), SampleOrder(np.arange(len(table)), None, 8, seed=1)
    wanted = [order.at(index) for index in range(7)]
    kept = open_frames(table, cache="memory")
    expected = [gather(windows, kept, rows) for rows in wanted]
    for workers in (0, 1, 2):
        torch.manual_seed(0)
        streamed = open_frames(table, cache="off", num_workers=workers)
        found = list(batches(windows, streamed, iter(wanted)))
        assert len(found) == 7
        assert all(same(one, other) for one, other in zip(found, expected, strict=True))
        assert torch.rand(1).item() == torch.rand(1, generator=torch.Generator().manual_seed(0)).item()


def children() -> list[str]:
    """Of this process, those that its main thread started."""
    return Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()


@pytest.mark.timeout(300)
def test_an_endless_stream_ends_with_its_generator(table: Table) -> None:
    """As training does it: another thread asks for single pictures meanwhile, and the processes are gone at the end."""
    windows, order = Windows(table, 2, 6), SampleOrder(np.arange(len(table)), None, 4, seed=1)
    streamed = open_frames(table, cache="off", num_workers=2)
    expected = gather(windows, open_frames(table, cache="memory"), np.arange(20))
    assert same(gather(windows, streamed, np.arange(20)), expected)  # files are open before the processes start

    def endless() -> Iterator[np.ndarray]:
        index = 0
        while True:
            yield order.at(index)
            index += 1

    before = children()
    stream = batches(windows, streamed, endless())
    for index in range(20):
        assert len(next(stream)["task"]) == 4
        assert same(gather(windows, streamed, np.arange(20)), expected), index
    assert len(children()) == 2 + len(before)
    stream.close()
    assert children() == before


@pytest.mark.timeout(300)
def test_a_process_that_is_killed_is_told(table: Table) -> None:
    before = children()
    windows, streamed = Windows(table, 2, 6), open_frames(table, cache="off", num_workers=1)
    stream = batches(windows, streamed, iter([np.arange(4)] * 1000))
    next(stream)
    (worker,) = set(children()) - set(before)
    os.kill(int(worker), signal.SIGTERM)  # as a scheduler sends to all: to be left to the main process
    next(stream)
    os.kill(int(worker), signal.SIGKILL)  # as the system does when memory is short
    with pytest.raises(DatasetError, match=r"a process that decodes pictures was ended .*--num_workers"):
        list(stream)


def test_scaled_pictures_are_kept_scaled(table: Table, tmp_path: Path) -> None:
    plain = all_of(open_frames(table, cache="memory"), len(table))
    expected = plain[SIDE].float().view(len(table), 1, 3, 16, 2, 24, 2).mean((4, 6))
    for cache in ("memory", "disk", "off"):
        opened = open_frames(table, cache=cache, resize=HALF, cache_dir=tmp_path)
        found = all_of(opened, len(table))
        assert found[SIDE].shape == (len(table), 1, 3, 16, 24)
        assert (found[SIDE].float() - expected).abs().max() <= 0.51
        assert torch.equal(found[HAND], plain[HAND])
        assert opened.nbytes == sum(pictures.nbytes for pictures in found.values())
    whole = open_frames(table, cache="disk", cache_dir=tmp_path)  # beside those, not in their place
    assert same(all_of(whole, len(table)), plain)


def test_a_file_is_made_once_and_not_for_other_pictures(copied: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = copied.with_name("copy.frames")
    first = all_of(open_frames(load_table(copied), cache="disk"), 71)
    made = {path.name: path.stat().st_mtime_ns for path in folder.glob("*.u8")}
    assert len(made) == 2

    def decode(*_: Any, **__: Any) -> None:
        raise AssertionError("decoded again")

    with monkeypatch.context() as patch:
        patch.setattr(disk, "decode", decode)
        assert same(all_of(open_frames(load_table(copied), cache="disk"), 71), first)
        video = next((copied / "videos" / SIDE).rglob("*.mp4"))
        os.utime(video, ns=(1, 1))
        with pytest.raises(AssertionError, match="decoded again"):
            open_frames(load_table(copied), cache="disk")
    assert same(all_of(open_frames(load_table(copied), cache="disk"), 71), first)
    assert len(list(folder.glob("*.u8"))) == 3
    assert not list(folder.glob("*.partial"))


def test_a_file_that_is_not_whole_is_never_used(copied: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    table, folder = load_table(copied), copied.with_name("copy.frames")
    expected = all_of(open_frames(table, cache="memory"), len(table))

    def dies(shelf: Any, resize: Any, keep: Any, *rest: Any) -> None:
        keep(np.arange(3), np.zeros((3, *shelf.shape), np.uint8))
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(disk, "decode", dies)
        with pytest.raises(KeyboardInterrupt):
            open_frames(table, cache="disk")
    assert not list(folder.glob("*.u8")) + list(folder.glob("*.partial"))
    name = disk.cache_file(table.parts[0], frames.shelf(table, table.parts[0], SIDE), {}, None).name
    (folder / f"{name}.1.partial").write_bytes(b"left by a process that was killed")
    assert same(all_of(open_frames(table, cache="disk"), len(table)), expected)
    assert not list(folder.glob("*.partial"))
    (folder / name).write_bytes(b"cut short")
    with pytest.raises(DatasetError, match=r"side-.*\.u8 has 9 bytes, 327168 are needed: delete it"):
        open_frames(table, cache="disk")


MAKE = """
import sys
from pathlib import Path
import numpy as np
from dit_policy_training.data import decoding, disk
from dit_policy_training.data.frames import open_frames
from dit_policy_training.data.table import load_table
def decode(*args):
    print("decodes", flush=True)
    decoding.decode(*args)
disk.decode = decode
frames = open_frames(load_table(Path(sys.argv[1])), cache="disk")
print(sum(int(pictures.sum()) for pictures in frames.gather(np.arange(71)[:, None]).values()))
"""


@pytest.mark.timeout(300)
def test_processes_of_a_machine_share_a_file(copied: Path) -> None:
    """All start before a file is there; each camera is decoded by one of them."""
    command = [sys.executable, "-c", MAKE, str(copied)]
    started = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    printed = [process.communicate()[0].split() for process in started]
    assert [process.returncode for process in started] == [0, 0]
    assert sum(words.count("decodes") for words in printed) == 2
    assert len({words[-1] for words in printed}) == 1


def test_who_comes_second_waits_for_the_first(copied: Path) -> None:
    table = load_table(copied)
    path = disk.cache_file(table.parts[0], frames.shelf(table, table.parts[0], SIDE), {}, None)
    path.parent.mkdir()
    found: list[frames.Frames] = []
    with path.with_name(f".{path.name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        second = threading.Thread(target=lambda: found.append(open_frames(table, cache="disk")))
        second.start()
        second.join(0.3)
        assert second.is_alive()
        assert not path.exists()
    second.join()
    assert path.exists()
    assert len(found) == 1


def test_a_full_disk_says_what_to_change(table: Table, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(disk.os, "posix_fallocate", full)
    with pytest.raises(
        DatasetError, match=r"has no room for 0\.00 GB of decoded pictures: give --cache_dir=.*cache=off"
    ):
        open_frames(table, cache="disk", cache_dir=tmp_path)
    assert not list(tmp_path.glob("*.u8")) + list(tmp_path.glob("*.partial"))
    file = tmp_path / "file"
    file.write_text("")
    with pytest.raises(DatasetError, match=r"cannot be written to .*file/there: Not a directory; give --cache_dir"):
        open_frames(table, cache="disk", cache_dir=file / "there")


def test_auto_takes_what_has_room(table: Table, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def where(**options: Any) -> str:
        description = open_frames(table, cache_dir=tmp_path / "cache", **options).description
        return next(word for word in ("memory", "cache", "during training") if word in description)

    assert where() == "memory"
    assert where(cache_limit_gb=0.0) == "cache"
    assert where(cache_limit_gb=0.0, cache_disk_limit_gb=0.0) == "during training"
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")  # as torchrun and accelerate launch set it
    assert where() == "cache"
    assert where(cache_disk_limit_gb=0.0) == "memory"
    assert where(cache_disk_limit_gb=0.0, cache_limit_gb=0.0008) == "during training"  # room for one copy, not for two
    monkeypatch.delenv("LOCAL_WORLD_SIZE")
    with monkeypatch.context() as patch:
        patch.setattr(frames, "_available_memory", lambda: 1000.0)
        assert where() == "cache"
        with pytest.raises(DatasetError, match=r"do not fit into the 0\.0 GB of memory that are free: --cache=disk"):
            open_frames(table, cache="memory")
    shutil.rmtree(tmp_path / "cache")
    monkeypatch.setattr(disk.shutil, "disk_usage", lambda _: SimpleNamespace(free=1000))
    assert where(cache_limit_gb=0.0) == "during training"


PEAK = """
import resource, sys
from pathlib import Path
from dit_policy_training.data.frames import open_frames
from dit_policy_training.data.table import load_table
table = load_table(Path(sys.argv[1]))
grown = {key: (lambda x: x.float().new_zeros(len(x), 3, 512, 512)) for key in table.image_shapes}
peak = lambda: 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
open_frames(table, cache="off")
before = peak()
open_frames(table, cache="disk", resize=grown, cache_dir=Path(sys.argv[2]), num_workers=2)
between = peak()
frames = open_frames(table, cache="memory", resize=grown, num_workers=2)
print(between - before, peak() - between, frames.nbytes)
"""


@pytest.mark.timeout(300)
def test_memory_is_that_of_the_pictures(dataset: Path, tmp_path: Path) -> None:
    """Of a process of its own: none or one of each, beside the four that each of two threads scales at a time."""
    command = [sys.executable, "-c", PEAK, str(dataset), str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    on_disk, in_memory, nbytes = map(int, done.stdout.split())
    assert nbytes == 2 * 71 * 3 * 512 * 512
    at_a_time = 2 * 4 * 3 * 512 * 512 * (4 + 4 + 4 + 1)  # as floats, times 255, rounded; as uint8
    assert on_disk <= at_a_time
    assert in_memory <= 1.05 * nbytes


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    middle = len(data) // 2
    data[middle : middle + 400] = bytes(255 - value for value in data[middle : middle + 400])
    path.write_bytes(data)


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def stream_all(table: Table, workers: int) -> None:
    streamed = open_frames(table, cache="off", num_workers=workers)
    list(batches(Windows(table, 2, 6), streamed, iter([np.arange(len(table))])))


def replace_by_text(path: Path) -> None:
    path.write_text("no video")


@pytest.mark.timeout(300)
@pytest.mark.parametrize("damage", [flip, truncate, replace_by_text, Path.unlink])
def test_a_corrupt_video_is_named(copied: Path, tmp_path: Path, damage: Any) -> None:
    video = next((copied / "videos" / HAND).rglob("*.mp4"))
    damage(video)
    named = rf"{HAND}/chunk-000/file-000\.mp4.*(again|meta/episodes promises)"
    table = load_table(copied)
    for cache in ("memory", "disk"):
        with pytest.raises(DatasetError, match=named):
            open_frames(table, cache=cache, cache_dir=tmp_path / "cache", num_workers=2)
    for workers in (0, 2):
        with pytest.raises(DatasetError, match=named):
            stream_all(table, workers)


def test_a_video_that_lacks_frames_is_refused(copied: Path) -> None:
    path = next((copied / "meta" / "episodes").rglob("*.parquet"))
    episodes = pd.read_parquet(path)
    episodes[f"videos/{SIDE}/from_timestamp"] += 0.5
    episodes.to_parquet(path)
    with pytest.raises(DatasetError, match=r"side.*\.mp4 ends before row \d+ at \d+\.\d+ s"):
        open_frames(load_table(copied))
    episodes[f"videos/{SIDE}/from_timestamp"] -= 0.55
    episodes.to_parquet(path)
    with pytest.raises(DatasetError, match=r"side.*\.mp4 has no frame for row \d+ at -?\d+\.\d+ s, the next is at"):
        open_frames(load_table(copied))


def test_pictures_in_tables_that_are_damaged_are_named(png_dataset: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(png_dataset, tmp_path / "copy")
    path = next((copy / "data").rglob("*.parquet"))
    rows = pd.read_parquet(path)
    for damaged in (b"no picture", None):
        rows.at[40, HAND] = {"bytes": damaged, "path": None}
        rows.to_parquet(path)
        for cache in ("memory", "off"):
            with pytest.raises(DatasetError, match=rf"{HAND} of row 40 is nothing that can be decoded"):
                all_of(open_frames(load_table(copy), cache=cache), 71)


def test_episodes_that_do_not_fit_the_rows_are_told(copied: Path) -> None:
    path = next((copied / "meta" / "episodes").rglob("*.parquet"))
    episodes = pd.read_parquet(path)
    episodes[:-1].to_parquet(path)
    with pytest.raises(
        DatasetError, match=r"meta/episodes has 2 episodes with \d+ frames, the rows of data/ are 3 episo"
    ):
        open_frames(load_table(copied))
    episodes.drop(columns=f"videos/{SIDE}/from_timestamp").to_parquet(path)
    with pytest.raises(DatasetError, match=r"parquet has no column videos/.*side/from_timestamp"):
        open_frames(load_table(copied))
    path.unlink()
    with pytest.raises(DatasetError, match=r"has no meta/episodes/chunk-\*/file-\*\.parquet"):
        open_frames(load_table(copied))
