"""The learned environment as an SB3 ``VecEnv``, for any of SB3's algorithms or for inspection.

Legend of shapes: ``M`` models, ``E`` environments, ``S`` first observations, ``O`` observation size, ``A`` action size.
"""

from typing import Any

import gymnasium as gym
import numpy as np
import torch as th
from gymnasium.error import ResetNeeded
from stable_baselines3.common.vec_env import VecEnv
from stable_baselines3.common.vec_env.base_vec_env import VecEnvIndices, VecEnvStepReturn

from sb3_mbmpo.common.checks import check_choice, check_integer, check_number
from sb3_mbmpo.dynamics import CLIP_MARGIN, DynamicsEnsemble, Prediction, output_bias_array
from sb3_mbmpo.imagination.model_env import ModelEnv
from sb3_mbmpo.rewards.resolve import CheckedFn, RewardFn, TerminationFn, never_terminates

RESAMPLE_MODEL = ("episode", "step")


class ModelVecEnv(VecEnv):
    """
    A vectorised environment of imagined episodes.

    Each environment uses one member of the ensemble, for an episode or for a step; ``info["model_index"]`` tells which one
    made the step. A probabilistic member is sampled. Everything is in raw units, and the weights are those at construction: a
    later fit makes no difference. For SB3's statistics of episodes, wrap it in ``VecMonitor``.

    :param dynamics: the ensemble, which also determines the spaces
    :param start_obs: real first observations (S, O), where episodes start
    :param reward_fn: (obs (E, O), action, next_obs (E, O)) -> (E,); None: the ensemble's learned reward
    :param termination_fn: next_obs (E, O) -> (E,) bool; None: the ensemble's learned termination, or no termination if it has
        not learned one
    :param n_envs: number of environments ``E``
    :param horizon: time limit of an episode in steps, a truncation
    :param model_index: the member that all environments use; None: a random one each episode or step
    :param clip_margin: imagined observations stay within the range of the data plus this many standard deviations; None: no
        clipping
    :param seed: seed of the choice of members and first observations, and of the noise; None: different ones each time
    :param resample_model: draw another random member every "episode" or every "step"
    :param output_bias: deliberate constant error of each member's predicted observations, in standard deviations of the
        observed changes: an array (M, O), or the standard deviation with which one is drawn
    :param output_noise: standard deviation of deliberate noise on the predicted observations, in the same units
    :raises ValueError: if an argument is invalid
    """

    # VecEnv.__init__ reads it before it is set; there is nothing to render
    render_mode: str | None = None

    def __init__(
        self,
        dynamics: DynamicsEnsemble,
        start_obs: np.ndarray,
        reward_fn: RewardFn | None = None,
        termination_fn: TerminationFn | None = None,
        n_envs: int = 64,
        horizon: int = 200,
        *,
        model_index: int | None = None,
        clip_margin: float | None = CLIP_MARGIN,
        seed: int | None = None,
        resample_model: str = "episode",
        output_bias: float | np.ndarray = 0.0,
        output_noise: float = 0.0,
    ) -> None:
        check_integer("n_envs", n_envs, 1)
        check_integer("horizon", horizon, 1)
        if model_index is not None:
            check_integer("model_index", model_index, 0, dynamics.n_models - 1)
        if clip_margin is not None:
            check_number("clip_margin", clip_margin, 0)
        if seed is not None:
            check_integer("seed", seed, 0)
        check_choice("resample_model", resample_model, RESAMPLE_MODEL)
        check_number("output_noise", output_noise, 0)
        if reward_fn is None and not dynamics.learned_reward:
            raise ValueError("The ensemble has learned no reward: pass `reward_fn`, or one made with `learned_reward=True`.")
        super().__init__(n_envs, dynamics.observation_space, dynamics.action_space)
        self.horizon = horizon
        self._device = dynamics.device
        self._start_obs = self._checked_starts(start_obs, dynamics)
        if reward_fn is not None:
            reward_fn = CheckedFn(reward_fn, "reward_fn", is_reward=True)
        if termination_fn is not None and termination_fn is not never_terminates:
            termination_fn = CheckedFn(termination_fn, "termination_fn", is_reward=False)

        self._noise = th.Generator(self._device)
        self._reseed(seed)
        # The members that episodes may use; a step evaluates no others
        self._members = np.arange(dynamics.n_models) if model_index is None else np.array([model_index])
        self._resamples_every_step = resample_model == "step"
        # From a separate generator, so that members and first observations are the same with and without a bias
        draws = np.random.default_rng(seed).standard_normal((dynamics.n_models, dynamics.observation_dim))
        self._model_env = ModelEnv.of(
            dynamics,
            reward_fn=reward_fn,
            termination_fn=termination_fn,
            clip_margin=clip_margin,
            generator=self._noise,
            members=self._members.tolist(),
            output_bias=output_bias_array(output_bias, draws),
            output_noise=output_noise,
        )

        self._obs = self._start_obs[:0]  # (E, O) from the first reset on
        self._actions = th.empty(0)
        self._elapsed = np.zeros(n_envs, dtype=int)
        self._member = np.zeros(n_envs, dtype=int)  # index into self._members of the one that each environment uses

    def _checked_starts(self, start_obs: np.ndarray, dynamics: DynamicsEnsemble) -> th.Tensor:
        array, observation_dim = np.asarray(start_obs), dynamics.observation_dim
        if array.ndim != 2 or array.shape[0] == 0 or array.shape[1] != observation_dim:
            raise ValueError(f"`start_obs` must have shape (S, {observation_dim}) with S of at least 1, not {array.shape}.")
        starts = th.as_tensor(array, dtype=dynamics.observation_dtype, device=self._device)
        if not th.isfinite(starts).all():
            raise ValueError("`start_obs` contains NaN or infinite numbers: episodes cannot start there.")
        return starts.clone()

    def _reseed(self, seed: int | None) -> None:
        self._rng = np.random.default_rng(seed)
        self._noise.manual_seed(int(self._rng.integers(2**63)))

    # ---------------------------------------------------------------- episodes

    def reset(self) -> np.ndarray:
        """
        Begin new episodes in all environments, with the seed of the last call to ``seed`` since the last reset, if any.

        :return: first observations (E, O)
        """
        if self._seeds[0] is not None:
            self._reseed(self._seeds[0])
        self._obs = self._start_obs.new_empty((self.num_envs, self._start_obs.shape[1]))
        self._begin_episodes(np.arange(self.num_envs))
        self._reset_seeds()
        self._reset_options()
        return self._to_numpy(self._obs)

    def _begin_episodes(self, envs: np.ndarray) -> None:
        """
        Begin new episodes in some environments.

        :param envs: indices of the environments to reset
        """
        self._obs[envs] = self._start_obs[self._rng.integers(len(self._start_obs), size=len(envs))]
        self._elapsed[envs] = 0
        self._draw_members(envs)
        for i in envs:
            self.reset_infos[i] = {"model_index": int(self._members[self._member[i]])}

    def _draw_members(self, envs: np.ndarray) -> None:
        """
        Draw new members for some environments.

        :param envs: indices of the environments
        """
        self._member[envs] = self._rng.integers(len(self._members), size=len(envs))
        # The step function takes the same number of rows for every member: a member's k-th environment is its row k, and the
        # rest is padding. 64 environments in 5 members are some 90 rows; every member for every environment would be 320.
        lives_in = self._member == np.arange(len(self._members))[:, None]  # (M, E)
        row = (lives_in.cumsum(1) - 1)[self._member, np.arange(self.num_envs)]
        self._place = tuple(th.as_tensor(index, device=self._device) for index in (self._member, row))
        self._n_rows = int(row.max()) + 1

    def _to_members(self, values: th.Tensor) -> th.Tensor:
        """
        Sort the rows of the environments by member.

        :param values: (E, .)
        :return: the rows of each member, with zeros in the padding (M, rows, .)
        """
        batch = values.new_zeros((len(self._members), self._n_rows, values.shape[1]))
        batch[self._place] = values
        return batch

    def step_async(self, actions: np.ndarray) -> None:
        """
        Store the actions of the next step.

        :param actions: (E, ``*action_space.shape``) in the environment's units; those of a Box are clipped to its bounds
        :raises ValueError: if the shape is wrong
        """
        actions, shape = np.asarray(actions), (self.num_envs, *(self.action_space.shape or ()))
        if actions.shape != shape:
            raise ValueError(f"`actions` must have shape {shape}, one action per environment, not {actions.shape}.")
        if isinstance(self.action_space, gym.spaces.Box):
            actions = np.clip(actions, self.action_space.low, self.action_space.high)
        self._actions = self._model_env.codec.from_numpy(actions, self._device)

    @th.no_grad()
    def step_wait(self) -> VecEnvStepReturn:
        """
        Take the step with the stored actions.

        :return: observations (E, O), of the next episode where one has ended, rewards (E,), dones (E,) and infos
        """
        if len(self._obs) == 0:
            raise ResetNeeded("Call `reset` before the first `step`.")
        encoded = self._model_env.codec.to_dynamics(self._actions)
        by_member = self._model_env.step(self._to_members(self._obs), self._to_members(encoded))
        next_obs = by_member.next_obs[self._place]
        # Copied before the resets write to `next_obs`, because a reward function may return a view of it
        rewards = self._rewards(by_member, next_obs).cpu().numpy().astype(np.float32)
        terminated = self._terminated(by_member, next_obs).cpu().numpy()
        self._obs = next_obs
        self._elapsed += 1
        truncated = (self._elapsed >= self.horizon) & ~terminated
        dones: np.ndarray = terminated | truncated
        model_indices = self._members[self._member]
        infos: list[dict[str, Any]] = [
            {"TimeLimit.truncated": is_truncated, "model_index": model_index}
            for is_truncated, model_index in zip(truncated.tolist(), model_indices.tolist(), strict=True)
        ]
        obs = self._to_numpy(next_obs)
        if self._resamples_every_step:
            self._draw_members(np.arange(self.num_envs))
        over = np.flatnonzero(dones)
        if len(over) > 0:
            for i in over:
                infos[i]["terminal_observation"] = obs[i]
            self._begin_episodes(over)
            obs = self._to_numpy(self._obs)
        return obs, rewards, dones, infos

    def _rewards(self, by_member: Prediction, next_obs: th.Tensor) -> th.Tensor:
        """Return the rewards of the step from ``self._obs`` to ``next_obs`` (E,)."""
        predicted = None if by_member.reward is None else by_member.reward[self._place]
        rewards = self._model_env.reward(self._obs, self._actions, next_obs, predicted)
        self._model_env.check_rewards(rewards, obs=self._obs, action=self._actions, next_obs=next_obs)
        return rewards

    def _terminated(self, by_member: Prediction, next_obs: th.Tensor) -> th.Tensor:
        """Tell which episodes terminate with this step (E,) bool."""
        logit = None if by_member.termination_logit is None else by_member.termination_logit[self._place]
        terminated = self._model_env.terminated(next_obs, logit)
        return th.zeros(self.num_envs, dtype=th.bool) if terminated is None else terminated

    def _to_numpy(self, obs: th.Tensor) -> np.ndarray:
        """Return a copy in the dtype of the observation space (E, O)."""
        space, array = self.observation_space, obs.cpu().numpy()
        assert isinstance(space, gym.spaces.Box)
        if np.issubdtype(space.dtype, np.integer):
            # Without clipping, -1 would become 255 in uint8
            array = np.clip(np.rint(array), space.low, space.high)
        copy: np.ndarray = array.astype(space.dtype)
        return copy

    def close(self) -> None:
        """Do nothing: there are no open resources."""

    # ---------------------------------------------------------------- attributes of the environments are those of this object

    def get_attr(self, attr_name: str, indices: VecEnvIndices = None) -> list[Any]:
        """See ``VecEnv``."""
        value = getattr(self, attr_name)
        return [value for _ in self._get_indices(indices)]

    def set_attr(self, attr_name: str, value: Any, indices: VecEnvIndices = None) -> None:
        """
        See ``VecEnv``.

        :raises ValueError: if ``indices`` does not include all environments
        """
        if set(self._get_indices(indices)) != set(range(self.num_envs)):
            raise ValueError(f"Imagined environments share their attributes: set {attr_name!r} for all, not for {indices}.")
        setattr(self, attr_name, value)

    def env_method(
        self, method_name: str, *method_args: Any, indices: VecEnvIndices = None, **method_kwargs: Any
    ) -> list[Any]:
        """See ``VecEnv``. The method of this object is called once for each of the environments."""
        return [method(*method_args, **method_kwargs) for method in self.get_attr(method_name, indices)]

    def env_is_wrapped(
        self, wrapper_class: type[gym.Wrapper[Any, Any, Any, Any]], indices: VecEnvIndices = None
    ) -> list[bool]:
        """See ``VecEnv``."""
        return [False for _ in self._get_indices(indices)]
