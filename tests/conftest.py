"""Settings and fixtures for all tests."""

import contextlib
import io
import signal

import pytest
import torch as th
from tiny import tiny_model

# The networks are so small that threads would only wait for one another; and one thread fixes the order of sums.
th.set_num_threads(1)
# A shell that starts pytest in the background lets it ignore Ctrl-C, and every program that the tests start would, too
signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="module")
def model():
    """Return a trained model, which tests must not change."""
    return tiny_model(learn_inner_lr=True, buffer_size=64).learn(40)


@pytest.fixture
def train(monkeypatch, tmp_path):
    """Return the command line, with settings so small that an iteration takes a fraction of a second."""
    from tiny_training import command_line

    return command_line(monkeypatch, tmp_path)


@pytest.fixture(scope="session")
def point_run(tmp_path_factory):
    """Train with the command line and return the folder of the run, with its output; the model lies next to it."""
    from sb3_mbmpo.__main__ import main

    model = tmp_path_factory.mktemp("runs") / "point.zip"
    options = ["--total-timesteps", "300", "--seed", "7", "--eval-episodes", "3", "--no-progress-bar"]
    output = io.StringIO()
    with contextlib.redirect_stdout(output):
        main(["train", "--env", "Point2D-v0", "--save", str(model), *options])
    (model.with_suffix("") / "output.txt").write_text(output.getvalue())
    return model.with_suffix("")


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


@pytest.fixture
def study(quiet_optuna):
    """Return a study in memory whose first trial is the configuration."""
    from optuna.storages import InMemoryStorage
    from tiny_study import PENDULUM

    from tuning.studies import open_study

    return open_study(InMemoryStorage(), "study", PENDULUM)


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
