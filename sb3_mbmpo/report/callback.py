"""The report's figures in TensorBoard, while training."""

from typing import Any

import gymnasium as gym
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.logger import Figure

from sb3_mbmpo.common.checks import check_integer
from sb3_mbmpo.mbmpo import MBMPO
from sb3_mbmpo.report.study import study_model


class DiagnosticsCallback(BaseCallback):
    """
    A callback that compares the models with fresh real episodes every few iterations.

    It logs the figures of ``python -m sb3_mbmpo.report`` to TensorBoard, and the metrics ``diagnostics/one_step_rmse`` and
    ``diagnostics/horizon_rmse`` to every log. As with ``EvalCallback``, its episodes do not count as real steps. It needs
    matplotlib: ``pip install "sb3-mbmpo[plots]"``.

    :param eval_env: an environment of its own, not the training one
    :param every_n_iterations: compare at every multiple of this number, and at the last iteration
    :param n_episodes: number of real episodes of the meta-policy, and also of random actions
    :param seed: seed of these episodes
    :param verbose: 0 for no output, 1 to print the errors
    :raises ValueError: if a number is less than 1
    :raises ImportError: without matplotlib
    """

    def __init__(
        self,
        eval_env: gym.Env[Any, Any],
        every_n_iterations: int = 5,
        n_episodes: int = 2,
        seed: int = 0,
        verbose: int = 0,
    ) -> None:
        super().__init__(verbose)
        check_integer("every_n_iterations", every_n_iterations, 1)
        check_integer("n_episodes", n_episodes, 1)
        import sb3_mbmpo.report.matplotlib_parts  # noqa: F401 - an ImportError now, not after hours of training

        self.eval_env = eval_env
        self.every_n_iterations = every_n_iterations
        self.n_episodes = n_episodes
        self.seed = seed
        self._n_iterations = 0
        self._is_logged = False

    def _init_callback(self) -> None:
        if not isinstance(self.model, MBMPO):
            raise ValueError(f"DiagnosticsCallback examines the models of MBMPO, but {type(self.model).__name__} has none.")

    def _on_step(self) -> bool:
        return True

    def _on_rollout_start(self) -> None:
        assert isinstance(self.model, MBMPO)
        if self.model._n_fits == self._n_iterations:  # nothing was learned since the last rollout
            return
        self._n_iterations, self._is_logged = self.model._n_fits, False
        if self._n_iterations % self.every_n_iterations == 0:
            self._log()

    def _on_training_end(self) -> None:
        assert isinstance(self.model, MBMPO)
        if self.model._n_fits > self._n_iterations or (self.model._n_fits > 0 and not self._is_logged):
            self._log()

    def _log(self) -> None:
        from sb3_mbmpo.report.model_plots import model_pictures
        from sb3_mbmpo.report.panels import WIDE_PAGE

        assert isinstance(self.model, MBMPO)
        study = study_model(self.model, self.eval_env, self.n_episodes, self.seed)
        for picture in model_pictures(study):
            if picture.draw is not None:
                figure = Figure(picture.draw(WIDE_PAGE), close=True)
                self.logger.record(f"diagnostics/{picture.name}", figure, exclude=("stdout", "log", "json", "csv"))
        for key, value in study.metrics().items():
            self.logger.record(f"diagnostics/{key}", value)
            if self.verbose >= 1:
                print(f"diagnostics/{key} after {self.num_timesteps} real steps: {value:.3g}")
        # As SB3's EvalCallback does: the next dump of the training is an iteration away
        self.logger.record("time/total_timesteps", self.num_timesteps, exclude="tensorboard")
        self.logger.dump(self.num_timesteps)
        self._is_logged = True
