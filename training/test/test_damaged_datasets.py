"""A dataset's files damaged at random: what is read is the very same, or the damage is told; never a traceback."""

import random
import shutil
from pathlib import Path

import numpy as np
import pytest
from dit_policy_training.data.frames import open_frames
from dit_policy_training.data.table import Table, load_table

CORRUPTIONS = 100


def damaged(data: bytes, dice: random.Random) -> bytes | None:
    """The bytes with one fault; None: the file is gone."""
    at, length = dice.randrange(len(data)), dice.randint(1, 64)
    some = data[at : at + length]
    return dice.choice(
        [
            data[:at] + bytes([data[at] ^ dice.randint(1, 255)]) + data[at + 1 :],
            data[:at] + dice.randbytes(len(some)) + data[at + length :],
            data[:at] + bytes(len(some)) + data[at + length :],
            data[:at] + some + data[at:],
            data[:at],
            b"",
            None,
        ]
    )


def read(root: Path) -> tuple[Table, dict[str, np.ndarray]]:
    table = load_table(root)
    pictures = open_frames(table, cache="memory").gather(np.arange(len(table))[:, None])
    return table, {key: value.numpy() for key, value in pictures.items()}


@pytest.mark.timeout(300)
@pytest.mark.parametrize("kind", ["dataset", "png_dataset"])
def test_damage_is_told_or_changes_nothing(kind: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    root: Path = request.getfixturevalue(kind)
    sound, pictures = read(root)
    unread = ("report.html", "report.json", "stats.json")
    files = sorted(path for path in root.rglob("*") if path.is_file() and path.name not in unread)
    told: list[str] = []
    for seed in range(CORRUPTIONS):
        dice = random.Random(seed)
        path = dice.choice(files).relative_to(root)
        copy = shutil.copytree(root, tmp_path / str(seed))
        (copy / path).unlink()
        if (data := damaged((root / path).read_bytes(), dice)) is not None:
            (copy / path).write_bytes(data)
        try:
            table, found = read(copy)
        except ValueError as error:  # a traceback in `train` for anything else
            told.append(str(error))
        else:
            assert table.fingerprint == sound.fingerprint, (seed, path)
            assert found.keys() == pictures.keys(), (seed, path)
            assert all(np.array_equal(found[key], pictures[key]) for key in pictures), (seed, path)
        shutil.rmtree(copy)
    assert len(told) > CORRUPTIONS / 2
    assert all(str(tmp_path) in message for message in told)
