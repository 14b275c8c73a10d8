"""What ends a run from outside, said with what to change: no memory, no disk."""

import errno
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

_DISK_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


class OutOfResources(ValueError):
    """Memory or disk ended; the message says what to change."""


@contextmanager
def explained(device: torch.device, output_dir: Path, checkpoint_bytes: int) -> Iterator[None]:
    """Errors of a full memory or disk inside are told as OutOfResources; all others pass."""
    try:
        with memory_explained(str(device)):
            yield
    except OSError as error:
        if error.errno not in _DISK_FULL:
            raise
        raise OutOfResources(disk_is_full(output_dir, checkpoint_bytes, error.filename or "")) from error


@contextmanager
def memory_explained(device: str) -> Iterator[None]:
    """Errors of a full memory inside are told as OutOfResources; all others pass."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        raise OutOfResources(_out_of_memory(device, error)) from error


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory could not be had; torch says so of the CPU's in a RuntimeError."""
    told = ("DefaultCPUAllocator", "can't allocate memory", "not enough memory", "CUDA out of memory")
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or any(words in str(error) for words in told)


def _out_of_memory(device: str, error: BaseException) -> str:
    said = (str(error) or type(error).__name__).splitlines()[0]
    where = f"the memory of {device}" if device != "cpu" else "the machine's memory"
    return (
        f"{where} is exhausted ({said}). Any of these needs less:\n"
        "  - half the batch_size with twice the gradient_accumulation_steps: the same steps, slower\n"
        "  - use_amp: true, activations in half the bytes\n"
        "  - smaller pictures: policy.observation_encoder.vision.resize_shape and crop_shape\n"
        "  - fewer or narrower layers: policy.transformer.num_layers, hidden_dim; policy.objective.noise_draws: 1\n"
        "  - cache: disk or off, if it is the machine's memory that the pictures fill\n"
        "A run that has a checkpoint can go on with any of these but smaller pictures and another policy: "
        "--checkpoint_path=OUTPUT/checkpoints/last"
    )


def disk_is_full(output_dir: Path, checkpoint_bytes: int, file: str = "") -> str:
    """What to do where a checkpoint does not fit."""
    needed, free = _megabytes(checkpoint_bytes), _megabytes(free_bytes(output_dir))
    return (
        f"no space for a checkpoint in {output_dir}{f' ({file})' if file else ''}: it takes {needed}, {free} are free "
        "(or a quota, or a limit on the size of a file, says "
        "less). What is there already is whole. Give more room, or\n"
        "  - --keep_checkpoints=0: only the best and the last are kept, beside the one being written\n"
        "  - --output_dir on another disk\n"
        "  - --cache_dir on another disk, or --cache=off, if the pictures' cache fills this one\n"
        "and go on with --checkpoint_path=OUTPUT/checkpoints/last"
    )


def _megabytes(count: int) -> str:
    return f"{count / 1e6:.{0 if count >= 1e7 else 2}f} MB"


def free_bytes(folder: Path) -> int:
    """What the disk has left where a folder is, or will be."""
    existing = next(place for place in (folder.absolute(), *folder.absolute().parents) if place.exists())
    return shutil.disk_usage(existing).free
