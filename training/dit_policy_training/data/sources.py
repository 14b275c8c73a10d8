"""Which datasets a run trains on: a folder, a repository of the Hugging Face hub, or several with weights."""

from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from dit_policy_ros.embodiment import Embodiment
from dit_policy_training.data.errors import DatasetError
from dit_policy_training.data.hub import download


@dataclass
class DatasetSource:
    """One of several datasets: a folder or a repository of the hub."""

    path: Path | None = None  # folder of a LeRobotDataset v3
    repo_id: str = ""  # or its name on the hub
    revision: str = ""  # there: branch, tag or commit
    weight: float = 0.0  # share of the samples, relative to the other datasets'; 0: as many as it has frames


@dataclass(frozen=True)
class ResolvedSource:
    """A dataset on this machine. `weight` is DatasetSource's; `name` is what messages call it."""

    root: Path
    weight: float
    name: str


class Choice(Protocol):
    """The options that say which datasets; a run's configuration has them."""

    dataset_path: Path | None
    dataset_repo_id: str
    dataset_revision: str
    datasets: list[DatasetSource]
    embodiment: Path | None


def resolve(choice: Choice) -> list[ResolvedSource]:
    """The chosen datasets, in order; what is on the hub is downloaded unless it was.

    Raises DatasetError for a choice of none or of two ways at once, and for what the hub does not give; EmbodimentError
    for a wrong YAML.
    """
    ways = {
        "--dataset_path": choice.dataset_path is not None,
        "--dataset_repo_id": bool(choice.dataset_repo_id),
        "--datasets": bool(choice.datasets),
    }
    given = [name for name, is_given in ways.items() if is_given]
    if len(given) != 1:
        found = f"{' and '.join(given)} exclude each other" if given else "no dataset is given"
        raise DatasetError(
            f"{found}: give --dataset_path=FOLDER, --dataset_repo_id=NAME or --datasets='[{{path: ...}}]'"
        )
    if choice.dataset_revision and not choice.dataset_repo_id:
        raise DatasetError(f"--dataset_revision={choice.dataset_revision} is for --dataset_repo_id, which is not given")
    sources = choice.datasets or [DatasetSource(choice.dataset_path, choice.dataset_repo_id, choice.dataset_revision)]
    _check(sources)
    robot = None if choice.embodiment is None else Embodiment.load(choice.embodiment)
    return [_resolved(source, robot) for source in sources]


def _check(sources: list[DatasetSource]) -> None:
    problems = []
    for number, source in enumerate(sources):
        where = f"datasets[{number}]"
        if (source.path is None) == (not source.repo_id):
            problems.append(f"{where} needs either a path or a repo_id; got {source}")
        if source.revision and not source.repo_id:
            problems.append(f"{where} has the revision {source.revision}, which is for a repo_id")
        if not 0 <= source.weight < float("inf"):
            problems.append(f"{where} has the weight {source.weight}; it must be finite and at least 0")
    weights = [source.weight for source in sources]
    if any(weights) and not all(weights):
        problems.append(f"give every dataset a weight above 0, or none of them; got {weights}")
    if problems:
        raise DatasetError("datasets that cannot be:\n  - " + "\n  - ".join(problems))


def _resolved(source: DatasetSource, robot: Embodiment | None) -> ResolvedSource:
    if source.repo_id:
        root = download(source.repo_id, source.revision, robot)
        return ResolvedSource(root, source.weight, source.repo_id.rpartition("/")[2])
    path = Path(source.path or "")
    if not path.is_dir():
        like_a_repository = not path.is_absolute() and len(path.parts) == 2
        hint = f"; of the Hugging Face hub it would be --dataset_repo_id={path}" if like_a_repository else ""
        found = "it is a file, a dataset is a folder" if path.exists() else f"there is no such folder{hint}"
        raise DatasetError(f"{path} is not a LeRobotDataset: {found}")
    return ResolvedSource(path, source.weight, path.resolve().name)
