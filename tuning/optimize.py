"""Search for MBMPO's hyperparameters: ``python -m tuning.optimize --env Pendulum-v1 --n-trials 20 --n-jobs 2``.

The same command again goes on where a search ended or was killed; with the same ``--storage`` on other machines, it helps.
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
import yaml
from optuna.exceptions import OptunaError
from sqlalchemy.exc import SQLAlchemyError
from tqdm import tqdm

from sb3_mbmpo.checks import check_integer, check_mapping
from sb3_mbmpo.search_space import SPACE, is_given
from sb3_mbmpo.zoo import read_config
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
    mend_journal,
    merge,
    open_storage,
    open_study,
    search_space,
)


def work(*arguments: Any) -> None:
    """A process of the search; only these need PyTorch, which takes its time to import."""
    threading.Thread(target=end_with_parent, daemon=True).start()
    with suppress(KeyboardInterrupt):
        from tuning import trials

        try:
            trials.work(*arguments)
        except SearchError as error:
            sys.exit(str(error))


def end_with_parent() -> None:
    """However a search is killed, it leaves no processes behind that nobody sees: their trials will be tried again."""
    parent = mp.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def watch(study: optuna.Study, n_trials: int, processes: Sequence[BaseProcess]) -> None:
    """Draw the progress of the whole study, other machines' trials too, until no process is left."""
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


def positive(text: str) -> int:
    """:return: an integer of at least 1"""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be an integer of at least 1, not {text!r}")
    return int(text)


def yaml_mapping(text: str) -> dict[str, Any]:
    """:return: what a dictionary in YAML says"""
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise argparse.ArgumentTypeError(f"must be YAML: {error}") from error
    if not isinstance(value, dict):
        raise argparse.ArgumentTypeError(f"must be a dictionary such as '{{horizon: 100}}', not {text!r}")
    return value


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """:return: the command line's arguments"""
    parser = argparse.ArgumentParser(prog="python -m tuning.optimize", description=__doc__)
    add_arguments(parser)
    parser.add_argument("--n-trials", type=positive, default=20, help="finished trials the study is to have, of all machines")
    parser.add_argument("--n-jobs", type=positive, default=1, help="processes on this machine; they share its PyTorch threads")
    parser.add_argument("--objective", choices=OBJECTIVES, default="last", help="of the returns of a learning curve")
    parser.add_argument("--n-seeds", type=positive, default=3, help="the objective is the mean over seeds 0, 1, ...")
    parser.add_argument("--n-timesteps", type=positive, help="real steps of a training; by default those of the configuration")
    parser.add_argument("--n-evaluations", type=positive, default=8, help="points of a learning curve; a trial can end at any")
    parser.add_argument("--n-eval-episodes", type=positive, default=10, help="of each evaluation")
    parser.add_argument(
        "--search", nargs="+", choices=SPACE, default=list(SPACE), metavar="NAME", help=f"by default all of {', '.join(SPACE)}"
    )
    parser.add_argument(
        "--set",
        type=yaml_mapping,
        default={},
        metavar="YAML",
        help="what all trials have other than the configuration, for example '{n_imagined_rollouts: 10}'",
    )
    parser.add_argument("--heartbeat", type=positive, default=30, help="seconds between two signs of life of a trial")
    parser.add_argument("--device", default="cpu", help="of the networks: cpu, cuda, ...")
    return complete(parser.parse_args(argv))


def check_entry(config: dict[str, Any]) -> None:
    """
    Check what of a configuration is read before there is a model, whose constructor checks the rest.

    :param config: an entry of the configuration file, with --set over it
    :raises ValueError: for the first value that cannot be
    """
    for name in ("n_timesteps", "learning_starts", "n_envs"):
        if name in config:
            check_integer(name, config[name], 1)
    for name in ("policy_kwargs", "dynamics_kwargs", "env_kwargs"):
        if config.get(name) is not None:
            check_mapping(name, config[name])
    if not isinstance(config.get("env_id", ""), str):
        raise ValueError(f"`env_id` must be the id of an environment, not {config['env_id']!r}.")


def check_model(settings: dict[str, Any], device: str) -> None:
    """
    Find what cannot work before a study begins, whose settings would be those for good. In a process that needs PyTorch.

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
    :param env_id: of a registered environment, or "pkg.module:ID", whose module registers it
    :raises ImportError: if there is no such module
    :raises gymnasium.error.Error: if there is no such environment
    """
    module, _, name = env_id.rpartition(":")
    if module:
        importlib.import_module(module)
    gym.spec(name)


def study_settings(arguments: argparse.Namespace) -> dict[str, Any]:
    """
    :return: what all trials of the study have in common, in numbers and strings that any storage keeps
    :raises ImportError: if the environment's module cannot be imported
    :raises gymnasium.error.Error: if there is no such environment
    :raises ValueError: if nothing would be learned, or nothing searched
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
        raise ValueError(f"Nothing is left to search: of {', '.join(arguments.search)}, --set or --n-timesteps decides all.")
    return settings


def main(argv: Sequence[str] | None = None) -> None:
    """Start the processes, watch them, write the report."""
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    try:
        arguments = parse(argv)
        settings = study_settings(arguments)
        with damage_named(arguments.storage):
            mend_journal(arguments.storage)
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
        print(f"Not searched, as --set or --n-timesteps decides them: {', '.join(decided)}")
    # Without it, the processes would outlive this one when a cluster ends it
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("Terminated: the same command goes on with the study."))
    n_jobs = max(1, min(arguments.n_jobs, arguments.n_trials - len(finished(study))))
    task = (arguments, settings, n_jobs)
    processes = [mp.get_context("spawn").Process(target=work, args=task, daemon=True) for _ in range(n_jobs)]
    for process in processes:
        process.start()
    try:
        watch(study, arguments.n_trials, processes)
    except KeyboardInterrupt:
        for process in processes:
            process.join()
        sys.exit("Interrupted: the same command goes on with the study.")
    if len(finished(study)) < arguments.n_trials:
        codes = sorted({process.exitcode for process in processes if process.exitcode is not None})
        sys.exit(
            f"All processes of this machine ended with an error, see above, or were killed (exit codes {codes}): the same "
            "command goes on with the study."
        )
    from tuning.report import write_report  # Matplotlib and Plotly: nothing that a search should wait for

    print(f"Report: {write_report(study, arguments.output)}")


if __name__ == "__main__":
    main()
