"""`python -m dit_policy_training.merge`: the shards of several `convert --shard=i/n` runs to one dataset."""

from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path

from rich.console import Console

from dit_policy_training import cli
from dit_policy_training.conversion.assembling import Contents, assemble, check_output, is_up_to_date
from dit_policy_training.conversion.checking import check_verify
from dit_policy_training.conversion.interrupts import stoppable
from dit_policy_training.conversion.locking import locked
from dit_policy_training.conversion.manifest import (
    ManifestError,
    Part,
    Refusal,
    ShardRecord,
    ShardsFolder,
    without_copies,
)
from dit_policy_training.conversion.options import OptionError
from dit_policy_training.conversion.progress import Summary, print_line, print_refusal


@dataclass
class MergeConfig:
    """Shards to a dataset, the same that one `convert` of all bags makes. Exit status: 1 if any bag was refused."""

    output: Path  # folder of the dataset; appears only when complete
    shards: str = ""  # folders of shards, with commas between; empty: OUTPUT.shards, where convert leaves them
    overwrite: bool = False  # replace an `output` that convert or merge did not make
    verify: str = "sample"  # or full: every picture, against the shards; off


def merge(config: MergeConfig, console: Console | None = None) -> list[Refusal]:
    """Make the dataset; returns the bags that were refused.

    Raises OptionError, ManifestError, OutputError and LockedError, with what is missing or does not fit together.
    """
    console = console or Console()
    if problems := check_verify(config.verify):
        raise OptionError(problems[0])
    check_output(config.output, config.overwrite)
    folders = [ShardsFolder(folder) for folder in _folders(config)]
    with stoppable(), locked(ShardsFolder.of(config.output).path):
        parts = [part for folder in folders for part in folder.parts()]
        records = [record for folder in folders for record in folder.records()]
        contents = _contents(parts, records, ", ".join(str(folder.path) for folder in folders))
        for refusal in contents.refusals:
            print_refusal(console, refusal)
        if is_up_to_date(config.output, contents, config.verify):
            print_line(console, f"{config.output}: nothing has changed since it was made, nothing to do")
            return contents.refusals
        summary = Summary(config.output)
        with console.status("joining and checking"):
            findings = assemble(config.output, contents, config.verify, None)
        console.print(summary.table(contents, findings))
    return contents.refusals


def _folders(config: MergeConfig) -> list[Path]:
    if not config.shards:
        return [ShardsFolder.of(config.output).path]
    folders = [Path(name.strip()) for name in config.shards.split(",")]
    if missing := [str(folder) for folder in folders if not folder.is_dir()]:
        raise OptionError(f"--shards: {', '.join(missing)} not there; expected folders, such as {config.output}.shards")
    return folders


def _contents(parts: list[Part], records: list[ShardRecord], where: str) -> Contents:
    """Every bag's outcome, in the order of the bags."""
    if not parts:
        raise ManifestError(f"{where}: no finished part there; run convert with --shard=i/n for each i first")
    first = parts[0]
    _check_parts(parts, where)
    by_key = {record.key: record for record in records}
    shards = {bag: by_key[key] for part in parts for bag, key in part.done.items() if key in by_key}
    refused = {bag: reason for part in parts for bag, reason in part.refused.items()}
    missing = [bag for bag in first.bags if bag not in shards and bag not in refused]
    if missing:
        raise ManifestError(f"{where}: no shard of {', '.join(missing)}; run its part again")
    outcomes = (
        replace(shards[bag], bag=bag) if bag in shards else Refusal(Path(bag), refused[bag]) for bag in first.bags
    )
    contents = Contents(first.settings, tuple(without_copies(outcomes)))
    if not contents.shards:
        raise ManifestError(f"{where}: every bag was refused; run convert again and see why")
    return contents


def _check_parts(parts: list[Part], where: str) -> None:
    first = parts[0]
    for part in parts:
        name, other = f"{part.number}/{part.of}", f"{first.number}/{first.of}"
        if part.settings != first.settings:
            changes = "; ".join(part.settings.differences(first.settings))
            raise ManifestError(f"{where}: --shard={name} had other settings than {other}: {changes}; run one again")
        if part.of != first.of or part.bags != first.bags:
            raise ManifestError(
                f"{where}: --shard={name} was of {len(part.bags)} bags, {other} of {len(first.bags)}, or of others; "
                "run all parts again with the same --bags and n"
            )
    there = Counter(part.number for part in parts)
    if missing := [f"{number}/{first.of}" for number in range(1, first.of + 1) if number not in there]:
        raise ManifestError(f"{where}: --shard={', '.join(missing)} not finished; run convert with it first")


def main() -> int:
    """The command line; returns the exit status."""
    return cli.run(lambda config: 1 if merge(config) else 0, MergeConfig, "dit_policy_training.merge")


if __name__ == "__main__":
    raise SystemExit(main())
