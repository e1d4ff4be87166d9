"""Progress between real steps: a second line of the progress bar, and the wall time of each stage."""

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from numbers import Real
from typing import Any

from stable_baselines3.common.callbacks import BaseCallback, CallbackList, ConvertCallback, ProgressBarCallback
from stable_baselines3.common.off_policy_algorithm import OffPolicyAlgorithm
from stable_baselines3.common.type_aliases import MaybeCallback

STAGES = ("real_rollout", "dynamics_fit", "imagination", "meta_update")
LOG_FORMATS = ("stdout", "log", "json", "csv", "tensorboard")


class StageProgressBar(ProgressBarCallback):
    """
    SB3's progress bar with a second line: the stage of the iteration, the epoch or meta-step, and its metrics.
    """

    def after(self, callback: MaybeCallback) -> CallbackList:
        """Combine the user's callback, or callbacks, with this one, which comes last."""
        if isinstance(callback, list):
            callback = CallbackList(callback)
        elif not isinstance(callback, BaseCallback):
            callback = ConvertCallback(callback)
        return CallbackList([callback, self])

    def _on_training_start(self) -> None:
        super()._on_training_start()
        self._stage = ""
        # A second bar would need a live display of its own, and older versions of rich allow only one
        self._lines = self.pbar._prog
        self._line = self._lines.add_task("", visible=False)

    def _on_rollout_start(self) -> None:
        self.show("real rollout", 0, None, {})

    def _on_rollout_end(self) -> None:
        # tqdm defers an update that comes too soon after another one; the next one would come only after the silent stages
        self.pbar.refresh()

    def close(self) -> None:
        """Close the bar, so that the terminal is usable after training has ended with an error."""
        if hasattr(self, "pbar"):
            self.pbar.close()

    def show(self, stage: str, done: int, total: int | None, metrics: dict[str, float]) -> None:
        """
        Show the progress of a stage.

        :param stage: name of the stage, with the unit of ``done``
        :param done: number of epochs or meta-steps so far
        :param total: their maximum number, or None if they are not counted
        :param metrics: name and value of the metrics to show
        """
        if stage != self._stage:  # a new line, so that its clock starts at 0
            self._stage = stage
            self._lines.remove_task(self._line)
            self._line = self._lines.add_task("", total=total)
        numbers = "".join(f" {name} {value:.3g}" for name, value in metrics.items())
        self._lines.update(self._line, description=f"{stage}:{numbers}", completed=done)


class Stopwatch:
    """Wall time of an iteration's stages."""

    def __init__(self) -> None:
        self.seconds = dict.fromkeys(STAGES, 0.0)

    @contextmanager
    def __call__(self, stage: str) -> Iterator[None]:
        """Measure the block, and add its wall time to the stage's seconds."""
        start = time.perf_counter()
        yield
        self.seconds[stage] += time.perf_counter() - start


def dump_and_keep(algorithm: OffPolicyAlgorithm) -> None:
    """
    Write the log, but keep its metrics in the logger: callbacks read them during the next rollout, as with PPO or SAC.

    :param algorithm: the algorithm, which has recorded the metrics of an iteration
    """
    logger = algorithm.logger
    values: Mapping[str, Any] = logger.name_to_value
    metrics = {
        key: value
        for key, value in values.items()
        # Metrics kept from the previous iteration, which this one did not record, are outdated
        if isinstance(value, Real) and logger.name_to_excluded[key] != LOG_FORMATS
    }
    algorithm.dump_logs()
    for key, value in metrics.items():
        logger.record(key, value, exclude=LOG_FORMATS)  # already written above
