"""What the tests of the report need: the names of its figures, and the log of a run."""

import numpy as np
from tiny import tiny_model

from sb3_mbmpo.report.run_log import RunLog, read_progress

FIGURES = ["learning_curve", "expectations", "prediction_error", "one_step_error", "replay", "play", "plasticity", "time"]


def log(text, tmp_path):
    """Return the log of a run whose progress.csv has this text."""
    path = tmp_path / "progress.csv"
    path.write_text(text)
    return RunLog(read_progress(path), (np.zeros(0), np.zeros(0)), tiny_model())
