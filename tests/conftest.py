"""Settings and fixtures for all tests."""

import pytest
import torch as th
from tiny import tiny_model

# The networks are so small that threads would only wait for one another; and one thread fixes the order of sums.
th.set_num_threads(1)


@pytest.fixture(scope="module")
def model():
    """Return a trained model, which tests must not change."""
    return tiny_model(learn_inner_lr=True, buffer_size=64).learn(40)


@pytest.fixture
def mujoco_for_old_environments(monkeypatch, tmp_path):
    """Make every version of Gymnasium's MuJoCo environments work, without a log file in the current folder."""
    import mujoco

    # Pusher-v4 refuses MuJoCo 3, in which its object has another mass; the formula of its reward is the same
    monkeypatch.setattr(mujoco, "__version__", "2.3.7")
    # MuJoCo writes warnings about Gymnasium's models to MUJOCO_LOG.TXT in the current folder
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def quiet_optuna():
    """Silence Optuna's messages about trials."""
    import optuna

    optuna.logging.set_verbosity(optuna.logging.ERROR)


@pytest.fixture(params=["study.db", "study.log"])
def url(request, tmp_path):
    """Return the URL of a study that does not exist yet, in a database or a journal."""
    from tuning.studies import sqlite_url

    path = tmp_path / request.param
    return sqlite_url(path) if path.suffix == ".db" else str(path)


@pytest.fixture
def journal(tmp_path):
    """Return the URL of a journal: databases are slow to create and to write to."""
    return str(tmp_path / "study.log")
