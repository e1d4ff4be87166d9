"""What the package wants to know of an environment. It is asked at set-up, never later: it may be closed by then, or dead.

Whatever the environment answers, nothing comes of it: a property that raises, or a value that does not pickle, counts as no
answer. In a ``SubprocVecEnv`` either would end the worker, so questions are answered there, beside the environment, and only
answers travel.
"""

import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from multiprocessing.reduction import ForkingPickler
from typing import Any, TypeVar

from gymnasium.envs.registration import EnvSpec
from stable_baselines3.common.vec_env import SubprocVecEnv, VecEnv

# Name of an attribute of the environment, through its wrappers -> its value; may raise anything
Get = Callable[[str], Any]
Answer = TypeVar("Answer")

# What a worker's environment carries our question as
_ATTRIBUTE = "_sb3_mbmpo_question"


def ask(env: VecEnv, question: Callable[[Get], Answer | None]) -> Answer | None:
    """
    Ask the first environment; the others are taken to be like it.

    :param env: of any wrappers, in this process or in others
    :param question: may raise anything. For a ``SubprocVecEnv`` it has to pickle
    :return: None if the question raised, or the environment is gone, or its answer cannot come here
    """
    vec_env = env.unwrapped
    if not isinstance(vec_env, SubprocVecEnv):
        return _attempt(question, lambda name: env.get_attr(name, 0)[0])
    if vec_env.closed or vec_env.waiting:  # a worker that is in a step answers that first, if ever
        return None
    try:
        vec_env.set_attr(_ATTRIBUTE, _Beside(question))
        # An environment may keep its attributes elsewhere, and one that is missing would end the worker
        answers = vec_env.env_method(_ATTRIBUTE, indices=0) if vec_env.has_attr(_ATTRIBUTE) else [None]
        vec_env.set_attr(_ATTRIBUTE, None)
    except (OSError, EOFError):  # a worker has ended
        return None
    answer: Answer | None = answers[0]
    return answer


@dataclass
class _Beside:
    """A question on its way to a worker of SB3's, whose loop calls it there like a method of the environment."""

    question: Callable[[Get], Any]

    def __call__(self) -> Any:
        # SB3 has no command that hands the environment to a function: it is a variable of the loop
        env = sys._getframe(1).f_locals.get("env")
        return _attempt(self._picklable_answer, lambda name: env.get_wrapper_attr(name))  # type: ignore[union-attr]

    def _picklable_answer(self, get: Get) -> Any:
        answer = self.question(get)
        ForkingPickler.dumps(answer)
        return answer


def _attempt(question: Callable[[Get], Answer | None], get: Get) -> Answer | None:
    try:
        return question(get)
    except Exception:  # noqa: BLE001 - somebody else's properties, to which no answer is an answer
        return None


def attribute(name: str, get: Get) -> Any:
    """
    Read an attribute of the environment, through its wrappers.

    :param name: of an attribute
    :param get: reads it
    :return: None if it is missing or cannot be read
    """
    return _attempt(lambda get: get(name), get)


def env_spec(get: Get) -> EnvSpec | None:
    """Return what ``gymnasium.make`` made the environment from; None if it did not, or ``spec`` is something else."""
    # A wrapper whose arguments cannot be copied has no `spec`; the environment inside has
    candidates = (attribute("spec", get), _attempt(lambda get: get("unwrapped").spec, get))
    return next((spec for spec in candidates if isinstance(spec, EnvSpec)), None)


def env_id(get: Get) -> str | None:
    """Return what ``gymnasium.make`` was asked for."""
    spec = env_spec(get)
    return None if spec is None else spec.id


def env_spec_json(get: Get) -> str | None:
    """
    Describe how the environment was made.

    :return: what ``gymnasium.make(EnvSpec.from_json(...))`` needs to make it once more, without the wrappers that do not tell
        their arguments (SB3's ``Monitor``); None where Gymnasium did not make it. Raises where JSON cannot hold its arguments
    """
    spec = env_spec(get)
    if spec is None:
        return None
    wrappers = tuple(wrapper for wrapper in spec.additional_wrappers if wrapper.kwargs is not None)
    return replace(spec, additional_wrappers=wrappers, vector_entry_point=None).to_json()
