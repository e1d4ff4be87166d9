"""The numbers behind the figures: comparison of a trained model with fresh episodes of its real environment.

Nothing is drawn here. All observations are raw; the units of errors are stated.

Legend of shapes: ``M`` members, ``T`` tasks, ``S`` starts, ``K`` steps predicted, ``L`` steps of an episode, ``B`` rows,
``O`` observation size.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import gymnasium as gym
import numpy as np
import torch as th

from sb3_mbmpo.dynamics import DynamicsEnsemble
from sb3_mbmpo.imagination.model_env import ModelEnv
from sb3_mbmpo.mbmpo import MBMPO
from sb3_mbmpo.report.episodes import (
    Act,
    Episode,
    RandomPolicy,
    evaluation_seed,
    meta_actor,
    play_episodes,
    to_policy_input,
)
from sb3_mbmpo.report.observation_names import Quantity, quantities

# Errors are measured up to this many steps ahead: further ahead, no model of a chaotic environment predicts anything
MAX_STEPS_AHEAD = 100
# Maximum number of starts for the mean errors, and of states for KL and disagreement
MAX_STARTS = 200
MAX_STATES = 2000
# Points per side of a map over the plane
MAP_SIZE = 60


class HorizonErrors(NamedTuple):
    """
    Errors of predictions along real actions.

    They are root mean squares over the starts, in standard deviations of the observations in the training data.

    :param members: errors of each member, step ahead and dimension (M, K, O)
    :param unchanged: errors of predicting no change at all (K, O)
    """

    members: np.ndarray
    unchanged: np.ndarray


class Trajectory(NamedTuple):
    """
    A real episode, and that of each member from the same first observation.

    :param real: (L + 1, O)
    :param imagined: (M, L + 1, O)
    :param real_rewards: (L,)
    :param imagined_rewards: (M, L)
    """

    real: np.ndarray
    imagined: np.ndarray
    real_rewards: np.ndarray
    imagined_rewards: np.ndarray


class Plasticity(NamedTuple):
    """
    The members' disagreement, and the change of the policy by adaptation, at some states.

    :param obs: states (B, O)
    :param disagreement: for the meta-policy's action, in standard deviations of the observed changes (B,)
    :param kl: KL from the meta-policy to the adapted policies, mean over the tasks, in nats (B,)
    :param visited: real states of the meta-policy (B', O), for maps
    :param is_map: whether ``obs`` are the points of a square grid over the plane, rows first
    """

    obs: np.ndarray
    disagreement: np.ndarray
    kl: np.ndarray
    visited: np.ndarray
    is_map: bool


class ActorStudy(NamedTuple):
    """
    Errors of the ensemble on the real episodes of one actor.

    :param episodes: the real episodes
    :param horizon_errors: see ``HorizonErrors``
    :param one_step: errors of each member and dimension, in standard deviations of the observed changes; NaN for a
        dimension that never changed (M, O)
    """

    episodes: list[Episode]
    horizon_errors: HorizonErrors
    one_step: np.ndarray


class ModelStudy(NamedTuple):
    """
    All comparisons of a model with its real environment.

    :param actors: by actor: "meta-policy", "random actions"
    :param replayed: an episode of the meta-policy, which the members predict from its actions
    :param played: the same episode, but in the members the meta-policy acts on imagined observations
    :param plasticity: see ``Plasticity``
    :param quantities: what the numbers of an observation are (O,)
    """

    actors: dict[str, ActorStudy]
    replayed: Trajectory
    played: Trajectory
    plasticity: Plasticity
    quantities: list[Quantity]

    def returns(self, actor: str = "meta-policy") -> np.ndarray:
        """Return the returns of an actor's real episodes."""
        return np.array([episode.rewards.sum() for episode in self.actors[actor].episodes])

    def metrics(self) -> dict[str, float]:
        """Return root mean square errors over members and dimensions on the meta-policy's real episodes, for a log."""
        _, errors, one_step = self.actors["meta-policy"]
        return {
            "one_step_rmse": float(np.sqrt(np.nanmean(np.square(one_step)))),
            "horizon_rmse": float(root_mean_square(errors.members[:, -1], axis=(0, 1))),
        }


def study_model(model: MBMPO, env: gym.Env[Any, Any], n_episodes: int = 20, seed: int = 0) -> ModelStudy:
    """
    Play fresh real episodes, and compare the model with them. The model is unchanged, including its random numbers.

    The episodes are those with which ``python -m sb3_mbmpo train`` evaluates a run of the same seed.

    :param model: a trained model
    :param env: its real environment, without VecNormalize; it is reset
    :param n_episodes: number of episodes of the meta-policy, and also of random actions
    :param seed: seed of the run whose evaluation episodes are played, and of the random actions
    :return: the comparisons
    :raises ValueError: if the model has not been trained, or the environment is of other spaces
    """
    if model._n_fits == 0:
        raise ValueError("The model has not been trained yet: call `learn` first.")
    for name in ("observation_space", "action_space"):
        theirs, ours = getattr(env, name), getattr(model, name)
        if theirs != ours:
            raise ValueError(f"`env` must be the model's environment: its {name} is {theirs}, the model's is {ours}.")
    actors: dict[str, Act] = {"meta-policy": meta_actor(model), "random actions": RandomPolicy(model.action_space, seed)}
    studies, model_env, scale = {}, model._model_env(None), model.dynamics.observation_std.cpu().numpy()
    for name, act in actors.items():
        episodes = play_episodes(env, act, n_episodes, evaluation_seed(seed))
        horizon = horizon_errors(model_env, episodes, horizon=model.horizon, scale=scale)
        one_step = one_step_errors(model.dynamics, episodes)
        studies[name] = ActorStudy(episodes, horizon_errors=horizon, one_step=one_step)
    episodes = studies["meta-policy"].episodes
    return ModelStudy(
        studies,
        replayed=replay(model, episodes[0]),
        played=play(model, episodes[0]),
        plasticity=plasticity(model, episodes),
        quantities=quantities(env),
    )


# ---------------------------------------------------------------- errors of predictions


@th.no_grad()
def open_loop(model_env: ModelEnv, obs: np.ndarray, actions: np.ndarray) -> np.ndarray:
    """
    Predict along given actions, each step from the model's previous prediction.

    :param model_env: the learned environment
    :param obs: first observations (S, O)
    :param actions: as an environment takes them (S, K, ...)
    :return: predicted observations (M, S, K, O) float32
    """
    n_starts, n_steps = actions.shape[:2]
    flat = model_env.codec.from_numpy(actions.reshape(n_starts * n_steps, *actions.shape[2:]), model_env.device)
    encoded = model_env.codec.to_dynamics(flat).view(n_starts, n_steps, -1)
    all_members = (model_env.n_models, -1, -1)
    current = th.as_tensor(obs, dtype=th.float32, device=model_env.device).expand(all_members)
    predicted = []
    for k in range(n_steps):
        current = model_env.step(current, encoded[:, k].expand(all_members)).next_obs
        predicted.append(current)
    return th.stack(predicted, dim=2).cpu().numpy()


def windows(episodes: Sequence[Episode], n_steps: int) -> tuple[np.ndarray, np.ndarray]:
    """
    Cut episodes into overlapping windows.

    :param episodes: real episodes
    :param n_steps: length ``K`` of a window
    :return: observations (S, K + 1, O) and actions (S, K, ...) of at most ``MAX_STARTS`` windows, evenly spread
    """
    starts = [(episode, t) for episode in episodes for t in range(len(episode.actions) - n_steps + 1)]
    chosen = starts[:: -(-len(starts) // MAX_STARTS)]
    obs = np.stack([episode.obs[t : t + n_steps + 1] for episode, t in chosen])
    return obs, np.stack([episode.actions[t : t + n_steps] for episode, t in chosen])


def root_mean_square(errors: np.ndarray, axis: int | tuple[int, ...]) -> np.ndarray:
    """Return the root mean square over ``axis``."""
    result: np.ndarray = np.sqrt(np.square(errors).mean(axis))
    return result


def horizon_errors(model_env: ModelEnv, episodes: Sequence[Episode], *, horizon: int, scale: np.ndarray) -> HorizonErrors:
    """
    Measure errors of predictions 1 to ``K`` steps ahead.

    ``K`` is the horizon of imagined rollouts, half of the longest episode or ``MAX_STEPS_AHEAD``, whichever is smallest.

    :param model_env: the learned environment
    :param episodes: real episodes
    :param horizon: horizon of imagined rollouts
    :param scale: standard deviation of the observations in the training data (O,)
    :return: the errors
    """
    longest = max(len(episode.actions) for episode in episodes)
    obs, actions = windows(episodes, max(1, min(horizon, MAX_STEPS_AHEAD, longest // 2)))
    predicted = open_loop(model_env, obs[:, 0], actions)
    members = root_mean_square((predicted - obs[:, 1:]) / scale, axis=1)
    return HorizonErrors(members, root_mean_square((obs[:, :1] - obs[:, 1:]) / scale, axis=0))


def one_step_errors(dynamics: DynamicsEnsemble, episodes: Sequence[Episode]) -> np.ndarray:
    """
    Measure errors of predictions one step ahead.

    :param dynamics: the ensemble
    :param episodes: real episodes
    :return: root mean square errors (M, O), in standard deviations of the observed changes: 1 is as good as predicting the
        mean change. NaN for a dimension that never changed
    """
    obs, next_obs, actions = (
        np.concatenate(parts)
        for parts in zip(*((episode.obs[:-1], episode.obs[1:], episode.actions) for episode in episodes), strict=True)
    )
    scale = dynamics.target_std[: dynamics.observation_dim].cpu().numpy()
    return root_mean_square((dynamics.predict(obs, actions) - next_obs) / np.where(scale > 0, scale, np.nan), axis=1)


# ---------------------------------------------------------------- trajectories


def replay(model: MBMPO, episode: Episode) -> Trajectory:
    """
    Predict a real episode from its first observation and its actions.

    :param model: a trained model
    :param episode: a real episode, of which the first ``horizon`` steps are used
    :return: the episode and the members' predictions
    """
    length = min(len(episode.actions), model.horizon)
    predicted = open_loop(model._model_env(None), episode.obs[:1], episode.actions[None, :length])[:, 0]
    first = np.broadcast_to(episode.obs[0].astype(np.float32), (len(predicted), 1, predicted.shape[2]))
    imagined = np.concatenate([first, predicted], axis=1)
    return _trajectory(model, episode, imagined, [episode.actions[:length]] * len(imagined))


@th.no_grad()
def play(model: MBMPO, episode: Episode) -> Trajectory:
    """
    Let the meta-policy act in every member, from a real first observation.

    :param model: a trained model
    :param episode: a real episode of the meta-policy, of which the first ``horizon`` steps are used
    :return: the episode and the imagined ones from its first observation; terminations are ignored
    """
    model_env, act = model._model_env(None), meta_actor(model)
    imagined = [np.repeat(episode.obs[:1].astype(np.float32), model_env.n_models, axis=0)]
    actions = []
    for _ in range(min(len(episode.actions), model.horizon)):
        actions.append(act(imagined[-1]))
        encoded = model_env.codec.to_dynamics(model_env.codec.from_numpy(actions[-1], model_env.device))
        current = th.as_tensor(imagined[-1], device=model_env.device)
        imagined.append(model_env.step(current.unsqueeze(1), encoded.unsqueeze(1)).next_obs.squeeze(1).cpu().numpy())
    return _trajectory(model, episode, np.stack(imagined, axis=1), list(np.stack(actions, axis=1)))


def _trajectory(model: MBMPO, episode: Episode, imagined: np.ndarray, actions: list[np.ndarray]) -> Trajectory:
    length = imagined.shape[1] - 1
    rewards = [imagined_rewards(model, imagined[i], actions[i], member=i) for i in range(len(imagined))]
    return Trajectory(
        real=episode.obs[: length + 1],
        imagined=imagined,
        real_rewards=episode.rewards[:length],
        imagined_rewards=np.stack(rewards),
    )


@th.no_grad()
def imagined_rewards(model: MBMPO, obs: np.ndarray, actions: np.ndarray, member: int) -> np.ndarray:
    """
    Evaluate the rewards of an imagined trajectory.

    :param model: a trained model
    :param obs: observations imagined by ``member`` (L + 1, O)
    :param actions: (L, ...)
    :param member: the member whose reward head is used if the reward is learned
    :return: rewards of the steps (L,)
    """
    model_env = model._model_env(None)
    observations = th.as_tensor(obs, dtype=th.float32, device=model_env.device)
    env_actions = model_env.codec.from_numpy(actions, model_env.device)
    predicted = None
    if model_env.reward_fn is None:
        model._functions.require(model.dynamics.learned_reward, model.dynamics.learned_termination)
        batch = (x.expand(model_env.n_models, -1, -1) for x in (observations[:-1], model_env.codec.to_dynamics(env_actions)))
        of_members = model_env.step(*batch).reward
        assert of_members is not None
        predicted = of_members[member]
    rewards = model_env.reward(observations[:-1], env_actions, observations[1:], predicted)
    return rewards.cpu().numpy()


# ---------------------------------------------------------------- disagreement and adaptation


def plasticity(model: MBMPO, episodes: Sequence[Episode]) -> Plasticity:
    """
    Compute the members' disagreement, and the change of the policy by adaptation.

    :param model: a trained model
    :param episodes: real episodes of the meta-policy
    :return: values over the plane, within the range of the training data, if observations have two dimensions; else at the
        episodes' states
    """
    visited = np.concatenate([episode.obs for episode in episodes])
    is_map = visited.shape[1] == 2
    if is_map:
        low, high = (bound.cpu().numpy() for bound in (model.dynamics.observation_low, model.dynamics.observation_high))
        states = grid(low, high)
    else:
        states = visited[:: -(-len(visited) // MAX_STATES)]
    disagreement = model.dynamics.disagreement(states, meta_actor(model)(states))
    kl = adaptation_kl(model, states)
    return Plasticity(states, disagreement=disagreement, kl=kl, visited=visited, is_map=is_map)


def grid(low: np.ndarray, high: np.ndarray) -> np.ndarray:
    """
    Make a square grid over a rectangle.

    :param low: lower left corner (2,)
    :param high: upper right corner (2,)
    :return: points (``MAP_SIZE`` ** 2, 2), the second coordinate changes slowest
    """
    x, y = (np.linspace(start, stop, MAP_SIZE) for start, stop in zip(low, high, strict=True))
    return np.stack([axis.ravel() for axis in np.meshgrid(x, y)], axis=1)


@th.no_grad()
def adaptation_kl(model: MBMPO, obs: np.ndarray) -> np.ndarray:
    """
    Measure how much adaptation changes the policy at each observation.

    :param model: a trained model
    :param obs: raw (B, O)
    :return: KL from the meta-policy to the adapted policies of its last iteration, mean over the tasks, in nats (B,)
    """
    adapted = model._adapted
    policy_input = to_policy_input(model, obs).expand(len(adapted), -1, -1)
    before = model.policy.actor(model.policy.actor_vector().expand(len(adapted), -1))(policy_input)
    kl: np.ndarray = before.kl_divergence(model.policy.actor(adapted)(policy_input)).mean(0).cpu().numpy()
    return kl


def rank_correlation(a: np.ndarray, b: np.ndarray) -> float:
    """
    Compute Spearman's rank correlation.

    :param a: (B,)
    :param b: (B,)
    :return: the correlation, -1 to 1; NaN if ``a`` or ``b`` is constant
    """

    def ranks(values: np.ndarray) -> np.ndarray:
        # Equal values share the mean of their ranks
        _, place, counts = np.unique(values, return_inverse=True, return_counts=True)
        last: np.ndarray = counts.cumsum()
        mean_rank: np.ndarray = (last - (counts - 1) / 2)[place]
        return mean_rank

    x, y = (ranks(values) - (len(values) + 1) / 2 for values in (a, b))
    norm = np.sqrt(np.square(x).sum() * np.square(y).sum())
    return float((x * y).sum() / norm) if norm > 0 else float("nan")
