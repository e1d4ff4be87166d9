"""MBMPO, the SB3 algorithm: holds the state and the order of the stages; the maths lives in the modules it wires."""

import time
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, ClassVar, TypeVar

import numpy as np
import torch as th
from stable_baselines3.common.policies import BasePolicy
from stable_baselines3.common.type_aliases import GymEnv, MaybeCallback, Schedule, TrainFreq, TrainFrequencyUnit
from stable_baselines3.common.utils import check_for_correct_spaces

from sb3_mbmpo import tasks
from sb3_mbmpo.advantages import estimate_advantages
from sb3_mbmpo.arguments import CLIP_MARGIN, ENSEMBLE_OPTIONS, FIT_OPTIONS, check_arguments, check_integer
from sb3_mbmpo.dynamics import DynamicsEnsemble, Transitions
from sb3_mbmpo.imagination import World
from sb3_mbmpo.meta import TaskBatch, adapt, split_outer
from sb3_mbmpo.meta_training import MetaSettings, MetaTrainer
from sb3_mbmpo.policies import MetaPolicy, MlpPolicy
from sb3_mbmpo.real_rollouts import RealRolloutAlgorithm, collect_episodes
from sb3_mbmpo.vec_env import ModelVecEnv

SelfMBMPO = TypeVar("SelfMBMPO", bound="MBMPO")

STAGES = ("real_rollout", "dynamics_fit", "imagination", "meta_update")
RANDOM_PURPOSES = ("exploration", "imagination", "starts", "dynamics")
TRPO_OPTIONS = (
    "target_kl",
    "cg_max_steps",
    "cg_damping",
    "line_search_shrinking_factor",
    "line_search_max_iter",
    "sub_sampling_factor",
)
# A known reward function that misses the real rewards by more than this share of their spread is worth a warning
REWARD_ERROR_TOLERANCE = 0.2


class MBMPO(RealRolloutAlgorithm):
    """
    Model-Based Meta-Policy Optimization (MB-MPO).

    Learns an ensemble of dynamics models from few real steps, imagines rollouts in them and meta-learns a policy that one
    policy-gradient step adapts to any of the models, so that errors of the models hurt less.

    Paper: https://arxiv.org/abs/1809.05214
    Code: the authors' at https://github.com/jonasrothfuss/model_ensemble_meta_learning; the README lists the differences.

    :param policy: the policy, "MlpPolicy" or a subclass of it
    :param env: the environment to learn from (if registered in Gymnasium, can be str)
    :param learning_rate: Adam step size of the dynamics ensemble, a number or a schedule of the remaining progress (1 to 0)
    :param n_steps: real steps an iteration, over all environments together
    :param learning_starts: uniformly random real steps before the first fit
    :param buffer_size: real transitions that are kept, first in first out
    :param n_models: members of the ensemble
    :param n_tasks: tasks of a meta-step, a multiple of ``n_models``: task ``i`` lives in model ``i // (n_tasks / n_models)``
    :param n_imagined_rollouts: imagined rollouts a task
    :param horizon: steps of an imagined rollout
    :param n_meta_steps: outer steps an iteration
    :param n_inner_steps: policy-gradient steps of an adaptation
    :param inner_lr: step size of the adaptation
    :param learn_inner_lr: learn one inner step size a parameter, starting from ``inner_lr``
    :param first_order: ignore that the inner gradient depends on the meta-parameters
    :param outer_optimizer: "trpo" or "ppo"
    :param target_kl: bound of the mean KL of the adapted policies in a TRPO step
    :param cg_max_steps: conjugate gradient iterations
    :param cg_damping: added to the diagonal of the Fisher matrix
    :param line_search_shrinking_factor: each candidate of the line search is this much shorter than the one before
    :param line_search_max_iter: candidates of the line search
    :param sub_sampling_factor: the Fisher-vector products use every k-th imagined step
    :param gamma: discount factor
    :param gae_lambda: trade-off of bias (0) and variance (1) of the advantages
    :param normalize_advantage: standardise the advantages of each task
    :param ent_coef: weight of the policy's entropy in the outer objective
    :param baseline: "linear" or "zero"
    :param reward_fn: "auto" (the environment's own ``reward(obs, action, next_obs)``, else the known one of its id, else
        learned), "learned", a function of torch tensors, or its path "pkg.module:function"
    :param termination_fn: "auto", "learned", None (nothing ends), a function of ``next_obs``, or its path
    :param imagined_start: where imagined rollouts start: "initial" (real first observations) or "buffer" (any real one)
    :param exploration: who acts in the real environment: the "adapted" policies, one an episode, or the "meta" policy
    :param dynamics_kwargs: arguments of ``DynamicsEnsemble`` (net_arch, activation_fn, weight_norm, probabilistic,
        weight_decay) and of its ``fit`` (max_epochs, batch_size, validation_fraction, rolling_average_persistency), and
        ``reinit_every`` (draw new weights at every k-th fit; 0: never) and ``clip_margin`` (imagined observations stay
        within the range of the data plus this many standard deviations; None: no clipping)
    :param stats_window_size: episodes that the logged means of real episodes cover
    :param tensorboard_log: log location for TensorBoard (if None, no logging)
    :param policy_kwargs: arguments of the policy
    :param outer_kwargs: arguments of the PPO outer step: learning_rate, n_epochs, clip_range
    :param verbose: 0 for no output, 1 for info messages, 2 for debug messages
    :param seed: seed of everything random
    :param device: where all networks and the imagination live; "auto" is a GPU if there is one
    :param _init_setup_model: whether to build the networks at the creation of the instance
    """

    policy_aliases: ClassVar[dict[str, type[BasePolicy]]] = {"MlpPolicy": MlpPolicy}
    policy: MetaPolicy
    dynamics: DynamicsEnsemble

    def __init__(
        self,
        policy: str | type[MetaPolicy],
        env: GymEnv | str | None,
        learning_rate: float | Schedule = 1e-3,
        n_steps: int = 4000,
        learning_starts: int = 5000,
        buffer_size: int = 100_000,
        n_models: int = 5,
        n_tasks: int = 20,
        n_imagined_rollouts: int = 50,
        horizon: int = 200,
        n_meta_steps: int = 30,
        n_inner_steps: int = 1,
        inner_lr: float = 1e-3,
        learn_inner_lr: bool = False,
        first_order: bool = False,
        outer_optimizer: str = "trpo",
        target_kl: float = 0.01,
        cg_max_steps: int = 10,
        cg_damping: float = 1e-5,
        line_search_shrinking_factor: float = 0.8,
        line_search_max_iter: int = 15,
        sub_sampling_factor: int = 10,
        gamma: float = 0.99,
        gae_lambda: float = 1.0,
        normalize_advantage: bool = True,
        ent_coef: float = 0.0,
        baseline: str = "linear",
        reward_fn: str | tasks.RewardFn = "auto",
        termination_fn: str | tasks.TerminationFn | None = "auto",
        imagined_start: str = "initial",
        exploration: str = "adapted",
        dynamics_kwargs: Mapping[str, Any] | None = None,
        stats_window_size: int = 100,
        tensorboard_log: str | None = None,
        policy_kwargs: dict[str, Any] | None = None,
        outer_kwargs: Mapping[str, Any] | None = None,
        verbose: int = 0,
        seed: int | None = None,
        device: th.device | str = "auto",
        _init_setup_model: bool = True,
    ) -> None:
        super().__init__(
            policy,
            env,  # type: ignore[arg-type]
            learning_rate,
            buffer_size=buffer_size,
            learning_starts=learning_starts,
            gamma=gamma,
            train_freq=1,
            policy_kwargs=policy_kwargs,
            stats_window_size=stats_window_size,
            tensorboard_log=tensorboard_log,
            verbose=verbose,
            device=device,
            support_multi_env=True,
            seed=seed,
            sde_support=False,
        )
        self.n_steps = n_steps
        self.n_models, self.n_tasks = n_models, n_tasks
        self.n_imagined_rollouts, self.horizon = n_imagined_rollouts, horizon
        self.n_meta_steps, self.n_inner_steps = n_meta_steps, n_inner_steps
        self.inner_lr, self.learn_inner_lr, self.first_order = inner_lr, learn_inner_lr, first_order
        self.outer_optimizer = outer_optimizer
        self.target_kl, self.cg_max_steps, self.cg_damping = target_kl, cg_max_steps, cg_damping
        self.line_search_shrinking_factor = line_search_shrinking_factor
        self.line_search_max_iter = line_search_max_iter
        self.sub_sampling_factor = sub_sampling_factor
        self.gae_lambda, self.normalize_advantage, self.ent_coef = gae_lambda, normalize_advantage, ent_coef
        self.baseline = baseline
        self.reward_fn, self.termination_fn = reward_fn, termination_fn
        self.imagined_start, self.exploration = imagined_start, exploration
        self.dynamics_kwargs = dict(dynamics_kwargs or {})
        self.outer_kwargs = dict(outer_kwargs or {})
        check_arguments(vars(self))

        self._setup_rollouts()
        self._learned_heads: tuple[bool, bool] | None = None  # of reward and termination
        self.learned_inner_lr: th.Tensor | None = None
        self._n_fits = 0
        self._seconds = dict.fromkeys(STAGES, 0.0)
        self._warned_of_reward = self._warned_of_termination = False
        if _init_setup_model:
            self._setup_model()

    # ---------------------------------------------------------------- set-up

    def _setup_model(self) -> None:
        super()._setup_model()
        # One generator a purpose: a change of one stage does not shift the random numbers of the others
        if not self._generators:
            seeds = np.random.SeedSequence(self.seed).generate_state(len(RANDOM_PURPOSES))
            for purpose, number in zip(RANDOM_PURPOSES, seeds, strict=True):
                self._generators[purpose] = th.Generator(self.device).manual_seed(int(number))
        self._reward = tasks.resolve_reward_fn(self.reward_fn, self.env)
        self._termination = tasks.resolve_termination_fn(self.termination_fn, self.env)
        if self._learned_heads is None:
            self._learned_heads = (self._reward.fn is None, self._termination.fn is None)
        self.dynamics = DynamicsEnsemble(
            self.observation_space,
            self.action_space,
            self.n_models,
            learned_reward=self._learned_heads[0],
            learned_termination=self._learned_heads[1],
            learning_rate=self.lr_schedule(1),
            seed=self.seed,
            device=self.device,
            **{key: value for key, value in self.dynamics_kwargs.items() if key in ENSEMBLE_OPTIONS},
        )
        theta = self.policy.actor_vector()
        if self.learned_inner_lr is None and self.learn_inner_lr:
            self.learned_inner_lr = th.full_like(theta, float(self.inner_lr))
        if self.verbose >= 1:
            n_dynamics = sum(parameter.numel() for parameter in self.dynamics.parameters())
            print(
                f"MBMPO: observations of {self.dynamics.observation_dim}, actions of {self.dynamics.action_dim} numbers; "
                f"reward: {self._reward.source}; termination: {self._termination.source}; horizon: {self.horizon}; "
                f"parameters: {len(theta)} of the policy, {n_dynamics} of {self.n_models} models"
            )

    def _excluded_save_params(self) -> list[str]:
        # A function that is a method of the environment would bring the whole environment into the file
        return [*super()._excluded_save_params(), "_reward", "_termination"]

    def _get_torch_save_params(self) -> tuple[list[str], list[str]]:
        return ["policy", "dynamics", "dynamics.optimizer"], []

    # ---------------------------------------------------------------- real rollouts

    def learn(
        self: SelfMBMPO,
        total_timesteps: int,
        callback: MaybeCallback = None,
        log_interval: int | None = 1,
        tb_log_name: str = "MBMPO",
        reset_num_timesteps: bool = True,
        progress_bar: bool = False,
    ) -> SelfMBMPO:
        total_timesteps, callback = self._setup_learn(
            total_timesteps, callback, reset_num_timesteps, tb_log_name, progress_bar
        )
        callback.on_training_start(locals(), globals())
        assert self.env is not None
        assert self.replay_buffer is not None
        iteration = 0
        while self.num_timesteps < total_timesteps:
            self._seconds = dict.fromkeys(STAGES, 0.0)
            with self._stopwatch("real_rollout"):
                rollout = self.collect_rollouts(
                    self.env,
                    callback,
                    TrainFreq(self._steps_to_collect(total_timesteps), TrainFrequencyUnit.STEP),
                    self.replay_buffer,
                    learning_starts=self.learning_starts,
                )
            if not rollout.continue_training:
                break
            self.train()
            iteration += 1
            if log_interval is not None and iteration % log_interval == 0:
                self.logger.record("time/iterations", iteration, exclude="tensorboard")
                self.dump_logs()
        callback.on_training_end()
        return self

    # ---------------------------------------------------------------- training

    def train(self, gradient_steps: int = 1, batch_size: int = 0) -> None:
        """
        One iteration on the data so far: fit the ensemble, meta-train the policy in it, adapt it to each model.

        The arguments are those of SB3's interface; MB-MPO has ``n_meta_steps`` and ``dynamics_kwargs`` instead.
        """
        self.policy.set_training_mode(True)
        data = self._transitions()
        self._check_task(data)
        with self._stopwatch("dynamics_fit"):
            self._fit_dynamics(data)
        self.policy.set_observation_statistics(self._to_policy_units(data.obs))
        with self._stopwatch("meta_update"):
            self._meta_train(self._meta_trainer(self._generators))
        # The imagination runs inside the meta-update
        self._seconds["meta_update"] -= self._seconds["imagination"]
        self.policy.set_training_mode(False)
        for stage, seconds in self._seconds.items():
            self.logger.record(f"time/{stage}", seconds)

    def _check_task(self, data: Transitions) -> None:
        """Compare reward and termination functions with what the environment really gave, and warn once if they differ."""
        if self._reward.fn is not None:
            action = self._codec.to_reward(data.action)
            check = tasks.check_reward_fn(self._reward.fn, data.obs, action, data.next_obs, data.reward)
            self.logger.record("dynamics/reward_error", check.mean_abs_error)
            if check.relative_error > REWARD_ERROR_TOLERANCE and not self._warned_of_reward:
                self._warned_of_reward = True
                warnings.warn(
                    f"The reward function ({self._reward.source}) misses the real rewards by {check.mean_abs_error:.3g} "
                    f"on average and {check.max_abs_error:.3g} at most ({100 * check.relative_error:.0f} % of their standard "
                    "deviation): pass `reward_fn='learned'` or a function that fits."
                )
        if self._termination.fn is not None:
            rate = tasks.check_termination_fn(self._termination.fn, data.next_obs, data.terminated)
            if rate > 0.01 and not self._warned_of_termination:
                self._warned_of_termination = True
                warnings.warn(
                    f"The termination function ({self._termination.source}) contradicts {100 * rate:.1f} % of the real steps: "
                    "pass `termination_fn='learned'` or a function that fits."
                )

    def _fit_dynamics(self, data: Transitions) -> None:
        reinit_every = self.dynamics_kwargs.get("reinit_every", 0)
        if reinit_every and self._n_fits > 0 and self._n_fits % reinit_every == 0:
            seed = th.randint(2**31, (), generator=self._generators["dynamics"], device=self.device)
            self.dynamics.reset_parameters(th.Generator().manual_seed(int(seed)))
        self._update_learning_rate(self.dynamics.optimizer)
        fit_options = {key: value for key, value in self.dynamics_kwargs.items() if key in FIT_OPTIONS}
        report = self.dynamics.fit(data, generator=self._generators["dynamics"], **fit_options)
        self._n_fits += 1
        self.logger.record("dynamics/train_loss", float(report.train_loss.mean()))
        self.logger.record("dynamics/val_loss", float(report.val_loss.mean()))
        self.logger.record("dynamics/epochs", float(report.epochs.mean()))
        some = slice(None, None, 1 + len(data.obs) // 1000)
        action = self._codec.to_numpy(data.action[some])
        disagreement = self.dynamics.disagreement(data.obs[some].cpu().numpy(), action)
        self.logger.record("dynamics/disagreement", float(disagreement.mean()))

    def _meta_trainer(self, generators: Mapping[str, th.Generator]) -> MetaTrainer:
        """
        :param generators: for imagined actions ("imagination") and first observations ("starts")
        :return: meta-training in the ensemble as it is now
        """
        if self._termination.fn is None and not self.dynamics.learned_termination:
            raise ValueError(
                "No termination function is known, and the ensemble learned none: load the model with its environment."
            )
        imagination, starts = generators["imagination"], generators["starts"]
        pool = self._start_pool()

        def sample_starts(rows: int) -> th.Tensor:
            return pool[th.randint(len(pool), (rows,), generator=starts, device=self.device)]

        world = World(
            self.dynamics.step_fn(self._clip_margin, imagination),
            self._reward.fn,
            None if self._termination.fn is tasks.never_terminates else self._termination.fn,
            self._codec,
            lambda obs: self.policy.standardize(self._to_policy_units(obs)),
            self.n_models,
        )
        if self.outer_optimizer == "trpo":
            outer_kwargs = {name: getattr(self, name) for name in TRPO_OPTIONS}
        else:
            outer_kwargs = self.outer_kwargs
        settings = MetaSettings(
            self.n_tasks,
            self.n_imagined_rollouts,
            self.horizon,
            self.n_inner_steps,
            None if self.learn_inner_lr else float(self.inner_lr),
            self.first_order,
            self.outer_optimizer,
            outer_kwargs,
            self.gamma,
            self.gae_lambda,
            self.baseline,
            self.normalize_advantage,
            self.ent_coef,
        )
        return MetaTrainer(world, self.policy.actor, sample_starts, settings, imagination, self._stopwatch)

    def _start_pool(self) -> th.Tensor:
        """:return: raw observations at which imagined rollouts may start (B, O)"""
        if self.imagined_start == "buffer":
            return self._transitions().obs.float()
        if self._initial_obs is None:
            raise ValueError("There is no real first observation to imagine from yet: call `learn` first.")
        return th.as_tensor(self._initial_obs, device=self.device, dtype=th.float32)

    def _meta_train(self, trainer: MetaTrainer) -> None:
        reports = []
        for _ in range(self.n_meta_steps):
            step = trainer.step(self._outer_variable())
            self._set_outer_variable(step.phi)
            reports.append(step.report)
            self._n_updates += 1
        phi = self._outer_variable()
        adaptation = trainer.adapt(phi)
        self._adapted = adaptation.parameters

        record = self.logger.record
        if reports:
            record("imagined/ep_rew_mean_adapted", float(step.post.returns().mean()))
            record("train/policy_objective", float(np.mean([report.objective_gain for report in reports])))
            record("train/kl_divergence", float(np.mean([report.kl_divergence for report in reports])))
            record("train/is_line_search_success", float(np.mean([report.accepted for report in reports])))
            record("train/line_search_steps", float(np.mean([report.line_search_steps for report in reports])))
        record("imagined/ep_rew_mean", float(adaptation.rollouts.returns().mean()))
        record("imagined/ep_len_mean", float(adaptation.rollouts.lengths().float().mean()))
        record("train/inner_kl", trainer.inner_kl(phi, adaptation))
        if hasattr(self.policy, "log_std"):
            record("train/std", float(self.policy.log_std.detach().exp().mean()))
        record("train/n_updates", self._n_updates, exclude="tensorboard")

    def _outer_variable(self) -> th.Tensor:
        """:return: theta, with the inner step sizes behind it if they are learned"""
        theta = self.policy.actor_vector()
        return th.cat([theta, self.learned_inner_lr]) if self.learned_inner_lr is not None else theta

    def _set_outer_variable(self, phi: th.Tensor) -> None:
        if self.learned_inner_lr is not None:
            phi, self.learned_inner_lr = (half.clone() for half in phi.chunk(2))
        self.policy.set_actor_vector(phi)

    # ---------------------------------------------------------------- use

    def adapt(self, env: GymEnv | None = None, n_episodes: int = 10, model_index: int | None = None) -> MetaPolicy:
        """
        Few-shot adaptation: the meta-policy after its policy-gradient step(s) on real episodes, or on one of the models.

        :param env: real environment to collect episodes in with the meta-policy; by default the training one. It is reset.
        :param n_episodes: real episodes, shared out among the ``n_inner_steps``
        :param model_index: adapt to this member of the ensemble in imagination instead; no real step is made
        :return: an independent policy with ``predict`` and ``save``; the model is unchanged, down to its random numbers
        """
        generators = {name: g.clone_state() for name, g in self._generators.items()}
        phi = self._outer_variable()
        if model_index is not None:
            if env is not None:
                raise ValueError("Pass either `env` or `model_index`: adapt to real episodes or to a model, not to both.")
            check_integer("model_index", model_index, 0, self.n_models - 1)
            adaptation = self._meta_trainer(generators).adapt(phi, n_tasks=self.n_models)
            return self.policy.with_actor_vector(adaptation.parameters[model_index])

        check_integer("n_episodes", n_episodes, self.n_inner_steps)
        vec_env = self.env if env is None else self._wrap_env(env, self.verbose)
        if vec_env is None:
            raise ValueError("There is no environment to adapt to: pass `env`, or `model_index` to adapt to a learned model.")
        check_for_correct_spaces(vec_env, self.observation_space, self.action_space)
        if vec_env is self.env:
            self._last_obs = None  # the training episode is cut: the next `learn` must not go on with it
        theta, inner_lr = split_outer(phi, None if self.learn_inner_lr else float(self.inner_lr))
        parameters = theta.unsqueeze(0)
        for step in range(self.n_inner_steps):
            share = (n_episodes + step) // self.n_inner_steps
            act = self.policy.actor(parameters)
            episodes = collect_episodes(vec_env, act, self.policy, share, generators["exploration"])
            advantages = estimate_advantages(episodes, self.gamma, self.gae_lambda, self.baseline, self.normalize_advantage)
            batch = TaskBatch.from_rollouts(episodes, advantages)
            parameters = adapt(self.policy.actor, parameters, [batch], inner_lr)
        return self.policy.with_actor_vector(parameters[0])

    def imagined_env(
        self, n_envs: int = 64, model_index: int | None = None, horizon: int | None = None, seed: int | None = None
    ) -> ModelVecEnv:
        """
        The learned model as an environment for any SB3 algorithm, with the same step function as the imagination.

        :param n_envs: number of parallel imagined environments
        :param model_index: a member of the ensemble; None: a random one each episode
        :param horizon: time limit of an episode; by default that of the imagined rollouts
        :param seed: of members, first observations and noise
        :return: a VecEnv in raw units
        """
        return ModelVecEnv(
            self.dynamics,
            self._start_pool().cpu().numpy(),
            self._reward.fn,
            self._termination.fn,
            n_envs,
            self.horizon if horizon is None else horizon,
            model_index,
            self._clip_margin,
            seed,
        )

    @property
    def _clip_margin(self) -> float | None:
        margin: float | None = self.dynamics_kwargs.get("clip_margin", CLIP_MARGIN)
        return margin

    @contextmanager
    def _stopwatch(self, stage: str) -> Iterator[None]:
        """Add the wall time of the block to the stage's seconds in this iteration."""
        start = time.perf_counter()
        yield
        self._seconds[stage] += time.perf_counter() - start
