"""Runs commands of the package in forks of a process that has imported what takes seconds. Lines of JSON on stdin:
{"module", "arguments", "environment", "output": file} starts one and answers its process id, {"wait": id} answers the
exit status, as Popen has it."""

import json
import os
import runpy
import sys
import warnings


def main() -> None:
    warnings.simplefilter("ignore", DeprecationWarning)  # of forks beside threads: the only one is jemalloc's
    import dit_policy_training.loop.trainer  # noqa: F401
    import lerobot.datasets.lerobot_dataset  # noqa: F401

    for line in sys.stdin:
        order = json.loads(line)
        if "wait" in order:
            answer = os.waitstatus_to_exitcode(os.waitpid(order["wait"], 0)[1])
        else:
            answer = os.fork() or become(**order)
        print(answer, flush=True)


def become(module: str, arguments: list[str], environment: dict[str, str], output: str) -> int:
    os.setsid()  # a process group of its own, which can be killed as a whole
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    file = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    os.dup2(file, 1)
    os.dup2(file, 2)
    os.environ.update(environment)
    sys.argv = [module, *arguments]
    status = 1
    try:
        runpy.run_module(module, run_name="__main__", alter_sys=True)
    except SystemExit as ended:
        status = int(ended.code or 0)
    except BaseException as error:
        sys.excepthook(type(error), error, error.__traceback__)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


if __name__ == "__main__":
    main()
