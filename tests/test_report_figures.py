"""The figures of the report: labels, legends, colours, and what they show."""

import re

import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from tiny_report import FIGURES, log

from sb3_mbmpo.report import loading, model_plots, run_plots
from sb3_mbmpo.report.colours import member_colours
from sb3_mbmpo.report.episodes import Episode
from sb3_mbmpo.report.observation_names import Quantity
from sb3_mbmpo.report.panels import NARROW_PAGE, WIDE_PAGE
from sb3_mbmpo.report.run_log import find_run, read_run
from sb3_mbmpo.report.study import ActorStudy, ModelStudy, Plasticity, Trajectory, study_model


@pytest.fixture(scope="module")
def pictures(point_run):
    """Return all pictures of a run by name."""
    model, make_env = loading.load_run(find_run(point_run), None)
    study = study_model(model, make_env(), n_episodes=1)
    log = read_run(find_run(point_run), model)
    found = [run_plots.draw_learning_curve(log, study), run_plots.draw_expectations(log)]
    found += [*model_plots.model_pictures(study), run_plots.draw_times(log)]
    return {picture.name: picture for picture in found}


@pytest.mark.parametrize("layout", [WIDE_PAGE, NARROW_PAGE], ids=["wide", "narrow"])
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

    assert (columns(WIDE_PAGE), columns(NARROW_PAGE)) == (2, 1)


def test_a_member_has_one_colour_in_all_figures(pictures):
    colours = member_colours(5)
    assert len(set(colours)) == 5
    for name in ("prediction_error", "one_step_error", "replay", "play"):
        figure = pictures[name].draw(WIDE_PAGE)
        legend = {handle.get_label(): handle.get_color() for handle in figure.legends[0].legend_handles}
        assert [legend[f"member {i}"] for i in range(5)] == colours
        for axes in figure.axes:
            lines = {line.get_label(): line.get_color() for line in axes.get_lines()}
            assert all(lines[f"member {i}"] == colour for i, colour in enumerate(colours) if f"member {i}" in lines)
    marks = [line.get_color() for line in figure_lines(pictures["one_step_error"], marker="o")]
    assert marks == colours


def figure_lines(picture, marker):
    (axes,) = picture.draw(WIDE_PAGE).axes
    return [line for line in axes.get_lines() if line.get_marker() == marker]


def test_marks_of_one_step_errors_are_where_the_errors_are():
    errors = {"meta-policy": np.array([[0.1, 0.2], [0.3, 0.4]]), "random actions": np.array([[0.5, np.nan], [0.7, np.nan]])}
    actors = {name: ActorStudy([], None, values) for name, values in errors.items()}
    picture = model_plots.draw_one_step_errors(actors, [Quantity("height", "m"), Quantity("obs[1]")])
    for marker, values, shift in (("o", errors["meta-policy"], -0.18), ("x", errors["random actions"], 0.18)):
        lines = figure_lines(picture, marker)
        np.testing.assert_array_equal([line.get_xdata() for line in lines], values)
        np.testing.assert_allclose(lines[0].get_ydata(), np.array([0, 1]) + shift)
    (axes,) = picture.draw(WIDE_PAGE).axes
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
    picture = model_plots.draw_play(shown, [Quantity("height", "m"), Quantity("obs[1]")])
    *of_observations, rewards = picture.draw(WIDE_PAGE).axes
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
    assert re.search(sentence, model_plots.in_words(correlation))


def test_no_adaptation_no_figure_of_it():
    nothing = Plasticity(np.zeros((4, 3)), np.ones(4), np.zeros(4), np.zeros((4, 3)), False)
    picture = model_plots.draw_plasticity(nothing, [Quantity("x")] * 3)
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
    picture = run_plots.draw_learning_curve(run_log, study)
    assert reason in picture.caption
    (axes,) = picture.draw(WIDE_PAGE).axes
    curves = {line.get_label(): list(line.get_ydata()) for line in axes.get_lines()}
    assert curves["real, while collecting"] == [-9, -8]
    assert curves.get("imagined, meta-policy") == (None if reason else [-7, -6])
