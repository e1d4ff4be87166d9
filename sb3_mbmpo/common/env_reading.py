"""Read-only questions to an environment. They are asked at set-up, never later: by then it may be closed, or have crashed.

A question never fails: a property that raises, or a value that does not pickle, counts as no answer. In a ``SubprocVecEnv``
either would end the worker process, so the question runs in the worker, beside the environment, and only the answer is sent
back.
"""

import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from multiprocessing.reduction import ForkingPickler
from types import FrameType
from typing import Any, TypeVar

from gymnasium.envs.registration import EnvSpec
from stable_baselines3.common.vec_env import SubprocVecEnv, VecEnv

# Name of an attribute of the environment, through its wrappers -> its value; may raise anything
Get = Callable[[str], Any]
Answer = TypeVar("Answer")


def ask(env: VecEnv, question: Callable[[Get], Answer | None]) -> Answer | None:
    """
    Ask the first environment a question; the others are assumed to be like it.

    :param env: any vectorised environment, in this process or in others
    :param question: a function of ``Get``, which may raise anything. For a ``SubprocVecEnv`` it has to pickle
    :return: the answer; None if the question raised, the environment is gone or the answer does not pickle
    """
    vec_env = env.unwrapped
    if not isinstance(vec_env, SubprocVecEnv):
        return _attempt(question, lambda name: env.get_attr(name, 0)[0])
    if vec_env.waiting:  # a worker that is in a step would answer the step first, if at all
        return None
    remote = vec_env.remotes[0]
    try:
        # The one command that may ask for a missing attribute. Nothing is stored in the environment, which might not allow it
        remote.send(("has_attr", _Beside(question)))
        reply = remote.recv()
        if isinstance(reply, _Answer):
            remote.recv()  # whether it has the attribute
    except (OSError, EOFError):  # the worker has ended, perhaps because of the question
        return None
    return reply.value if isinstance(reply, _Answer) else None


def check_running(env: VecEnv) -> None:
    """
    Reject an environment in which no step can be taken.

    :param env: any vectorised environment, in this process or in others
    :raises ValueError: if it is closed, a worker process has ended, or it is in the middle of a step
    """
    vec_env = env.unwrapped
    if getattr(vec_env, "closed", False):
        what = "is closed"
    elif isinstance(vec_env, SubprocVecEnv) and not all(process.is_alive() for process in vec_env.processes):
        what = "has lost a worker process"
    elif getattr(vec_env, "waiting", False):
        what = "is in the middle of a step, as after an interrupt"
    else:
        return
    raise ValueError(f"The environment {what}, so no step can be taken: pass another one to `set_env` or `adapt`.")


@dataclass
class _Answer:
    value: Any


@dataclass
class _Beside:
    """A question for a worker process of SB3's, which answers it as soon as it unpickles it."""

    question: Callable[[Get], Any]

    def __reduce__(self) -> tuple[Callable[..., str], tuple[Any, ...]]:
        return _answer_beside, (self.question,)


def _answer_beside(question: Callable[[Get], Any]) -> str:
    """Send the answer to a question from within a worker, and return the name of some attribute."""
    # SB3 has no command that passes the environment to a function, so it is read from the local variables of the loop
    frame: FrameType | None = sys._getframe()
    while frame is not None and not {"env", "remote"} <= frame.f_locals.keys():
        frame = frame.f_back
    if frame is not None:
        env, remote = frame.f_locals["env"], frame.f_locals["remote"]
        remote.send(_Answer(_attempt(partial(_picklable, question), lambda name: env.get_wrapper_attr(name))))
    return "unwrapped"


def _picklable(question: Callable[[Get], Any], get: Get) -> Any:
    answer = question(get)
    ForkingPickler.dumps(answer)
    return answer


def _attempt(question: Callable[[Get], Answer | None], get: Get) -> Answer | None:
    try:
        return question(get)
    except (Exception, SystemExit):  # noqa: BLE001 - foreign code: any failure counts as no answer
        return None


def attribute(name: str, get: Get) -> Any:
    """
    Read an attribute of the environment, through its wrappers.

    :param name: name of the attribute
    :param get: reads an attribute by name
    :return: its value, or None if it is missing or cannot be read
    """
    return _attempt(lambda get: get(name), get)


def env_spec(get: Get) -> EnvSpec | None:
    """Return the spec that ``gymnasium.make`` made the environment from, or None if it was made in another way."""
    # A wrapper whose arguments cannot be copied has no `spec`, but the environment inside has
    candidates = (attribute("spec", get), _attempt(lambda get: get("unwrapped").spec, get))
    return next((spec for spec in candidates if isinstance(spec, EnvSpec)), None)


def env_id(get: Get) -> str | None:
    """Return the id that ``gymnasium.make`` was given, or None if the environment was made in another way."""
    spec = env_spec(get)
    return None if spec is None else spec.id


def env_spec_json(get: Get) -> str | None:
    """
    Describe how the environment was made.

    :param get: reads an attribute by name
    :return: what ``gymnasium.make(EnvSpec.from_json(...))`` needs to make it again, without the wrappers that do not record
        their arguments (SB3's ``Monitor``); None if Gymnasium did not make it. Raises if JSON cannot hold its arguments
    """
    spec = env_spec(get)
    if spec is None:
        return None
    wrappers = tuple(wrapper for wrapper in spec.additional_wrappers if wrapper.kwargs is not None)
    return replace(spec, additional_wrappers=wrappers, vector_entry_point=None).to_json()
