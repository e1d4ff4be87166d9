"""
Sources of the rewards and terminations of imagined steps, and comparison of the functions with real steps.

The source is the user's function, the environment's own, the table of known Gymnasium environments (``known``), or a head of
the learned model.

Shapes: ``B`` rows, ``O`` observation size, ``A`` action size.
"""

import inspect
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from importlib import import_module
from typing import Any, NamedTuple

import torch as th
from stable_baselines3.common.vec_env import SubprocVecEnv, VecEnv

from sb3_mbmpo.common.env_reading import Get, ask, attribute, env_id
from sb3_mbmpo.common.finite import check_rewards
from sb3_mbmpo.common.warn_once import WarnsOnce
from sb3_mbmpo.rewards.functions import EnvFunctions, RewardFn, TerminationFn, never_terminates
from sb3_mbmpo.rewards.known import KNOWN_ENVS, Parameters

__all__ = [
    "KNOWN_ENVS",
    "CheckedEnvFunctions",
    "CheckedFn",
    "EnvFunctions",
    "Resolved",
    "RewardCheck",
    "RewardFn",
    "TerminationFn",
    "check_reward_fn",
    "check_termination_fn",
    "known_functions",
    "never_terminates",
    "resolve_reward_fn",
    "resolve_termination_fn",
]


class Resolved(NamedTuple):
    """
    A reward or termination function and its source.

    :param fn: a ``RewardFn`` or ``TerminationFn``; None: it is to be learned. Without terminations it is ``never_terminates``
    :param source: for messages: "argument", "env.reward", "known: HalfCheetah-v5 (...)", "learned", ...
    """

    fn: Callable[..., th.Tensor] | None
    source: str


def known_functions(env: VecEnv) -> EnvFunctions | None:
    """
    Return the reward and termination of a known Gymnasium environment, with the constructor arguments that it was made with.

    Changes that cannot be seen here (``xml_file``, Ant's ``main_body``, wrappers that transform rewards, or observations
    without a change of size) are left to ``check_reward_fn`` on real steps.

    :param env: the environment, with any wrappers, in this process or in others
    :return: the functions, or None if the id is unknown or the observation does not have the size of the default layout
    """
    found = ask(env, partial(_known_functions, env.observation_space.shape))
    return None if found is None else found[1]


def _known_functions(obs_shape: tuple[int, ...] | None, get: Get) -> tuple[str, EnvFunctions] | None:
    """Return the id and its functions, which can be pickled: for environments in other processes they are built there."""
    name = env_id(get) or ""
    known = KNOWN_ENVS.get(name)
    return None if known is None or obs_shape != (known.obs_size,) else (name, known.build(Parameters(get)))


LEARNED = Resolved(None, "learned")


class PathInFile(str):
    """
    A "pkg.module:function" read from a file and not confirmed by the user: importing it would run code that the file chose.
    """


@dataclass
class CheckedFn:
    """
    A foreign function whose first result is checked, because a wrong shape would be broadcast silently into the returns.

    :param fn: the function
    :param name: its name in errors
    :param is_reward: whether floating results are expected, else bool
    :param found_as: the argument of MBMPO that was "auto" when the function was found: the attribute may be something else
        that only looks like a reward or termination function. "" for a function that the user passed
    """

    fn: Callable[..., th.Tensor]
    name: str
    is_reward: bool
    found_as: str = ""
    checked: bool = field(default=False, init=False)

    def __call__(self, *batch: th.Tensor) -> th.Tensor:
        """
        Call the function, and check its first result.

        :param batch: the function's arguments; the last is next_obs [B, O]
        :return: [B], floating or bool
        :raises ValueError: at the first call, if the type, shape, dtype or device of the result is wrong, or if a function
            that was found fails
        """
        if self.checked:
            return self.fn(*batch)
        try:
            result = self.fn(*batch)
            self._check(result, batch[-1])
        except Exception as error:
            if not self.found_as:
                raise
            kind, arguments = ("rewards", "obs, action, next_obs") if self.is_reward else ("terminations", "next_obs")
            raise ValueError(
                f"`{self.name}({arguments})` of the environment was taken for {kind} of batches of torch tensors, but failed "
                f"({type(error).__name__}: {error}). If it computes something else, pass "
                f'`{self.found_as}="learned"`, or a function.'
            ) from error
        self.checked = True
        return result

    def _check(self, result: Any, next_obs: th.Tensor) -> None:
        dtype = "floating" if self.is_reward else "torch.bool"
        expected = f"a {dtype} tensor of shape {(len(next_obs),)} on {next_obs.device}"
        if not isinstance(result, th.Tensor):
            raise ValueError(f"{self.name} must return {expected}, it returned a {type(result).__name__}: use torch in it")
        right_dtype = result.is_floating_point() if self.is_reward else result.dtype == th.bool
        if not right_dtype or result.shape != (len(next_obs),) or result.device != next_obs.device:
            received = f"a {result.dtype} tensor of shape {tuple(result.shape)} on {result.device}"
            raise ValueError(f"{self.name} must return {expected}, one number per row, it returned {received}")


def resolve_reward_fn(argument: str | RewardFn, env: VecEnv | None) -> Resolved:
    """
    Find the reward function.

    :param argument: "auto" (the environment's own ``reward(obs, action, next_obs)`` on batches of tensors, else the known one
        of its Gymnasium id, else learned), "learned", a function, or "pkg.module:function"
    :param env: the real environment. Its own method is not found in a ``SubprocVecEnv``, where it is in another process
    :return: the function, None for learned, and its source
    :raises ValueError: if the argument is something else
    """
    return _resolve("reward", argument, env)


def resolve_termination_fn(argument: str | TerminationFn | None, env: VecEnv | None) -> Resolved:
    """
    Find the termination function.

    :param argument: "auto" (the environment's own ``done(next_obs)`` on batches of tensors, else the known one of its
        Gymnasium id, else learned), "learned", None (episodes never terminate), a function, or "pkg.module:function"
    :param env: the real environment, as in ``resolve_reward_fn``
    :return: the function (``never_terminates`` for None), None for learned, and its source
    :raises ValueError: if the argument is something else
    """
    return Resolved(never_terminates, "argument: never") if argument is None else _resolve("termination", argument, env)


# Name of the environment's own method, and the number of its arguments
_METHODS = {"reward": ("reward", 3), "termination": ("done", 1)}


def _resolve(kind: str, argument: object, env: VecEnv | None) -> Resolved:
    name = f"{kind}_fn"
    if argument == "learned" or (argument == "auto" and env is None):
        return LEARNED
    if argument == "auto" and env is not None:
        return _from_method(env, kind) or _from_table(env, kind) or LEARNED
    if callable(argument) and not isinstance(argument, type):
        _check_signature(argument, kind)
        return Resolved(CheckedFn(argument, name, kind == "reward"), "argument")
    if isinstance(argument, PathInFile) and env is None:
        return Resolved(None, f"not imported: {argument}")
    if isinstance(argument, str) and ":" in argument:
        return Resolved(CheckedFn(_import(argument, name), name, kind == "reward"), f"argument: {argument}")
    choices = '"auto", "learned", a function or "pkg.module:function"' + (", or None" if kind == "termination" else "")
    raise ValueError(f"{name} must be {choices}, got {argument!r}")


def _from_method(env: VecEnv, kind: str) -> Resolved | None:
    """Return the environment's own method, if it has one with the right number of arguments."""
    method_name, n_arguments = _METHODS[kind]
    # Pickling a bound method in another process would copy its environment, too, if it worked at all
    method = None if isinstance(env.unwrapped, SubprocVecEnv) else ask(env, partial(attribute, method_name))
    # Excluded, too: the last reward as an attribute, and gymnasium.RewardWrapper.reward(reward)
    if not callable(method) or not _takes(method, n_arguments):
        return None
    source = f"env.{method_name}"
    return Resolved(CheckedFn(method, source, kind == "reward", f"{kind}_fn"), source)


def _takes(fn: Callable[..., Any], n_arguments: int) -> bool:
    try:
        inspect.signature(fn).bind(*range(n_arguments))
    except (TypeError, ValueError):  # the arguments do not fit; there is no signature
        return False
    return True


def _check_signature(fn: Callable[..., Any], kind: str) -> None:
    """Raise ``ValueError`` if the signature shows, before the first call, that the function does not take our arguments."""
    try:
        signature = inspect.signature(fn)
    except (TypeError, ValueError):  # Python knows no signature
        return
    if not _takes(fn, _METHODS[kind][1]):
        expected = "(obs, action, next_obs)" if kind == "reward" else "(next_obs)"
        raise ValueError(f"{kind}_fn must be a function of {expected}, {fn!r} takes {signature}.")


def _from_table(env: VecEnv, kind: str) -> Resolved | None:
    found = ask(env, partial(_known_functions, env.observation_space.shape))
    if found is None:
        return None
    name, functions = found
    approximation = f" (approximation: {functions.approximation})" if functions.approximation else ""
    if kind == "termination":
        if functions.termination_fn is never_terminates:
            return Resolved(functions.termination_fn, f"episodes of {name} never terminate")
        return Resolved(functions.termination_fn, f"known: {name}{'' if functions.is_termination_exact else approximation}")
    return Resolved(functions.reward_fn, f"known: {name}{approximation}")


def _import(path: str, name: str) -> Callable[..., th.Tensor]:
    module_name, _, function_name = path.partition(":")
    try:
        found = getattr(import_module(module_name), function_name)
    except (ImportError, AttributeError, ValueError) as error:  # ValueError: an empty name
        raise ValueError(
            f'cannot import {name}="{path}" ({error}): give "pkg.module:function" of a module that Python can import from here'
        ) from error
    if not callable(found):
        raise ValueError(f'{name}="{path}" is a {type(found).__name__}, not a function: name a callable in {module_name}')
    function: Callable[..., th.Tensor] = found
    return function


class RewardCheck(NamedTuple):
    """
    The error of a reward function on real steps.

    :param mean_abs_error: in units of the reward
    :param max_abs_error: in units of the reward
    :param relative_error: root mean square error / standard deviation of the real rewards; a constant can reach 1
    """

    mean_abs_error: float
    max_abs_error: float
    relative_error: float


@th.no_grad()
def check_reward_fn(fn: RewardFn, obs: th.Tensor, action: th.Tensor, next_obs: th.Tensor, reward: th.Tensor) -> RewardCheck:
    """
    Compare a reward function with real rewards.

    :param fn: the function
    :param obs: [B, O], real, in raw units
    :param action: what the environment received: float [B, A], long [B] or long [B, k]
    :param next_obs: [B, O], the terminal observation where an episode ended
    :param reward: [B], the environment's
    :return: the errors
    :raises ValueError: if ``fn`` does not return one number per row
    """
    error = _difference(fn(obs, action, next_obs), reward)
    # The standard deviation of constant rewards is 0: 1 % of their size makes rounding small and a wrong constant large
    scale = max(reward.double().std(correction=0).item(), 0.01 * reward.double().abs().mean().item(), 1e-30)
    return RewardCheck(error.abs().mean().item(), error.abs().max().item(), error.square().mean().sqrt().item() / scale)


@th.no_grad()
def check_termination_fn(fn: TerminationFn, next_obs: th.Tensor, terminated: th.Tensor) -> float:
    """
    Compare a termination function with real terminations.

    :param fn: the function
    :param next_obs: [B, O], real, in raw units, the terminal observation where an episode ended
    :param terminated: [B] bool, the environment's, without truncations
    :return: the share of rows on which they disagree
    :raises ValueError: if ``fn`` does not return one bool per row
    """
    return _difference(fn(next_obs), terminated).abs().mean().item()


def _difference(predicted: th.Tensor, real: th.Tensor) -> th.Tensor:
    if predicted.shape != real.shape:
        raise ValueError(f"expected one value per row, {tuple(real.shape)}, the function returned {tuple(predicted.shape)}")
    return predicted.double() - real.double()


# Warn of a reward function whose error exceeds this share of the standard deviation of the real rewards, and of a termination
# function that is wrong for more than this share of the real steps
REWARD_ERROR_TOLERANCE = 0.2
TERMINATION_ERROR_TOLERANCE = 0.01


class CheckedEnvFunctions(WarnsOnce):
    """
    Reward and termination functions for imagined steps, found once for an environment.

    :param reward_fn: MBMPO's argument
    :param termination_fn: MBMPO's argument
    :param env: the real environment; None: only the arguments are known
    """

    def __init__(self, reward_fn: str | RewardFn, termination_fn: str | TerminationFn | None, env: VecEnv | None) -> None:
        super().__init__()
        self.reward = resolve_reward_fn(reward_fn, env)
        self.termination = resolve_termination_fn(termination_fn, env)

    def require(self, learned_reward: bool, learned_termination: bool) -> None:
        """
        Raise an error if imagined steps have no source of rewards or terminations.

        :param learned_reward: whether the ensemble has a reward head
        :param learned_termination: whether it has a termination head
        :raises ValueError: if there is neither a function nor a head
        """
        heads = {"reward": (self.reward.fn, learned_reward), "termination": (self.termination.fn, learned_termination)}
        for kind, (fn, learned) in heads.items():
            if fn is None and not learned:
                raise ValueError(
                    f"No {kind} function is known, and the ensemble has not learned one: load the model with its environment "
                    f"(`load(path, env=env)`), or pass `{kind}_fn=...` to `load`."
                )

    def sources(self, learned_reward: bool, learned_termination: bool) -> tuple[str, str]:
        """
        Return descriptions of the sources of reward and termination, for messages.

        :param learned_reward: whether the ensemble has a reward head
        :param learned_termination: whether it has a termination head
        """
        unknown = "a function that comes with the environment"
        return (
            self.reward.source if self.reward.fn is not None or learned_reward else unknown,
            self.termination.source if self.termination.fn is not None or learned_termination else unknown,
        )

    def try_out(self, obs: th.Tensor, action: th.Tensor) -> None:
        """
        Call both functions once before the first real step, because their results are checked at the first call.

        :param obs: a real observation [1, O]
        :param action: as the functions get it [1, ...]
        :raises ValueError: if a result is of the wrong type, shape, dtype or device, or a reward is not finite
        """
        # A number of rows unlike any dimension exposes a function that mixes up its axes
        rows = 1 + obs.shape[-1] + action[0].numel()
        obs, action = obs.expand(rows, -1), action.expand(rows, *action.shape[1:])
        if self.reward.fn is not None:
            reward = self.reward.fn(obs, action, obs)
            check_rewards(f"The reward function ({self.reward.source})", reward, obs=obs, action=action, next_obs=obs)
        if self.termination.fn is not None:
            self.termination.fn(obs)

    def compare(
        self, *, obs: th.Tensor, action: th.Tensor, next_obs: th.Tensor, reward: th.Tensor, terminated: th.Tensor
    ) -> float | None:
        """
        Compare the functions with real steps, and warn once if they differ.

        The parameters are those of ``check_reward_fn`` and ``check_termination_fn``.

        :return: mean absolute error of the reward function; None if the reward is learned
        :raises ValueError: if the reward function returns a number that is not finite
        """
        if self.termination.fn is not None:
            rate = check_termination_fn(self.termination.fn, next_obs, terminated)
            if rate > TERMINATION_ERROR_TOLERANCE:
                self._warn_of_misfit("termination", f"contradicts the environment on {100 * rate:.1f} % of the real steps")
        if self.reward.fn is None:
            return None
        predicted = self.reward.fn(obs, action, next_obs)
        source = f"The reward function ({self.reward.source})"
        check_rewards(source, predicted, obs=obs, action=action, next_obs=next_obs)
        check = check_reward_fn(self.reward.fn, obs, action, next_obs, reward)
        if check.relative_error > REWARD_ERROR_TOLERANCE:
            misfit = (
                f"misses the real rewards by {check.mean_abs_error:.3g} on average and {check.max_abs_error:.3g} at most "
                f"({100 * check.relative_error:.0f} % of their standard deviation)"
            )
            self._warn_of_misfit("reward", misfit)
        return check.mean_abs_error

    def _warn_of_misfit(self, kind: str, misfit: str) -> None:
        source = (self.reward if kind == "reward" else self.termination).source
        self._warn(kind, f"The {kind} function ({source}) {misfit}: pass `{kind}_fn='learned'` or a function that fits.")
