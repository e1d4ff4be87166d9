"""What a user sees while nothing real happens: a second line of the progress bar, and the seconds of each stage."""

import time
from collections.abc import Iterator
from contextlib import contextmanager

from stable_baselines3.common.callbacks import ProgressBarCallback

STAGES = ("real_rollout", "dynamics_fit", "imagination", "meta_update")


class StageProgressBar(ProgressBarCallback):
    """
    SB3's progress bar with a second line: which stage of the iteration, which epoch or meta-step, and its figures.
    """

    def _on_training_start(self) -> None:
        super()._on_training_start()
        self._stage = ""
        # A second bar would want a live display of its own, of which older versions of rich allow only one
        self._task = self.pbar._prog.add_task("", total=None)

    def _on_rollout_start(self) -> None:
        self.show("real rollout", 0, None, {})

    def show(self, stage: str, done: int, total: int | None, figures: dict[str, float]) -> None:
        """
        :param stage: name of the stage, with the unit of ``done``
        :param done: epochs or meta-steps so far
        :param total: how many there will be at most; None: no count
        :param figures: name and value of what is worth watching
        """
        if stage != self._stage:
            self._stage = stage
            self.pbar._prog.reset(self._task)
        numbers = "".join(f" {name} {value:.3g}" for name, value in figures.items())
        self.pbar._prog.update(self._task, description=f"{stage}:{numbers}", completed=done, total=total)


class Stopwatch:
    """Wall time of an iteration's stages."""

    def __init__(self) -> None:
        self.seconds = dict.fromkeys(STAGES, 0.0)

    @contextmanager
    def __call__(self, stage: str) -> Iterator[None]:
        """Add the wall time of the block to the stage's seconds."""
        start = time.perf_counter()
        yield
        self.seconds[stage] += time.perf_counter() - start
