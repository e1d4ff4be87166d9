"""MBMPO in rl_zoo3: the algorithm, its search space and its default configuration file.

``pip install`` installs a hook (`_hook.py`) that calls this as soon as rl_zoo3 is imported. Where the hook cannot run, for
example after ``pip install --target``, call ``sb3_mbmpo.zoo.register()`` before rl_zoo3's command line.
"""

import re
import warnings
from collections.abc import Callable
from functools import wraps
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any

from sb3_mbmpo.zoo.config import config_file

ALGO = "mbmpo"


def register() -> None:
    """
    Add MBMPO to rl_zoo3; calling it more than once does no harm.

    :raises ImportError: if rl_zoo3 is not installed, or its version lacks one of the modules
    :raises AttributeError: if the internals of its version differ
    """
    for name in EXTENSIONS:
        extend(import_module(name))


def extend(module: ModuleType) -> None:
    """
    Add MBMPO to a module of rl_zoo3.

    :param module: rl_zoo3, or one of its modules that list the algorithms
    """
    EXTENSIONS[module.__name__](module)


def extend_or_warn(module: ModuleType) -> None:
    """
    Extend a module of rl_zoo3, or warn once: a program that imports rl_zoo3 for, say, PPO must not fail because of MBMPO.

    :param module: rl_zoo3, or one of its modules that list the algorithms
    """
    global _warned
    try:
        extend(module)
    except Exception as error:  # noqa: BLE001 - any error would break another program's import
        if not _warned:
            _warned = True
            warnings.warn(
                f"rl_zoo3 {_version('rl_zoo3')} will not know `--algo {ALGO}`: sb3_mbmpo {_version('sb3-mbmpo')} cannot "
                f"extend {module.__name__} ({type(error).__name__}: {error}). Without rl_zoo3, "
                "`python -m sb3_mbmpo train --env ENV` trains with the same configuration file.",
                RuntimeWarning,
            )


_warned = False


def _version(distribution: str) -> str:
    try:
        return version(distribution)
    except PackageNotFoundError:
        return "(unknown version)"


def _check_modules(package: ModuleType) -> None:
    missing = [name for name in EXTENSIONS if find_spec(name) is None]
    if missing:
        raise ModuleNotFoundError(f"{package.__name__} has no {', '.join(missing)}")


def _add_algorithm(utils: ModuleType) -> None:
    from sb3_mbmpo.mbmpo import MBMPO

    utils.ALGOS[ALGO] = MBMPO


def _add_search_space(hyperparams_opt: ModuleType) -> None:
    from sb3_mbmpo.zoo.search_space import convert, sample_for_zoo

    hyperparams_opt.HYPERPARAMS_SAMPLER[ALGO] = sample_for_zoo
    hyperparams_opt.HYPERPARAMS_CONVERTER[ALGO] = convert


def _extend_manager(exp_manager: ModuleType) -> None:
    manager = exp_manager.ExperimentManager
    read: Callable[[Any], tuple[dict[str, Any], dict[str, Any]]] = manager.read_hyperparameters
    learn: Callable[[Any, Any], None] = manager.learn
    if hasattr(read, "__wrapped__"):
        return
    default = Path(exp_manager.__file__ or "").parent / "hyperparams" / f"{ALGO}.yml"

    @wraps(read)
    def read_ours(self: Any) -> tuple[dict[str, Any], dict[str, Any]]:
        if getattr(self, "algo", None) != ALGO:
            return read(self)
        if self.config == str(default) and not default.exists():
            self.config = str(config_file())
        hyperparams, saved = read(self)
        # rl_zoo3 trains with an entry's env_kwargs but evaluates without them: episodes and observations would differ
        self.eval_env_kwargs = self.eval_env_kwargs or dict(hyperparams.get("env_kwargs", {}))
        return hyperparams, saved

    @wraps(learn)
    def learn_ours(self: Any, model: Any) -> None:
        if getattr(self, "algo", None) == ALGO:
            _survive_close(model.env.unwrapped)
        learn(self, model)

    manager.read_hyperparameters, manager.learn = read_ours, learn_ours
    _extend_callbacks(manager)


def _extend_callbacks(manager: Any) -> None:
    """
    Write the log that the report shows, and make ``--save-replay-buffer`` work with ``--save-freq``, too.

    Without its real steps, a checkpoint cannot be resumed.

    :param manager: rl_zoo3's class
    """
    create: Callable[[Any], None] = manager.create_callbacks
    load: Callable[..., Any] = manager._load_pretrained_agent

    @wraps(create)
    def create_ours(self: Any) -> None:
        create(self)
        if self.algo == ALGO and not self.optimize_hyperparameters:
            from sb3_mbmpo.zoo.progress_log import ProgressLog

            self.callbacks.append(ProgressLog(Path(self.save_path) / "progress.csv"))
        for callback in self.callbacks:
            if self.algo == ALGO and type(callback).__name__ == "CheckpointCallback":
                callback.save_replay_buffer = self.save_replay_buffer

    @wraps(load)
    def load_ours(self: Any, hyperparams: dict[str, Any], env: Any) -> Any:
        model = load(self, hyperparams, env)
        checkpoint = Path(self.trained_agent)
        buffer = checkpoint.with_name(re.sub(r"_(\d+_steps)\.zip$", r"_replay_buffer_\1.pkl", checkpoint.name))
        if self.algo == ALGO and buffer != checkpoint and buffer.is_file():
            print(f"Loading replay buffer {buffer}")
            model.load_replay_buffer(buffer)
        if self.algo == ALGO and model._n_fits > 0 and model.replay_buffer.size() == 0:
            from sb3_mbmpo.real.rollouts import NO_REAL_STEPS

            warnings.warn(NO_REAL_STEPS)
        return model

    manager.create_callbacks, manager._load_pretrained_agent = create_ours, load_ours


def _survive_close(vec_env: Any) -> None:
    """
    Make ``close`` tolerate workers that have ended.

    rl_zoo3 closes the environment before it saves the model. Ctrl-C ends the workers of a ``SubprocVecEnv``, too, and SB3's
    ``close`` raises an error if they are gone, so the model would be lost.

    :param vec_env: an environment without wrappers
    """
    from stable_baselines3.common.vec_env import SubprocVecEnv

    if not isinstance(vec_env, SubprocVecEnv):
        return
    close = vec_env.close

    def close_or_give_up() -> None:
        try:
            close()
        except (OSError, EOFError):  # a worker has ended; the others are not needed any more
            for process in vec_env.processes:
                process.terminate()
            vec_env.closed = True

    vec_env.close = close_or_give_up  # type: ignore[method-assign]


EXTENSIONS: dict[str, Callable[[ModuleType], None]] = {
    "rl_zoo3": _check_modules,
    "rl_zoo3.utils": _add_algorithm,
    "rl_zoo3.hyperparams_opt": _add_search_space,
    "rl_zoo3.exp_manager": _extend_manager,
}
