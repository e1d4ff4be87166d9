"""Progress between real steps: a second line of the progress bar, and the wall time of each stage."""

import time
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from numbers import Real
from typing import Any

from rich import get_console
from rich.progress import BarColumn, ProgressColumn, Task, TextColumn
from rich.table import Column
from rich.text import Text
from stable_baselines3.common.callbacks import BaseCallback, CallbackList, ConvertCallback, ProgressBarCallback
from stable_baselines3.common.off_policy_algorithm import OffPolicyAlgorithm
from stable_baselines3.common.type_aliases import MaybeCallback
from tqdm import TqdmExperimentalWarning
from tqdm.rich import tqdm

STAGES = ("real_rollout", "dynamics_fit", "imagination", "meta_update")
LOG_FORMATS = ("stdout", "log", "json", "csv", "tensorboard")
# Characters of a line that are not its description: at least 6 of the bar, the times, and the spaces between them
MIN_BAR, TIMES, SPACES = 6, len("1:02:03<4:05:06"), 3


class CountColumn(ProgressColumn):
    """A column that shows ``done/total``, or nothing if the total is unknown."""

    def render(self, task: Task) -> Text:
        """See ``ProgressColumn``."""
        counts = "" if task.total is None else f"{task.completed:,.0f}/{task.total:,.0f}"
        return Text(counts, style="progress.download")


class TimesColumn(ProgressColumn):
    """
    A column that shows ``elapsed<remaining``.

    The remaining time is that at the mean speed so far: real steps come in bursts, between which the models are trained.
    """

    def render(self, task: Task) -> Text:
        """See ``ProgressColumn``."""
        elapsed = (task.finished_time if task.finished else task.elapsed) or 0.0
        text = _clock(elapsed)
        if task.remaining is not None:
            text += f"<{_clock(elapsed * task.remaining / task.completed)}" if task.completed else "<-:--"
        return Text(text, style="progress.elapsed")


def _clock(seconds: float) -> str:
    """Return a duration as 1:02:03, or as 2:03 if it is shorter than an hour."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"


def columns(total: int, width: int) -> tuple[ProgressColumn, ...]:
    """
    Return the columns of a progress bar that fits in a line.

    :param total: the largest number that is counted to
    :param width: of the terminal, in characters
    :return: description, which is cut where it is too long, bar, count and times
    """
    counts = 2 * len(f"{total:,}") + 1
    longest = max(width - counts - MIN_BAR - TIMES - SPACES, len("meta-steps"))
    description = Column(no_wrap=True, overflow="ellipsis", max_width=longest)
    bar = BarColumn(bar_width=None, table_column=Column(ratio=1, min_width=MIN_BAR))
    whole = [Column(no_wrap=True, justify="right") for _ in range(2)]
    return (
        TextColumn("{task.description}", markup=False, table_column=description),
        bar,
        CountColumn(table_column=whole[0]),
        TimesColumn(table_column=whole[1]),
    )


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
        total = self.locals["total_timesteps"] - self.model.num_timesteps
        console = get_console()
        layout, options = columns(total, console.width), {"console": console}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", TqdmExperimentalWarning)
            self.pbar = tqdm(total=total, desc="real steps", progress=layout, options=options)
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
        numbers = "".join(f" {name} {value:.4g}" for name, value in metrics.items())
        description = f"{stage}:{numbers}" if metrics else stage
        if stage != self._stage:  # a new line, so that its clock starts at 0
            self._stage = stage
            self._lines.remove_task(self._line)
            self._line = self._lines.add_task(description, total=total)
        self._lines.update(self._line, description=description, completed=done)


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
