"""Settings and fixtures for all tests."""

import pytest
import torch as th

# The networks are so small that threads would only wait for one another; and one thread fixes the order of sums.
th.set_num_threads(1)


@pytest.fixture
def mujoco_for_old_environments(monkeypatch, tmp_path):
    """Make every version of Gymnasium's MuJoCo environments work, without a log file in the current folder."""
    import mujoco

    # Pusher-v4 refuses MuJoCo 3, in which its object has another mass; the formula of its reward is the same
    monkeypatch.setattr(mujoco, "__version__", "2.3.7")
    # MuJoCo writes warnings about Gymnasium's models to MUJOCO_LOG.TXT in the current folder
    monkeypatch.chdir(tmp_path)
