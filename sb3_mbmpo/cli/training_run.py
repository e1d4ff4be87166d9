"""A training run of the command line, which is evaluated at milestones, saved after every iteration, and resumed exactly.

The model's file names the buffer that belongs to it. The buffer is written first, under a new name; then the model replaces
the previous one; then the previous buffer is removed. However the process ends, there is a model with its buffer.
"""

import argparse
import importlib.util
import inspect
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.logger import HumanOutputFormat, KVWriter, Logger, TensorBoardOutputFormat
from stable_baselines3.common.type_aliases import PolicyPredictor
from stable_baselines3.common.vec_env import VecEnv

from sb3_mbmpo.cli.interrupts import Interrupted, interrupts_raise
from sb3_mbmpo.cli.repeatable import RepeatableEpisode
from sb3_mbmpo.common.checks import nearest_name
from sb3_mbmpo.common.mujoco_messages import tidy_mujoco_messages
from sb3_mbmpo.common.world import ALONE, ProcessLostError, World, process_group
from sb3_mbmpo.mbmpo import MBMPO
from sb3_mbmpo.report.episodes import RandomPolicy, evaluation_seed
from sb3_mbmpo.report.run_log import RunLogFile, run_folder
from sb3_mbmpo.zoo import ENV_ENTRIES, check_entry, merge, read_config

# The attribute of a model that describes the run of the command line
RUN = "command_line_run"


class Checkpoints(BaseCallback):
    """
    A callback that saves a model and its buffer between two iterations.

    :param path: the model's file
    :param task: the arguments that identify the run, stored in the model's file
    :param every: minimum number of real steps between two checkpoints; 0: every iteration
    """

    log: RunLogFile

    def __init__(self, path: Path, task: dict[str, Any], every: int = 0) -> None:
        super().__init__()
        self.path, self.task, self.every = path, task, every
        self.saved_steps: int | None = None  # None: this process has neither saved nor loaded the model
        self.start, self.seconds_before = time.perf_counter(), 0.0

    def _on_rollout_start(self) -> None:
        if self._is_due(max(self.every, 1)):
            self.save()

    def _on_step(self) -> bool:
        return True

    def _on_training_end(self) -> None:
        if self._is_due(1):
            self.save()

    def _is_due(self, every: int) -> bool:
        assert isinstance(self.model, MBMPO)
        if self.saved_steps is None:  # a model that has learned nothing must not replace an older one
            return self.model._n_fits > 0 or not self.path.exists()
        return self.num_timesteps - self.saved_steps >= every

    def seconds(self) -> float:
        """Return the seconds of training, summed over all processes of the run."""
        return self.seconds_before + time.perf_counter() - self.start

    def save(self) -> None:
        """
        Save the model and its buffer, remove the previous buffer, and release the log.

        :raises OSError: if they cannot be written; the previous ones are kept
        """
        folder = run_folder(self.path)
        names = (f"replay_buffer-{self.num_timesteps}{tail}.pkl" for tail in ("", *(f"-{i}" for i in range(2, 1000))))
        buffer = next(folder / name for name in names if not (folder / name).exists())
        assert isinstance(self.model, MBMPO) and self.model.env is not None
        self.model.save_replay_buffer(buffer)
        episodes = self.model.env.env_method("so_far")
        run = {**self.task, "buffer": buffer.name, "seconds": self.seconds(), "episodes": episodes}
        vars(self.model)[RUN] = run
        self.model.save(self.path)
        self.log.release()
        self.saved_steps = self.num_timesteps
        for other in folder.glob("replay_buffer-*.pkl"):
            if other != buffer:
                other.unlink()


class TrainingRun:
    """
    A run of the command line's ``train``.

    :param arguments: the command line's arguments
    :param world: the processes that learn together
    :raises ValueError: if a setting cannot be, or the model's file exists already, and the arguments do not say what to do
    :raises ImportError: if TensorBoard is asked for, but not installed
    """

    def __init__(self, arguments: argparse.Namespace, world: World = ALONE) -> None:
        self.arguments, self.world = arguments, world
        config = merge(read_config(arguments.env), arguments.set)
        check_entry(config)
        check_names(config)
        if arguments.tensorboard_log is not None and importlib.util.find_spec("tensorboard") is None:
            raise ImportError("--tensorboard-log needs TensorBoard: pip install 'sb3-mbmpo[tensorboard]'.")
        self.env_id, self.n_envs = config.get("env_id", arguments.env), config.get("n_envs", 1)
        self.env_kwargs = config.get("env_kwargs") or {}
        self.hyperparams = {key: value for key, value in config.items() if key not in ENV_ENTRIES}
        self.total = arguments.total_timesteps or int(config["n_timesteps"])
        self.path = model_path(arguments)
        self.model: MBMPO | None = None
        task = {"env": arguments.env, "env_id": self.env_id, "env_kwargs": self.env_kwargs, "seed": arguments.seed}
        task["set"] = {name: value for name, value in arguments.set.items() if name not in ENV_ENTRIES}
        self.checkpoints = Checkpoints(self.path, task, arguments.save_every)
        # The other processes may be on another machine, and have no files
        if world.rank == 0 and self.path.exists() and not (arguments.resume or arguments.overwrite):
            raise ValueError(
                f"{self.path} is there already: the same command with --resume continues that run, or tells that it is "
                "finished; with --overwrite, a new run replaces it."
            )

    def make_env(self, n_envs: int, seed: int, **kwargs: Any) -> VecEnv:
        """Make the run's environment; ``kwargs`` are those of SB3's ``make_vec_env``."""
        return make_vec_env(self.env_id, n_envs=n_envs, seed=seed, env_kwargs=self.env_kwargs, **kwargs)

    def train(self) -> None:
        """
        Train to each milestone, and report the return there.

        :raises ValueError: if an argument, the environment or a file is invalid
        :raises OSError: if a file cannot be written
        """
        arguments = self.arguments
        env = self.make_env(self.n_envs, arguments.seed, wrapper_class=RepeatableEpisode)
        resumes = arguments.resume and self.path.exists()
        model = self.model = self._resumed(env) if resumes else self._new(env)
        self.world.broadcast(model.shared_arguments())
        run_folder(self.path).mkdir(parents=True, exist_ok=True)
        replaces = self.path.exists() and not resumes
        self.checkpoints.log = log = RunLogFile(run_folder(self.path) / "progress.csv", model.num_timesteps, held=replaces)
        writers: list[KVWriter] = [log]
        if arguments.verbose:
            writers.append(HumanOutputFormat(sys.stdout))
        if arguments.tensorboard_log is not None:
            # A resumed run goes on in the same folder, as the same curve
            writers.append(TensorBoardOutputFormat(str(arguments.tensorboard_log / run_folder(self.path).name)))
        model.set_logger(Logger(str(log.path.parent), writers))
        print(
            f"{self.env_id} {self.env_kwargs or ''} seed {arguments.seed}: "
            f"mean return of {arguments.eval_episodes} deterministic episodes"
        )
        print(f"{'policy':<14}{'real steps':>12}{'wall time':>12}{'return':>12}{'std':>10}")
        if model.num_timesteps == 0:
            self._report("random policy", 0, 0.0, RandomPolicy(env.action_space, arguments.seed))
        last = max(self.total, model.num_timesteps)  # a finished run is only evaluated again
        self.checkpoints.start = time.perf_counter()
        for milestone in sorted({*(step for step in arguments.eval_at if step < last), last}):
            if milestone < model.num_timesteps:
                continue
            if milestone > model.num_timesteps:
                with warnings.catch_warnings():
                    # It goes on after a milestone, and all of it is long enough
                    warnings.filterwarnings("ignore", "Nothing will be learned")
                    self.world.broadcast(True)  # the other processes learn, too
                    model.learn(
                        milestone - model.num_timesteps,
                        callback=self.checkpoints,
                        reset_num_timesteps=model.num_timesteps == 0,
                        progress_bar=not arguments.no_progress_bar,
                    )
            seconds = self.checkpoints.seconds()
            name = "MB-MPO" if model.num_timesteps >= model.learning_starts else "untrained"
            self._report(name, model.num_timesteps, seconds, model)
            self.checkpoints.start, self.checkpoints.seconds_before = time.perf_counter(), seconds
        self.world.broadcast(False)
        model.logger.close()
        print(f"Model saved to {self.path}")

    def follow(self) -> None:
        """Do this process's share of the learning; process 0 tells what and how long."""
        env = self.make_env(self.n_envs, self.arguments.seed)
        model = MBMPO("MlpPolicy", env, device=self.arguments.device, **self.world.broadcast())
        while self.world.broadcast():
            model.learn(0)

    def _new(self, env: VecEnv) -> MBMPO:
        arguments = self.arguments
        model = MBMPO(env=env, seed=arguments.seed, verbose=arguments.verbose, device=arguments.device, **self.hyperparams)
        if self.total < model.learning_starts:
            raise ValueError(
                f"All {self.total} real steps would be random (`learning_starts`: {model.learning_starts}), so nothing would "
                "be learned: pass more --total-timesteps."
            )
        return model

    def _resumed(self, env: VecEnv) -> MBMPO:
        arguments = self.arguments
        model = MBMPO.load(self.path, env=env, device=arguments.device, force_reset=False, verbose=arguments.verbose)
        run: dict[str, Any] | None = getattr(model, RUN, None)
        if run is None:
            raise ValueError(f"{self.path} is no run of this command line: it cannot be resumed, only replaced (--overwrite).")
        task, its = self.checkpoints.task, {"set": {}, **run}  # older runs have no "set"
        differences = {name: (its.get(name), value) for name, value in task.items() if its.get(name) != value}
        if differences:
            raise ValueError(
                f"The run in {self.path} is another one, (its, yours): {differences}. Pass the same arguments to resume it, "
                "or another --save."
            )
        buffer = run_folder(self.path) / Path(run["buffer"]).name
        if not buffer.is_file():
            raise ValueError(f"The run in {self.path} cannot be resumed: its real steps, {buffer}, are gone.")
        model.load_replay_buffer(buffer)
        self.checkpoints.saved_steps, self.checkpoints.seconds_before = model.num_timesteps, run["seconds"]
        repeated = [env.env_method("repeat", episode, indices=i)[0] for i, episode in enumerate(run["episodes"])]
        if not all(repeated):
            model._last_obs = None  # makes `learn` reset the environment
            env.seed(arguments.seed + model.num_timesteps)
            print("The environment does not repeat itself: a new episode begins, so results differ from an uninterrupted run.")
        print(f"{self.path} goes on from {model.num_timesteps} real steps.")
        return model

    def _report(self, name: str, steps: int, seconds: float, policy: PolicyPredictor) -> None:
        env = self.make_env(1, evaluation_seed(self.arguments.seed))
        mean, std = evaluate_policy(policy, env, n_eval_episodes=self.arguments.eval_episodes, deterministic=True)
        env.close()
        print(f"{name:<14}{steps:>12}{seconds:>10.0f} s{np.mean(mean):>12.1f}{np.mean(std):>10.1f}", flush=True)

    def state(self) -> str:
        """Return a message that tells what has been saved if the run ends now."""
        if self.world.rank > 0:
            return f"Process {self.world.rank} has no files; process 0 tells what it has saved."
        if self.model is not None and self.model._progress is not None:
            self.model._progress.close()
        if self.checkpoints.saved_steps is None:
            return f"{self.path} is as it was." if self.path.exists() else "Nothing was saved yet."
        return (
            f"{self.path} has the run up to {self.checkpoints.saved_steps} real steps: the same command with --resume "
            "continues from there."
        )


def check_names(config: dict[str, Any]) -> None:
    """
    Check that the arguments of MBMPO in a configuration exist.

    :param config: an entry of the configuration file, with --set over it
    :raises ValueError: for the first name that MBMPO does not have
    """
    # What options of the command line set, and objects
    others = {"env", "seed", "verbose", "device", "tensorboard_log", "_init_setup_model"}
    known = {*ENV_ENTRIES, *inspect.signature(MBMPO).parameters} - others
    for name in config:
        if name not in known:
            nearest = nearest_name(str(name), known)
            advice = f": do you mean `{nearest}`?" if nearest else "."
            raise ValueError(f"`{name}` is no setting of MBMPO that --set or zoo_configs/mbmpo.yml can change{advice}")


def model_path(arguments: argparse.Namespace) -> Path:
    """Return the path of the model, which ends in ".zip" even if there are other dots in its name."""
    path: Path = arguments.save or Path("runs") / f"mbmpo-{arguments.env.rpartition(':')[2]}-seed{arguments.seed}"
    return path if path.suffix == ".zip" else path.with_name(f"{path.name}.zip")


def train(arguments: argparse.Namespace) -> None:
    """
    Train with the hyperparameters of the configuration file, and report the return at each milestone. The model FILE.zip is
    saved after every iteration, with its replay buffer and its log FILE/progress.csv.
    """
    tidy_mujoco_messages()
    run: TrainingRun | None = None
    with interrupts_raise(), process_group() as world:
        try:
            run = TrainingRun(arguments, world)
            run.train() if world.rank == 0 else run.follow()
        except Interrupted as interrupt:
            print(f"{interrupt.name}. {run.state() if run is not None else ''}".strip(), file=sys.stderr)
            sys.exit(interrupt.exit_code)
        except (ValueError, OSError, ImportError, ProcessLostError, gym.error.Error) as error:
            is_running = run is not None and run.model is not None
            sys.exit(f"{type(error).__name__}: {error}" + (f"\n{run.state()}" if run is not None and is_running else ""))
