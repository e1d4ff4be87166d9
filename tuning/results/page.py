"""Generate docs/results.md: only the blocks between markers are replaced, the hand-written text around them is kept."""

import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from sb3_mbmpo.common.atomic import write_whole
from tuning.results.curves import (
    NAMES,
    Curves,
    Verdict,
    all_rows,
    budgets,
    judge,
    median_seconds,
    medians,
    read_ablations,
    read_curves,
    settings_of,
)
from tuning.results.plots import save_environment, save_overview
from tuning.results.records import LIBRARIES
from tuning.results.runs import OURS, Run, read_document, read_queue


def write_page(queue: Path, output: Path, time: str = "processor") -> Path:
    """
    Write the page, a plot for each environment, and ``images/results.png`` for the README.

    The page goes next to the folder of the queue, the plots into that folder.

    :param queue: YAML file of the queue
    :param output: folder of the CSV files
    :param time: kind of training time to show, "processor" or "wall"
    :return: path of the page
    :raises ValueError: if there is nothing to show
    """
    runs = read_queue(queue)
    curves = read_curves(runs, output, time)
    if not curves:
        raise ValueError(f"{output} has no rows of any run of {queue} yet: create some with `python -m tuning.results run`.")
    page = queue.parent.with_suffix(".md")
    text = page.read_text() if page.exists() else "# Results\n"
    text = fill(text, "overview", overview(curves), "Overview")
    for name, of_environment in curves.items():
        picture = queue.parent / f"{name}.png"
        save_environment(name, of_environment, time, picture)
        text = fill(
            text, name, environment_section(name, of_environment, runs, time, f"{queue.parent.name}/{picture.name}"), name
        )
    for name, variants in read_ablations(runs, output).items():
        text = fill(text, f"ablation of {name}", ablation_table(variants), f"Ablation: {name}")
    text = fill(text, "settings", settings_table(curves), "Settings")
    text = fill(text, "origin", origin_table(curves), "Versions and machines")
    save_overview(curves, read_document(queue).get("picture", []), queue.parent.parent / "images" / "results.png")
    write_whole(page, text)
    return page


def fill(text: str, name: str, content: str, heading: str) -> str:
    """
    Replace the content of a block, or append a section with the block if the page has none.

    :param text: text of the page
    :param name: name of the block
    :param content: text to put between the markers of the block
    :param heading: heading of the section, if a new one is appended
    :return: new text of the page
    """
    begin, end = f"<!-- {name}:begin -->", f"<!-- {name}:end -->"
    if begin not in text:
        text = f"{text.rstrip()}\n\n## {heading}\n\n{begin}\n{end}\n"
    pattern = re.compile(f"{re.escape(begin)}.*?{re.escape(end)}", re.DOTALL)
    return pattern.sub(lambda _: f"{begin}\n{content.strip()}\n{end}", text)


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", r"\|") for cell in line) + " |" for line in lines)


def number(value: float) -> str:
    """Format a return with the precision that its noise justifies."""
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.1f}"


def duration(seconds: float) -> str:
    """Format a duration in hours, minutes or seconds."""
    for unit, name in ((3600.0, "h"), (60.0, "min")):
        if seconds >= 2 * unit:
            return f"{seconds / unit:.1f} {name}" if seconds < 10 * unit else f"{seconds / unit:.0f} {name}"
    return f"{seconds:.0f} s"


def listing(values: Sequence[str]) -> str:
    """Join words as in "a, b and c"."""
    return " and ".join([", ".join(values[:-1]), values[-1]] if len(values) > 1 else values)


# ---------------------------------------------------------------- blocks


def ablation_table(variants: Mapping[str, Mapping[int, Mapping[int, float]]]) -> str:
    """
    Return a Markdown table with one row per variant.

    :param variants: mean returns by variant (empty name: the unchanged settings), seed and number of real steps
    :return: table with the returns of all seeds that any variant was trained with
    """
    seeds = sorted({seed for name, by_seed in variants.items() if name for seed in by_seed})
    steps = sorted({step for name, by_seed in variants.items() if name for returns in by_seed.values() for step in returns})

    def cell(by_seed: Mapping[int, Mapping[int, float]], step: int) -> str:
        return " ".join(number(by_seed[seed][step]) if step in by_seed.get(seed, {}) else "-" for seed in seeds)

    header = [f"variant (seeds {' '.join(map(str, seeds))})", *(f"{step:,}" for step in steps)]
    rows = [[name or "unchanged", *(cell(by_seed, step) for step in steps)] for name, by_seed in variants.items()]
    return table(header, rows)


def overview(curves: Mapping[str, Curves]) -> str:
    """Return a Markdown table that compares MBMPO with the best peer, with the winner in bold.

    Each environment has a row for the first two and for the last budget at which both sides were evaluated.
    """
    rows = []
    for name, of_environment in curves.items():
        verdict = judge(of_environment)
        compared = sorted([*verdict.ahead, *verdict.level, *verdict.behind])
        for step in sorted({*compared[:2], *compared[-1:]}):
            peers = medians(of_environment, step)
            ours = peers.pop(OURS)
            best = max(peers, key=lambda algo: peers[algo])
            texts = [number(ours), f"{number(peers[best])} ({NAMES[best]})"]
            winner = 0 if step in verdict.ahead else 1 if step in verdict.behind else None
            rows.append([name, f"{step:,}", *(f"**{text}**" if i == winner else text for i, text in enumerate(texts))])
    return table(["environment", "real steps", "MB-MPO", "best peer"], rows)


def environment_section(name: str, curves: Curves, runs: Sequence[Run], time: str, picture: str) -> str:
    """Return the Markdown section of one environment: description, verdict, plot and table."""
    described = sorted({row["environment"] for row in all_rows(curves)})
    unfinished = [
        f"{NAMES[run.algo]} seed {run.seed}"
        for run in runs
        if run.environment == name and run.algo in curves and not _is_finished(run, curves)
    ]
    parts = [
        f"`{'`, `'.join(described)}`. {verdict_text(judge(curves))}",
        f"![Learning curves of {name}]({picture})",
        budget_table(curves, time),
    ]
    if unfinished:
        parts.append(f"Not finished yet: {', '.join(unfinished)}.")
    return "\n\n".join(parts)


def _is_finished(run: Run, curves: Curves) -> bool:
    return any(curve.seed == run.seed and set(run.evaluate_at) <= set(curve.returns) for curve in curves[run.algo])


def verdict_text(verdict: Verdict) -> str:
    """Return a sentence that says which algorithm is ahead."""
    parts = []
    if verdict.ahead:
        parts.append(f"ahead of every peer's at {_steps(verdict.ahead)}")
    if verdict.level:
        parts.append(f"level with the best peer's at {_steps(verdict.level)}")
    by_peers: dict[str, list[int]] = {}
    for step, algos in verdict.behind.items():
        by_peers.setdefault(listing([NAMES[algo] for algo in algos]), []).append(step)
    parts += [f"behind {names} at {_steps(steps)}" for names, steps in by_peers.items()]
    if not parts:
        return "No peer has been evaluated at the same real steps yet."
    return f"MB-MPO's median is {'; '.join(parts)} real steps."


def _steps(steps: Sequence[int]) -> str:
    return listing([f"{step:,}" for step in steps])


def budget_table(curves: Curves, time: str) -> str:
    """Return a Markdown table of medians, the best in bold, with each seed's return in brackets, and of training times."""
    rows = []
    for step in budgets(curves):
        middle = medians(curves, step)
        cells = []
        for algo, of_algo in curves.items():
            if algo not in middle:
                cells.append("")
                continue
            text = number(middle[algo])
            text = f"**{text}**" if middle[algo] == max(middle.values()) else text
            seeds = " ".join(number(curve.returns[step]) if step in curve.returns else "-" for curve in of_algo)
            cells.append(f"{text} ({seeds})" if len(of_algo) > 1 else text)
        rows.append([f"{step:,}", *cells])
    times = [f"{time} time"]
    for of_algo in curves.values():
        last = max(step for curve in of_algo for step in curve.seconds)
        times.append(f"{duration(median_seconds(of_algo, last) or 0.0)} for {last:,}")
    header = [f"{NAMES[algo]} (seeds {' '.join(str(curve.seed) for curve in of_algo)})" for algo, of_algo in curves.items()]
    return table(["real steps", *header], [*rows, times])


def settings_table(curves: Mapping[str, Curves]) -> str:
    """Return a Markdown table of the settings that each algorithm was trained with, including changes to them."""
    found = settings_of(curves)
    return table(
        ["algorithm", "environments", "settings"],
        [[NAMES[algo], ", ".join(names), settings] for (algo, settings), names in sorted(found.items())],
    )


def origin_table(curves: Mapping[str, Curves]) -> str:
    """Return a Markdown table of the software versions and the machines that the rows come from."""
    rows = [row for of_environment in curves.values() for row in all_rows(of_environment)]
    ours = [row for of_environment in curves.values() for row in all_rows(of_environment, OURS)]
    found = {
        "commit (MB-MPO's runs)": {row["commit"][:12] for row in ours},
        **{library: {row[library] for row in rows} for library in ("sb3_mbmpo", *LIBRARIES)},
        "CPU": {row["cpu"] for row in rows},
        "threads of a run": {row["threads"] for row in rows},
    }
    return table(["what", "which"], [[what, ", ".join(sorted(which))] for what, which in found.items()])
