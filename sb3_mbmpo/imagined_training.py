"""Training in the imagination: the stages of an iteration after its real rollouts, in their order."""

from collections.abc import Mapping
from statistics import fmean
from typing import Any

import numpy as np
import torch as th

from sb3_mbmpo.arguments import CLIP_MARGIN, FIT_OPTIONS, MAX_EPOCHS
from sb3_mbmpo.dynamics import DynamicsEnsemble, Transitions, output_bias_array, perturbed_step_fns
from sb3_mbmpo.health import TrainingHealth
from sb3_mbmpo.imagination import ImaginedRollouts, World, forked
from sb3_mbmpo.meta import StepReport
from sb3_mbmpo.meta_training import MetaSettings, MetaTrainer, ReturnDrop, figures
from sb3_mbmpo.progress import StageProgressBar, Stopwatch
from sb3_mbmpo.real_rollouts import RealRolloutAlgorithm
from sb3_mbmpo.tasks import TaskFunctions, never_terminates
from sb3_mbmpo.threads import single_threaded_operations, worker_threads

TRPO_OPTIONS = (
    "target_kl",
    "cg_max_steps",
    "cg_damping",
    "line_search_shrinking_factor",
    "line_search_max_iter",
    "sub_sampling_factor",
)


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
    normalize_advantage: bool
    ent_coef: float
    chunk_size: int
    imagined_start: str
    stop_on_return_drop: bool
    dynamics_kwargs: Mapping[str, Any]
    learned_inner_lr: th.Tensor | None
    _bias_draws: np.ndarray | None
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
        reward_error = self._task.compare(data.obs, action, data.next_obs, data.reward, data.terminated)
        if reward_error is not None:
            self.logger.record("dynamics/reward_error", reward_error)
        n_threads = worker_threads(self.device)
        with single_threaded_operations():
            with self._stopwatch("dynamics_fit"):
                self._fit_dynamics(data, n_threads)
            self.policy.set_observation_statistics(self._to_policy_units(data.obs))
            with self._stopwatch("meta_update"):
                self._meta_train(self._meta_trainer(self._generators, n_threads))
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
        self._health.real_episodes(returns, [int(episode["l"]) for episode in episodes], self.horizon)

    def _fit_dynamics(self, data: Transitions, n_threads: int) -> None:
        reinit_every = self.dynamics_kwargs.get("reinit_every", 0)
        if reinit_every and self._n_fits > 0 and self._n_fits % reinit_every == 0:
            seed = th.randint(2**31, (), generator=self._generators["dynamics"], device=self.device)
            self.dynamics.reset_parameters(th.Generator().manual_seed(int(seed)))
        self._update_learning_rate(self.dynamics.optimizer)
        fit_options = {key: value for key, value in self.dynamics_kwargs.items() if key in FIT_OPTIONS}
        max_epochs = fit_options.get("max_epochs", MAX_EPOCHS)

        def on_epoch(epoch: int, val_loss: float) -> None:
            if self._progress is not None:
                self._progress.show("dynamics fit, epochs", epoch, max_epochs, {"val_loss": val_loss})

        generator = self._generators["dynamics"]
        report = self.dynamics.fit(data, generator=generator, on_epoch=on_epoch, n_threads=n_threads, **fit_options)
        self._n_fits += 1
        self.logger.record("dynamics/train_loss", float(report.train_loss.mean()))
        self.logger.record("dynamics/val_loss", float(report.val_loss.mean()))
        self._health.dynamics_fitted(float(report.val_loss.mean()), self.dynamics.probabilistic)
        self.logger.record("dynamics/epochs", float(report.epochs.mean()))
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

        def sample_starts(rows: int) -> th.Tensor:
            return pool[th.randint(len(pool), (rows,), generator=starts, device=self.device)]

        own = forked(imagination, n_threads)
        steps = perturbed_step_fns(self.dynamics, own, self._clip_margin, None, self._output_bias(), self._output_noise)
        world = World(
            steps,
            self._task.reward.fn,
            None if self._task.termination.fn is never_terminates else self._task.termination.fn,
            self._codec,
            lambda obs: self.policy.standardize(to_policy_units(obs)),
            self.n_models,
            self.dynamics.flops,
        )
        settings = MetaSettings(
            self.n_tasks,
            self.n_imagined_rollouts,
            self.horizon,
            self.n_inner_steps,
            self._fixed_inner_lr,
            self.first_order,
            self.outer_optimizer,
            {name: getattr(self, name) for name in TRPO_OPTIONS} if self.outer_optimizer == "trpo" else self.outer_kwargs,
            self.gamma,
            self.gae_lambda,
            self.baseline,
            self.normalize_advantage,
            self.ent_coef,
            self.chunk_size,
        )
        return MetaTrainer(world, self.policy.actor, sample_starts, settings, imagination, self._stopwatch)

    def _start_pool(self) -> th.Tensor:
        """:return: raw observations at which imagined rollouts may start (B, O)"""
        if self.imagined_start == "buffer":
            pool = self._transitions().obs.to(self.dynamics.observation_dtype)
            if len(pool) == 0:
                raise ValueError("The replay buffer, to imagine from, is empty: `load_replay_buffer`, or call `learn` first.")
            return pool
        if self._initial_obs is None:
            raise ValueError("There is no real first observation to imagine from yet: call `learn` first.")
        return th.as_tensor(self._initial_obs, device=self.device, dtype=self.dynamics.observation_dtype)

    def _meta_train(self, trainer: MetaTrainer) -> None:
        reports: list[StepReport] = []
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
        self._health.meta_trained(float(adaptation.rollouts.returns().mean()), [bool(report.accepted) for report in reports])
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

    @property
    def _clip_margin(self) -> float | None:
        margin: float | None = self.dynamics_kwargs.get("clip_margin", CLIP_MARGIN)
        return margin

    def _output_bias(self) -> np.ndarray:
        """:return: deliberate error of each member, in standard deviations of the observed changes (M, O)"""
        assert self._bias_draws is not None
        return output_bias_array(self.dynamics_kwargs.get("output_bias", 0.0), self._bias_draws)

    @property
    def _output_noise(self) -> float:
        return float(self.dynamics_kwargs.get("output_noise", 0.0))

    @property
    def _fixed_inner_lr(self) -> float | None:
        return None if self.learn_inner_lr else float(self.inner_lr)
