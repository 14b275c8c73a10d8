"""Jobs done by a Ray cluster: a task a bag. It needs `ray`, and folders that every machine sees under the same name."""

import os
from collections.abc import Generator
from typing import Any

from dit_policy_training.conversion.jobs import Begun, Done, Event, Halt, Job
from dit_policy_training.conversion.manifest import Refusal, ShardRecord
from dit_policy_training.conversion.options import OptionError
from dit_policy_training.conversion.workers import limit_threads

RETRIES = 3  # of a bag whose worker died
_LOOK_EVERY = 1.0  # s


def run_on_ray(jobs: list[Job], workers: int) -> Generator[Event, None, None]:
    """Do `jobs` on the cluster of RAY_ADDRESS, or on one of this machine's `workers` cores that ends with the run.

    One Done each; closing the iterator cancels what is not done. Raises OptionError if `ray` is not installed.
    """
    ray = _ray()
    cluster = {} if os.environ.get("RAY_ADDRESS") else {"num_cpus": workers, "include_dashboard": False}
    ray.init(logging_level="ERROR", log_to_driver=False, **cluster)
    try:
        convert = ray.remote(max_retries=RETRIES)(_converted)
        tasks = {convert.options(num_cpus=job.threads).remote(job): job for job in jobs}
        for job in jobs:
            yield Begun(job.number)
        while tasks:
            finished, _ = ray.wait(list(tasks), num_returns=1, timeout=_LOOK_EVERY)
            for task in finished:
                job = tasks.pop(task)
                yield Done(job.number, _outcome(ray, task, job))
    finally:
        ray.shutdown()


def _ray() -> Any:
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # it would call home
    try:
        import ray
    except ImportError:
        raise OptionError("--executor=ray needs the package ray: pip install 'dit_policy_training[ray]'") from None
    return ray


def _converted(job: Job) -> ShardRecord | Refusal | Halt:
    from dit_policy_training.conversion.bag_to_shard import convert_bag

    limit_threads(job.threads)
    return convert_bag(job, lambda progress: None)


def _outcome(ray: Any, task: Any, job: Job) -> ShardRecord | Refusal | Halt:
    try:
        outcome: ShardRecord | Refusal | Halt = ray.get(task)
        return outcome
    except ray.exceptions.RayError as error:
        first_line = str(error).strip().splitlines()[0]
        reason = f"given up after {1 + RETRIES} attempts: {type(error).__name__}: {first_line}"
        return Refusal(job.given, reason, str(error))
