"""A dataset of the Hugging Face hub on this machine: what training needs of it, downloaded once."""

import os
from pathlib import Path

from dit_policy_ros.embodiment import Embodiment
from dit_policy_training.data.errors import DatasetError
from dit_policy_training.data.features import FORMAT, read_features

_FIRST = ["meta/*", "embodiment.yaml", "conversion.json"]
_TOKENS = ("HUGGINGFACE_TOKEN", "HF_TOKEN")


def download(repo_id: str, revision: str, embodiment: Embodiment | None) -> Path:
    """The folder of a dataset in the hub's cache (HF_HOME). Without a revision it is the tag of this format, or main.

    What describes the dataset comes first, so that one of another format, or of another robot, is refused before its
    videos are fetched; of those only the cameras that are trained on. With HF_HUB_OFFLINE=1, or where the hub cannot
    be reached, what was downloaded is used. Raises DatasetError.
    """
    commit = _described(repo_id, revision)
    robot = embodiment
    if robot is None and (commit / "embodiment.yaml").exists():
        robot = Embodiment.load(commit / "embodiment.yaml")
    videos = read_features(commit, robot).videos
    return _snapshot(repo_id, commit.name, [*_FIRST, "data/*", *(f"videos/{key}/*" for key in videos)])


def _described(repo_id: str, revision: str) -> Path:
    """The folder of the commit that is meant, with what describes the dataset."""
    if revision:
        return _snapshot(repo_id, revision, _FIRST)
    try:
        return _snapshot(repo_id, FORMAT, _FIRST)
    except _NotThereError:
        return _snapshot(repo_id, "main", _FIRST)


def _snapshot(repo_id: str, revision: str, patterns: list[str]) -> Path:
    import httpx
    from huggingface_hub import snapshot_download

    token = next((os.environ[name] for name in _TOKENS if os.environ.get(name)), None)  # None: the one of `hf auth`
    try:
        found = snapshot_download(repo_id, repo_type="dataset", revision=revision, allow_patterns=patterns, token=token)
    except (OSError, ValueError, httpx.HTTPError) as error:
        raise _in_words(error, repo_id, revision) from error
    return Path(str(found))


class _NotThereError(DatasetError):
    """A revision that the hub does not have, or the cache where the hub cannot be asked."""


def _in_words(error: Exception, repo_id: str, revision: str) -> DatasetError:
    """The error as a user of --dataset_repo_id needs it."""
    import httpx
    from huggingface_hub import errors

    what = f"dataset {repo_id} of the Hugging Face hub"
    if isinstance(error, errors.HFValidationError):
        return DatasetError(f"--dataset_repo_id is '{repo_id}'; expected NAME or OWNER/NAME, as on the hub: {error}")
    if isinstance(error, errors.GatedRepoError):
        return DatasetError(
            f"{what} is gated: ask for access on its page, then set {_TOKENS[0]} to a token of that account"
        )
    if isinstance(error, errors.RevisionNotFoundError):
        return _NotThereError(f"{what} has no revision '{revision}': see --dataset_revision")
    if isinstance(error, errors.RepositoryNotFoundError):
        has_token = any(os.environ.get(name) for name in _TOKENS)
        token = "the token given must be one that may read it" if has_token else f"set {_TOKENS[0]} to a token"
        return DatasetError(f"{what} does not exist, or is private: check the name; for a private one, {token}")
    if isinstance(error, errors.LocalEntryNotFoundError | httpx.HTTPError):
        return _NotThereError(
            f"{what} ({revision}) is not (or not wholly) in the cache, and the hub cannot be asked: "
            f"{_short(error)}. Check the network (HF_HUB_OFFLINE, a proxy), or copy the dataset here and give "
            "--dataset_path"
        )
    if isinstance(error, errors.HfHubHTTPError):
        return DatasetError(f"{what} ({revision}) cannot be downloaded: {_short(error)}; try again")
    if isinstance(error, OSError):
        return DatasetError(
            f"{what} cannot be written to the cache: {_short(error)}; set HF_HOME to a folder with room"
        )
    return DatasetError(f"{what} ({revision}) cannot be downloaded: {_short(error)}")


def _short(error: BaseException) -> str:
    """What an error, or the one behind it, says first."""
    cause = error.__cause__ or error
    return f"{type(cause).__name__} {str(cause).strip().splitlines()[0] if str(cause).strip() else ''}".strip()
