"""The report on a run, its files, its video and its plots in TensorBoard."""

import base64
import contextlib
import html
import importlib.metadata
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
from matplotlib.backends.backend_agg import FigureCanvasAgg
from PIL import Image
from stable_baselines3 import PPO
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.vec_env import VecNormalize
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tiny import Drift, assert_same, parameters, tiny_model

from sb3_mbmpo import MBMPO, DiagnosticsCallback
from sb3_mbmpo.__main__ import main as train
from sb3_mbmpo.report import callback as diagnostics_callback
from sb3_mbmpo.report import loading, plots, video
from sb3_mbmpo.report import page as page_module
from sb3_mbmpo.report.__main__ import main as report_main
from sb3_mbmpo.report.colours import member_colours
from sb3_mbmpo.report.episodes import Episode, RandomPolicy, evaluation_seed
from sb3_mbmpo.report.observation_names import LAYOUTS, Quantity, quantities
from sb3_mbmpo.report.run_log import RunFiles, RunLog, find_run, read_progress, read_run
from sb3_mbmpo.report.study import ActorStudy, ModelStudy, Plasticity, Trajectory, study_model

POINT = "sb3_mbmpo.envs:Point2D-v0"
FIGURES = ["learning_curve", "expectations", "prediction_error", "one_step_error", "replay", "play", "plasticity", "time"]


class Page(HTMLParser):
    """A parser that collects what a browser would load and what it would show."""

    def __init__(self, text):
        super().__init__()
        self.images, self.sources, self.links, self.open, self.captions, self.metas = [], [], [], [], [], {}
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        values = dict(attrs)
        self.links += [values[name] for name in ("src", "srcset", "href", "data") if name in values]
        if tag == "img":
            self.images.append(values)
        if tag == "source":
            self.sources.append(values)
        if tag == "meta" and "name" in values:
            self.metas[values["name"]] = values["content"]
        if tag == "figcaption":
            self.captions.append("")
        if tag not in ("img", "meta", "source"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] == "figcaption":
            self.captions[-1] += data


def head(text):
    """Return the rows of the table at the head of a page."""
    table = text[text.index("<table class='head'>") : text.index("</table>")]
    return {name: html.unescape(value) for name, value in re.findall(r"<tr><td>(.*?)</td><td>(.*?)</td></tr>", table)}


def png(data_url):
    return Image.open(io.BytesIO(base64.b64decode(data_url.partition("base64,")[2])))


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Train with the command line and return the folder of the run, with its output; the model lies next to it."""
    model = tmp_path_factory.mktemp("runs") / "point.zip"
    options = ["--total-timesteps", "300", "--seed", "7", "--eval-episodes", "3", "--no-progress-bar"]
    output = io.StringIO()
    with contextlib.redirect_stdout(output):
        train(["train", "--env", "Point2D-v0", "--save", str(model), *options])
    (model.with_suffix("") / "output.txt").write_text(output.getvalue())
    return model.with_suffix("")


@pytest.fixture(scope="module")
def pictures(run):
    """Return all pictures of a run by name."""
    model, make_env = loading.load_run(find_run(run), None)
    study = study_model(model, make_env(), n_episodes=1)
    log = read_run(find_run(run), model)
    found = [plots.draw_learning_curve(log, study), plots.draw_expectations(log)]
    found += [*plots.model_pictures(study), plots.draw_times(log)]
    return {picture.name: picture for picture in found}


# -- The page -------------------------------------------------------------------------------------------------------------


def test_a_report_has_all_figures_in_one_file(run, tmp_path):
    report_main([str(run), "--output", str(tmp_path), "--episodes", "2"])
    text = (tmp_path / "report.html").read_text()
    page = Page(text)
    assert [image["src"].split(",")[0] for image in page.images] == ["data:image/png;base64"] * len(FIGURES)
    # A phone shows the page in its own width, with the narrow layout of each figure
    assert page.metas["viewport"] == "width=device-width, initial-scale=1"
    assert [source["media"] for source in page.sources] == ["(max-width: 640px)"] * len(FIGURES)
    for image, source in zip(page.images, page.sources, strict=True):
        assert (png(image["src"]).width, png(source["srcset"]).width) == (1650, 748)
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


def test_the_head_has_the_numbers_that_the_training_printed(run, tmp_path):
    report_main([str(run), "--output", str(tmp_path), "--episodes", "3", "--no-video"])
    lines = (run / "output.txt").read_text().splitlines()
    printed = {line.split("  ")[0]: line.split()[-2:] for line in lines if "  " in line}
    rows = head((tmp_path / "report.html").read_text())
    for row, policy in (("return, meta-policy", "MB-MPO"), ("return, random actions", "random policy")):
        mean, std = (float(number) for number in rows[row].split(" (")[0].split(" ± "))
        # To the digits that both show
        assert (mean, std) == pytest.approx([float(number) for number in printed[policy]], abs=0.06)
    assert rows["return, meta-policy"].endswith(", 3 deterministic episodes")
    assert (rows["seed"], rows["real steps"], rows["its arguments"]) == ("7", "300", "none")
    assert "--seed 7 --eval-episodes 3" in rows["these episodes"]
    package, stable_baselines3 = (importlib.metadata.version(name) for name in ("sb3_mbmpo", "stable_baselines3"))
    for made in ("trained with", "report made with"):
        assert rows[made].startswith(f"sb3_mbmpo {package}, ")
        assert f"stable_baselines3 {stable_baselines3}, torch {th.__version__}, numpy {np.__version__}" in rows[made]


def test_episodes_are_those_of_sb3s_evaluation():
    model = tiny_model(make_vec_env("Pendulum-v1")).learn(20)

    def evaluated(policy):
        env = make_vec_env("Pendulum-v1", seed=evaluation_seed(3))
        return evaluate_policy(policy, env, n_eval_episodes=4, return_episode_rewards=True)[0]

    study = study_model(model, gym.make("Pendulum-v1"), n_episodes=4, seed=3)
    np.testing.assert_allclose(study.returns(), evaluated(model), atol=1e-5)  # Monitor rounds
    np.testing.assert_allclose(study.returns("random actions"), evaluated(RandomPolicy(model.action_space, 3)), atol=1e-5)


@pytest.mark.parametrize(
    ("env_id", "kwargs", "expected"),
    [
        ("Pendulum-v1", {}, "none"),
        ("Pendulum-v1", {"g": 5.0, "max_episode_steps": 30}, "g=5.0, max_episode_steps=30"),
        ("Pendulum-v1", {"max_episode_steps": 200}, "none"),  # as registered
        (POINT, {}, "none"),
    ],
)
def test_the_head_has_the_environments_arguments(env_id, kwargs, expected):
    assert page_module.environment_arguments(gym.make(env_id, **kwargs)) == expected


@pytest.mark.parametrize("layout", [plots.WIDE, plots.NARROW], ids=["wide", "narrow"])
@pytest.mark.parametrize("name", FIGURES)
def test_figures_say_their_units_and_nothing_covers_or_leaves_them(name, layout, pictures):
    figure = pictures[name].draw(layout)
    units = r"steps|return|standard deviations|nats|seconds|units|iteration|^$"
    for axes in figure.axes:
        labels = [axes.get_xlabel(), axes.get_ylabel()]
        assert all(re.search(units, label.replace("\n", " ")) for label in labels), labels
        assert any(labels)
    assert figure.get_suptitle()
    FigureCanvasAgg(figure).draw()
    legends = [*figure.legends, *filter(None, (axes.get_legend() for axes in figure.axes))]
    assert legends
    for legend in legends:
        for axes in figure.axes:
            one, other = legend.get_window_extent(), axes.get_window_extent()
            assert not (one.x0 < other.x1 and other.x0 < one.x1 and one.y0 < other.y1 - 1 and other.y0 < one.y1), name
    inside = figure.get_tightbbox()  # in inches
    assert inside.x0 > -0.02
    assert inside.x1 < layout.width + 0.02
    panels = [axes.get_window_extent() for axes in figure.axes if axes.get_label() != "<colorbar>"]
    assert min(panel.width for panel in panels) > 100
    assert min(panel.height for panel in panels) > 50


def test_panels_are_beside_one_another_on_a_wide_page_only(pictures):
    def columns(layout):
        figure = pictures["prediction_error"].draw(layout)
        return figure.axes[0].get_subplotspec().get_gridspec().ncols

    assert (columns(plots.WIDE), columns(plots.NARROW)) == (2, 1)


def test_a_member_has_one_colour_in_all_figures(pictures):
    colours = member_colours(5)
    assert len(set(colours)) == 5
    for name in ("prediction_error", "one_step_error", "replay", "play"):
        figure = pictures[name].draw(plots.WIDE)
        legend = {handle.get_label(): handle.get_color() for handle in figure.legends[0].legend_handles}
        assert [legend[f"member {i}"] for i in range(5)] == colours
        for axes in figure.axes:
            lines = {line.get_label(): line.get_color() for line in axes.get_lines()}
            assert all(lines[f"member {i}"] == colour for i, colour in enumerate(colours) if f"member {i}" in lines)
    marks = [line.get_color() for line in figure_lines(pictures["one_step_error"], marker="o")]
    assert marks == colours


def figure_lines(picture, marker):
    (axes,) = picture.draw(plots.WIDE).axes
    return [line for line in axes.get_lines() if line.get_marker() == marker]


def test_marks_of_one_step_errors_are_where_the_errors_are():
    errors = {"meta-policy": np.array([[0.1, 0.2], [0.3, 0.4]]), "random actions": np.array([[0.5, np.nan], [0.7, np.nan]])}
    actors = {name: ActorStudy([], None, values) for name, values in errors.items()}
    picture = plots.draw_one_step_errors(actors, [Quantity("height", "m"), Quantity("obs[1]")])
    for marker, values, shift in (("o", errors["meta-policy"], -0.18), ("x", errors["random actions"], 0.18)):
        lines = figure_lines(picture, marker)
        np.testing.assert_array_equal([line.get_xdata() for line in lines], values)
        np.testing.assert_allclose(lines[0].get_ydata(), np.array([0, 1]) + shift)
    (axes,) = picture.draw(plots.WIDE).axes
    assert [label.get_text() for label in axes.get_yticklabels()] == ["height [0]", "obs[1]"]


def test_colours_for_any_number_of_members():
    for number in (1, 9, 10, 30):
        colours = member_colours(number)
        assert len(set(colours)) == number
        assert all(re.fullmatch("#[0-9a-f]{6}", colour) for colour in colours)
    assert member_colours(30)[:9] != member_colours(9)  # then they are spread round the circle


def trajectory(real_rewards, imagined_rewards):
    length = len(real_rewards)
    real = np.linspace(0, 1, 2 * (length + 1)).reshape(-1, 2)
    return Trajectory(real, np.stack([real, 10 * real]), np.array(real_rewards), np.array(imagined_rewards))


def test_imagined_rewards_are_shown_whole_however_large():
    shown = trajectory([1, 1, 1], [[1, 2, 3], [100, 200, 300]])
    picture = plots.draw_play(shown, [Quantity("height", "m"), Quantity("obs[1]")])
    *of_observations, rewards = picture.draw(plots.WIDE).axes
    assert rewards.get_title() == "rewards so far"
    low, high = rewards.get_ylim()
    assert low < 0
    assert high > 600
    curves = {line.get_label(): line.get_ydata() for line in rewards.get_lines()}
    np.testing.assert_array_equal(curves["real"], [0, 1, 2, 3])
    np.testing.assert_array_equal(curves["member 1"], [0, 100, 300, 600])
    # A member that is wrong by ten times leaves the others readable
    assert [axes.get_title() for axes in of_observations] == ["height", "obs[1]"]
    assert [axes.get_ylabel() for axes in of_observations] == ["m", "raw units"]
    assert of_observations[0].get_ylim()[1] < 3


@pytest.mark.parametrize(
    ("correlation", "sentence"),
    [
        (0.83, "the more the models disagree, the more the policy adapts, a strong tendency .* as MB-MPO intends"),
        (0.4, "the more the policy adapts, a clear tendency"),
        (-0.17, r"the less the policy adapts, a weak tendency \(rank correlation -0.17\), while MB-MPO intends the opposite"),
        (-0.001, r"is unrelated to .* \(rank correlation 0.00\)"),
        (float("nan"), "one of the two is the same everywhere"),
    ],
)
def test_correlations_are_said_in_words(correlation, sentence):
    assert re.search(sentence, plots.in_words(correlation))


def test_no_adaptation_no_figure_of_it():
    nothing = Plasticity(np.zeros((4, 3)), np.ones(4), np.zeros(4), np.zeros((4, 3)), False)
    picture = plots.draw_plasticity(nothing, [Quantity("x")] * 3)
    assert picture.draw is None
    assert "equal the meta-policy" in picture.caption


LENGTHS = "time/total_timesteps,rollout/ep_rew_mean_new,rollout/ep_len_mean,imagined/ep_rew_mean,imagined/ep_len_mean\n"


@pytest.mark.parametrize(
    ("imagined_length", "baseline", "reason"),
    [
        (200, "linear", ""),
        (197, "linear", ""),
        (25, "linear", "real episodes last 200 steps, imagined rollouts 25"),
        (25, "critic", "only parts of episodes"),
    ],
)
def test_only_returns_of_equal_length_are_compared(imagined_length, baseline, reason, pictures, tmp_path):
    run_log = log(f"{LENGTHS}20,-9,200,-7,{imagined_length}\n40,-8,200,-6,{imagined_length}\n", tmp_path)
    run_log.model.baseline = baseline
    episode = Episode(np.zeros((2, 1)), np.zeros(1), np.array([-5.0]))
    actors = dict.fromkeys(("meta-policy", "random actions"), ActorStudy([episode], None, None))
    study = ModelStudy(actors, None, None, None, [])
    picture = plots.draw_learning_curve(run_log, study)
    assert reason in picture.caption
    (axes,) = picture.draw(plots.WIDE).axes
    curves = {line.get_label(): list(line.get_ydata()) for line in axes.get_lines()}
    assert curves["real, while collecting"] == [-9, -8]
    assert curves.get("imagined, meta-policy") == (None if reason else [-7, -6])


# -- Names of observations ------------------------------------------------------------------------------------------------


def documented(env):
    """Return description and unit of each row of the table in an environment's docstring."""
    rows = []
    text = type(env.unwrapped).__doc__
    for line in text[text.index("Observation Space") :].splitlines():
        number, *cells = (cell.strip() for cell in line.strip().strip("|").split("|"))
        if number == str(len(rows)):
            unit = re.search(r"\((m|rad|m/s|rad/s|N)\)", f"{cells[-1]} {cells[0]}", re.IGNORECASE)
            rows.append((re.findall(r"[a-z0-9]+", " ".join(cells).lower().replace("_", " ")), unit[1] if unit else ""))
    return rows


@pytest.mark.parametrize("env_id", LAYOUTS)
def test_names_are_those_of_the_documentation(env_id):
    env = gym.make(env_id)
    names = quantities(env)
    assert len(names) == env.observation_space.shape[0]
    assert len({quantity.name for quantity in names}) == len(names)
    rows = documented(env)
    assert len(rows) == (len(names) if len(names) < 100 else {"Ant-v5": 27}.get(env_id, 45))
    for quantity, (words, unit) in zip(names, rows, strict=False):
        assert set(re.findall(r"[a-z0-9]+", quantity.name.lower())) <= set(words), quantity
        if unit and "orientation" not in quantity.name:  # a quaternion, although the documentation has rad
            is_misprint = env_id == "Ant-v5" and "angular velocity" in quantity.name  # rad there
            assert quantity.unit == ("rad/s" if is_misprint else unit), quantity


@pytest.mark.parametrize(
    ("env_id", "kwargs", "expected"),
    [
        ("HalfCheetah-v5", {"exclude_current_positions_from_observation": False}, {0: "front tip x", 1: "front tip z"}),
        ("Ant-v5", {"include_cfrc_ext_in_observation": False}, {0: "torso z", 26: "back right ankle angular velocity"}),
        ("Ant-v5", {}, {27: "torso cfrc_ext[0]", 104: "ankle_4 cfrc_ext[5]"}),
        ("Humanoid-v5", {"include_cinert_in_observation": False}, {45: "torso cvel[0]"}),
        ("HalfCheetah-v4", {}, {0: "obs[0]", 16: "obs[16]"}),
        (POINT, {}, {0: "x", 1: "y"}),
    ],
)
def test_names_follow_the_environments_arguments(env_id, kwargs, expected):
    names = quantities(gym.make(env_id, **kwargs))
    assert {i: names[i].name for i in expected} == expected


@pytest.mark.parametrize(
    "wrap",
    [
        gym.wrappers.TimeAwareObservation,  # another size
        lambda env: gym.wrappers.TransformObservation(env, lambda obs: obs[::-1], env.observation_space),
    ],
)
def test_observations_that_a_wrapper_changes_have_numbers_only(wrap):
    names = quantities(wrap(gym.make("Pendulum-v1")))
    assert [quantity.name for quantity in names] == [f"obs[{i}]" for i in range(len(names))]


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
    assert "Imagined returns are left out: no progress.csv" in plots.why_not_comparable(run_log)
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
    quick = ModelStudy({}, None, None, None, [])
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
