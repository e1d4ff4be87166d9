"""The log of a run of rl_zoo3, which the report shows: rl_zoo3 itself keeps returns of episodes only."""

from pathlib import Path

from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.logger import CSVOutputFormat


class ProgressLog(BaseCallback):
    """
    A callback that writes what SB3's logger gets to a file, too.

    :param path: progress.csv in the folder of the run
    """

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.path = path
        self._format: CSVOutputFormat | None = None

    def _on_training_start(self) -> None:
        self._format = CSVOutputFormat(str(self.path))
        self.logger.output_formats.append(self._format)

    def _on_step(self) -> bool:
        return True

    def _on_training_end(self) -> None:
        # rl_zoo3 ends its first callback twice
        if self._format is not None and self._format in self.logger.output_formats:
            self.logger.output_formats.remove(self._format)
            self._format.close()
