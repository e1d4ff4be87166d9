"""Figures of what ``study`` computes and ``run_log`` reads. Needs matplotlib: ``pip install "sb3-mbmpo[plots]"``.

Every figure comes with a caption that explains how to read it. matplotlib's global state is not used.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from sb3_mbmpo.report.run_log import RunLog
from sb3_mbmpo.report.study import ActorStudy, ModelStudy, Plasticity, Trajectory, rank_correlation, root_mean_square

try:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter
except ImportError as error:
    raise ImportError("Figures need matplotlib: pip install 'sb3-mbmpo[plots]'.") from error

# Maximum number of dimensions that are drawn separately: those with the largest errors
MAX_DIMENSIONS = 8
# Number of steps of a trajectory that are drawn: the curves of runners cannot be told apart if there are more
DRAWN_STEPS = 60
REAL, IMAGINED, ADAPTED = "black", "#0072b2", "#d55e00"
STAGES = {
    "time/real_rollout": ("real rollout", "#009e73"),
    "time/dynamics_fit": ("dynamics fit", "#e69f00"),
    "time/imagination": ("imagination", "#0072b2"),
    "time/meta_update": ("meta-update", "#cc79a7"),
}
# Label, colour, style, (real steps, values)
Curve = tuple[str, str, str, tuple[np.ndarray, np.ndarray]]


class Picture(NamedTuple):
    """
    A figure with title and caption.

    :param name: name of the file, without suffix
    :param title: heading
    :param caption: how to read the figure
    :param figure: the figure; None if it cannot be drawn, and the caption says why
    """

    name: str
    title: str
    caption: str
    figure: Figure | None


def missing(name: str, title: str, reason: str) -> Picture:
    """Return a picture without a figure, whose caption gives the reason."""
    return Picture(name, title, f"Left out: {reason}", None)


def model_pictures(study: ModelStudy) -> list[Picture]:
    """Draw all figures about the model itself."""
    return [
        draw_horizon_errors(study.actors),
        draw_one_step_errors(study.actors),
        draw_replay(study.replayed),
        draw_play(study.played),
        draw_plasticity(study.plasticity),
    ]


# ---------------------------------------------------------------- the run


def draw_learning_curve(run: RunLog, study: ModelStudy) -> Picture:
    """Draw real and imagined returns against real steps, and the returns of the report's fresh episodes."""
    curves = [
        ("real, while collecting", REAL, "o-", run.column("rollout/ep_rew_mean_new")),
        ("real, evaluation", "#009e73", "s-", run.evaluation()),
    ]
    is_whole = run.model.baseline != "critic"  # with a critic, imagined rollouts are only parts of episodes
    if is_whole:
        curves += [
            ("imagined, meta-policy", IMAGINED, "o-", run.column("imagined/ep_rew_mean")),
            ("imagined, adapted policies", ADAPTED, "o--", run.column("imagined/ep_rew_mean_adapted")),
        ]
    name, title = "learning_curve", "Learning curve"
    if not any(len(steps) > 0 for _, _, _, (steps, _) in curves):
        return missing(name, title, _no_log("returns"))
    figure, axes = _figure("Real and imagined return" if is_whole and run.has_imagined_returns() else "Real return", 8, 4.5)
    _plot(axes, curves)
    returns = study.returns()
    label = f"real, meta-policy in {len(returns)} fresh episodes:\n{returns.mean():.4g} ± {returns.std():.3g}"
    axes.errorbar(run.model.num_timesteps, returns.mean(), returns.std(), fmt="D", color="#009e73", label=label, capsize=4)
    _label(axes, "real steps", "return (sum of rewards, undiscounted)")
    caption = (
        "The policy's real returns. Those while collecting are of the adapted policies, which explore; the diamond is the "
        "final meta-policy without noise."
    )
    if is_whole:
        caption += (
            " For comparison, its returns in the learned models: imagined returns that rise far above the real ones mean that "
            "the policy exploits model errors. Compare each imagined point with the next real one, which comes after it."
        )
        caption += _notes(run)
    return Picture(name, title, caption, figure)


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
    figure = Figure(figsize=(5 * len(panels), 4), layout="constrained")
    figure.suptitle("What is imagined beside what is real", fontsize=11)
    for axes, (label, curves) in zip(np.atleast_1d(figure.subplots(1, len(panels))), panels.items(), strict=True):
        _plot(axes, curves)
        _label(axes, "real steps", label)
    caption = (
        "Imagined numbers far above the real ones that follow mean that the policy exploits model errors, or that the critic "
        "is too optimistic. Imagined rollouts start anywhere in the data, including the states of early policies, so at first "
        "their steps earn less than real ones."
    )
    return Picture(name, title, caption, figure)


def _plot(axes: Axes, curves: Sequence[Curve]) -> None:
    for label, colour, style, (steps, values) in curves:
        if len(steps) > 0:
            axes.plot(steps, values, style, color=colour, label=label, markersize=4, linewidth=1.2)


def _no_log(what: str) -> str:
    """Return the reason why ``what`` is missing."""
    return (
        f"no progress.csv with the model has {what}. `python -m sb3_mbmpo train` writes one, and so does SB3's logger with "
        "the format csv."
    )


def _notes(run: RunLog) -> str:
    """Return the reasons, other than model errors, why real and imagined returns differ."""
    if not run.has_imagined_returns():
        return f" Imagined returns are left out: {_no_log('them')}"
    notes = ""
    real, imagined = (run.column(key)[1][-1:] for key in ("rollout/ep_len_mean", "imagined/ep_len_mean"))
    if len(real) > 0 and abs(real[0] - imagined[0]) > 0.02 * real[0]:
        notes += (
            f" Here the two are sums over different lengths: in the end, real episodes last {real[0]:.0f} steps, imagined "
            f"rollouts {imagined[0]:.0f}."
        )
    if run.model.imagined_start == "buffer":
        notes += " Here imagined rollouts start anywhere in the data, real episodes at their beginning."
    return notes


def draw_times(run: RunLog) -> Picture:
    """Draw the seconds of each stage as stacked bars, one per iteration."""
    name, title = "time", "Time by stage"
    seconds = {key: run.column(key)[1] for key in STAGES}
    n_iterations = len(seconds["time/real_rollout"])
    if n_iterations == 0 or any(len(values) != n_iterations for values in seconds.values()):
        return missing(name, title, _no_log("the seconds of the stages"))
    figure, axes = _figure("Wall time of the stages of each iteration", 8, 4)
    bottom = np.zeros(n_iterations)
    for key, (label, colour) in STAGES.items():
        label = f"{label}: {seconds[key].sum():.0f} s in all"
        axes.bar(np.arange(1, n_iterations + 1), seconds[key], bottom=bottom, color=colour, label=label)
        bottom = bottom + seconds[key]
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    _label(axes, "iteration", "wall time (seconds)")
    caption = "Save time where the bars are tallest: fewer epochs, or fewer, shorter imagined rollouts and meta-steps."
    return Picture(name, title, caption, figure)


# ---------------------------------------------------------------- errors of predictions


def draw_horizon_errors(actors: Mapping[str, ActorStudy]) -> Picture:
    """Draw the error against the steps ahead, by member and by dimension, with one row per actor."""
    figure = Figure(figsize=(11, 3.4 * len(actors)), layout="constrained")
    rows = figure.subplots(len(actors), 2, squeeze=False, sharey="row")
    figure.suptitle("Error of predictions against the number of steps ahead, on fresh real episodes")
    for (by_member, by_dimension), (actor, study) in zip(rows, actors.items(), strict=True):
        members, unchanged = study.horizon_errors
        ahead = np.arange(1, members.shape[1] + 1)
        for i, errors in enumerate(root_mean_square(members, axis=2)):
            by_member.plot(ahead, errors, label=f"member {i}", linewidth=1)
        by_member.plot(ahead, root_mean_square(unchanged, axis=1), ":", color=REAL, label="“nothing changes”")
        each = root_mean_square(members, axis=0)
        worst = _worst(each[-1])
        for dimension in worst:
            by_dimension.plot(ahead, each[:, dimension], label=f"obs[{dimension}]", linewidth=1)
        by_member.set_title(f"{actor}: each member, over all dimensions", fontsize=10)
        few = "each dimension" if len(worst) == each.shape[1] else f"the {len(worst)} worst of {each.shape[1]} dimensions"
        by_dimension.set_title(f"{actor}: {few}, over all members", fontsize=10)
        _label(by_member, "steps ahead", "error (standard deviations of\nthe observations in the data)")
        _label(by_dimension, "steps ahead", "")
        for axes in (by_member, by_dimension):
            axes.legend(fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
    caption = (
        "Root mean square error of each member's prediction k steps ahead, from the real actions and its own previous "
        "predictions. The episodes are fresh ones, not training data. Unit: standard deviation of the observations in "
        "the training data. Above the dotted line, the member predicts worse than someone who assumes that nothing "
        "changes. Near an unstable equilibrium this happens early: the real actions do not react to the members' "
        "predictions, unlike those of a policy that acts in the members."
    )
    return Picture("prediction_error", "Prediction error against horizon", caption, figure)


def draw_one_step_errors(actors: Mapping[str, ActorStudy]) -> Picture:
    """Draw the one-step errors of every dimension, with one dot per member."""
    figure, axes = _figure("Error of one-step predictions, on fresh real episodes", 9, 4)
    for (actor, study), colour, shift in zip(actors.items(), (IMAGINED, ADAPTED), (-0.15, 0.15), strict=True):
        dimensions = np.arange(study.one_step.shape[1]) + shift
        for i, errors in enumerate(study.one_step):
            axes.plot(dimensions, errors, ".", color=colour, label=f"{actor}, a member" if i == 0 else None)
        axes.plot(
            dimensions, root_mean_square(study.one_step, axis=0), "_", color=colour, markersize=14, label=f"{actor}, all"
        )
    axes.axhline(1, color=REAL, linestyle=":", label="forecasting the mean change")
    axes.set_yscale("log")
    if len(dimensions) <= 30:  # more labels would overlap
        axes.set_xticks(range(len(dimensions)))
    _label(axes, "dimension of the observation", "error (standard deviations of\nthe changes in one step)")
    caption = (
        "Root mean square error of the next observation, on fresh real episodes of the meta-policy and of random actions. "
        "Unit: standard deviation of the changes from step to step in the training data; at 1 a member has learned nothing "
        "about the dimension. Errors that are much larger for one of the two show where data is missing."
    )
    return Picture("one_step_error", "One-step error", caption, figure)


def draw_replay(trajectory: Trajectory) -> Picture:
    """Draw an episode and the members' predictions of it, with one panel per dimension, and the rewards."""
    caption = (
        "The members (colours) predict a fresh real episode (black) from its first observation and its actions only. Where "
        "they deviate from it together, all have learned the same error, or the equilibrium is unstable, so that the smallest "
        "error grows; where they deviate from one another, they lack data."
    )
    title = "A real episode of the meta-policy, and each member's from its first observation and its actions"
    return Picture(
        "replay", "Imagined beside real: the same actions", caption + _panels_caption(trajectory), _panels(trajectory, title)
    )


def draw_play(trajectory: Trajectory) -> Picture:
    """Draw an episode and those of the meta-policy acting in the members, with one panel per dimension, and the rewards."""
    caption = (
        "From the same first observation, the meta-policy acts in each member (colours) on imagined observations; the same "
        "fresh real episode is black. Rewards that occur only in the members are exploitation of their errors."
    )
    title = "A real episode of the meta-policy, and the meta-policy acting in each member"
    return Picture(
        "play", "Imagined beside real: the same policy", caption + _panels_caption(trajectory), _panels(trajectory, title)
    )


def _drawn_dimensions(trajectory: Trajectory) -> np.ndarray:
    """Return the dimensions that the members predict worst, in ascending order."""
    spread = np.maximum(trajectory.real.std(0), 1e-8)
    return np.sort(_worst(root_mean_square((trajectory.imagined - trajectory.real) / spread, axis=(0, 1))))


def _panels_caption(trajectory: Trajectory) -> str:
    n_all, n_drawn = trajectory.real.shape[1], len(_drawn_dimensions(trajectory))
    some = "" if n_drawn == n_all else f" Of {n_all} dimensions, the {n_drawn} that differ most."
    n_steps = len(trajectory.real_rewards)
    first = f"its first {DRAWN_STEPS} steps, " if n_steps > DRAWN_STEPS else ""
    return (
        f"{some} Observations: {first}in the environment's own units. The last panel adds up the rewards of {n_steps} steps."
    )


def _panels(trajectory: Trajectory, title: str) -> Figure:
    drawn = DRAWN_STEPS + 1  # observations
    series = [
        (f"obs[{i}]", "raw units", trajectory.real[:drawn, i], trajectory.imagined[:, :drawn, i])
        for i in _drawn_dimensions(trajectory)
    ]
    real, imagined = (
        np.insert(rewards.cumsum(-1), 0, 0, axis=-1) for rewards in (trajectory.real_rewards, trajectory.imagined_rewards)
    )
    series.append(("rewards so far", "return", real, imagined))
    n_columns = 2 if len(series) <= 4 else 3
    n_rows = -(-len(series) // n_columns)
    figure = Figure(figsize=(11, 2.5 * n_rows + 0.8), layout="constrained")
    figure.suptitle(title)
    panels = figure.subplots(n_rows, n_columns, squeeze=False).ravel()
    for panel, (label, unit, one_real, one_imagined) in zip(panels, series, strict=False):
        for i, values in enumerate(one_imagined):
            panel.plot(values, linewidth=1, label=f"member {i}")
        panel.plot(one_real, "--", color=REAL, linewidth=1.3, label="real")
        # A member that deviates far would make all other curves flat
        margin = 1.5 * max(one_real.max() - one_real.min(), 1e-3)
        low = max(min(one_real.min(), one_imagined.min()), one_real.min() - margin)
        high = min(max(one_real.max(), one_imagined.max()), one_real.max() + margin)
        pad = 0.05 * (high - low) + 1e-6
        panel.set_ylim(low - pad, high + pad)
        panel.set_title(label, fontsize=10)
        panel.xaxis.set_major_locator(MaxNLocator(integer=True))
        panel.set_xlabel("steps", fontsize=9)
        panel.set_ylabel(unit, fontsize=9)
        panel.grid(alpha=0.3)
    for panel in panels[len(series) :]:
        panel.remove()
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=min(len(labels), 8), fontsize=8)
    return figure


# ---------------------------------------------------------------- disagreement and adaptation


def draw_plasticity(plasticity: Plasticity) -> Picture:
    """Draw maps of disagreement and KL over the plane, or a scatter plot for other observations."""
    # Adding 0 turns -0 into 0
    correlation = f"{round(rank_correlation(plasticity.disagreement, plasticity.kl), 2) + 0:.2f}"
    name, title = "plasticity", "Disagreement and adaptation"
    if not plasticity.kl.any():
        return missing(name, title, "the adapted policies equal the meta-policy, as before the first iteration.")
    draw = _draw_maps if plasticity.is_map else _draw_scatter
    what = "points of the plane" if plasticity.is_map else "states of fresh real episodes of the meta-policy"
    caption = (
        f"Disagreement: standard deviation of the members' predictions for the meta-policy's action, in standard deviations "
        f"of the changes in one step. KL: how much the adaptation to a model changes the policy there, mean over the tasks. "
        f"Over {what}, their rank correlation is {correlation}: 1 if the policy is plastic exactly where the models are "
        f"uncertain, as MB-MPO intends, 0 if the two are unrelated."
    )
    return Picture(name, title, caption, draw(plasticity, correlation))


KL_LABEL = "KL of meta-policy to adapted policies (nats)"
DISAGREEMENT_LABEL = "disagreement (standard deviations of the changes)"


def _draw_maps(plasticity: Plasticity, correlation: str) -> Figure:
    figure = Figure(figsize=(10, 4.4), layout="constrained")
    figure.suptitle(f"Disagreement of the models and plasticity of the policy over the plane (rank correlation {correlation})")
    size = round(len(plasticity.obs) ** 0.5)
    x, y = (plasticity.obs[:, i].reshape(size, size) for i in range(2))
    panels = figure.subplots(1, 2, sharex=True, sharey=True)
    for axes, values, label in zip(
        panels, (plasticity.disagreement, plasticity.kl), (DISAGREEMENT_LABEL, KL_LABEL), strict=True
    ):
        image = axes.pcolormesh(x, y, values.reshape(size, size), shading="nearest")
        figure.colorbar(image, ax=axes, label=label, format="%.2g")
        axes.plot(*plasticity.visited.T, ".", color="white", markersize=1.5, label="real states of the meta-policy")
        _label(axes, "obs[0] (raw units)", "obs[1] (raw units)")
        axes.grid(visible=False)
        axes.set(xlim=(x.min(), x.max()), ylim=(y.min(), y.max()), aspect="equal")
        axes.legend(fontsize=8, facecolor="grey", labelcolor="white")
    return figure


def _draw_scatter(plasticity: Plasticity, correlation: str) -> Figure:
    figure, axes = _figure("Disagreement of the models and plasticity of the policy", 7, 4.5)
    axes.loglog(plasticity.disagreement, plasticity.kl, ".", color=IMAGINED, markersize=4, alpha=0.6, label="a real state")
    for axis in (axes.xaxis, axes.yaxis):  # the usual labels overlap where the values span few decades
        axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.set_major_formatter("{x:.0e}")
        axis.set_minor_formatter(NullFormatter())
    _label(axes, DISAGREEMENT_LABEL, KL_LABEL)
    axes.legend(title=f"rank correlation {correlation}", fontsize=8)
    return figure


# ---------------------------------------------------------------- common


def _worst(errors: np.ndarray) -> np.ndarray:
    """Return the dimensions with the largest errors (O,), the worst first."""
    return np.argsort(-errors, kind="stable")[:MAX_DIMENSIONS]


def _figure(title: str, width: float, height: float) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.subplots()
    axes.set_title(title, fontsize=11)
    return figure, axes


def _label(axes: Axes, x: str, y: str) -> None:
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
