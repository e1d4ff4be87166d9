"""The report on a study: its tables, its plots, and the same plots in a narrow column."""

import numpy as np
import pytest
from matplotlib import pyplot as plt
from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.trial import TrialState, create_trial

from sb3_mbmpo.zoo.search_space import SPACE, suggest
from tuning import plots, report

# tuning ignores it at import, which pytest undoes before each test
pytestmark = pytest.mark.filterwarnings("ignore::optuna.exceptions.ExperimentalWarning")


def test_report_on_a_study_without_a_complete_trial(study, tmp_path):
    study.add_trial(create_trial(state=TrialState.PRUNED, user_attrs={"error": "not finite"}))
    page = report.write_report(study, tmp_path).read_text()
    assert "No trial is complete" in page
    assert "<td>not finite</td><td>1</td>" in page


def add_trials(study, values):
    for value in values:
        trial = study.ask()
        suggest(trial)
        for step in range(6):
            trial.report(value, step)
        study.tell(trial, value)


@pytest.mark.parametrize("n_trials", [1, 19, 20])
def test_importances_are_shown_from_20_trials_on(n_trials, study, tmp_path):
    study.add_trial(create_trial(state=TrialState.PRUNED))  # does not count
    add_trials(study, [500.0 + (7 * i) % 20 for i in range(n_trials)])
    page = report.write_report(study, tmp_path).read_text()
    is_shown = n_trials >= 20
    assert (tmp_path / "importances.png").exists() == is_shown
    assert page.count("Plotly.newPlot(") == 3 + is_shown
    assert (f"Left out: {n_trials} complete trials are too few to tell" in page) == (not is_shown)
    n_all = len(SPACE)
    assert f"Parallel coordinates: the {'most important' if is_shown else 'first'} 8 of {n_all} hyperparameters" in page


def test_equal_values_say_nothing_of_importances(study, tmp_path):
    add_trials(study, [500.0] * 20)
    page = report.write_report(study, tmp_path).read_text()
    assert "Left out: all trials have the same value" in page
    assert page.count("Plotly.newPlot(") == 3


def test_trials_are_counted_in_whole_round_numbers():
    distances = {1: 1, 10: 1, 11: 2, 22: 5, 50: 5, 51: 10, 101: 20, 2000: 200}
    assert {n_trials: plots.trial_ticks(n_trials) for n_trials in distances} == distances


def test_the_axis_of_trials_has_whole_numbers(study, tmp_path, monkeypatch):
    add_trials(study, [1.0, 2.0])
    drawn = {}
    monkeypatch.setattr(plots, "section", lambda name, _, *figures: drawn.update({name: figures}))
    plots.draw_history(study, "last return", tmp_path)
    figure, interactive, _ = drawn["history"]
    assert (interactive.layout.xaxis.dtick, interactive.layout.xaxis.tickformat) == (1, "d")
    ticks = figure.axes[0].get_xticks()
    assert (ticks == ticks.round()).all()
    plt.close(figure)


def test_a_place_on_an_axis_is_the_value():
    log, linear = FloatDistribution(1e-4, 1.0, log=True), IntDistribution(0, 100)
    places, ticks = plots.places_on_axis([(1e-3, log), (1e-2, log), (1e-1, log)])
    np.testing.assert_allclose(places, [0, 0.5, 1])
    assert ticks == [(0.0, "0.001"), (1.0, "0.1")]
    places, ticks = plots.places_on_axis([(10, linear), (None, None), (20, linear), (14, linear)])
    np.testing.assert_allclose(places, [0, np.nan, 1, 0.4])
    assert ticks == [(0.0, "10"), (1.0, "20")]
    places, ticks = plots.places_on_axis([(5, linear), (5, linear)])
    np.testing.assert_allclose(places, [0, 0])
    assert ticks == [(0.0, "5")]
    names = CategoricalDistribution(["relu", "swish", "tanh"])
    places, ticks = plots.places_on_axis([("tanh", names), ("relu", names), ("tanh", names)])
    np.testing.assert_allclose(places, [1, 0, 1])
    assert ticks == [(0.0, "relu"), (1.0, "tanh")]


def test_coordinates_run_down_a_narrow_page(study):
    add_trials(study, [3.0, 1.0, 2.0])
    names = ["gae_lambda", "inner_lr"]
    figure = plots.coordinates_down(plots.with_short_names(study), names, "last return")
    (axes,) = figure.axes
    assert figure.get_figwidth() < 5
    texts = [text.get_text() for text in axes.texts]
    assert [text for text in texts if text in ("last return", *names)] == ["last return", *names]
    lines = [line for line in axes.get_lines() if len(line.get_xdata()) == 3]
    assert [line.get_xdata()[0] for line in lines] == [0, 0.5, 1]  # the worst first, the best on top
    assert [line.get_linewidth() > 2 for line in lines] == [False, False, True]
    plt.close(figure)


def test_names_are_whole_where_the_plot_would_cut_them():
    names = ["dynamics.max_gradient_steps", "inner_lr"]
    labels = ["last return", "dynamics.max_grad...", "inner_lr"]
    assert [plots.whole_name(label, names) for label in labels] == ["last return", *names]
