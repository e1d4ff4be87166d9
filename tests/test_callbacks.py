"""Callbacks, logger and progress bar."""

import csv
import io
import json
import re
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from rich.console import Console
from stable_baselines3.common.callbacks import (
    BaseCallback,
    CallbackList,
    CheckpointCallback,
    EvalCallback,
    EveryNTimesteps,
    LogEveryNTimesteps,
    StopTrainingOnMaxEpisodes,
    StopTrainingOnNoModelImprovement,
    StopTrainingOnRewardThreshold,
)
from stable_baselines3.common.logger import HumanOutputFormat, KVWriter, Logger, configure
from stable_baselines3.common.vec_env import VecNormalize
from tiny import Drift, Unknown, tiny_model, vec_drift

from sb3_mbmpo import MBMPO
from sb3_mbmpo.common.progress import StageProgressBar

LOG_KEYS = Path(__file__).parent.parent / "docs" / "guide" / "log-keys.md"


class Recorder(BaseCallback):
    """A callback that records every call, with the numbers of real steps and of meta-steps at that moment."""

    def __init__(self, stop_at=None):
        super().__init__()
        self.calls, self.locals_of_steps, self.stop_at = [], [], stop_at

    def _note(self, name):
        self.calls.append((name, self.model.num_timesteps, self.model._n_updates))

    def _on_training_start(self):
        self._note("training_start")

    def _on_rollout_start(self):
        self._note("rollout_start")

    def _on_step(self):
        self._note("step")
        self.locals_of_steps.append(dict(self.locals))
        return self.num_timesteps != self.stop_at

    def _on_rollout_end(self):
        self._note("rollout_end")

    def _on_training_end(self):
        self._note("training_end")

    def names(self):
        return [name for name, _, _ in self.calls]


def logged_keys(model):
    class Keys(KVWriter):
        def write(self, key_values, key_excluded, step=0):
            keys.update(key_values)

    keys = set()
    model.set_logger(Logger(None, [Keys()]))
    model.learn(40)
    return keys


@pytest.fixture
def log_to(tmp_path):
    """Yield a function that makes a model log into files under ``tmp_path``, and close the files afterwards."""
    loggers = []

    def set_logger(model, *formats):
        loggers.append(configure(str(tmp_path), list(formats)))
        model.set_logger(loggers[-1])

    yield set_logger
    for logger in loggers:
        logger.close()


# ---------------------------------------------------------------- callbacks


@pytest.mark.parametrize("n_envs", [1, 2])
def test_protocol(n_envs):
    recorder = Recorder()
    model = tiny_model(vec_drift(n_envs), n_meta_steps=2).learn(60, callback=recorder)
    steps = ["step"] * (20 // n_envs)
    rollout = ["rollout_start", *steps, "rollout_end"]
    assert recorder.names() == ["training_start", *rollout * 3, "training_end"]
    assert [n for name, n, _ in recorder.calls if name == "step"] == list(range(n_envs, 61, n_envs))
    # Meta-steps happen between the rollouts
    assert [updates for name, _, updates in recorder.calls if name == "rollout_start"] == [0, 2, 4]
    assert [updates for name, _, updates in recorder.calls if name == "rollout_end"] == [0, 2, 4]
    assert model._n_updates == 6
    for step in recorder.locals_of_steps:
        assert {"self", "env", "actions", "buffer_actions", "new_obs", "rewards", "dones", "infos", "replay_buffer"} <= set(
            step
        )
        assert step["self"] is model
        assert step["new_obs"].shape == (n_envs, 2)


@pytest.mark.parametrize("stop_at", [1, 20, 33, 60])
@pytest.mark.parametrize("as_list", [False, True])
def test_false_stops_at_once(stop_at, as_list):
    recorder = Recorder(stop_at)
    model = tiny_model().learn(100, callback=[recorder, Recorder()] if as_list else recorder)
    assert model.num_timesteps == stop_at == model.env.envs[0].unwrapped.n_steps
    assert recorder.names()[-2:] == ["step", "training_end"], "neither an end of the rollout nor training"
    assert model._n_updates == (stop_at - 1) // 20


def test_function_as_callback():
    steps = []
    tiny_model().learn(10, callback=lambda local_variables, _: steps.append(local_variables["self"].num_timesteps) or True)
    assert steps == list(range(1, 11))


def test_evaluation_sees_the_meta_policy_and_its_best_model_loads(tmp_path):
    seen = []

    class Spy(BaseCallback):
        def _on_step(self):
            seen.append(self.parent.last_mean_reward)
            return True

    evaluation = vec_drift(random_start=False)
    callback = EvalCallback(
        evaluation, callback_after_eval=Spy(), eval_freq=10, n_eval_episodes=1, best_model_save_path=str(tmp_path), verbose=0
    )
    model = tiny_model().learn(40, callback=callback)
    assert len(seen) == 4
    assert seen[0] == seen[1], "nothing was learned before the first fit"
    assert seen[2] != seen[1]
    best = MBMPO.load(tmp_path / "best_model")
    assert best.num_timesteps == 10 * (1 + int(np.argmax(seen)))
    assert model.num_timesteps == 40


def test_checkpoints_with_buffer_and_statistics(tmp_path):
    env = VecNormalize(vec_drift())
    callback = CheckpointCallback(25, str(tmp_path), save_replay_buffer=True, save_vecnormalize=True)
    tiny_model(env).learn(50, callback=callback)
    loaded_env = VecNormalize.load(str(tmp_path / "rl_model_vecnormalize_25_steps.pkl"), vec_drift())
    loaded = MBMPO.load(tmp_path / "rl_model_25_steps", env=loaded_env)
    loaded.load_replay_buffer(tmp_path / "rl_model_replay_buffer_25_steps")
    assert loaded.num_timesteps == 25
    assert loaded.replay_buffer.size() == 24, "a callback runs before its step is stored"
    loaded.learn(20, reset_num_timesteps=False)


def test_stopping_callbacks():
    model = tiny_model(Drift(length=5)).learn(100, callback=StopTrainingOnMaxEpisodes(3))
    assert model.num_timesteps == 15
    threshold = EvalCallback(
        vec_drift(), callback_on_new_best=StopTrainingOnRewardThreshold(-1e6), eval_freq=7, n_eval_episodes=1, verbose=0
    )
    assert tiny_model().learn(100, callback=threshold).num_timesteps == 7
    stale = EvalCallback(
        vec_drift(random_start=False),
        callback_after_eval=StopTrainingOnNoModelImprovement(1),
        eval_freq=3,
        n_eval_episodes=1,
        verbose=0,
    )
    assert tiny_model().learn(100, callback=stale).num_timesteps == 9, "nothing improves before the first fit"


def test_every_n_timesteps_and_log_every_n_timesteps(tmp_path, log_to):
    recorder = Recorder()
    model = tiny_model()
    log_to(model, "csv")
    model.learn(60, callback=CallbackList([EveryNTimesteps(25, recorder), LogEveryNTimesteps(15)]), log_interval=None)
    assert [n for name, n, _ in recorder.calls if name == "step"] == [25, 50]
    with (tmp_path / "progress.csv").open() as file:
        assert [int(row["time/total_timesteps"]) for row in csv.DictReader(file)] == [15, 30, 45, 60]


# ---------------------------------------------------------------- logger


@pytest.mark.parametrize("log_interval", [1, 2, None])
def test_log_interval_counts_iterations(log_interval, tmp_path, log_to):
    model = tiny_model()
    log_to(model, "json")
    model.learn(80, log_interval=log_interval)
    lines = [json.loads(line) for line in (tmp_path / "progress.json").read_text().splitlines()]
    expected = [] if log_interval is None else list(range(20 * log_interval, 81, 20 * log_interval))
    assert [line["time/total_timesteps"] for line in lines] == expected
    for line in lines:
        assert all(np.isfinite(value) for value in line.values())
        assert line["time/meta_update"] >= 0


def test_new_real_returns_are_those_since_the_last_fit(tmp_path, log_to):
    returns = {}

    def remember(locals_, _):
        for info in locals_["infos"]:
            if "episode" in info:
                returns[locals_["self"].num_timesteps] = info["episode"]["r"]
        return True

    model = tiny_model(Drift(length=7), stats_window_size=50)
    log_to(model, "csv")
    model.learn(80, callback=remember)
    with (tmp_path / "progress.csv").open() as file:
        logged = {int(row["time/total_timesteps"]): float(row["rollout/ep_rew_mean_new"]) for row in csv.DictReader(file)}
    assert list(logged) == [20, 40, 60, 80]
    assert logged == {
        end: pytest.approx(np.mean([value for step, value in returns.items() if end - 20 < step <= end])) for end in logged
    }


def test_documented_table_of_keys_is_what_an_iteration_logs():
    table = re.search(r"<!-- keys:begin -->(.*)<!-- keys:end -->", LOG_KEYS.read_text(), re.DOTALL)
    documented = re.findall(r"^\| *`([a-z_]+/[a-z_]+)` *\|", table.group(1), re.MULTILINE)
    assert len(documented) == len(set(documented))
    assert logged_keys(tiny_model(Drift(length=5))) == set(documented)


def test_keys_that_have_no_meaning_are_left_out():
    every = logged_keys(tiny_model(Drift(length=5)))
    assert every == logged_keys(tiny_model(Unknown(length=5)))
    critic = {"rollout/ep_discounted_rew_mean", "imagined/initial_value", "train/value_loss", "train/explained_variance"}
    assert every - logged_keys(tiny_model(Drift(length=5), baseline="linear")) == critic
    discrete = tiny_model(Drift(length=5, action_space=Drift().action_space.__class__(-1, 1, (1,))))
    assert every == logged_keys(discrete)
    none = {"imagined/ep_rew_mean_adapted", "train/policy_objective", "train/kl_divergence"}
    none |= {"train/is_line_search_success", "train/line_search_steps", "train/value_loss", "train/explained_variance"}
    assert every - logged_keys(tiny_model(Drift(length=5), n_meta_steps=0)) == none


def test_every_format(tmp_path, capsys, log_to):
    model = tiny_model(tensorboard_log=str(tmp_path / "board"), verbose=1)
    for resets, n_runs in ((True, 1), (False, 1), (True, 2)):
        model.learn(20, tb_log_name="run", reset_num_timesteps=resets)
        model.logger.close()
        assert {path.name for path in (tmp_path / "board").iterdir()} == {f"run_{k + 1}" for k in range(n_runs)}
    assert "ep_rew_mean_adapted" in capsys.readouterr().out
    log_to(model, "csv", "json", "log", "tensorboard", "stdout")
    model.learn(20)
    assert {"progress.csv", "progress.json", "log.txt"} <= {path.name for path in tmp_path.iterdir()}
    assert list(tmp_path.glob("events.out.tfevents.*"))


def test_own_logger_is_kept():
    stream = io.StringIO()
    model = tiny_model()
    model.set_logger(Logger(None, [HumanOutputFormat(stream)]))
    model.learn(20)
    assert "val_loss" in stream.getvalue()


# ---------------------------------------------------------------- progress bar


def test_progress_bar_says_what_the_silent_stages_do(monkeypatch):
    shown = []
    show = StageProgressBar.show

    def watched(self, *args):
        show(self, *args)
        first, second = self._lines.tasks
        shown.append((re.sub(r"-?\d[\d.e+-]*", "#", second.description), second.completed, second.total))
        assert (first.completed, first.total) == (self.model.num_timesteps, 40)

    monkeypatch.setattr(StageProgressBar, "show", watched)
    console = Console(file=io.StringIO(), force_terminal=True, width=200)
    monkeypatch.setattr("sb3_mbmpo.common.progress.get_console", lambda: console)
    recorder = Recorder()
    tiny_model(n_meta_steps=3).learn(40, callback=recorder, progress_bar=True)
    iteration = [
        ("real rollout", 0, None),
        *[("dynamics fit, passes: val_loss #", k, 2) for k in (1, 2)],
        *[("meta-steps: return # adapted #", k, 3) for k in (1, 2, 3)],
    ]
    assert shown == iteration * 2
    assert recorder.names()[-1] == "training_end"


class ShownBar(StageProgressBar):
    """A progress bar without an algorithm, which shows what a terminal of some width would."""

    training_env = SimpleNamespace(num_envs=1)

    def __init__(self, total, width, monkeypatch):
        super().__init__()
        self.console = Console(file=io.StringIO(), force_terminal=True, width=width, color_system=None, legacy_windows=False)
        monkeypatch.setattr("sb3_mbmpo.common.progress.get_console", lambda: self.console)
        self.model, self.locals = SimpleNamespace(num_timesteps=0), {"total_timesteps": total}
        self._on_training_start()

    def lines(self):
        self._lines.refresh()
        text = re.sub(r"\x1b\[[0-9?]*[a-zA-Z]", "", self.console.file.getvalue())
        return re.split(r"[\r\n]+", text)


@pytest.mark.parametrize("width", [50, 80, 120])
def test_progress_bar_fits_in_a_line_and_no_number_is_cut(width, monkeypatch):
    bar = ShownBar(40_000, width, monkeypatch)
    bar.pbar.update(12_000)
    bar._lines.tasks[0].start_time -= 7000
    bar.pbar.refresh()
    bar.show("meta-steps", 12, 20, {"return": -1034.2, "adapted": -1012.1})
    lines = bar.lines()
    bar.close()
    assert max(map(len, lines)) <= width
    # 7,000 s for 12,000 of 40,000 steps, so 16,333 s for the others
    assert any(re.fullmatch(r"real steps +━+╸? +12,000/40,000 1:56:40<4:32:\d\d *", line) for line in lines)
    last = next(line for line in reversed(lines) if line.startswith("meta-steps"))
    assert re.search(r" 12/20 +0:00<0:00 *$", last)
    assert width < 80 or "return -1034 adapted -1012 " in last


def test_progress_bar_does_not_guess_when_it_knows_nothing(monkeypatch):
    bar = ShownBar(500, 80, monkeypatch)
    bar._on_rollout_start()
    lines = [line.rstrip() for line in bar.lines()]
    bar.close()
    assert any(re.fullmatch(r"real steps +0/500 0:00<-:--", line) for line in lines)
    assert any(re.fullmatch(r"real rollout +━+ +0:00", line) for line in lines)


def test_progress_bar_takes_every_kind_of_callback_and_can_be_saved(tmp_path, monkeypatch):
    monkeypatch.setattr("sb3_mbmpo.common.progress.get_console", lambda: Console(file=io.StringIO()))
    for callback in (None, Recorder(), [Recorder()], lambda *_: True):
        model = tiny_model().learn(5, callback=callback, progress_bar=True)
    model.save(tmp_path / "model")
    assert MBMPO.load(tmp_path / "model")._progress is None
    assert model.learn(5)._progress is None
