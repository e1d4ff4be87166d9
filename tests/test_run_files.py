"""The files of a run: which of them the report finds, how the model's environment is made again, and the log."""

from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
from gymnasium.envs.registration import EnvSpec
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.vec_env import VecNormalize
from tiny import tiny_model
from tiny_report import log

from sb3_mbmpo import MBMPO
from sb3_mbmpo.report import loading, run_plots
from sb3_mbmpo.report.run_log import RunFiles, RunLogFile, find_run, read_progress, read_run


def test_files_say_how_their_environment_is_made(tmp_path):
    env = make_vec_env("Pendulum-v1", env_kwargs={"g": 5.0, "max_episode_steps": 30})
    tiny_model(env).save(tmp_path / "model")
    spec = EnvSpec.from_json(MBMPO.load(tmp_path / "model").env_spec)
    made = gym.make(spec)
    assert (made.unwrapped.g, made.spec.max_episode_steps) == (5.0, 30)
    # A model that was loaded without an environment still knows its environment's id
    MBMPO.load(tmp_path / "model").save(tmp_path / "again")
    assert MBMPO.load(tmp_path / "again").env_spec == spec.to_json()


def test_a_wrapper_that_tells_its_arguments_is_made_again(tmp_path):
    make = lambda: gym.wrappers.TimeAwareObservation(gym.make("Pendulum-v1"))  # noqa: E731
    tiny_model(make()).save(tmp_path / "model")
    model = MBMPO.load(tmp_path / "model")
    assert loading.env_maker(None, model)().observation_space == make().observation_space == model.observation_space


def test_statistics_of_vec_normalize_are_found_and_used(tmp_path):
    env = VecNormalize(make_vec_env("Pendulum-v1", seed=0))
    model = tiny_model(env).learn(40)
    model.save(tmp_path / "Pendulum-v1")
    (tmp_path / "Pendulum-v1").mkdir()
    env.save(str(tmp_path / "Pendulum-v1" / "vecnormalize.pkl"))
    files = find_run(tmp_path)
    assert files.vec_normalize == tmp_path / "Pendulum-v1" / "vecnormalize.pkl"
    loaded, _ = loading.load_run(files, None)
    np.testing.assert_array_equal(loaded.get_vec_normalize_env().obs_rms.mean, env.obs_rms.mean)
    assert not loaded.get_vec_normalize_env().training
    files.vec_normalize.write_bytes(files.vec_normalize.read_bytes()[:-9])
    with pytest.raises(ValueError, match=r"vecnormalize\.pkl cannot be read"):
        loading.load_run(files, None)


def touch(folder, *names):
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()


def test_the_files_of_this_command_line(tmp_path):
    touch(tmp_path, "a.zip", "b.zip", "a/progress.csv", "b/progress.csv")
    expected = RunFiles(tmp_path / "a.zip", tmp_path / "a" / "progress.csv", None, None)
    for name in ("a", "a.zip"):
        assert find_run(tmp_path / name) == expected


def test_the_files_of_rl_zoo3(tmp_path):
    names = ["best_model.zip", "Env-v1.zip", "rl_model_500_steps.zip", "Env-v1/vecnormalize.pkl", "evaluations.npz"]
    touch(tmp_path, *names)
    best, final, _, statistics, evaluations = (tmp_path / name for name in names)
    assert find_run(tmp_path) == RunFiles(final, None, evaluations, statistics)
    assert find_run(best) == RunFiles(best, None, evaluations, statistics)
    final.unlink()
    with pytest.raises(ValueError, match=r"best_model.zip, rl_model_500_steps.zip: give the model's zip file"):
        find_run(tmp_path)


def test_the_folder_where_one_is(tmp_path, monkeypatch):
    touch(tmp_path, "mine.zip", "progress.csv")
    monkeypatch.chdir(tmp_path)
    assert [path.name for path in find_run(Path())[:2]] == ["mine.zip", "progress.csv"]


def test_a_folder_without_a_model(tmp_path):
    (tmp_path / "run").mkdir()
    with pytest.raises(ValueError, match=r"no model in it, and no run\.zip beside it"):
        find_run(tmp_path / "run")


def test_the_log_of_the_command_line_has_every_iteration(point_run):
    progress = read_progress(point_run / "progress.csv")
    np.testing.assert_array_equal(progress["time/total_timesteps"], [200, 300])
    assert np.isfinite(progress["imagined/ep_rew_mean"]).all()


HEADER = "time/total_timesteps,time/episodes,rollout/ep_rew_mean,eval/mean_reward\n"


def test_a_column_has_the_rows_that_say_something(tmp_path):
    run_log = log(HEADER + "20,2,15,\n25,,,7\n30,3,text,9\n", tmp_path)
    for key, steps, values in [("rollout/ep_rew_mean", [20], [15]), ("eval/mean_reward", [25, 30], [7, 9]), ("no", [], [])]:
        found = run_log.column(key)
        np.testing.assert_array_equal(found[0], steps)
        np.testing.assert_array_equal(found[1], values)
    np.testing.assert_array_equal(run_log.evaluation()[1], [7, 9])


def test_evaluations_of_sb3_are_read(tmp_path):
    np.savez(tmp_path / "evaluations.npz", timesteps=[100, 200], results=[[1, 3], [5, 9]], ep_lengths=[[1, 1], [1, 1]])
    run_log = read_run(RunFiles(tmp_path / "m.zip", None, tmp_path / "evaluations.npz", None), tiny_model())
    steps, returns = run_log.evaluation()
    assert "Imagined returns are left out: no progress.csv" in run_plots.why_not_comparable(run_log)
    np.testing.assert_array_equal(steps, [100, 200])
    np.testing.assert_array_equal(returns, [2, 7])


def test_a_log_goes_on_and_new_columns_find_room(tmp_path):
    path = tmp_path / "progress.csv"
    file = RunLogFile(path)
    for step in (20, 40, 60):
        file.write({"time/total_timesteps": step, "a": 1 / 3}, {"time/total_timesteps": (), "a": ()})
    file = RunLogFile(path, last_step=40)
    file.write({"time/total_timesteps": 60, "b": "x,y", "c": 1}, {"time/total_timesteps": (), "b": (), "c": ("csv",)})
    columns = read_progress(path)
    np.testing.assert_array_equal(columns["time/total_timesteps"], [20, 40, 60])
    np.testing.assert_array_equal(columns["a"], [1 / 3, 1 / 3, np.nan])
    assert columns.keys() == {"time/total_timesteps", "a", "b"}


def test_a_damaged_log_is_named(tmp_path):
    path = tmp_path / "progress.csv"
    file = RunLogFile(path)
    for step in (20, 40):
        file.write(
            {"time/total_timesteps": step, "rollout/ep_rew_mean": -12.5},
            {"time/total_timesteps": (), "rollout/ep_rew_mean": ()},
        )
    good = path.read_bytes()
    for damaged in (good.replace(b"40,-12.5", b"40,-92.5"), good.replace(b"20,", b"20"), good.replace(b"12", b"\xff2")):
        assert damaged != good
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match=r"progress\.csv"):
            read_progress(path)
        with pytest.raises(ValueError, match=r"progress\.csv"):
            RunLogFile(path, last_step=40)
