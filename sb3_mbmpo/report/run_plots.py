"""Figures of the course of a run, as ``run_log`` reads it from the log, with captions that explain how to read them."""

from collections.abc import Sequence

import numpy as np

from sb3_mbmpo.report.colours import ADAPTED, EVALUATED, IMAGINED, RANDOM, REAL
from sb3_mbmpo.report.matplotlib_parts import Axes, Figure, MaxNLocator
from sb3_mbmpo.report.panels import Layout, Picture, label_axes, legend_below, missing, new_figure
from sb3_mbmpo.report.run_log import RunLog
from sb3_mbmpo.report.study import ModelStudy

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
        figure, (axes,) = new_figure(layout, "Real and imagined return" if is_comparable else "Real return", 1, 4.2)
        _plot(axes, curves)
        label = f"real, meta-policy, {len(returns)} episodes: {returns.mean():.4g} ± {returns.std():.3g}"
        steps = run.model.num_timesteps
        axes.errorbar(steps, returns.mean(), returns.std(), fmt="D", color=EVALUATED, label=label, capsize=4)
        axes.axhline(chance, color=RANDOM, linestyle=":", label=f"random actions: {chance:.4g}")
        axes.set_xlim(left=0)
        label_axes(axes, "real steps", "return (sum of rewards, undiscounted)")
        legend_below(figure, layout, axes)
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
        figure, all_axes = new_figure(layout, "What is imagined beside what is real", len(panels), 3.8)
        for axes, (label, curves) in zip(all_axes, panels.items(), strict=True):
            _plot(axes, curves)
            axes.set_xlim(left=0)
            label_axes(axes, "real steps", label)
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
        figure, (axes,) = new_figure(layout, "Wall time of the stages of each iteration", 1, 3.8)
        bottom = np.zeros(n_iterations)
        for key, (stage, colour) in STAGES.items():
            label = f"{stage}: {seconds[key].sum():.0f} s in all"
            axes.bar(np.arange(1, n_iterations + 1), seconds[key], bottom=bottom, color=colour, label=label)
            bottom = bottom + seconds[key]
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
        label_axes(axes, "iteration", "wall time (seconds)")
        legend_below(figure, layout, axes)
        return figure

    caption = "Save time where the bars are tallest: fewer epochs, or fewer, shorter imagined rollouts and meta-steps."
    return Picture(name, title, caption, draw)
