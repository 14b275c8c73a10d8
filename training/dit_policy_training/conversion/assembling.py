"""Finished shards to a dataset: joined, checked, reported on, and only then under its name."""

import json
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dit_policy_training.conversion.disk import no_room
from dit_policy_training.conversion.manifest import RECORD, Refusal, ShardRecord, flush, flush_name, write_json
from dit_policy_training.conversion.options import VERIFY
from dit_policy_training.conversion.settings import CONVERTER_VERSION, Settings

if TYPE_CHECKING:
    from dit_policy_training.conversion.verify import Reread


class OutputError(ValueError):
    """The dataset cannot be written where it was asked for, or what was written is not sound; says what to do."""


@dataclass(frozen=True)
class Contents:
    """What a dataset is to be made of: for each bag, in order, its shard or why it has none."""

    settings: Settings
    outcomes: tuple[ShardRecord | Refusal, ...]

    @property
    def shards(self) -> list[ShardRecord]:
        """Of the bags that were converted."""
        return [outcome for outcome in self.outcomes if isinstance(outcome, ShardRecord)]

    @property
    def refusals(self) -> list[Refusal]:
        """The bags that were not."""
        return [outcome for outcome in self.outcomes if isinstance(outcome, Refusal)]

    def as_json(self) -> dict[str, Any]:
        """The dataset's conversion.json, but for what its check found."""
        settings = self.settings.as_json()
        return {
            "settings": settings["options"],
            "annotations": settings["annotations"],
            "converter": {
                "converter": CONVERTER_VERSION,
                "dit_policy_training": version("dit_policy_training"),
                "lerobot": self.settings.lerobot,
            },
            "bags": list(self._bags()),
        }

    def _bags(self) -> Iterator[dict[str, Any]]:
        episodes = 0
        for outcome in self.outcomes:
            if isinstance(outcome, Refusal):
                yield {"path": str(outcome.bag), "refused": outcome.reason, "episodes": [], "account": outcome.account}
                continue
            yield {
                "path": outcome.bag,
                "sha256": outcome.fingerprint,
                "shard": outcome.folder.name,
                "key": outcome.key,
                "episodes": list(range(episodes, episodes + outcome.episodes)),
                "refused": None,
                "account": outcome.account,
            }
            episodes += outcome.episodes


def is_ours(output: Path) -> bool:
    """Whether a folder is a dataset that this command made."""
    return (output / RECORD).is_file()


def check_output(output: Path, overwrite: bool) -> None:
    """Raises OutputError for a place that is taken: before the work, not after it."""
    if output.exists() and not output.is_dir():
        raise OutputError(f"{output} is a file; expected the name of a folder")
    if not output.exists() or overwrite or is_ours(output) or not any(output.iterdir()):
        return
    raise OutputError(
        f"{output} exists, and convert did not make it (it has no {RECORD}); give --overwrite=true to replace it, or "
        "another --output"
    )


def is_up_to_date(output: Path, contents: Contents, mode: str) -> bool:
    """Whether the dataset is there, made of the same, and checked at least as thoroughly as `mode`."""
    try:
        present = json.loads((output / RECORD).read_text())
        checked = present.pop("verified")["mode"]
    except (OSError, ValueError, TypeError, KeyError):
        return False
    # Through JSON, as the other came: it knows no tuples.
    same = bool(present == json.loads(json.dumps(contents.as_json())))
    return same and VERIFY.index(checked) <= VERIFY.index(mode)


@dataclass(frozen=True)
class Findings:
    """What the check compared, and what the report warns of."""

    figures: dict[str, Any]
    warnings: list[str]


def assemble(output: Path, contents: Contents, mode: str, reread: "Reread | None") -> Findings:
    """Make the dataset. What `output` was before is replaced at the end, or kept.

    `mode` and `reread` as verify's. Raises OutputError with all problems if the check finds any.
    """
    from dit_policy_training.conversion.merging import merge_shards
    from dit_policy_training.conversion.report import write_report
    from dit_policy_training.conversion.verify import verify

    shards = [record.folder for record in contents.shards]
    with _replacing(output) as folder:
        merge_shards(shards, folder)
        (folder / "embodiment.yaml").write_text(contents.settings.embodiment)
        checked = verify(folder, shards, mode, reread)
        if checked.problems:
            raise OutputError(_unsound(output, checked.problems))
        write_json(folder / RECORD, {**contents.as_json(), "verified": checked.figures})
        return Findings(checked.figures, write_report(folder, checked.figures))


@contextmanager
def _replacing(output: Path) -> Iterator[Path]:
    """A temporary folder beside `output` that takes its name once the body is through; else it is removed."""
    partial = output.with_name(f".{output.name}.partial")
    replaced = output.with_name(f".{output.name}.replaced")
    _put_back(replaced, output)
    shutil.rmtree(partial, ignore_errors=True)
    output.parent.mkdir(parents=True, exist_ok=True)
    try:
        yield partial
        flush(partial)
        if output.exists():
            output.rename(replaced)
        partial.rename(output)
        flush_name(output)
    except Exception as error:
        if reason := no_room(error):
            raise OutputError(f"{output}: {reason}; make room, then run the same command to go on") from error
        raise
    finally:
        _put_back(replaced, output)
        shutil.rmtree(partial, ignore_errors=True)


def _put_back(replaced: Path, output: Path) -> None:
    """What stood there before stands there again, unless the new dataset does."""
    if replaced.exists() and not output.exists():
        replaced.rename(output)
    shutil.rmtree(replaced, ignore_errors=True)


def _unsound(output: Path, problems: Sequence[str]) -> str:
    found = "\n".join(f"  {problem}" for problem in problems)
    return (
        f"the dataset is not sound, so it was not put in place:\n{found}\n"
        f"Remove {output}.shards and convert again; if that does not help, please report it"
    )
