"""A run of the converter: what is done already, what is left, who does it, and what becomes of it."""

import os
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console

from dit_policy_ros.embodiment import Embodiment
from dit_policy_training.conversion.annotations import Annotation, read_annotations
from dit_policy_training.conversion.assembling import Contents, assemble, check_output, is_up_to_date
from dit_policy_training.conversion.checking import check_options, shard_of
from dit_policy_training.conversion.interrupts import Stopped, stoppable
from dit_policy_training.conversion.jobs import Done, Executor, Halt, Job
from dit_policy_training.conversion.layout import Layout
from dit_policy_training.conversion.locking import locked
from dit_policy_training.conversion.manifest import (
    BagFile,
    Part,
    Refusal,
    ShardRecord,
    ShardsFolder,
    files_of,
    without_copies,
)
from dit_policy_training.conversion.options import ConvertConfig
from dit_policy_training.conversion.progress import ProgressBar, Summary, counted, print_line, print_refusal
from dit_policy_training.conversion.ray_cluster import run_on_ray
from dit_policy_training.conversion.recording import find_bags
from dit_policy_training.conversion.settings import Settings, robot_of
from dit_policy_training.conversion.shards import encoders_of
from dit_policy_training.conversion.streams import samplings_of
from dit_policy_training.conversion.workers import run_in_processes

if TYPE_CHECKING:
    from dit_policy_training.conversion.verify import Reread

EXECUTORS: dict[str, Executor] = {"local": run_in_processes, "ray": run_on_ray}


class RunError(ValueError):
    """The run could not do what it was for; the message says what to do."""


@dataclass(frozen=True)
class Plan:
    """What a run is to do."""

    config: ConvertConfig
    embodiment: Embodiment  # with the dataset's fps
    settings: Settings
    all_bags: tuple[Path, ...]  # sorted, of all runs that share the work
    number: int  # this run is the number-th
    of: int
    notes: tuple[str, ...]  # what is odd about what was asked for

    @classmethod
    def of_config(cls, config: ConvertConfig) -> "Plan":
        """Raises OptionError, EmbodimentError, VideoError and BagError for what makes no sense."""
        check_options(config)
        embodiment = robot_of(config)
        layout = Layout.of(config, embodiment)  # what contradicts the embodiment is said before the work
        samplings_of(embodiment, config.depth, config.time)
        if config.video.use_videos:
            encoders_of(layout, config.video)  # and which video cannot be made
        bags = tuple(find_bags(config.bags))
        nobodys = [one for one in _annotations(config) if not any(one.is_of(bag.absolute()) for bag in bags)]
        number, of = shard_of(config)
        notes = tuple(f"{one.where}: none of the bags is '{one.bag}'" for one in nobodys)
        return cls(config, embodiment, Settings.of(config, embodiment), bags, number, of, notes)

    @property
    def part(self) -> str:
        """This run's part of a work that is shared by --shard; empty if it does all."""
        return f"{self.number}-of-{self.of}" if self.config.shard else ""

    @property
    def bags(self) -> tuple[Path, ...]:
        """This run's."""
        return self.all_bags[self.number - 1 :: self.of]


def run(config: ConvertConfig, console: Console) -> list[Refusal]:
    """Convert what is not converted yet and make the dataset of it; with --shard only this part's shards.

    Returns the bags that were refused. Raises OptionError, EmbodimentError, VideoError, BagError, OutputError,
    LockedError and RunError for what makes the whole run pointless, and Stopped if a signal ends it.
    """
    plan = Plan.of_config(config)
    if not plan.part:
        check_output(config.output, config.overwrite)
    shards = ShardsFolder.of(config.output)
    with stoppable(), locked(shards.path, plan.part):
        shards.clear(plan.part or "all")  # what killed runs left
        try:
            return _run(plan, shards, console)
        except Stopped as stop:
            stop.args = (f"{stop}; what is done is kept in {shards.path}: run the same command to go on",)
            raise
        finally:
            shards.clear(plan.part or "all")  # what workers left that died, or were stopped


def _run(plan: Plan, shards: ShardsFolder, console: Console) -> list[Refusal]:
    summary = Summary(plan.config.output)
    contents = _converted(plan, shards, summary, console)
    if plan.part:
        shards.save_part(Part.of_run(plan.number, plan.of, plan.all_bags, contents.outcomes, plan.settings))
        print_line(console, _part_done(plan, contents))
    else:
        _make_dataset(plan, shards, contents, summary, console)
    return contents.refusals


def _converted(plan: Plan, shards: ShardsFolder, summary: Summary, console: Console) -> Contents:
    """Every bag's outcome, in order; what the run before left undone is done now."""
    outcomes, jobs = _split(plan, shards)
    for line in _announcement(plan, shards, jobs):
        print_line(console, line)
    if jobs:
        outcomes |= _done(plan, jobs, console)
    in_order = without_copies([outcomes[number] for number in range(len(plan.bags))])
    for bag, outcome in zip(plan.bags, in_order, strict=True):
        if isinstance(outcome, Refusal):
            shards.refuse(outcome)
            if outcome not in outcomes.values():  # a copy; the others were said when they happened
                print_refusal(console, outcome)
        else:
            shards.accept(bag)
            if ShardRecord.load(outcome.folder) != outcome:  # the bag was moved or touched
                outcome.save()
    summary.converted = len(jobs)
    return Contents(plan.settings, tuple(in_order))


def _annotations(config: ConvertConfig) -> list[Annotation]:
    path = config.episodes.annotations
    return [] if path is None else read_annotations(path)


def _split(plan: Plan, shards: ShardsFolder) -> tuple[dict[int, ShardRecord | Refusal], list[Job]]:
    """The bags whose shards are there, by number, and the jobs that are left, the largest bag first.

    A bag whose files have the size and the time that its shard's record says is not read again.
    """
    ready = {record.files: record for record in shards.records() if record.settings == plan.settings}
    outcomes: dict[int, ShardRecord | Refusal] = {}
    left: list[tuple[int, Path, tuple[BagFile, ...]]] = []
    for number, bag in enumerate(plan.bags):
        files = _files_of(bag)
        if files in ready:
            outcomes[number] = replace(ready[files], bag=str(bag))
        else:
            left.append((number, bag, files))
    processes, threads = _cores(plan.config, len(left))
    jobs = [
        Job(
            number=number,
            bag=bag.absolute(),
            given=bag,
            size=sum(file.size for file in files),
            config=replace(plan.config, workers=processes),
            embodiment=plan.embodiment,
            shards=shards.path.absolute(),
            part=plan.part or "all",
            threads=threads,
        )
        for number, bag, files in left
    ]
    return outcomes, sorted(jobs, key=lambda job: (-job.size, job.number))


def _files_of(bag: Path) -> tuple[BagFile, ...]:
    try:
        return files_of(bag)
    except OSError:  # its worker will say why it cannot be read
        return ()


def _cores(config: ConvertConfig, bags: int) -> tuple[int, int]:
    """How many bags at a time, and with how many cores each: one, unless there are fewer bags than cores here."""
    cores = config.workers or len(os.sched_getaffinity(0))
    processes = max(min(cores, bags), 1)
    return processes, cores // processes if config.executor == "local" else 1


def _done(plan: Plan, jobs: list[Job], console: Console) -> dict[int, ShardRecord | Refusal]:
    outcomes: dict[int, ShardRecord | Refusal] = {}
    workers, _ = _cores(plan.config, len(jobs))
    events = EXECUTORS[plan.config.executor](jobs, workers)
    with closing(events), ProgressBar(console, jobs, len(plan.bags)) as bar:
        for event in events:
            bar.show(event)
            if not isinstance(event, Done):
                continue
            if isinstance(event.outcome, Halt):
                raise RunError(event.outcome.reason)
            outcomes[event.number] = event.outcome
    return outcomes


def _announcement(plan: Plan, shards: ShardsFolder, jobs: list[Job]) -> Iterator[str]:
    yield from plan.notes
    done = len(plan.bags) - len(jobs)
    if done and jobs:
        yield f"{done} of {counted(len(plan.bags), 'bag')} done already, {len(jobs)} to do"
    others = [record.settings for record in shards.records() if record.settings != plan.settings]
    if others and jobs:
        changes = "; ".join(plan.settings.differences(others[0]))
        yield f"settings changed since an earlier run, so its shards do not serve: {changes}"


def _part_done(plan: Plan, contents: Contents) -> str:
    refused = f", {len(contents.refusals)} refused" if contents.refusals else ""
    return (
        f"part {plan.config.shard}: {len(contents.shards)} of {counted(len(plan.bags), 'bag')} converted{refused}. "
        f"When all parts are through: python -m dit_policy_training.merge --output={plan.config.output}"
    )


def _make_dataset(plan: Plan, shards: ShardsFolder, contents: Contents, summary: Summary, console: Console) -> None:
    config = plan.config
    if not contents.shards:
        raise RunError(f"of {counted(len(plan.bags), 'bag')} none could be converted; the reasons stand above")
    if is_up_to_date(config.output, contents, config.verify):
        print_line(console, f"{config.output}: nothing has changed since it was made, nothing to do")
        return
    with console.status("joining and checking"):
        findings = assemble(config.output, contents, config.verify, _rereader(plan, contents))
    summary.removed = shards.remove_all_but(contents.shards, plan.bags)
    console.print(summary.table(contents, findings))


def _rereader(plan: Plan, contents: Contents) -> "Reread":
    bags = {
        outcome.folder: bag
        for bag, outcome in zip(plan.bags, contents.outcomes, strict=True)
        if isinstance(outcome, ShardRecord)
    }

    def reread(shard: Path) -> Iterator[object]:
        from dit_policy_training.conversion.bag_to_shard import sampled

        return sampled(bags[shard], plan.config, plan.embodiment)

    return reread
