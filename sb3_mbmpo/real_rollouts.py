"""Real rollouts: who acts in the real environment, and what of it is kept. Everything before the first model.

SB3's ``OffPolicyAlgorithm`` already steps environments, calls callbacks and fills a replay buffer to the letter (time limits,
``terminal_observation``, VecNormalize); this class adds the adapted policies and the pool of first observations.

Legend of shapes: ``T`` tasks, ``P`` actor parameters, ``B`` rows, ``O`` observation size.
"""

from typing import Any

import numpy as np
import torch as th
from stable_baselines3.common.buffers import ReplayBuffer
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.noise import ActionNoise
from stable_baselines3.common.off_policy_algorithm import OffPolicyAlgorithm
from stable_baselines3.common.running_mean_std import RunningMeanStd
from stable_baselines3.common.type_aliases import MaybeCallback, RolloutReturn
from stable_baselines3.common.vec_env import VecEnv, unwrap_vec_normalize
from torch.nn.utils.rnn import pad_sequence

from sb3_mbmpo.actions import ActionCodec
from sb3_mbmpo.dynamics import Transitions
from sb3_mbmpo.imagination import Act, ImaginedRollouts
from sb3_mbmpo.policies import MetaPolicy

# Real first observations that are kept for the imagination
MAX_INITIAL_OBS = 10_000


class RealRolloutAlgorithm(OffPolicyAlgorithm):
    """
    The half of MBMPO that acts in the real environment. Its arguments are documented there.
    """

    policy: MetaPolicy
    n_steps: int
    n_models: int
    n_tasks: int
    exploration: str

    def _setup_rollouts(self) -> None:
        """State of the real rollouts, besides SB3's; all of it is saved with the model."""
        self._generators: dict[str, th.Generator] = {}
        self._adapted: th.Tensor | None = None  # theta'_i (T, P) of the last iteration
        self._task_turn = 0
        self._acting_tasks = np.zeros(1, dtype=int)
        self._random_phase = True
        self._initial_obs: np.ndarray | None = None

    def _setup_model(self) -> None:
        super()._setup_model()
        self._codec = ActionCodec(self.action_space)

    def _setup_learn(
        self,
        total_timesteps: int,
        callback: MaybeCallback = None,
        reset_num_timesteps: bool = True,
        tb_log_name: str = "run",
        progress_bar: bool = False,
    ) -> tuple[int, BaseCallback]:
        resets = reset_num_timesteps or self._last_obs is None
        result = super()._setup_learn(total_timesteps, callback, reset_num_timesteps, tb_log_name, progress_bar)
        if resets:
            self._remember_starts(self._raw_last_obs())
        return result

    def _random_steps_left(self) -> int:
        """:return: uniformly random real steps still to do before the first fit; none once the policy has learned"""
        assert self.replay_buffer is not None
        collected = self.replay_buffer.size() * self.n_envs
        return max(0, self.learning_starts - collected) if self._n_updates == 0 else 0

    def _steps_to_collect(self, total_timesteps: int) -> int:
        """:return: steps of every environment in the next rollout; real steps are dear, so never more than asked for"""
        wanted = self._random_steps_left() or self.n_steps
        return max(1, min(wanted, total_timesteps - self.num_timesteps) // self.n_envs)

    def collect_rollouts(self, *args: Any, **kwargs: Any) -> RolloutReturn:
        # A rollout begins with fresh policies, even in the middle of an episode: they know more than the last ones
        self._acting_tasks = self._next_tasks(self.n_envs)
        self._random_phase = self._random_steps_left() > 0
        return super().collect_rollouts(*args, **kwargs)

    def _next_tasks(self, count: int) -> np.ndarray:
        """:return: whose adapted policy acts next: one of another model each time, until every task has had its turn"""
        order = np.arange(self.n_tasks).reshape(self.n_models, -1).T.reshape(-1)
        tasks_in_turn = order[(self._task_turn + np.arange(count)) % self.n_tasks]
        self._task_turn = (self._task_turn + count) % self.n_tasks
        return tasks_in_turn

    def _sample_action(
        self, learning_starts: int, action_noise: ActionNoise | None = None, n_envs: int = 1
    ) -> tuple[np.ndarray, np.ndarray]:
        if self._random_phase:
            action = np.array([self.action_space.sample() for _ in range(n_envs)])
            return action, action
        assert isinstance(self._last_obs, np.ndarray)
        parameters = self.policy.actor_vector().unsqueeze(0)
        if self.exploration == "adapted" and self._adapted is not None:
            parameters = self._adapted[th.as_tensor(self._acting_tasks, device=self.device)]
        with th.no_grad():
            obs = self.policy.standardize(th.as_tensor(self._last_obs, device=self.device))
            distribution = self.policy.actor(parameters.expand(n_envs, -1))(obs.unsqueeze(1))
            sample = distribution.sample(self._generators["exploration"]).squeeze(1)
        action = self._codec.to_numpy(self._codec.to_env(sample))
        return action, action

    def _store_transition(
        self,
        replay_buffer: ReplayBuffer,
        buffer_action: np.ndarray,
        new_obs: np.ndarray | dict[str, np.ndarray],
        reward: np.ndarray,
        dones: np.ndarray,
        infos: list[dict[str, Any]],
    ) -> None:
        self._check_finite(new_obs, reward)
        super()._store_transition(replay_buffer, buffer_action, new_obs, reward, dones, infos)
        if dones.any():
            self._remember_starts(self._raw_last_obs()[dones])
            self._acting_tasks[dones] = self._next_tasks(int(dones.sum()))

    def _check_finite(self, new_obs: np.ndarray | dict[str, np.ndarray], reward: np.ndarray) -> None:
        """:raises ValueError: before a NaN or infinite number of the environment can enter the buffer"""
        assert isinstance(new_obs, np.ndarray)
        for name, values in (("observation", new_obs), ("reward", reward[:, None])):
            bad = np.flatnonzero(~np.isfinite(values).all(axis=1))
            if len(bad) > 0:
                raise ValueError(
                    f"The environment returned a NaN or infinite {name} at real step {self.num_timesteps}, "
                    f"environment {bad[0]}: {values[bad[0]]}. The model and the buffer up to that step are intact: "
                    "`save` and `save_replay_buffer` still work."
                )

    def _raw_last_obs(self) -> np.ndarray:
        """:return: the observations that the next actions answer, without VecNormalize's scaling (n_envs, O)"""
        raw = self._last_obs if self._vec_normalize_env is None else self._vec_normalize_env.get_original_obs()
        assert isinstance(raw, np.ndarray)
        return raw

    def _remember_starts(self, obs: np.ndarray) -> None:
        """
        Keep real first observations for the imagination, which then needs no simulator to reset.

        :param obs: (B, O), raw
        """
        known = obs[:0] if self._initial_obs is None else self._initial_obs
        self._initial_obs = np.concatenate([known, obs])[-MAX_INITIAL_OBS:]

    # ---------------------------------------------------------------- real data

    def _transitions(self) -> Transitions:
        """:return: all of the replay buffer, in raw units"""
        buffer = self.replay_buffer
        assert buffer is not None
        rows = buffer.size()

        def flat(array: np.ndarray) -> th.Tensor:
            return th.as_tensor(array[:rows].reshape(rows * self.n_envs, *array.shape[2:]), device=self.device)

        terminated = buffer.dones.astype(bool) & ~buffer.timeouts.astype(bool)
        return Transitions(
            flat(buffer.observations),
            flat(buffer.actions),
            flat(buffer.next_observations),
            flat(buffer.rewards),
            flat(terminated),
        )

    def _to_policy_units(self, obs: th.Tensor) -> th.Tensor:
        """:return: raw observations as the policy's environment would show them: scaled by VecNormalize, if there is one"""
        normalizer = self._vec_normalize_env
        if normalizer is None or not normalizer.norm_obs:
            return obs
        statistics = normalizer.obs_rms
        assert isinstance(statistics, RunningMeanStd)
        mean, var = (th.as_tensor(x, device=obs.device, dtype=obs.dtype) for x in (statistics.mean, statistics.var))
        return ((obs - mean) / (var + normalizer.epsilon).sqrt()).clamp(-normalizer.clip_obs, normalizer.clip_obs)


def collect_episodes(env: VecEnv, act: Act, policy: MetaPolicy, n_episodes: int, generator: th.Generator) -> ImaginedRollouts:
    """
    Real episodes of one policy, in the container of imagined rollouts: an adaptation does not care where its data is from.

    As in SB3's ``evaluate_policy``, episodes are shared out evenly among the environments: short ones would be
    over-represented otherwise.

    :param env: the environment; what VecNormalize shows the policy is normalised, the rewards are the original ones
    :param act: standardised observations (1, B, O) -> distributions
    :param policy: standardises observations, translates actions
    :param n_episodes: number of complete episodes
    :param generator: samples the actions
    :return: one task with a rollout an episode (1, H, N, .), as long as the longest; shorter ones are not alive to the end
    """
    codec = ActionCodec(policy.action_space)
    normalizer = unwrap_vec_normalize(env)
    quota = (n_episodes + np.arange(env.num_envs)) // env.num_envs
    running: list[list[tuple[th.Tensor, th.Tensor, float, bool]]] = [[] for _ in range(env.num_envs)]
    episodes: list[list[tuple[th.Tensor, th.Tensor, float, bool]]] = []
    obs = env.reset()
    while quota.any():
        policy_input = policy.standardize(th.as_tensor(np.asarray(obs), device=policy.device))
        with th.no_grad():
            sample = act(policy_input.unsqueeze(0)).sample(generator).squeeze(0)
        obs, rewards, dones, infos = env.step(codec.to_numpy(codec.to_env(sample)))
        if normalizer is not None:
            rewards = normalizer.get_original_reward()
        for i in np.flatnonzero(quota):
            terminated = bool(dones[i]) and not infos[i].get("TimeLimit.truncated", False)
            running[i].append((policy_input[i], sample[i], float(rewards[i]), terminated))
            if dones[i]:
                episodes.append(running[i])
                running[i] = []
                quota[i] -= 1

    lengths = th.tensor([len(episode) for episode in episodes], device=policy.device)
    alive = th.arange(int(lengths.max()), device=policy.device).unsqueeze(1) < lengths
    inputs, actions, rewards_, terminations = (
        pad_sequence([th.stack([th.as_tensor(step[k], device=policy.device) for step in episode]) for episode in episodes])
        for k in range(4)
    )
    return ImaginedRollouts(*(x.unsqueeze(0) for x in (inputs, actions, rewards_, alive, terminations)))
