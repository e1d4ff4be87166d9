"""Real rollouts: which policy acts in the real environment, and which data is kept.

SB3's ``OffPolicyAlgorithm`` already steps environments, calls callbacks and fills a replay buffer correctly (time limits,
``terminal_observation``, VecNormalize). This class adds the adapted policies and the pool of first observations. It is the
first line of algorithm 1 in Clavera et al. 2018: collect real steps with the adapted policies.

Legend of shapes: ``T`` tasks, ``P`` actor parameters, ``B`` rows, ``O`` observation size.
"""

import warnings
from collections.abc import Callable
from statistics import fmean
from typing import Any

import numpy as np
import torch as th
from stable_baselines3.common.buffers import ReplayBuffer
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.noise import ActionNoise
from stable_baselines3.common.running_mean_std import RunningMeanStd
from stable_baselines3.common.type_aliases import GymEnv, MaybeCallback, RolloutReturn

from sb3_mbmpo.common.actions import ActionCodec
from sb3_mbmpo.common.env_reading import check_running
from sb3_mbmpo.common.finite import as_floating, check_counts, in_float32
from sb3_mbmpo.common.health import TrainingHealth
from sb3_mbmpo.common.observations import VecNormalizeScaling, unscaled
from sb3_mbmpo.dynamics import DynamicsEnsemble, Transitions
from sb3_mbmpo.policies import MetaPolicy
from sb3_mbmpo.real.env_faults import EnvFaults, leave_out_last_step
from sb3_mbmpo.real.resumable import ResumableAlgorithm
from sb3_mbmpo.real.returns import DiscountedReturns

# Number of real first observations that are kept as starts of imagined rollouts
MAX_INITIAL_OBS = 10_000
NO_REAL_STEPS = (
    "The replay buffer is empty, but the models were fitted to real steps, which the next fit will not have. Restore them "
    "with `load_replay_buffer`: `save_replay_buffer`, `CheckpointCallback(save_replay_buffer=True)` and rl_zoo3's "
    "`--save-replay-buffer` write such files."
)


class RealRolloutAlgorithm(ResumableAlgorithm):
    """
    The part of MBMPO that acts in the real environment. ``MBMPO`` documents the arguments.
    """

    policy: MetaPolicy
    dynamics: DynamicsEnsemble
    n_steps: int
    n_models: int
    n_tasks: int
    horizon: int
    exploration: str
    baseline: str
    imagined_start: str
    _health: TrainingHealth

    def _init_rollouts(self) -> None:
        """Initialise the state of the real rollouts, besides SB3's; all of it is saved with the model."""
        self._task_turn = 0
        self._acting_tasks = np.zeros(1, dtype=int)
        self._random_phase = True
        self._begins_rollout = True
        self._n_fits = 0  # of the dynamics
        self._n_new_episodes = 0  # ended since the last fit
        self._n_new_steps = 0  # stored since the last fit
        self._initial_obs: np.ndarray | None = None
        self._new_starts: list[np.ndarray] = []  # not yet part of the initial observations
        self._is_start = np.ones(1, dtype=bool)  # environments that have not yet taken the first step of their episode
        self._episode_steps = np.zeros(1, dtype=int)  # steps so far of every environment's current episode
        self._longest_episode = 0  # in steps, including episodes that have not ended
        self._env_faults = EnvFaults()
        self._handed_out: np.ndarray | None = None  # the environment's latest observations, its own array

    def _setup_model(self) -> None:
        if not hasattr(self, "observation_space"):
            raise ValueError("`env` must be an environment or its id, not None: its spaces determine what is built.")
        # In SB3, `n_steps` means the steps of an n-step return: it would choose its replay buffer by it, or warn
        n_steps, self.n_steps = self.n_steps, 1
        super()._setup_model()
        self.n_steps = n_steps
        self._codec = ActionCodec(self.action_space)
        self._check_wrappers()
        self._begin_adapted()

    def _begin_adapted(self) -> None:
        """Set every theta'_k, the rows of (T, P), to theta: nothing is adapted yet."""
        self._adapted = self.policy.actor_vector().repeat(self.n_tasks, 1)

    def set_parameters(self, load_path_or_dict: Any, exact_match: bool = True, device: th.device | str = "auto") -> None:
        """See ``BaseAlgorithm``. The adapted policies, made from the old parameters, are discarded."""
        super().set_parameters(load_path_or_dict, exact_match, device)
        self._begin_adapted()

    def set_env(self, env: GymEnv, force_reset: bool = True) -> None:
        """See ``BaseAlgorithm``."""
        super().set_env(env, force_reset)
        self._check_wrappers()

    def _excluded_save_params(self) -> list[str]:
        return [*super()._excluded_save_params(), "_codec", "_handed_out"]

    def _check_wrappers(self) -> None:
        """Raise ``ValueError`` if a wrapper reshapes VecNormalize's output: the raw observations would not fit the policy."""
        normalizer = self._vec_normalize_env
        if normalizer is not None and normalizer.observation_space.shape != self.observation_space.shape:
            raise ValueError(
                f"VecNormalize gives observations of shape {normalizer.observation_space.shape}, but a wrapper around it "
                f"turns them into {self.observation_space.shape}: wrap the environment in VecNormalize last."
            )

    def _setup_learn(
        self,
        total_timesteps: int,
        callback: MaybeCallback = None,
        reset_num_timesteps: bool = True,
        tb_log_name: str = "run",
        progress_bar: bool = False,
    ) -> tuple[int, BaseCallback]:
        resets = reset_num_timesteps or self._last_obs is None
        assert self.replay_buffer is not None
        if not reset_num_timesteps and self._n_fits > 0 and self.replay_buffer.size() == 0:
            warnings.warn(NO_REAL_STEPS)
        assert self.env is not None
        check_running(self.env)
        result = super()._setup_learn(total_timesteps, callback, reset_num_timesteps, tb_log_name, progress_bar)
        if resets:
            self._is_start = np.ones(self.n_envs, dtype=bool)
            self._discounted_returns = DiscountedReturns(self.n_envs, self.gamma)
            self._episode_steps = np.zeros(self.n_envs, dtype=int)
            self._check_finite("observation", self._raw_last_obs(), self.replay_buffer.observations.dtype)
            assert isinstance(self._last_obs, np.ndarray)
            self._handed_out, self._last_obs = self._last_obs, self._last_obs.copy()
        return result

    def _random_steps_left(self) -> int:
        """Return how many uniformly random real steps are missing before the first fit; 0 after it."""
        buffer = self.replay_buffer
        assert buffer is not None
        # A buffer that is divided among environments may hold a few steps less than its size
        if self._n_fits > 0 or buffer.full:
            return 0
        return max(0, self.learning_starts - buffer.size() * self.n_envs)

    def _steps_to_collect(self, total_timesteps: int) -> int:
        """Return the steps per environment of the next rollout: no more than asked for, because real steps are expensive."""
        # Rounded up: a remainder of fewer steps than environments would otherwise become an iteration of its own
        left = total_timesteps - self.num_timesteps
        return -(-min(self._random_steps_left() or self.n_steps, left) // self.n_envs)

    def collect_rollouts(self, *args: Any, **kwargs: Any) -> RolloutReturn:
        """See ``OffPolicyAlgorithm``."""
        if len(self._adapted) != self.n_tasks:  # `load` was given another number of tasks
            self._begin_adapted()
        # Takes effect at the first action, not here: a callback's `on_rollout_start` must save the state between iterations
        self._begins_rollout = True
        self._random_phase = self._random_steps_left() > 0
        completed = False
        try:
            rollout = super().collect_rollouts(*args, **kwargs)
            completed = rollout.continue_training
            self._n_new_episodes += rollout.n_episodes
        finally:
            self._join_new_starts()
            if not completed:
                # The environment took a step that was not stored: a later `learn` must not continue from the step before it
                self._last_obs = None
        return rollout

    def _next_tasks(self, count: int) -> np.ndarray:
        """Return the tasks whose adapted policies act next: they cycle through the models until every task has had a turn."""
        order = np.arange(self.n_tasks).reshape(self.n_models, -1).T.reshape(-1)
        tasks_in_turn = order[(self._task_turn + np.arange(count)) % self.n_tasks]
        self._task_turn = (self._task_turn + count) % self.n_tasks
        return tasks_in_turn

    def _sample_action(
        self, learning_starts: int, action_noise: ActionNoise | None = None, n_envs: int = 1
    ) -> tuple[np.ndarray, np.ndarray]:
        if self._begins_rollout:
            # A rollout switches to the newly adapted policies even in the middle of an episode: they are better informed
            self._acting_tasks = self._next_tasks(self.n_envs)
            self._begins_rollout = False
        if self._random_phase:
            action = np.array([self.action_space.sample() for _ in range(n_envs)])
            return action, action
        assert isinstance(self._last_obs, np.ndarray)
        if self.exploration == "adapted":
            parameters = self._adapted[th.as_tensor(self._acting_tasks, device=self.device)]
        else:
            parameters = self.policy.actor_vector().unsqueeze(0)
        with th.no_grad():
            obs = self.policy.standardize(th.as_tensor(self._last_obs, device=self.device))
            distribution = self.policy.actor(parameters.expand(n_envs, -1))(obs.unsqueeze(1))
            self._check_policy(*distribution.parameters)
            sample = distribution.sample(self._generators["exploration"]).squeeze(1)
            self._check_policy(sample)
        action = self._codec.to_numpy(self._codec.to_env(sample))
        return action, action

    def _check_policy(self, *answers: th.Tensor) -> None:
        """
        Reject outputs of the policy that are not finite, before such an action is sent to the environment.

        :param answers: outputs of the policy for the last observations (n_envs, ...)
        :raises ValueError: if one is NaN or infinite
        """
        for answer in answers:
            bad = np.flatnonzero(~th.isfinite(answer).flatten(1).all(1).cpu().numpy())
            if len(bad) > 0:
                assert isinstance(self._last_obs, np.ndarray)
                raise ValueError(
                    f"The policy has no finite action for the observation {self._last_obs[bad[0]]} at real step "
                    f"{self.num_timesteps}, environment {bad[0]}, so none was sent: it is far from all data so far, or "
                    "`inner_lr` is too high, or a features extractor of your own is not finite there. "
                    f"{self._what_is_intact()}"
                )

    def _store_transition(
        self,
        replay_buffer: ReplayBuffer,
        buffer_action: np.ndarray,
        new_obs: np.ndarray | dict[str, np.ndarray],
        reward: np.ndarray,
        dones: np.ndarray,
        infos: list[dict[str, Any]],
    ) -> None:
        normalizer = self._vec_normalize_env
        raw_obs, raw_reward = new_obs, reward
        if normalizer is not None:
            raw_obs, raw_reward = normalizer.get_original_obs(), normalizer.get_original_reward()
        assert isinstance(raw_obs, np.ndarray)
        self._check_finite("observation", raw_obs, replay_buffer.observations.dtype)
        self._check_finite("reward", raw_reward[:, None], replay_buffer.rewards.dtype)
        next_obs = raw_obs.copy()
        for i, info in enumerate(infos):
            if info.get("terminal_observation") is not None:
                next_obs[i] = info["terminal_observation"]  # what SB3 will store in the buffer
                next_obs[i] = next_obs[i] if normalizer is None else normalizer.unnormalize_obs(next_obs[i])
        self._check_finite("terminal observation", next_obs, replay_buffer.observations.dtype)
        assert isinstance(new_obs, np.ndarray)
        raw_before = self._raw_last_obs()  # SB3 replaces it
        self._env_faults.reused(new_obs, self._handed_out)
        unchanged = (raw_obs == raw_before).all(axis=1)
        unknown = self._env_faults.unknown_ends(dones, infos, new_obs, unchanged)
        # Only starts from which an episode went on, so that an extra reset, as after loading, makes no difference
        if self._is_start.any():
            self._remember_starts(raw_before[self._is_start])
        self._handed_out = new_obs
        super()._store_transition(replay_buffer, buffer_action, new_obs.copy(), reward, dones, infos)
        if unknown.any():
            leave_out_last_step(replay_buffer, unknown)
        self._n_new_steps += self.n_envs
        truncated = np.array([info.get("TimeLimit.truncated", False) for info in infos]) & dones.astype(bool)
        terminated = dones.astype(bool) & ~truncated
        self._discounted_returns.step(raw_before, raw_reward, next_obs, terminated, truncated)
        self._is_start = dones.astype(bool)
        self._episode_steps += 1
        self._longest_episode = max(self._longest_episode, int(self._episode_steps.max()))
        self._episode_steps[self._is_start] = 0
        if dones.any():
            self._acting_tasks[dones] = self._next_tasks(int(dones.sum()))

    def _check_finite(self, name: str, values: np.ndarray, stored_as: np.dtype) -> None:
        """
        Reject numbers from the environment that are not finite, before they enter the buffer.

        :param name: name of the values in the message
        :param values: from the environment (n_envs, .)
        :param stored_as: the dtype that they have in the buffer
        :raises ValueError: if one is NaN, infinite or too large a whole number
        """
        bad = np.flatnonzero(~in_float32(values, stored_as).all(axis=1))
        if len(bad) > 0:
            # Numbers beyond 3.4e38 are infinite in single precision, and those beyond 65,504 in half precision
            raise ValueError(
                f"The environment returned a NaN or infinite {name} at real step {self.num_timesteps}, "
                f"environment {bad[0]}: {values[bad[0]]}. {self._what_is_intact()}"
            )
        check_counts(f"The environment's {name}", values)

    def _what_is_intact(self) -> str:
        """Describe what can still be used after a number that is not finite, and what cannot."""
        message = "The model and the buffer up to that step are intact: `save` and `save_replay_buffer` still work."
        normalizer = self._vec_normalize_env
        if normalizer is None:
            return message
        # `obs_rms` is missing without `norm_obs`, and may be a dictionary of statistics
        statistics = [x for x in vars(normalizer).values() if isinstance(x, RunningMeanStd)]
        if all(np.isfinite(x.mean).all() and np.isfinite(x.var).all() for x in statistics):
            return f"{message} So are the statistics of VecNormalize."
        return (
            f"{message} The statistics of VecNormalize are not: they now contain the number permanently. Continue with saved "
            "ones (`VecNormalize.load`), and put `VecCheckNan(env, raise_exception=True)` inside VecNormalize."
        )

    def _raw_last_obs(self) -> np.ndarray:
        """Return the latest observations, without VecNormalize's scaling (n_envs, O)."""
        raw = self._last_obs if self._vec_normalize_env is None else self._last_original_obs
        assert isinstance(raw, np.ndarray)
        return raw

    def _remember_starts(self, obs: np.ndarray) -> None:
        """
        Keep real first observations, so that imagined rollouts can start without resetting a simulator.

        :param obs: (B, O), raw
        """
        self._new_starts.append(obs)
        if len(self._new_starts) >= MAX_INITIAL_OBS:
            self._join_new_starts()

    def _join_new_starts(self) -> None:
        """Extend the pool of first observations, not at every start but in batches, because episodes may be short."""
        if self._new_starts:
            known = [] if self._initial_obs is None else [self._initial_obs]
            self._initial_obs = np.concatenate([*known, *self._new_starts])[-MAX_INITIAL_OBS:]
            self._new_starts = []

    # ---------------------------------------------------------------- real data

    def _transitions(self) -> Transitions:
        """Return the whole replay buffer, from the oldest to the newest step, in raw units."""
        buffer = self.replay_buffer
        assert buffer is not None
        rows = buffer.size()

        def flat(array: np.ndarray) -> th.Tensor:
            array = np.roll(array, -buffer.pos, axis=0) if buffer.full else array[:rows]
            return th.as_tensor(array.reshape(rows * self.n_envs, *array.shape[2:]), device=self.device)

        terminated = buffer.dones.astype(bool) & ~buffer.timeouts.astype(bool)
        return Transitions(
            obs=flat(as_floating(buffer.observations[:rows])),
            action=flat(buffer.actions),
            next_obs=flat(as_floating(buffer.next_observations[:rows])),
            reward=flat(buffer.rewards),
            terminated=flat(terminated),
        )

    def _to_policy_units(self, obs: th.Tensor) -> th.Tensor:
        """Scale raw observations as VecNormalize does, if there is one."""
        return self._policy_units(obs.dtype)(obs)

    def _policy_units(self, dtype: th.dtype) -> Callable[[th.Tensor], th.Tensor]:
        """Return ``_to_policy_units`` for one dtype, with the current statistics already on the device."""
        normalizer = self._vec_normalize_env
        if normalizer is None or not normalizer.norm_obs:
            return unscaled
        statistics, clip_obs = normalizer.obs_rms, normalizer.clip_obs
        assert isinstance(statistics, RunningMeanStd)
        mean, var = (th.as_tensor(x, device=self.device, dtype=dtype) for x in (statistics.mean, statistics.var))
        return VecNormalizeScaling(mean, (var + normalizer.epsilon).sqrt(), clip_obs)

    # ---------------------------------------------------------------- returns of real episodes, and the critic's values

    def _judge_real_returns(self) -> None:
        """Log the returns of the real episodes since the last fit, and compare them with the imagined ones."""
        n_episodes, self._n_new_episodes = self._n_new_episodes, 0
        # Empty without a Monitor
        episodes = list(self.ep_info_buffer or ())[-n_episodes:] if n_episodes > 0 else []
        returns = [float(episode["r"]) for episode in episodes]
        if returns:
            self.logger.record("rollout/ep_rew_mean_new", fmean(returns))
        discounted = self._bootstrapped_returns()
        if self.baseline == "critic":
            if discounted:
                self.logger.record("rollout/ep_discounted_rew_mean", fmean(discounted))
            self._health.real_episodes(discounted, " in discounted reward")
        else:
            # Of episodes longer than the horizon, count the share of the return that imagined rollouts can have
            shares = [min(1.0, self.horizon / int(episode["l"])) for episode in episodes]
            self._health.real_episodes([share * value for share, value in zip(shares, returns, strict=True)])
        if self.imagined_start == "initial":
            self._health.imagined_from_the_first(self._longest_episode, self.horizon)

    def _bootstrapped_returns(self) -> list[float]:
        """Return the discounted returns of the real episodes since the last fit, bootstrapped where a time limit cut them."""
        episodes = self._discounted_returns.take()
        if not episodes:
            return []
        values = self._values(np.stack([episode.final_obs for episode in episodes]))
        return [e.discounted_return + e.bootstrap * value for e, value in zip(episodes, values.tolist(), strict=True)]

    @th.no_grad()
    def _values(self, raw_obs: np.ndarray) -> np.ndarray:
        """
        Evaluate the critic; before its first fit all values are 0.

        :param raw_obs: raw observations (B, O)
        :return: values in units of the reward (B,)
        """
        obs = th.as_tensor(raw_obs, device=self.device, dtype=self.dynamics.observation_dtype)
        values: np.ndarray = self.policy.predict_values(self._to_policy_units(obs)).squeeze(1).cpu().numpy()
        return values if self.policy.value_net.is_trained else np.zeros_like(values)
