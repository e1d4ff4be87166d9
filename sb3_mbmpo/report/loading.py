"""Loading a run's model and its environment. Code that a file names is called only if the user has confirmed it."""

import json
import re
from collections.abc import Callable, Sequence
from functools import partial
from importlib import import_module
from typing import Any

import gymnasium as gym
from gymnasium.envs.registration import EnvSpec
from stable_baselines3.common.vec_env import DummyVecEnv, VecEnv, VecNormalize

import sb3_mbmpo.envs  # noqa: F401 - registers our environments
from sb3_mbmpo.common.save_util import TAKE_A_COPY
from sb3_mbmpo.mbmpo import MBMPO
from sb3_mbmpo.report.run_log import RunFiles

MakeEnv = Callable[..., gym.Env[Any, Any]]

# The wrappers of `gymnasium.wrappers` that change what an agent sees; the others write videos
_KINDS = ("action", "observation", "reward")
SAFE_WRAPPERS = (
    "gymnasium.wrappers.common:",
    *(f"gymnasium.wrappers.{how}_{kind}:" for how in ("stateful", "transform") for kind in _KINDS),
)


def env_maker(env_id: str | None, model: MBMPO, trust: bool = False) -> MakeEnv:
    """
    Return a function that makes the real environment.

    :param env_id: as ``gymnasium.make`` takes it; None: the one that the model's file names. If they are the same, it is made
        with the arguments and wrappers in the file
    :param model: the loaded model
    :param trust: whether any code that the file names may be imported and called
    :return: the function; it takes the arguments of ``gymnasium.make``
    :raises ValueError: if neither names an environment, or only the file does and it is not registered here
    """
    saved: str | None = getattr(model, "env_spec", None)
    if env_id is not None:
        module, _, name = env_id.rpartition(":")
        if not _names(saved, name):
            return partial(gym.make, env_id)
        if module:
            import_module(module)
    if saved is None:
        raise ValueError("The model's file does not say how its environment is made: pass `--env ID`.")
    try:
        spec = EnvSpec.from_json(saved)
        spec.kwargs.pop("render_mode", None)
        wrappers = [wrapper.entry_point for wrapper in spec.additional_wrappers]
    except Exception as error:
        raise ValueError(
            f"What the model's file says about its environment makes no sense ({type(error).__name__}: {error}): pass "
            "`--env ID`."
        ) from error
    if not trust:
        _check_registered(spec, wrappers, is_named=env_id is not None)
    return partial(gym.make, spec)


def _names(saved: str | None, name: str) -> bool:
    """Tell whether the environment in a model's file has this id, of which the version may be missing."""
    try:
        saved_id = str(json.loads(saved or "")["id"])
    except (ValueError, TypeError, KeyError):  # damaged: `--env ID` is the remedy
        return False
    return name in (saved_id, re.sub(r"-v\d+$", "", saved_id))


def _check_registered(spec: EnvSpec, wrappers: Sequence[Any], is_named: bool) -> None:
    """Raise ``ValueError`` if making the environment would import or call code that only the file names."""
    known = gym.registry.get(spec.id)
    # Shimmy's environments make any environment that their arguments name
    is_open = str(spec.entry_point).startswith("shimmy") and not (is_named and known and spec.kwargs == known.kwargs)
    if known is None or known.entry_point != spec.entry_point or is_open:
        raise ValueError(
            f"The model's file names the environment {spec.id} ({spec.entry_point}), which is not registered here. "
            f"Pass `--env MODULE:{spec.id}`, or, if you know where the file is from, `--trust`."
        )
    for wrapper in wrappers:
        # Whatever else their modules contain, such as `deepcopy`, would be called, too
        kind = getattr(gym.wrappers, str(wrapper).rpartition(":")[2], None)
        is_wrapper = isinstance(kind, type) and issubclass(kind, gym.Wrapper)
        if not (str(wrapper).startswith(SAFE_WRAPPERS) and is_wrapper):
            raise ValueError(
                f"The model's file names the wrapper {wrapper}, which is not one of Gymnasium's own. "
                "If you know where the file is from, pass `--trust`."
            )


def load_run(files: RunFiles, env_id: str | None, trust: bool = False) -> tuple[MBMPO, MakeEnv]:
    """
    Load the model of a run and its real environment.

    :param files: the files of the run
    :param env_id: overrides the environment in the model's file, and confirms the functions that the file names
    :param trust: whether any code that the file names may be imported and called
    :return: the model with its real environment, and the function that makes that environment
    :raises ValueError: if the environment is unknown or does not fit the model
    """
    model = MBMPO.load(files.model, verbose=0)  # without an environment, it imports no functions that the file names
    for name in ("reward_fn", "termination_fn"):
        path = getattr(model, name)
        if isinstance(path, str) and ":" in path and env_id is None and not trust:
            raise ValueError(
                f"The model's file names the function {path} as its {name}. If you know where the file is from, use `--trust`."
            )
    make_env = env_maker(env_id, model, trust)
    try:
        env: VecEnv = DummyVecEnv([make_env])
    except (ImportError, gym.error.Error):
        raise
    except Exception as error:
        raise ValueError(
            f"The environment that {files.model} or `--env` names cannot be made ({type(error).__name__}: {error}): pass "
            "another `--env ID`."
        ) from error
    if files.vec_normalize is not None:
        try:
            env = VecNormalize.load(str(files.vec_normalize), env)
        except Exception as error:
            reason = f"{type(error).__name__}: {error}"
            raise ValueError(f"{files.vec_normalize} cannot be read ({reason}). {TAKE_A_COPY}") from error
        assert isinstance(env, VecNormalize)
        env.training = False
    try:
        return MBMPO.load(files.model, env=env, verbose=0), make_env
    except ValueError as error:
        raise ValueError(f"{files.model} does not fit the environment ({error}): pass its own with `--env ID`.") from error
