"""A policy as a folder that needs nothing else: no network, no hub cache, no pickle.

model.safetensors     all weights, the frozen text tower's included
config.json           PolicyConfig with the encoders' own (Hugging Face) configurations filled in
tokenizer/            the tokenizer's files; not there if the policy reads no words
dataset_stats.json    the statistics the policy normalises with
embodiment.yaml       the robot it was trained on
model_card.md         for the reader

Loading allocates no weight twice. The policy is built without weights (on torch's meta device), the file's
header is compared with it, and only then are the tensors taken, straight to the device, and put in their places.
"""

import copy
import errno
import json
import mmap
import os
import shutil
import tempfile
from collections.abc import Callable, Mapping, Set
from pathlib import Path
from typing import Any

import draccus
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from .configuration import ClipTextConfig, PolicyConfig, ViTConfig
from .modeling import MultitaskDiTPolicy
from .towers import TokenizerError, describe, load_tokenizer

FORMAT_VERSION = 1
WEIGHTS, CONFIG, TOKENIZER, STATS = "model.safetensors", "config.json", "tokenizer", "dataset_stats.json"
EMBODIMENT, MODEL_CARD = "embodiment.yaml", "model_card.md"
ALIGNMENT = 64  # bytes, as torch allocates
PARTIAL, OLD = ".partial", ".old"  # ends of the names of folders that stand beside a checkpoint while it is written
PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")


class CheckpointError(ValueError):
    """A checkpoint folder that is incomplete, damaged or not of this model; the message says what to do."""


def save_checkpoint(
    folder: str | Path,
    policy: MultitaskDiTPolicy,
    embodiment_yaml: str,
    model_card: str,
    write_more: Callable[[Path], None] | None = None,
) -> None:
    """Writes the folder, replacing one that exists. What stands at `folder` is at all times complete.

    The folder is made under another name beside its place and then renamed, so an interruption leaves the old
    checkpoint (or, within an instant, none but the old one's complete copy `.NAME.old`). write_more adds files to
    what is not renamed yet. Raises CheckpointError for weights that are not finite.
    """
    folder = Path(folder)
    weights = policy.state_dict()
    if bad := [name for name, tensor in weights.items() if not is_finite(tensor)]:
        raise CheckpointError(f"not saved to {folder}: weights are not finite: {_listed(bad)}")
    folder.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", suffix=PARTIAL, dir=folder.parent))
    try:
        partial.chmod(0o755)  # mkdtemp's folders are private
        write_tensors(weights, partial / WEIGHTS)
        (partial / WEIGHTS).chmod(0o644)
        write_json(partial / CONFIG, {"format_version": FORMAT_VERSION} | draccus.encode(_self_contained(policy)))
        if (text_encoder := policy.observation_encoder.text_encoder) is not None:
            text_encoder.tokenizer.save_pretrained(partial / TOKENIZER)
        write_json(partial / STATS, policy.stats)
        (partial / EMBODIMENT).write_text(embodiment_yaml, encoding="utf-8")
        (partial / MODEL_CARD).write_text(model_card, encoding="utf-8")
        if write_more is not None:
            write_more(partial)
        replace_folder(folder, partial)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def clear_interrupted(parent: Path) -> list[Path]:
    """Ends what a killed `save_checkpoint` began in a folder: half-written ones go, and are returned; a complete copy
    that was set aside takes its place again if nothing else stands there.

    Not to be called while another process saves there.
    """
    for old in parent.glob(f".*{OLD}"):
        place = parent / old.name[1 : -len(OLD)]
        if not place.exists():
            old.rename(place)
    left = [*parent.glob(f".*{PARTIAL}"), *parent.glob(f".*{OLD}")]
    for folder in left:
        shutil.rmtree(folder, ignore_errors=True)
    return left


def write_tensors(tensors: Mapping[str, Tensor], path: Path) -> None:
    """A safetensors file that can be used where it is mapped: every tensor whose size allows it begins aligned.

    The format puts tensors one after the other without gaps, in any order: those of odd sizes come last. They are
    taken off their device one by one.
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    names = sorted(tensors, key=lambda name: (tensors[name].nbytes % ALIGNMENT > 0, name))
    end = 0
    for name in names:
        start, end = end, end + tensors[name].nbytes
        kind = _DTYPE_NAMES[str(tensors[name].dtype).removeprefix("torch.")]
        header[name] = {"dtype": kind, "shape": list(tensors[name].shape), "data_offsets": [start, end]}
    content = json.dumps(header, separators=(",", ":")).encode()
    content += b" " * (-(8 + len(content)) % ALIGNMENT)
    with path.open("wb") as file:
        file.write(len(content).to_bytes(8, "little"))
        file.write(content)
        for name in names:
            tensor = tensors[name].detach().cpu().contiguous()
            file.write(tensor.flatten().view(torch.uint8).numpy().data)


def load_checkpoint(folder: str | Path, device: str | torch.device = "cpu", mapped: bool = True) -> MultitaskDiTPolicy:
    """The policy in evaluation mode on a device.

    On the CPU the weights stay mapped from the file (copied where they are written to), which takes a tenth of
    the time; a process that must outlive somebody's overwriting the file in place says mapped=False and gets a
    copy. (`save_checkpoint` writes a new file, and may run meanwhile.)

    Asks no network and no hub cache, and never unpickles. Raises CheckpointError, naming everything that is
    wrong with the weights at once.
    """
    folder = Path(folder)
    config, stats = _read_description(folder)
    target = usable_device(device)
    try:
        with torch.device("meta"):
            policy = MultitaskDiTPolicy(config, stats, tokenizer_of(folder, config))
    except ValueError as error:
        raise CheckpointError(f"checkpoint {folder}: {error}") from error
    policy.load_state_dict(
        _load_weights(folder / WEIGHTS, policy.state_dict(), target, mapped), strict=True, assign=True
    )
    policy.reset_buffers(target)  # tables that no file holds
    return policy.eval()


def load_config(folder: str | Path) -> PolicyConfig:
    """The configuration of a checkpoint, without its weights. Raises CheckpointError."""
    path = Path(folder) / CONFIG
    content = read_json(path)
    version = content.pop("format_version", None) if isinstance(content, dict) else None
    if version != FORMAT_VERSION:
        raise CheckpointError(
            f"{path}: format_version is {version}, this version of dit_policy_ros reads {FORMAT_VERSION}: "
            "use the version that wrote the checkpoint"
        )
    try:
        return draccus.decode(PolicyConfig, content)
    except Exception as error:  # draccus has no common base for what decoding may raise
        raise CheckpointError(f"{path} is not a policy's configuration: {reasons(error)}") from error


def reasons(error: BaseException) -> str:
    """An error's message and those of what caused it: draccus wraps what a configuration says of itself."""
    causes = [error]
    while (cause := causes[-1].__cause__ or causes[-1].__context__) is not None:
        causes.append(cause)
    return ": ".join(dict.fromkeys(str(cause) for cause in causes))


def usable_device(name: str | torch.device) -> torch.device:
    """The device of that name. Raises CheckpointError if there is none that can hold weights."""
    try:
        device = torch.device(name)
        torch.empty(1, device=device).cpu()
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        there = ["cpu", *(f"cuda:{index}" for index in range(torch.cuda.device_count()))]
        reason = str(error).splitlines()[0]
        raise CheckpointError(
            f"weights cannot be loaded to device {str(name)!r}: {reason}; this machine has {', '.join(there)}, of "
            "which `device` must name one"
        ) from error
    return device


def _self_contained(policy: MultitaskDiTPolicy) -> PolicyConfig:
    """The configuration with the encoders' architectures in it, so that loading asks no hub."""
    config = copy.deepcopy(policy.config)
    encoder, described = policy.observation_encoder, config.observation_encoder
    if isinstance(described.text, ClipTextConfig) and encoder.text_encoder is not None:
        described.text.model_config = describe(encoder.text_encoder.text_encoder.config)
    if isinstance(described.vision, ViTConfig) and encoder.cameras:
        tower: Any = encoder.vision_encoders[0].model
        described.vision.backbone_config = describe(tower.config)
    return config


def _read_description(folder: Path) -> tuple[PolicyConfig, Any]:
    """Configuration and statistics of a folder that holds all of its files."""
    if not folder.is_dir():
        raise CheckpointError(
            f"no checkpoint at {folder}: the folder does not exist; give the folder that training wrote, "
            f"holding {WEIGHTS} and {CONFIG}"
        )
    config = load_config(folder) if (folder / CONFIG).exists() else None
    wanted = [WEIGHTS, CONFIG, STATS, EMBODIMENT]
    if config is None or isinstance(config.observation_encoder.text, ClipTextConfig):
        wanted.append(TOKENIZER)
    missing = [name for name in wanted if not (folder / name).exists()]
    if missing or config is None:
        hint = "copy the whole folder that training wrote"
        if pickles := [file.name for file in sorted(folder.iterdir()) if file.suffix in PICKLE_SUFFIXES]:
            hint += f". {', '.join(pickles)} may be a pickle, which can run any code when read, and is never read"
        raise CheckpointError(f"checkpoint {folder} is incomplete: it lacks {', '.join(missing)}; {hint}")
    return config, read_json(folder / STATS)


def refuse_pickle(path: Path) -> None:
    """Raises CheckpointError for a file that torch.save or pickle wrote, whatever its name."""
    with path.open("rb") as file:
        start = file.read(9)
    # A safetensors file is eight bytes of length, then JSON; torch.save writes a zip archive.
    if start[8:9] != b"{" and (start.startswith(b"PK\x03\x04") or start.startswith(b"\x80")):
        raise CheckpointError(
            f"{path} is a pickle, which can run any code when read, so it is never read: "
            "convert it to safetensors where you trust it"
        )


def tokenizer_of(folder: Path, config: PolicyConfig) -> Any:
    """The tokenizer of a checkpoint whose configuration that is; None if its policy reads no words."""
    if not isinstance(config.observation_encoder.text, ClipTextConfig):
        return None
    try:
        return load_tokenizer(folder / TOKENIZER, local_only=True)
    except TokenizerError as error:
        raise CheckpointError(f"checkpoint {folder}: {error}") from error


def _load_weights(path: Path, expected: dict[str, Tensor], device: torch.device, mapped: bool) -> dict[str, Tensor]:
    """The tensors of a file that must hold exactly the expected ones: names, shapes, types, finite."""
    refuse_pickle(path)
    try:
        with safe_open(path, framework="pt", device=str(device)) as file:  # checks lengths and offsets
            problems = _header_problems(file, expected)
            found = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            if device.type == "cpu" and not problems:
                odd = {name for name, tensor in found.items() if tensor.data_ptr() % ALIGNMENT}
                # A product's last bits depend on the alignment of its operands.
                if mapped and 10 * sum(found[name].nbytes for name in odd) < path.stat().st_size:
                    found |= {name: found[name].clone() for name in odd}
                else:
                    found = _read_to_memory(path, expected)
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path} cannot be read ({error}): the file is damaged, copy it again") from error
    if bad := [name for name in sorted(found) if not is_finite(found[name])]:
        problems.append(f"not finite: {_listed(bad)}")
    if problems:
        raise CheckpointError(
            f"{path} does not hold this model (it must come from the same training run as its {CONFIG}):\n  - "
            + "\n  - ".join(problems)
        )
    return found


def _read_to_memory(path: Path, expected: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of a safetensors file whose header was found to be right, read into one block of memory.

    The block is of huge pages where the system has them, because filling memory by small pages takes three
    times as long.
    """
    with path.open("rb", buffering=0) as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
        starts, size = {}, 0
        for name, tensor in expected.items():
            starts[name] = size
            size += -(-tensor.nbytes // ALIGNMENT) * ALIGNMENT
        block = mmap.mmap(-1, max(size, 1))
        if hasattr(mmap, "MADV_HUGEPAGE"):
            block.madvise(mmap.MADV_HUGEPAGE)
        memory = memoryview(block)
        for name in sorted(expected, key=lambda name: header[name]["data_offsets"]):
            file.seek(8 + length + header[name]["data_offsets"][0])
            _fill(file, memory[starts[name] : starts[name] + expected[name].nbytes], path)
    return {name: _view(block, starts[name], tensor) for name, tensor in expected.items()}


def _fill(file: Any, memory: memoryview, path: Path) -> None:
    """Reads until the memory is full: one read gives at most 2 GiB."""
    while len(memory):
        count = file.readinto(memory)
        if not count:
            raise OSError(f"{path} ends early")
        memory = memory[count:]


def _view(block: mmap.mmap, start: int, like: Tensor) -> Tensor:
    if not like.numel():
        return torch.empty(like.shape, dtype=like.dtype)
    return torch.frombuffer(block, dtype=like.dtype, count=like.numel(), offset=start).view(like.shape)


def _header_problems(file: Any, expected: dict[str, Tensor]) -> list[str]:
    """What differs between an open file and the model in names, shapes and types, a sentence each."""
    names = set(file.keys())
    problems = name_problems(names, expected.keys())
    for name in sorted(expected.keys() & names):
        part = file.get_slice(name)
        have = f"{_DTYPES.get(part.get_dtype(), part.get_dtype())} {tuple(part.get_shape())}"
        want = f"{str(expected[name].dtype).removeprefix('torch.')} {tuple(expected[name].shape)}"
        if have != want:
            problems.append(f"{name}: {have} in the file, {want} in the model")
    return problems


def name_problems(names: Set[str], expected: Set[str]) -> list[str]:
    """Which tensors are missing and which are not expected, a sentence each."""
    found = (("missing", expected - names), ("unexpected", names - expected))
    return [f"{kind}: {_listed(sorted(those))}" for kind, those in found if those]


_DTYPES = {
    "F64": "float64",
    "F32": "float32",
    "F16": "float16",
    "BF16": "bfloat16",
    "I64": "int64",
    "I32": "int32",
    "U8": "uint8",
    "BOOL": "bool",
}


_DTYPE_NAMES = {name: kind for kind, name in _DTYPES.items()}


def is_finite(tensor: Tensor) -> bool:
    """Whether no element is NaN or infinite, without a copy: one of them would make the sum so too."""
    return bool(tensor.sum().isfinite()) or bool(tensor.isfinite().all())


def _listed(names: list[str]) -> str:
    return ", ".join(names)


def replace_folder(folder: Path, partial: Path) -> None:
    """Puts `partial` where `folder` is, by renaming; all of it is on the disk then, so a power cut empties no file."""
    for path in (*partial.rglob("*"), partial):
        _to_disk(path)
    old = folder.with_name(f".{folder.name}{OLD}")
    shutil.rmtree(old, ignore_errors=True)
    if folder.exists():
        folder.rename(old)
    partial.rename(folder)
    _to_disk(folder.parent)
    shutil.rmtree(old, ignore_errors=True)


def _to_disk(path: Path) -> None:
    """Waits until a file or a folder's entries are on the disk, where the file system knows how to."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(descriptor)


def write_json(path: Path, content: Any) -> None:
    """Writes a JSON file, for people to read too."""
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def read_json(path: Path) -> Any:
    """A JSON file's content. Raises CheckpointError."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror}") from error
    except ValueError as error:
        raise CheckpointError(f"{path} is not JSON: {error}") from error
