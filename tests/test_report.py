"""The report on a run, its files, its video and its plots in TensorBoard."""

import io
import re
import sys
from html.parser import HTMLParser
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
import torch as th
from gymnasium.envs.registration import EnvSpec
from PIL import Image
from stable_baselines3 import PPO
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.vec_env import VecNormalize
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tiny import Drift, assert_same, parameters, tiny_model

from sb3_mbmpo import MBMPO, DiagnosticsCallback
from sb3_mbmpo.__main__ import main as train
from sb3_mbmpo.report import callback as diagnostics_callback
from sb3_mbmpo.report import loading, plots, video
from sb3_mbmpo.report import page as page_module
from sb3_mbmpo.report.__main__ import main as report_main
from sb3_mbmpo.report.run_log import RunFiles, RunLog, find_run, read_progress, read_run
from sb3_mbmpo.report.study import ModelStudy, Plasticity, study_model

POINT = "sb3_mbmpo.envs:Point2D-v0"
FIGURES = ["learning_curve", "expectations", "prediction_error", "one_step_error", "replay", "play", "plasticity", "time"]


class Page(HTMLParser):
    """A parser that collects what a browser would load and what it would show."""

    def __init__(self, text):
        super().__init__()
        self.images, self.links, self.open, self.captions = [], [], [], []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        values = dict(attrs)
        self.links += [values[name] for name in ("src", "href", "data") if name in values]
        if tag == "img":
            self.images.append(values)
        if tag == "figcaption":
            self.captions.append("")
        if tag not in ("img", "meta"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] == "figcaption":
            self.captions[-1] += data


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Train with the command line and return the folder of the run; the model lies next to it."""
    model = tmp_path_factory.mktemp("runs") / "point.zip"
    options = ["--total-timesteps", "300", "--eval-episodes", "1", "--no-progress-bar"]
    train(["train", "--env", "Point2D-v0", "--save", str(model), *options])
    return model.with_suffix("")


# -- The page -------------------------------------------------------------------------------------------------------------


def test_a_report_has_all_figures_in_one_file(run, tmp_path):
    report_main([str(run), "--output", str(tmp_path), "--episodes", "2"])
    text = (tmp_path / "report.html").read_text()
    page = Page(text)
    assert [image["src"].split(",")[0] for image in page.images] == ["data:image/png;base64"] * len(FIGURES)
    assert all(link.startswith("data:") for link in page.links)
    assert "http" not in re.sub(r"base64,[^']*", "", text)
    assert {path.stem for path in tmp_path.glob("*.png")} == set(FIGURES)
    assert len(page.captions) == len(FIGURES) + 1
    assert [caption for caption in page.captions if caption.startswith("Left out")] == [
        "Left out: only MuJoCo environments have a video, because their state can be set."
    ]
    for hyperparameter in ("inner_lr", "n_tasks", "dynamics_kwargs", "stats_window_size"):
        assert f"<td>{hyperparameter}</td>" in text
    assert "<tr class=changed><td>n_steps</td><td>100</td><td>500</td></tr>" in text
    assert "<tr><td>n_models</td><td>5</td><td>5</td></tr>" in text


def test_a_model_alone_gets_a_sentence_where_the_log_is_missing(run, tmp_path):
    model = tmp_path / "alone.zip"
    model.write_bytes(run.with_suffix(".zip").read_bytes())
    report_main([str(model), "--episodes", "1", "--no-video"])
    page = Page((tmp_path / "alone" / "report" / "report.html").read_text())
    assert {image["alt"] for image in page.images}.isdisjoint({"Learning curve", "Promised and kept", "Time by stage"})
    assert len(page.images) == len(FIGURES) - 3
    assert re.match("Left out: no progress.csv.*has returns", page.captions[0])
    assert re.match("Left out: no progress.csv.*has the seconds", page.captions[-1])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere"], "ValueError: There is no model and no folder nowhere"),
        (["RUN", "--env", "Pendulum-v1"], "ValueError: .*point.zip does not fit the environment.*--env"),
        (["RUN", "--env", "NoSuchEnv-v0"], "NameNotFound: .*NoSuchEnv"),
        (["RUN", "--episodes", "0"], "2"),
    ],
)
def test_what_is_wrong_is_said_in_a_line(run, arguments, message):
    with pytest.raises(SystemExit, match=message):
        report_main([str(run) if argument == "RUN" else argument for argument in arguments])


def test_a_file_without_an_environment_asks_for_it(tmp_path):
    tiny_model(Drift()).save(tmp_path / "model")
    with pytest.raises(SystemExit, match="does not say how its environment is made: pass `--env ID`"):
        report_main([str(tmp_path / "model.zip")])


def test_without_matplotlib_the_extra_is_named(run, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.axes", None)
    monkeypatch.delitem(sys.modules, "sb3_mbmpo.report.plots", raising=False)
    monkeypatch.delattr("sb3_mbmpo.report.plots", raising=False)
    with pytest.raises(SystemExit, match=r"pip install 'sb3-mbmpo\[plots\]'"):
        report_main([str(run)])


def test_figures_say_their_units(run):
    model, make_env = loading.load_run(find_run(run), None)
    study = study_model(model, make_env(), n_episodes=1)
    log = read_run(find_run(run), model)
    pictures = [plots.draw_learning_curve(log, study), plots.draw_expectations(log)]
    pictures += [*plots.model_pictures(study), plots.draw_times(log)]
    assert [picture.name for picture in pictures] == FIGURES
    units = r"steps|return|standard deviations|nats|seconds|units|iteration|dimension"
    for picture in pictures:
        for axes in picture.figure.axes:
            labels = [axes.get_xlabel(), axes.get_ylabel()]
            shared = axes.get_ylabel() == "" and axes.get_xlabel() != ""  # the panel to the left has the label
            assert all(re.search(units, label) for label in labels if label), (picture.name, labels)
            assert any(labels) or shared, picture.name
        assert picture.figure.get_suptitle() or picture.figure.axes[0].get_title(), picture.name
        assert picture.figure.legends or any(axes.get_legend() for axes in picture.figure.axes), picture.name


def test_no_adaptation_no_figure_of_it():
    picture = plots.draw_plasticity(Plasticity(np.zeros((4, 3)), np.ones(4), np.zeros(4), np.zeros((4, 3)), False))
    assert picture.figure is None
    assert "equal the meta-policy" in picture.caption


# -- The files of a run ---------------------------------------------------------------------------------------------------


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


def test_the_log_of_the_command_line_has_every_iteration(run):
    progress = read_progress(run / "progress.csv")
    np.testing.assert_array_equal(progress["time/total_timesteps"], [200, 300])
    assert np.isfinite(progress["imagined/ep_rew_mean"]).all()


def log(text, tmp_path):
    path = tmp_path / "progress.csv"
    path.write_text(text)
    return RunLog(read_progress(path), (np.zeros(0), np.zeros(0)), tiny_model())


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
    assert "Imagined returns are left out: no progress.csv" in plots._notes(run_log)
    np.testing.assert_array_equal(steps, [100, 200])
    np.testing.assert_array_equal(returns, [2, 7])


# -- The video ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "n_skipped"),
    [("HalfCheetah", 1), ("Hopper", 1), ("Walker2d", 1), ("Swimmer", 2), ("Ant", 2), ("InvertedPendulum", 0)],
)
def test_the_state_is_found_in_the_observation(name, n_skipped):
    simulator = gym.make(f"{name}-v5").unwrapped
    obs, _ = simulator.reset(seed=0)
    layout = video.state_layout(simulator)
    assert layout.n_skipped == n_skipped
    simulator.set_state(*layout.split(obs, np.full(n_skipped, 7.0)))
    np.testing.assert_allclose(simulator._get_obs(), obs, atol=1e-6)
    np.testing.assert_array_equal(simulator.data.qpos[:n_skipped], 7)


@pytest.mark.parametrize("env_id", ["Reacher-v5", "InvertedDoublePendulum-v5", "Pendulum-v1"])
def test_an_observation_without_the_state_is_not_filmed(env_id):
    simulator = gym.make(env_id).unwrapped
    simulator.reset(seed=0)
    with pytest.raises(video.NoFilmError, match=r"only MuJoCo|does not hold"):
        video.state_layout(simulator)


class Painted(gym.Wrapper):
    """An environment that renders without a graphics driver, and records its state."""

    def __init__(self, env, seen):
        super().__init__(env)
        self.seen = seen

    def render(self):
        self.seen.append(self.unwrapped.data.qpos.copy())
        return np.zeros((video.SIZE, video.SIZE, 3), np.uint8)


def test_a_film_shows_predicted_states_and_how_far_they_have_got():
    def make_env(**kwargs):
        return Painted(gym.make("HalfCheetah-v5", max_episode_steps=6), seen)

    seen = []
    model = tiny_model(gym.make("HalfCheetah-v5"))
    film = Image.open(io.BytesIO(video.film(model, make_env, seed=3)))
    assert film.n_frames == 4
    real, imagined = np.array(seen[:4]), np.array(seen[4:])

    simulator = gym.make("HalfCheetah-v5", max_episode_steps=6)
    first, _ = simulator.reset(seed=3)
    x, dt = simulator.unwrapped.data.qpos[0], simulator.unwrapped.dt
    np.testing.assert_allclose(real[0], simulator.unwrapped.data.qpos)
    obs, steps = first, model.dynamics.step_fn(model._dynamics_options.clip_margin)
    predicted = []
    for _ in range(6):
        action, _ = model.predict(first, deterministic=True)
        first, *_ = simulator.step(action)
        batch = (th.as_tensor(value, dtype=th.float32).expand(2, 1, -1) for value in (obs, action))
        obs = steps(*batch).next_obs[0, 0].numpy()
        x += dt * obs[8]
        predicted.append([x, *obs[:8]])
    np.testing.assert_allclose(imagined, predicted[1::2], rtol=1e-3, atol=1e-4)


def test_a_simulator_that_cannot_render_gets_a_sentence(tmp_path, monkeypatch):
    def broken(self):
        raise RuntimeError("no driver")

    monkeypatch.setattr(gym.Wrapper, "render", broken)
    model = tiny_model(gym.make("HalfCheetah-v5"))
    text = page_module.film_section(model, loading.env_maker("HalfCheetah-v5", model), 0, tmp_path)
    assert "Left out: the simulator cannot render here (RuntimeError: no driver)" in text
    assert not list(tmp_path.iterdir())


# -- TensorBoard ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("every", "steps"), [(1, [20, 40, 60, 80]), (2, [40, 80]), (3, [60, 80]), (9, [80])])
def test_the_callback_looks_when_it_is_due_and_at_the_end(monkeypatch, every, steps):
    looked = []
    quick = ModelStudy({}, None, None, None)
    monkeypatch.setattr(diagnostics_callback, "study_model", lambda *_: looked.append(callback.num_timesteps) or quick)
    monkeypatch.setattr(ModelStudy, "metrics", lambda self: {})
    monkeypatch.setattr(plots, "model_pictures", lambda study: [])
    callback = DiagnosticsCallback(Drift(), every_n_iterations=every)
    tiny_model().learn(80, callback=callback)
    assert looked == steps


def test_figures_and_errors_go_to_tensorboard(tmp_path):
    callback = DiagnosticsCallback(Drift(), every_n_iterations=9, n_episodes=1)
    tiny_model(tensorboard_log=str(tmp_path)).learn(40, callback=callback)
    events = EventAccumulator(str(next(tmp_path.iterdir())), size_guidance={"images": 0})
    events.Reload()
    names = {f"diagnostics/{name}" for name in FIGURES if name not in ("learning_curve", "expectations", "time")}
    assert set(events.Tags()["images"]) == names
    for tag in names:
        assert [event.step for event in events.Images(tag)] == [40]
    for key in ("one_step_rmse", "horizon_rmse"):
        assert [event.step for event in events.Scalars(f"diagnostics/{key}")] == [40]


def test_looking_does_not_change_what_is_learned():
    def learned(callback):
        return parameters(tiny_model().learn(60, callback=callback))

    assert_same(learned(None), learned(DiagnosticsCallback(Drift(), every_n_iterations=1, n_episodes=1)))


def test_the_callback_says_what_it_cannot_do():
    with pytest.raises(ValueError, match="every_n_iterations"):
        DiagnosticsCallback(Drift(), every_n_iterations=0)
    with pytest.raises(ValueError, match="PPO"):
        PPO("MlpPolicy", "Pendulum-v1").learn(1, callback=DiagnosticsCallback(Drift()))
