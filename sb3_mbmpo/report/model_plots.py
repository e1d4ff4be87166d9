"""Figures of what ``study`` computes: errors of predictions, imagined episodes, disagreement and adaptation.

Every figure comes with a caption that explains how to read it.
"""

from collections.abc import Mapping, Sequence

import numpy as np

from sb3_mbmpo.report.colours import IMAGINED, RANDOM, REAL, member_colours, rank_colours
from sb3_mbmpo.report.matplotlib_parts import Figure, Line2D, LogLocator, MaxNLocator, NullFormatter
from sb3_mbmpo.report.observation_names import Quantity
from sb3_mbmpo.report.panels import (
    Drawing,
    Layout,
    Picture,
    label_axes,
    legend_below,
    member_handles,
    missing,
    new_figure,
)
from sb3_mbmpo.report.study import ActorStudy, ModelStudy, Plasticity, Trajectory, rank_correlation, root_mean_square

# Maximum number of dimensions that are drawn separately: those with the largest errors
MAX_DIMENSIONS, MAX_ROWS = 8, 30
# Number of steps of a trajectory that are drawn: the curves of runners cannot be told apart if there are more
DRAWN_STEPS = 60


def model_pictures(study: ModelStudy) -> list[Picture]:
    """Return all figures about the model itself."""
    return [
        draw_horizon_errors(study.actors, study.quantities),
        draw_one_step_errors(study.actors, study.quantities),
        draw_replay(study.replayed, study.quantities),
        draw_play(study.played, study.quantities),
        draw_plasticity(study.plasticity, study.quantities),
    ]


# ---------------------------------------------------------------- errors of predictions


def _worst(errors: np.ndarray, number: int) -> np.ndarray:
    """Return the dimensions with the largest errors (O,), the worst first."""
    return np.argsort(-errors, kind="stable")[:number]


def draw_horizon_errors(actors: Mapping[str, ActorStudy], quantities: Sequence[Quantity]) -> Picture:
    """Draw the error against the steps ahead, by member and by dimension, with one row per actor."""
    by_dimension = {actor: root_mean_square(study.horizon_errors.members, axis=0) for actor, study in actors.items()}
    # The same dimensions in the same colours for all actors
    worst = _worst(np.max([errors[-1] for errors in by_dimension.values()], axis=0), MAX_DIMENSIONS)
    n_dimensions = len(quantities)
    few = "each dimension" if len(worst) == n_dimensions else f"the {len(worst)} worst of {n_dimensions} dimensions"

    def draw(layout: Layout) -> Figure:
        layout = layout._replace(columns=min(layout.columns, 2))
        title = "Error of predictions against the number of steps ahead, on fresh real episodes"
        figure, panels = new_figure(layout, title, 2 * len(actors), 3.0)
        for (of_members, of_dimensions), (actor, study) in zip(
            zip(panels[::2], panels[1::2], strict=True), actors.items(), strict=True
        ):
            members, unchanged = study.horizon_errors
            ahead = np.arange(1, members.shape[1] + 1)
            for i, (errors, colour) in enumerate(
                zip(root_mean_square(members, axis=2), member_colours(len(members)), strict=True)
            ):
                of_members.plot(ahead, errors, color=colour, label=f"member {i}", linewidth=1.2)
            of_members.plot(ahead, root_mean_square(unchanged, axis=1), ":", color=REAL, label="“nothing changes”")
            for dimension, colour in zip(worst, rank_colours(len(worst)), strict=True):
                label = quantities[dimension].name
                of_dimensions.plot(ahead, by_dimension[actor][:, dimension], "--", color=colour, label=label, linewidth=1.4)
            for axes, what in ((of_members, "each member, over all dimensions"), (of_dimensions, f"{few}, over all members")):
                axes.set_title(layout.wrap(f"{actor}: {what}", points=7 * layout.columns + 6), fontsize=10)
                axes.set_ylim(bottom=0)
                axes.xaxis.set_major_locator(MaxNLocator(integer=True))
                label_axes(axes, "steps ahead", "error (standard deviations of\nthe observations in the data)")
        legend_below(figure, layout, *panels[:2])
        return figure

    caption = (
        "Root mean square error of each member's prediction k steps ahead, from the real actions and its own previous "
        "predictions. The episodes are fresh ones, not training data. Unit: standard deviation of the observations in "
        "the training data. Above the dotted line, the member predicts worse than someone who assumes that nothing "
        "changes. Near an unstable equilibrium this happens early: the real actions do not react to the members' "
        "predictions, unlike those of a policy that acts in the members."
    )
    return Picture("prediction_error", "Prediction error against horizon", caption, draw)


def draw_one_step_errors(actors: Mapping[str, ActorStudy], quantities: Sequence[Quantity]) -> Picture:
    """Draw the one-step errors of every dimension, with one mark per member, in the member's colour."""
    largest = np.max([np.nan_to_num(study.one_step).max(0) for study in actors.values()], axis=0)
    drawn = np.sort(_worst(largest, MAX_ROWS))
    markers = dict(zip(actors, "ox", strict=True))

    def draw(layout: Layout) -> Figure:
        layout = layout._replace(columns=1)
        title = "Error of one-step predictions, on fresh real episodes"
        figure, (axes,) = new_figure(layout, title, 1, 1.2 + 0.3 * len(drawn))
        rows = np.arange(len(drawn))
        for (actor, study), shift in zip(actors.items(), (-0.18, 0.18), strict=True):
            for errors, colour in zip(study.one_step[:, drawn], member_colours(len(study.one_step)), strict=True):
                axes.plot(errors, rows + shift, markers[actor], color=colour, markersize=4.5)
            axes.plot(root_mean_square(study.one_step[:, drawn], axis=0), rows + shift, "|", color=REAL, markersize=11)
        axes.axvline(1, color=REAL, linestyle=":")
        axes.set_xscale("log")
        axes.set_yticks(rows, [_indexed(quantities, i) for i in drawn], fontsize=9)
        axes.set_ylim(len(drawn) - 0.5, -0.5)
        for boundary in rows[1:] - 0.5:
            axes.axhline(boundary, color="gainsboro", linewidth=0.8, zorder=0)
        label_axes(axes, layout.wrap("error (standard deviations of the changes in one step)", points=17), "")
        axes.grid(visible=False, axis="y")
        handles = [
            *(Line2D([], [], color=RANDOM, marker=marker, linestyle="", label=actor) for actor, marker in markers.items()),
            Line2D([], [], color=REAL, marker="|", linestyle="", markersize=11, label="all members"),
            Line2D([], [], color=REAL, linestyle=":", label="forecasting the mean change"),
            *member_handles(len(study.one_step)),
        ]
        legend_below(figure, layout, handles=handles)
        return figure

    n_all = len(quantities)
    some = "" if len(drawn) == n_all else f" Of {n_all} dimensions, the {len(drawn)} with the largest errors."
    caption = (
        "Root mean square error of the next observation, on fresh real episodes of the meta-policy and of random actions. "
        "Unit: standard deviation of the changes from step to step in the training data; at 1 a member has learned nothing "
        f"about the dimension. Errors that are much larger for one of the two show where data is missing.{some}"
    )
    return Picture("one_step_error", "One-step error", caption, draw)


def _indexed(quantities: Sequence[Quantity], dimension: int) -> str:
    """Return the name of a dimension with its index."""
    name = quantities[dimension].name
    return name if name == f"obs[{dimension}]" else f"{name} [{dimension}]"


def draw_replay(trajectory: Trajectory, quantities: Sequence[Quantity]) -> Picture:
    """Draw an episode and the members' predictions of it, with one panel per dimension, and the rewards."""
    caption = (
        "The members (colours) predict a fresh real episode (black) from its first observation and its actions only. Where "
        "they deviate from it together, all have learned the same error, or the equilibrium is unstable, so that the smallest "
        "error grows; where they deviate from one another, they lack data."
    )
    title = "A real episode of the meta-policy, and each member's from its first observation and its actions"
    return Picture(
        "replay",
        "Imagined beside real: the same actions",
        caption + _panels_caption(trajectory),
        lambda layout: _panels(layout, trajectory, quantities, title),
    )


def draw_play(trajectory: Trajectory, quantities: Sequence[Quantity]) -> Picture:
    """Draw an episode and those of the meta-policy acting in the members, with one panel per dimension, and the rewards."""
    caption = (
        "From the same first observation, the meta-policy acts in each member (colours) on imagined observations; the same "
        "fresh real episode is black. Rewards that occur only in the members are exploitation of their errors."
    )
    title = "A real episode of the meta-policy, and the meta-policy acting in each member"
    return Picture(
        "play",
        "Imagined beside real: the same policy",
        caption + _panels_caption(trajectory),
        lambda layout: _panels(layout, trajectory, quantities, title),
    )


def _drawn_dimensions(trajectory: Trajectory) -> np.ndarray:
    """Return the dimensions that the members predict worst, in ascending order."""
    spread = np.maximum(trajectory.real.std(0), 1e-8)
    errors = root_mean_square((trajectory.imagined - trajectory.real) / spread, axis=(0, 1))
    return np.sort(_worst(errors, MAX_DIMENSIONS))


def _panels_caption(trajectory: Trajectory) -> str:
    n_all, n_drawn = trajectory.real.shape[1], len(_drawn_dimensions(trajectory))
    some = "" if n_drawn == n_all else f" Of {n_all} dimensions, the {n_drawn} that differ most."
    n_steps = len(trajectory.real_rewards)
    first = f"its first {DRAWN_STEPS} steps, " if n_steps > DRAWN_STEPS else ""
    return (
        f"{some} Observations: {first}in the environment's own units; a member that deviates far leaves its panel. The last "
        f"panel adds up the rewards of {n_steps} steps, whole."
    )


def _panels(layout: Layout, trajectory: Trajectory, quantities: Sequence[Quantity], title: str) -> Figure:
    drawn = DRAWN_STEPS + 1  # observations
    series = [
        (quantities[i].name, quantities[i].unit or "raw units", trajectory.real[:drawn, i], trajectory.imagined[:, :drawn, i])
        for i in _drawn_dimensions(trajectory)
    ]
    real, imagined = (
        np.insert(rewards.cumsum(-1), 0, 0, axis=-1) for rewards in (trajectory.real_rewards, trajectory.imagined_rewards)
    )
    series.append(("rewards so far", "return", real, imagined))
    columns = 2 if len(series) <= 4 else layout.columns
    figure, panels = new_figure(layout._replace(columns=min(columns, layout.columns)), title, len(series), 2.4)
    colours = member_colours(len(trajectory.imagined))
    for panel, (label, unit, one_real, one_imagined) in zip(panels, series, strict=True):
        for i, (values, colour) in enumerate(zip(one_imagined, colours, strict=True)):
            panel.plot(values, color=colour, linewidth=1.1, label=f"member {i}")
        panel.plot(one_real, "--", color=REAL, linewidth=1.4, label="real")
        if label != "rewards so far":  # whose imagined curves are what the panel is for
            panel.set_ylim(*_limits(one_real, one_imagined))
        panel.set_title(label, fontsize=10)
        panel.xaxis.set_major_locator(MaxNLocator(integer=True))
        label_axes(panel, "steps", unit)
    legend_below(figure, layout, panels[0])
    return figure


def _limits(real: np.ndarray, imagined: np.ndarray) -> tuple[float, float]:
    """Return the limits of a panel's axis: a member that deviates far would make all other curves flat."""
    margin = 1.5 * max(real.max() - real.min(), 1e-3)
    low = max(min(real.min(), imagined.min()), real.min() - margin)
    high = min(max(real.max(), imagined.max()), real.max() + margin)
    pad = 0.05 * (high - low) + 1e-6
    return low - pad, high + pad


# ---------------------------------------------------------------- disagreement and adaptation


def draw_plasticity(plasticity: Plasticity, quantities: Sequence[Quantity]) -> Picture:
    """Draw maps of disagreement and KL over the plane, or a scatter plot for other observations."""
    name, title = "plasticity", "Disagreement and adaptation"
    if not plasticity.kl.any():
        return missing(name, title, "the adapted policies equal the meta-policy, as before the first iteration.")
    what = "points of the plane" if plasticity.is_map else "states of fresh real episodes of the meta-policy"
    caption = (
        f"Disagreement: standard deviation of the members' predictions for the meta-policy's action, in standard deviations "
        f"of the changes in one step. KL: how much the adaptation to a model changes the policy there, mean over the tasks. "
        f"Over {what}: {in_words(rank_correlation(plasticity.disagreement, plasticity.kl))}"
    )
    draw: Drawing = lambda layout: (  # noqa: E731
        _draw_maps(layout, plasticity, quantities) if plasticity.is_map else _draw_scatter(layout, plasticity)
    )
    return Picture(name, title, caption, draw)


def in_words(correlation: float) -> str:
    """
    Say what a rank correlation of disagreement and adaptation means.

    :param correlation: -1 to 1, or NaN
    :return: a sentence
    """
    if np.isnan(correlation):
        return "one of the two is the same everywhere, so they cannot be related."
    number = f"rank correlation {round(correlation, 2) + 0:.2f}"  # adding 0 turns -0 into 0
    size = abs(correlation)
    if size < 0.1:
        return (
            f"how much the policy adapts is unrelated to how much the models disagree ({number}). MB-MPO intends that it "
            "adapts most where they disagree."
        )
    strength = "weak" if size < 0.3 else "clear" if size < 0.6 else "strong"
    more, intended = ("more", "as MB-MPO intends") if correlation > 0 else ("less", "while MB-MPO intends the opposite")
    return f"the more the models disagree, the {more} the policy adapts, a {strength} tendency ({number}), {intended}."


KL_LABEL = "KL of meta-policy to adapted policies (nats)"
DISAGREEMENT_LABEL = "disagreement (standard deviations of the changes)"


def _draw_maps(layout: Layout, plasticity: Plasticity, quantities: Sequence[Quantity]) -> Figure:
    title = "Disagreement of the models and plasticity of the policy over the plane"
    figure, panels = new_figure(layout._replace(columns=min(layout.columns, 2)), title, 2, 5.2)
    size = round(len(plasticity.obs) ** 0.5)
    x, y = (plasticity.obs[:, i].reshape(size, size) for i in range(2))
    for axes, values, label in zip(
        panels, (plasticity.disagreement, plasticity.kl), (DISAGREEMENT_LABEL, KL_LABEL), strict=True
    ):
        image = axes.pcolormesh(x, y, values.reshape(size, size), shading="nearest")
        figure.colorbar(image, ax=axes, label=label, format="%.2g", location="bottom")
        axes.plot(*plasticity.visited.T, ".", color="white", markersize=1.5, label="real states of the meta-policy")
        labels = [f"{quantity.name} ({quantity.unit or 'raw units'})" for quantity in quantities]
        label_axes(axes, *labels)
        axes.grid(visible=False)
        axes.set(xlim=(x.min(), x.max()), ylim=(y.min(), y.max()), aspect="equal")
    legend_below(figure, layout, panels[0], facecolor="grey", labelcolor="white", markerscale=4)
    return figure


def _draw_scatter(layout: Layout, plasticity: Plasticity) -> Figure:
    title = "Disagreement of the models and plasticity of the policy"
    figure, (axes,) = new_figure(layout, title, 1, 4.2)
    axes.loglog(plasticity.disagreement, plasticity.kl, ".", color=IMAGINED, markersize=4, alpha=0.6, label="a real state")
    for axis in (axes.xaxis, axes.yaxis):  # the usual labels overlap where the values span few decades
        axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.set_major_formatter("{x:.0e}")
        axis.set_minor_formatter(NullFormatter())
    label_axes(axes, DISAGREEMENT_LABEL, KL_LABEL)
    legend_below(figure, layout, axes)
    return figure
