"""Training in the imagination: the stages of an iteration after its real rollouts, in their order."""

from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

import numpy as np
import torch as th

from sb3_mbmpo.critic import Critic, CriticReport
from sb3_mbmpo.dynamics import DynamicsEnsemble, DynamicsOptions, Transitions, output_bias_array
from sb3_mbmpo.health import TrainingHealth
from sb3_mbmpo.imagination import ImaginedRollouts, forked
from sb3_mbmpo.meta import StepReport
from sb3_mbmpo.meta_training import MetaSettings, MetaTrainer, ReturnDrop, figures
from sb3_mbmpo.model_env import ModelEnv
from sb3_mbmpo.progress import StageProgressBar, Stopwatch
from sb3_mbmpo.real_rollouts import RealRolloutAlgorithm
from sb3_mbmpo.tasks import TaskFunctions
from sb3_mbmpo.threads import single_threaded_operations, worker_threads

TRPO_OPTIONS = (
    "target_kl",
    "cg_max_steps",
    "cg_damping",
    "line_search_shrinking_factor",
    "line_search_max_iter",
    "sub_sampling_factor",
)
# Real observations that are saved with the model, for imagined rollouts to start at
START_SAMPLE_SIZE = 1_000
# A critic that explains a smaller share of the imagined returns is no measure of what is earned in reality
TRUSTED_EXPLAINED_VARIANCE = 0.5


class ImaginedTrainingAlgorithm(RealRolloutAlgorithm):
    """
    The half of MBMPO that acts in the learned models. Its arguments are documented there.
    """

    dynamics: DynamicsEnsemble
    n_imagined_rollouts: int
    horizon: int
    n_meta_steps: int
    n_inner_steps: int
    inner_lr: float
    learn_inner_lr: bool
    first_order: bool
    outer_optimizer: str
    outer_kwargs: Mapping[str, Any]
    gae_lambda: float
    baseline: str
    n_critic_updates: int
    batch_size: int
    normalize_advantage: bool
    ent_coef: float
    chunk_size: int
    imagined_start: str
    recent_starts: float
    stop_on_return_drop: bool
    _dynamics_options: DynamicsOptions
    learned_inner_lr: th.Tensor | None
    _bias_draws: np.ndarray | None
    _start_sample: np.ndarray | None
    _health: TrainingHealth
    _task: TaskFunctions
    _stopwatch: Stopwatch
    _progress: StageProgressBar | None

    def train(self, gradient_steps: int = 1, batch_size: int = 0) -> None:
        """
        One iteration on the data so far: fit the ensemble, meta-train the policy in it, adapt it to each model.

        The arguments are those of SB3's interface; MB-MPO has ``n_meta_steps`` and ``dynamics_kwargs`` instead.
        """
        # Dropout and batch statistics would make another policy of every forward pass: likelihood ratios compare the same one
        self.policy.set_training_mode(False)
        self._judge_real_returns()
        data = self._transitions()
        action = self._codec.to_reward(data.action)
        self.logger.record("rollout/rew_mean_step", float(data.reward[-self._n_new_steps :].mean()))
        reward_error = self._task.compare(
            obs=data.obs, action=action, next_obs=data.next_obs, reward=data.reward, terminated=data.terminated
        )
        if reward_error is not None:
            self.logger.record("dynamics/reward_error", reward_error)
        n_threads = worker_threads(self.device)
        with single_threaded_operations():
            with self._stopwatch("dynamics_fit"):
                self._fit_dynamics(data, n_threads)
            self.policy.set_observation_statistics(self._to_policy_units(data.obs))
            with self._stopwatch("meta_update"):
                self._meta_train(self._meta_trainer(self._generators, n_threads))
        self._n_new_steps = 0
        # For a model that is loaded without its buffer
        self._start_sample = data.obs[:: 1 + len(data.obs) // START_SAMPLE_SIZE].cpu().numpy().copy()
        # The imagination runs inside the meta-update
        seconds = self._stopwatch.seconds
        seconds["meta_update"] -= seconds["imagination"]
        for stage in seconds:
            self.logger.record(f"time/{stage}", seconds[stage])

    def _judge_real_returns(self) -> None:
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
            # Longer episodes than the imagined ones count in proportion
            shares = [min(1.0, self.horizon / int(episode["l"])) for episode in episodes]
            self._health.real_episodes([share * value for share, value in zip(shares, returns, strict=True)])
        if self.imagined_start == "initial":
            self._health.imagined_from_the_first(self._longest_episode, self.horizon)

    def _bootstrapped_returns(self) -> list[float]:
        """:return: discounted returns of the real episodes since the last fit, as if time limits had not cut them"""
        episodes = self._discounted_returns.take()
        if not episodes:
            return []
        values = self._values(np.stack([episode.final_obs for episode in episodes]))
        return [e.discounted_return + e.bootstrap * value for e, value in zip(episodes, values.tolist(), strict=True)]

    @th.no_grad()
    def _values(self, raw_obs: np.ndarray) -> np.ndarray:
        """
        Evaluate the critic; before its first fit all values are 0.

        :param raw_obs: (B, O)
        :return: (B,)
        """
        obs = th.as_tensor(raw_obs, device=self.device, dtype=self.dynamics.observation_dtype)
        values: np.ndarray = self.policy.predict_values(self._to_policy_units(obs)).squeeze(1).cpu().numpy()
        return values if self.policy.value_net.is_trained else np.zeros_like(values)

    def _fit_dynamics(self, data: Transitions, n_threads: int) -> None:
        reinit_every = self._dynamics_options.reinit_every
        if reinit_every and self._n_fits > 0 and self._n_fits % reinit_every == 0:
            seed = th.randint(2**31, (), generator=self._generators["dynamics"], device=self.device)
            self.dynamics.reset_parameters(th.Generator().manual_seed(int(seed)))
        self._update_learning_rate([self.dynamics.optimizer, self.policy.optimizer])

        def on_pass(number: int, at_most: int, val_loss: float) -> None:
            if self._progress is not None:
                self._progress.show("dynamics fit, passes", number, at_most, {"val_loss": val_loss})

        report = self.dynamics.fit(
            data,
            generator=self._generators["dynamics"],
            n_new_rows=self._n_new_steps,
            on_pass=on_pass,
            n_threads=n_threads,
            **self._dynamics_options.fit,
        )
        self._n_fits += 1
        self.logger.record("dynamics/train_loss", float(report.train_loss.mean()))
        self.logger.record("dynamics/val_loss", float(report.val_loss.mean()))
        self._health.dynamics_fitted(float(report.val_loss.mean()), self.dynamics.probabilistic)
        self.logger.record("dynamics/epochs", float(report.epochs.mean()))
        self.logger.record("dynamics/gradient_steps", float(report.gradient_steps.mean()))
        some = slice(None, None, 1 + len(data.obs) // 1000)
        action = self._codec.to_numpy(data.action[some])
        disagreement = self.dynamics.disagreement(data.obs[some].cpu().numpy(), action)
        self.logger.record("dynamics/disagreement", float(disagreement.mean()))

    def _meta_trainer(self, generators: Mapping[str, th.Generator], n_threads: int) -> MetaTrainer:
        """
        :param generators: for imagined actions ("imagination") and first observations ("starts")
        :param n_threads: how many threads imagine and differentiate
        :return: meta-training in the ensemble as it is now
        """
        self._task.require(self.dynamics.learned_reward, self.dynamics.learned_termination)
        imagination, starts = generators["imagination"], generators["starts"]
        pool = self._start_pool()
        to_policy_units = self._policy_units(pool.dtype)
        # Those since the fit before come last
        n_recent = min(self._n_new_steps, len(pool)) if self.imagined_start == "buffer" else 0

        def sample_starts(rows: int) -> th.Tensor:
            chosen = th.randint(len(pool), (rows,), generator=starts, device=self.device)
            if self.recent_starts > 0 and n_recent > 0:
                is_recent = th.rand(rows, generator=starts, device=self.device) < self.recent_starts
                recent = len(pool) - n_recent + th.randint(n_recent, (rows,), generator=starts, device=self.device)
                chosen = th.where(is_recent, recent, chosen)
            return pool[chosen]

        is_trpo = self.outer_optimizer == "trpo"
        settings = MetaSettings(
            n_tasks=self.n_tasks,
            n_imagined_rollouts=self.n_imagined_rollouts,
            horizon=self.horizon,
            n_inner_steps=self.n_inner_steps,
            inner_lr=self._fixed_inner_lr,
            first_order=self.first_order,
            outer_optimizer=self.outer_optimizer,
            outer_kwargs={name: getattr(self, name) for name in TRPO_OPTIONS} if is_trpo else self.outer_kwargs,
            gamma=self.gamma,
            gae_lambda=self.gae_lambda,
            baseline=self.baseline,
            normalize_advantage=self.normalize_advantage,
            ent_coef=self.ent_coef,
            chunk_size=self.chunk_size,
        )
        return MetaTrainer(
            model_env=self._model_env(forked(imagination, n_threads)),
            to_policy_input=lambda obs: self.policy.standardize(to_policy_units(obs)),
            actor=self.policy.actor,
            sample_starts=sample_starts,
            settings=settings,
            generator=imagination,
            stopwatch=self._stopwatch,
            critic=self._critic(generators["critic"]) if self.baseline == "critic" else None,
        )

    def _model_env(self, generators: Sequence[th.Generator] | None) -> ModelEnv:
        """
        Put the learned environment together, as the models are now.

        :param generators: one a thread that imagines, for the noise of probabilistic and of deliberately bad models; None: the
            means of the members, as they are
        """
        options = self._dynamics_options
        return ModelEnv.of(
            self.dynamics,
            reward_fn=self._task.reward.fn,
            termination_fn=self._task.termination.fn,
            clip_margin=options.clip_margin,
            generators=[None] if generators is None else generators,
            output_bias=None if generators is None else self._output_bias(),
            output_noise=0.0 if generators is None else options.output_noise,
        )

    def _critic(self, generator: th.Generator) -> Critic:
        return Critic(self.policy, generator, n_updates=self.n_critic_updates, batch_size=self.batch_size)

    def _start_pool(self) -> th.Tensor:
        """:return: raw observations at which imagined rollouts may start (B, O)"""
        if self.imagined_start == "buffer":
            assert self.replay_buffer is not None
            if self.replay_buffer.size() > 0:
                return self._transitions().obs.to(self.dynamics.observation_dtype)
            if self._start_sample is None:
                raise ValueError("The replay buffer, to imagine from, is empty: `load_replay_buffer`, or call `learn` first.")
            return th.as_tensor(self._start_sample, device=self.device, dtype=self.dynamics.observation_dtype)
        self._join_new_starts()
        if self._initial_obs is None:
            raise ValueError("There is no real first observation to imagine from yet: call `learn` first.")
        return th.as_tensor(self._initial_obs, device=self.device, dtype=self.dynamics.observation_dtype)

    def _meta_train(self, trainer: MetaTrainer) -> None:
        reports: list[StepReport] = []
        critic_reports: list[CriticReport] = []
        post: ImaginedRollouts | None = None
        drop, fell = ReturnDrop(), False
        for k in range(self.n_meta_steps):
            phi = self._outer_variable()
            step = trainer.step(phi)
            fell = self.stop_on_return_drop and drop.fell(phi, step.pre)
            if fell:
                break
            self._set_outer_variable(step.phi)
            self._n_updates += 1
            reports.append(step.report)
            if step.critic is not None:
                critic_reports.append(step.critic)
            post = step.post
            if self._progress is not None:
                means = {"return": float(step.pre.returns().mean()), "adapted": float(post.returns().mean())}
                self._progress.show("meta-steps", k + 1, self.n_meta_steps, means)
        phi = drop.best if fell else self._outer_variable()
        adaptation = trainer.adapt(phi)
        if self.stop_on_return_drop and not fell and drop.fell(phi, adaptation.rollouts):
            phi = drop.best
            adaptation = trainer.adapt(phi)
        self._set_outer_variable(phi)
        self._adapted = adaptation.parameters
        self._health.adapted(int(adaptation.failed.sum()), self.n_tasks)

        record = self.logger.record
        for key, value in figures(adaptation, reports, post).items():
            record(key, value)
        imagined: float | None = float(adaptation.rollouts.returns().mean())
        if self.baseline == "critic":
            self._join_new_starts()
            assert self._initial_obs is not None
            initial_value = float(self._values(self._initial_obs).mean())
            record("imagined/initial_value", initial_value)
            explained = fmean(report.explained_variance for report in critic_reports) if critic_reports else 0.0
            imagined = initial_value if explained > TRUSTED_EXPLAINED_VARIANCE else None
        self._health.meta_trained(imagined, [bool(report.accepted) for report in reports])
        if critic_reports:
            record("train/value_loss", fmean(report.value_loss for report in critic_reports))
            record("train/explained_variance", fmean(report.explained_variance for report in critic_reports))
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

    def _output_bias(self) -> np.ndarray:
        """:return: deliberate error of each member, in standard deviations of the observed changes (M, O)"""
        assert self._bias_draws is not None
        return output_bias_array(self._dynamics_options.output_bias, self._bias_draws)

    @property
    def _fixed_inner_lr(self) -> float | None:
        return None if self.learn_inner_lr else float(self.inner_lr)
