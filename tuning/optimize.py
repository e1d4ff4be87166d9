"""Search for MBMPO's hyperparameters: ``python -m tuning.optimize --env Pendulum-v1 --n-trials 20 --n-jobs 2``.

Repeat the command to resume a search that ended or was killed. Run it with the same ``--storage`` on other machines to add
workers.
"""

import argparse
import importlib
import multiprocessing as mp
import os
import signal
import sys
import threading
import time
from collections.abc import Sequence
from concurrent.futures import BrokenExecutor, ProcessPoolExecutor
from contextlib import suppress
from multiprocessing.process import BaseProcess
from typing import Any

import gymnasium as gym
import optuna
from optuna.exceptions import OptunaError
from sqlalchemy.exc import SQLAlchemyError
from tqdm import tqdm

from sb3_mbmpo.zoo import check_entry, merge, read_config, yaml_mapping
from sb3_mbmpo.zoo.search_space import SPACE, is_given
from tuning.arguments import positive
from tuning.studies import (
    OBJECTIVES,
    SearchError,
    add_arguments,
    as_stored,
    best_value,
    check_training,
    complete,
    damage_named,
    finished,
    open_storage,
    open_study,
    repair_journal,
    search_space,
)


def work(*arguments: Any) -> None:
    """Run one worker of the search; only workers import PyTorch, which is slow to import."""
    threading.Thread(target=end_with_parent, daemon=True).start()
    with suppress(KeyboardInterrupt):
        from sb3_mbmpo.common.mujoco_messages import tidy_mujoco_messages
        from tuning import trials

        tidy_mujoco_messages()
        try:
            trials.work(*arguments)
        except SearchError as error:
            sys.exit(str(error))


def end_with_parent() -> None:
    """
    Wait for the parent process to end, then exit.

    This way, a search leaves no orphaned workers behind, however it is killed. Their trials will be retried.
    """
    parent = mp.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def watch(study: optuna.Study, n_trials: int, processes: Sequence[BaseProcess]) -> None:
    """Show a progress bar of the whole study, including other machines' trials, until the last worker has ended."""
    with tqdm(total=n_trials, initial=len(finished(study)), unit="trial", desc=study.study_name) as bar:
        alive = True
        while alive:
            alive = any(process.is_alive() for process in processes)
            best = best_value(study)
            bar.set_postfix_str("no complete trial yet" if best is None else f"best {best:.4g}", refresh=False)
            bar.n = min(len(finished(study)), n_trials)
            bar.refresh()
            if alive:
                time.sleep(1)


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(prog="python -m tuning.optimize", description=__doc__)
    add_arguments(parser)
    parser.add_argument("--n-trials", type=positive, default=20, help="total number of trials to finish, over all machines")
    parser.add_argument("--n-jobs", type=positive, default=1, help="workers on this machine; they share its PyTorch threads")
    parser.add_argument("--objective", choices=OBJECTIVES, default="last", help="how to score the returns of a learning curve")
    parser.add_argument("--n-seeds", type=positive, default=3, help="number of seeds 0, 1, ... that a trial is averaged over")
    parser.add_argument("--n-timesteps", type=positive, help="real steps of a training run; default: those configured")
    parser.add_argument(
        "--n-evaluations", type=positive, default=8, help="points of a learning curve; a trial can be pruned at any of them"
    )
    parser.add_argument("--n-eval-episodes", type=positive, default=10, help="episodes of each evaluation")
    parser.add_argument(
        "--search", nargs="+", choices=SPACE, default=list(SPACE), metavar="NAME", help=f"default: all of {', '.join(SPACE)}"
    )
    parser.add_argument(
        "--set",
        type=yaml_mapping,
        default={},
        metavar="YAML",
        help="changes to the configuration for all trials, for example '{n_imagined_rollouts: 10}'",
    )
    parser.add_argument("--heartbeat", type=positive, default=30, help="seconds between two heartbeats of a trial")
    parser.add_argument("--device", default="cpu", help="device of the networks: cpu, cuda, ...")
    return complete(parser.parse_args(argv))


def check_model(settings: dict[str, Any], device: str) -> None:
    """
    Reject what cannot work before a study stores its settings for good.

    A process of its own makes the model, because making it imports PyTorch.

    :param settings: those of the study
    :param device: of the networks
    :raises SearchError: if there can be no such environment, or no such model
    """
    with ProcessPoolExecutor(1, mp_context=mp.get_context("spawn")) as pool:
        try:
            pool.submit(_check_model, settings, device).result()
        except BrokenExecutor as error:
            raise SearchError(f"The environment {settings['env']!r} ended the process that made it.") from error


def _check_model(*arguments: Any) -> None:
    from tuning import trials

    trials.check_configuration(*arguments)


def find_environment(env_id: str) -> None:
    """
    Check that an environment exists, importing the module that registers it if one is named.

    :param env_id: id of a registered environment, or "pkg.module:ID", whose module registers it
    :raises ImportError: if there is no such module
    :raises gymnasium.error.Error: if there is no such environment
    """
    module, _, name = env_id.rpartition(":")
    if module:
        importlib.import_module(module)
    gym.spec(name)


def study_settings(arguments: argparse.Namespace) -> dict[str, Any]:
    """
    Return the settings that all trials of the study have in common.

    :param arguments: command-line arguments
    :return: settings that any storage can keep, as JSON
    :raises ImportError: if the environment's module cannot be imported
    :raises gymnasium.error.Error: if there is no such environment
    :raises ValueError: if nothing would be learned, or if there is nothing to search
    """
    config = merge(read_config(arguments.env), arguments.set)
    check_entry(config)
    find_environment(config.get("env_id", arguments.env))
    config["n_timesteps"] = arguments.n_timesteps or config["n_timesteps"]
    settings = as_stored(
        {
            "env": arguments.env,
            "config": config,
            "n_timesteps": config["n_timesteps"],
            "names": sorted(name for name in arguments.search if not is_given(name, arguments.set)),
            **{name: getattr(arguments, name) for name in ("objective", "n_seeds", "n_evaluations", "n_eval_episodes")},
        }
    )
    check_training(settings)
    settings["names"] = sorted(search_space(settings))
    if not settings["names"]:
        raise ValueError(f"Nothing is left to search: --set or --n-timesteps fixes all of {', '.join(arguments.search)}.")
    return settings


def main(argv: Sequence[str] | None = None) -> None:
    """Start the workers, show their progress and write the report."""
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    try:
        arguments = parse(argv)
        settings = study_settings(arguments)
        with damage_named(arguments.storage):
            repair_journal(arguments.storage)
            storage = open_storage(arguments.storage, arguments.heartbeat)
            is_new = arguments.study_name not in optuna.get_all_study_names(storage)
        if is_new:
            check_model(settings, arguments.device)
        with damage_named(arguments.storage):
            study = open_study(storage, arguments.study_name, settings)
            study.get_trials()
    except (SearchError, ValueError, ImportError, OSError, gym.error.Error, SQLAlchemyError, OptunaError) as error:
        sys.exit(str(error).partition("\n")[0])
    if decided := sorted(set(arguments.search) - set(settings["names"])):
        print(f"Not searched, because --set or --n-timesteps fixes them: {', '.join(decided)}")
    # Without a handler, the workers would outlive this process when a cluster terminates it
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("Terminated: the same command resumes the study."))
    n_jobs = max(1, min(arguments.n_jobs, arguments.n_trials - len(finished(study))))
    process_class = mp.get_context("spawn").Process
    processes = [process_class(target=work, args=(arguments, settings, n_jobs), daemon=True) for _ in range(n_jobs)]
    for process in processes:
        process.start()
    try:
        watch(study, arguments.n_trials, processes)
    except KeyboardInterrupt:
        for process in processes:
            process.join()
        sys.exit("Interrupted: the same command resumes the study.")
    if len(finished(study)) < arguments.n_trials:
        codes = sorted({process.exitcode for process in processes if process.exitcode is not None})
        sys.exit(
            f"All workers of this machine ended with an error, see above, or were killed (exit codes {codes}): the same "
            "command resumes the study."
        )
    from tuning.report import write_report  # imports Matplotlib and Plotly, which a search should not wait for

    print(f"Report: {write_report(study, arguments.output)}")


if __name__ == "__main__":
    main()
