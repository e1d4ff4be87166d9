"""Figures of what ``study`` computes and ``run_log`` reads. Needs matplotlib: ``pip install "sb3-mbmpo[plots]"``.

Every figure comes with a caption that explains how to read it, and can be drawn in two layouts: for a wide page, and for a
narrow one, where its panels are below one another. matplotlib's global state is not used.
"""

import textwrap
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from sb3_mbmpo.report.colours import ADAPTED, EVALUATED, IMAGINED, RANDOM, REAL, member_colours, rank_colours
from sb3_mbmpo.report.observation_names import Quantity
from sb3_mbmpo.report.run_log import RunLog
from sb3_mbmpo.report.study import ActorStudy, ModelStudy, Plasticity, Trajectory, rank_correlation, root_mean_square

try:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D
    from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter
except ImportError as error:
    raise ImportError("Figures need matplotlib: pip install 'sb3-mbmpo[plots]'.") from error

# Maximum number of dimensions that are drawn separately: those with the largest errors
MAX_DIMENSIONS, MAX_ROWS = 8, 30
# Number of steps of a trajectory that are drawn: the curves of runners cannot be told apart if there are more
DRAWN_STEPS = 60
# Relative difference up to which two lengths of episodes count as the same
SAME_LENGTH = 0.02
STAGES = {
    "time/real_rollout": ("real rollout", "#009e73"),
    "time/dynamics_fit": ("dynamics fit", "#e69f00"),
    "time/imagination": ("imagination", "#0072b2"),
    "time/meta_update": ("meta-update", "#cc79a7"),
}
# Label, colour, style, (real steps, values)
Curve = tuple[str, str, str, tuple[np.ndarray, np.ndarray]]


class Layout(NamedTuple):
    """
    The space for a figure.

    :param width: in inches
    :param columns: maximum number of panels beside one another
    """

    width: float
    columns: int

    def wrap(self, text: str, points: float = 11) -> str:
        """Break a text into lines that fit in the width."""
        return textwrap.fill(text, round(self.width * 72 / points * 1.75))


WIDE, NARROW = Layout(width=11, columns=3), Layout(width=4.4, columns=1)
Drawing = Callable[[Layout], Figure]


class Picture(NamedTuple):
    """
    A figure with title and caption.

    :param name: name of the file, without suffix
    :param title: heading
    :param caption: how to read the figure
    :param draw: draws it in a layout; None if it cannot be drawn, and the caption says why
    """

    name: str
    title: str
    caption: str
    draw: Drawing | None


def missing(name: str, title: str, reason: str) -> Picture:
    """Return a picture without a figure, whose caption gives the reason."""
    return Picture(name, title, f"Left out: {reason}", None)


def model_pictures(study: ModelStudy) -> list[Picture]:
    """Return all figures about the model itself."""
    return [
        draw_horizon_errors(study.actors, study.quantities),
        draw_one_step_errors(study.actors, study.quantities),
        draw_replay(study.replayed, study.quantities),
        draw_play(study.played, study.quantities),
        draw_plasticity(study.plasticity, study.quantities),
    ]


# ---------------------------------------------------------------- the run


def draw_learning_curve(run: RunLog, study: ModelStudy) -> Picture:
    """Draw real returns against real steps, and imagined ones if they are sums of as many rewards."""
    curves = [
        ("real, while collecting", REAL, "o-", run.column("rollout/ep_rew_mean_new")),
        ("real, evaluation", EVALUATED, "s-", run.evaluation()),
    ]
    is_comparable = not why_not_comparable(run)
    if is_comparable:
        curves += [
            ("imagined, meta-policy", IMAGINED, "o-", run.column("imagined/ep_rew_mean")),
            ("imagined, adapted policies", ADAPTED, "o--", run.column("imagined/ep_rew_mean_adapted")),
        ]
    name, title = "learning_curve", "Learning curve"
    if not any(len(steps) > 0 for _, _, _, (steps, _) in curves):
        return missing(name, title, _no_log("returns"))
    returns, chance = study.returns(), study.returns("random actions").mean()

    def draw(layout: Layout) -> Figure:
        figure, (axes,) = _figure(layout, "Real and imagined return" if is_comparable else "Real return", 1, 4.2)
        _plot(axes, curves)
        label = f"real, meta-policy, {len(returns)} episodes: {returns.mean():.4g} ± {returns.std():.3g}"
        steps = run.model.num_timesteps
        axes.errorbar(steps, returns.mean(), returns.std(), fmt="D", color=EVALUATED, label=label, capsize=4)
        axes.axhline(chance, color=RANDOM, linestyle=":", label=f"random actions: {chance:.4g}")
        axes.set_xlim(left=0)
        _label(axes, "real steps", "return (sum of rewards, undiscounted)")
        _legend_below(figure, layout, axes)
        return figure

    caption = (
        "The policy's real returns. Those while collecting are of the adapted policies, which explore; the diamond is the "
        "final meta-policy without noise, mean and standard deviation."
    )
    if is_comparable:
        caption += (
            " For comparison, its returns in the learned models: imagined returns that rise far above the real ones mean that "
            "the policy exploits model errors. Compare each imagined point with the next real one, which comes after it."
        )
        if run.model.imagined_start == "buffer":
            caption += " Here imagined rollouts start anywhere in the data, real episodes at their beginning."
    else:
        caption += why_not_comparable(run)
    return Picture(name, title, caption, draw)


def why_not_comparable(run: RunLog) -> str:
    """Return a sentence that says why imagined returns do not belong beside real ones; "" if they do."""
    if not run.has_imagined_returns():
        return f" Imagined returns are left out: {_no_log('them')}"
    if run.model.baseline == "critic":
        return " Imagined rollouts are only parts of episodes: the next figure compares them step by step."
    real, imagined = (run.column(key)[1][-1:] for key in ("rollout/ep_len_mean", "imagined/ep_len_mean"))
    if len(real) > 0 and abs(real[0] - imagined[0]) > SAME_LENGTH * real[0]:
        return (
            f" Imagined returns are left out, because they are sums over another length: in the end, real episodes last "
            f"{real[0]:.0f} steps, imagined rollouts {imagined[0]:.0f}. The next figure compares them step by step."
        )
    return ""


def draw_expectations(run: RunLog) -> Picture:
    """Draw the rewards per step and discounted returns that models and critic predict beside the real ones."""
    name, title = "expectations", "Promised and kept"
    panels = {
        "reward of a step (units of the reward)": [
            ("real, while collecting", REAL, "o-", run.column("rollout/rew_mean_step")),
            ("imagined, meta-policy", IMAGINED, "o-", run.column("imagined/rew_mean_step")),
        ],
        "discounted return (units of the reward)": [
            ("real episodes, while collecting", REAL, "o-", run.column("rollout/ep_discounted_rew_mean")),
            ("critic's value of first observations", IMAGINED, "o-", run.column("imagined/initial_value")),
        ],
    }
    panels = {label: curves for label, curves in panels.items() if all(len(steps) > 0 for *_, (steps, _) in curves)}
    if not panels:
        return missing(name, title, _no_log("rewards of real and imagined steps"))

    def draw(layout: Layout) -> Figure:
        figure, all_axes = _figure(layout, "What is imagined beside what is real", len(panels), 3.8)
        for axes, (label, curves) in zip(all_axes, panels.items(), strict=True):
            _plot(axes, curves)
            axes.set_xlim(left=0)
            _label(axes, "real steps", label)
            axes.legend(fontsize=9, loc="lower left", bbox_to_anchor=(0, 1), borderaxespad=0.2, frameon=False)
        return figure

    caption = (
        "Imagined numbers far above the real ones that follow mean that the policy exploits model errors, or that the critic "
        "is too optimistic. Imagined rollouts start anywhere in the data, including the states of early policies, so at first "
        "their steps earn less than real ones."
    )
    if "discounted return (units of the reward)" in panels:
        caption += (
            " Both discounted returns count what comes behind a time limit: the real ones add the critic's value of the last "
            "observation."
        )
    return Picture(name, title, caption, draw)


def _plot(axes: Axes, curves: Sequence[Curve]) -> None:
    for label, colour, style, (steps, values) in curves:
        if len(steps) > 0:
            axes.plot(steps, values, style, color=colour, label=label, markersize=4, linewidth=1.2)


def _no_log(what: str) -> str:
    """Return the reason why ``what`` is missing."""
    return (
        f"no progress.csv with the model has {what}. `python -m sb3_mbmpo train` and `rl_zoo3 train` write one, and so does "
        "SB3's logger with the format csv."
    )


def draw_times(run: RunLog) -> Picture:
    """Draw the seconds of each stage as stacked bars, one per iteration."""
    name, title = "time", "Time by stage"
    seconds = {key: run.column(key)[1] for key in STAGES}
    n_iterations = len(seconds["time/real_rollout"])
    if n_iterations == 0 or any(len(values) != n_iterations for values in seconds.values()):
        return missing(name, title, _no_log("the seconds of the stages"))

    def draw(layout: Layout) -> Figure:
        figure, (axes,) = _figure(layout, "Wall time of the stages of each iteration", 1, 3.8)
        bottom = np.zeros(n_iterations)
        for key, (stage, colour) in STAGES.items():
            label = f"{stage}: {seconds[key].sum():.0f} s in all"
            axes.bar(np.arange(1, n_iterations + 1), seconds[key], bottom=bottom, color=colour, label=label)
            bottom = bottom + seconds[key]
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
        _label(axes, "iteration", "wall time (seconds)")
        _legend_below(figure, layout, axes)
        return figure

    caption = "Save time where the bars are tallest: fewer epochs, or fewer, shorter imagined rollouts and meta-steps."
    return Picture(name, title, caption, draw)


# ---------------------------------------------------------------- errors of predictions


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
        figure, panels = _figure(layout, title, 2 * len(actors), 3.0)
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
                _label(axes, "steps ahead", "error (standard deviations of\nthe observations in the data)")
        _legend_below(figure, layout, *panels[:2])
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
        figure, (axes,) = _figure(layout, title, 1, 1.2 + 0.3 * len(drawn))
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
        _label(axes, layout.wrap("error (standard deviations of the changes in one step)", points=17), "")
        axes.grid(visible=False, axis="y")
        handles = [
            *(Line2D([], [], color=RANDOM, marker=marker, linestyle="", label=actor) for actor, marker in markers.items()),
            Line2D([], [], color=REAL, marker="|", linestyle="", markersize=11, label="all members"),
            Line2D([], [], color=REAL, linestyle=":", label="forecasting the mean change"),
            *_member_handles(len(study.one_step)),
        ]
        _legend_below(figure, layout, handles=handles)
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
    figure, panels = _figure(layout._replace(columns=min(columns, layout.columns)), title, len(series), 2.4)
    colours = member_colours(len(trajectory.imagined))
    for panel, (label, unit, one_real, one_imagined) in zip(panels, series, strict=True):
        for i, (values, colour) in enumerate(zip(one_imagined, colours, strict=True)):
            panel.plot(values, color=colour, linewidth=1.1, label=f"member {i}")
        panel.plot(one_real, "--", color=REAL, linewidth=1.4, label="real")
        if label != "rewards so far":  # whose imagined curves are what the panel is for
            panel.set_ylim(*_limits(one_real, one_imagined))
        panel.set_title(label, fontsize=10)
        panel.xaxis.set_major_locator(MaxNLocator(integer=True))
        _label(panel, "steps", unit)
    _legend_below(figure, layout, panels[0])
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
    figure, panels = _figure(layout._replace(columns=min(layout.columns, 2)), title, 2, 5.2)
    size = round(len(plasticity.obs) ** 0.5)
    x, y = (plasticity.obs[:, i].reshape(size, size) for i in range(2))
    for axes, values, label in zip(
        panels, (plasticity.disagreement, plasticity.kl), (DISAGREEMENT_LABEL, KL_LABEL), strict=True
    ):
        image = axes.pcolormesh(x, y, values.reshape(size, size), shading="nearest")
        figure.colorbar(image, ax=axes, label=label, format="%.2g", location="bottom")
        axes.plot(*plasticity.visited.T, ".", color="white", markersize=1.5, label="real states of the meta-policy")
        labels = [f"{quantity.name} ({quantity.unit or 'raw units'})" for quantity in quantities]
        _label(axes, *labels)
        axes.grid(visible=False)
        axes.set(xlim=(x.min(), x.max()), ylim=(y.min(), y.max()), aspect="equal")
    _legend_below(figure, layout, panels[0], facecolor="grey", labelcolor="white", markerscale=4)
    return figure


def _draw_scatter(layout: Layout, plasticity: Plasticity) -> Figure:
    title = "Disagreement of the models and plasticity of the policy"
    figure, (axes,) = _figure(layout, title, 1, 4.2)
    axes.loglog(plasticity.disagreement, plasticity.kl, ".", color=IMAGINED, markersize=4, alpha=0.6, label="a real state")
    for axis in (axes.xaxis, axes.yaxis):  # the usual labels overlap where the values span few decades
        axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.set_major_formatter("{x:.0e}")
        axis.set_minor_formatter(NullFormatter())
    _label(axes, DISAGREEMENT_LABEL, KL_LABEL)
    _legend_below(figure, layout, axes)
    return figure


# ---------------------------------------------------------------- common


def _worst(errors: np.ndarray, number: int) -> np.ndarray:
    """Return the dimensions with the largest errors (O,), the worst first."""
    return np.argsort(-errors, kind="stable")[:number]


def _figure(layout: Layout, title: str, n_panels: int, height: float) -> tuple[Figure, list[Axes]]:
    """
    Make a figure with panels.

    :param layout: the space for it
    :param title: above all panels
    :param n_panels: number of panels
    :param height: of a panel, in inches
    :return: the figure and its panels, row by row
    """
    columns = min(layout.columns, n_panels)
    rows = -(-n_panels // columns)
    figure = Figure(figsize=(layout.width, height * rows + 0.5), layout="constrained")
    figure.suptitle(layout.wrap(title), fontsize=11)
    panels: list[Axes] = list(figure.subplots(rows, columns, squeeze=False).ravel())
    for panel in panels[n_panels:]:
        panel.remove()
    return figure, panels[:n_panels]


def _label(axes: Axes, x: str, y: str) -> None:
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.grid(alpha=0.3)


def _member_handles(n_members: int) -> list[Line2D]:
    return [
        Line2D([], [], color=colour, marker="s", linestyle="", label=f"member {i}")
        for i, colour in enumerate(member_colours(n_members))
    ]


def _legend_below(figure: Figure, layout: Layout, *panels: Axes, handles: Sequence[Any] | None = None, **options: Any) -> None:
    """Draw one legend for all panels, below them, where it covers no data, in as many columns as fit."""
    if handles is None:
        handles = [handle for axes in panels for handle in axes.get_legend_handles_labels()[0]]
    longest = max(len(str(handle.get_label())) for handle in handles)
    columns = min(len(handles), max(1, int(layout.width * 72 / (9 * (0.58 * longest + 4.5)))))
    figure.set_figheight(figure.get_figheight() + 0.19 * -(-len(handles) // columns))
    figure.legend(handles=handles, loc="outside lower center", ncols=columns, fontsize=9, **options)
