"""Learning curves: the numbers, pictures and words of the page."""

import pytest
from tiny_runs import MACHINE, pendulum, write_queue

from tuning.results import curves, page, plots, records
from tuning.results.files import csv_file
from tuning.results.runs import read_queue

ORIGIN = {"environment": "Pendulum-v1", "settings": "as they are", **MACHINE}


def write_curve(output, algo, seed, returns, seconds=1.0):
    for step, value in returns.items():
        measured = (step, 9 * seconds * step, seconds * step, value, 1.0)
        row = ORIGIN | dict(zip(records.MEASURED, measured, strict=True))
        records.append_row(csv_file(output, pendulum(algo, seed=seed)), row)


@pytest.fixture
def measured(tmp_path):
    """Write a queue with handmade rows of three algorithms."""
    items = [
        {"environment": "Pendulum-v1", "algorithms": ["sac", "mbmpo"], "seeds": [0, 1, 2]},
        {"environment": "Pendulum-v1", "algorithms": ["ppo"], "seeds": [0], "max_steps": 200},
        {"environment": "Pendulum-v1", "algorithms": ["tqc"], "seeds": [0]},
    ]
    environments = {"Pendulum-v1": {"evaluate_at": [100, 200, 400]}}
    folder = tmp_path / "results"
    folder.mkdir()
    queue = write_queue(folder / "queue.yml", environments, items, picture=["Pendulum-v1"])
    write_curve(folder / "runs", "mbmpo", 0, {100: -900.4, 200: -150, 400: -99.94}, 2.0)
    write_curve(folder / "runs", "mbmpo", 1, {100: -700, 200: -170, 400: -99.94}, 4.0)
    write_curve(folder / "runs", "mbmpo", 2, {100: -800, 200: -1160}, 3.0)
    write_curve(folder / "runs", "sac", 0, {100: -1300, 200: -150, 400: -50})
    write_curve(folder / "runs", "sac", 1, {100: -1100, 200: -190, 400: -40})
    write_curve(folder / "runs", "sac", 2, {100: -1200, 200: -170, 400: -60})
    write_curve(folder / "runs", "ppo", 0, {100: -1000, 200: -1000})
    return queue


def test_page_has_the_right_numbers(measured):
    path = page.write_page(measured, measured.parent / "runs")
    assert path == measured.parent.with_suffix(".md")
    lines = path.read_text().splitlines()
    table = [line for line in lines if line.startswith(("| real steps", "| 100", "| 200", "| 400", "| processor"))]
    assert table == [
        "| real steps | MB-MPO (seeds 0 1 2) | SAC (seeds 0 1 2) | PPO (seeds 0) |",
        "| 100 | **-800** (-900 -700 -800) | -1,200 (-1,300 -1,100 -1,200) | -1,000 |",
        "| 200 | **-170** (-150 -170 -1,160) | **-170** (-150 -190 -170) | -1,000 |",
        "| 400 | -99.9 (-99.9 -99.9 -) | **-50.0** (-50.0 -40.0 -60.0) |  |",
        "| processor time | 20 min for 400 | 6.7 min for 400 | 3.3 min for 200 |",
    ]
    text = "\n".join(lines)
    assert (
        "`Pendulum-v1`. MB-MPO's median is ahead of every peer's at 100; level with the best peer's at 200; behind SAC at 400 "
        "real steps." in text
    )
    assert "Not finished yet: MB-MPO seed 2." in text
    assert "| Pendulum-v1 | 100 | **-800** | -1,000 (PPO) |" in text
    assert "| Pendulum-v1 | 200 | -170 | -170 (SAC) |" in text
    assert "| Pendulum-v1 | 400 | -99.9 | **-50.0 (SAC)** |" in text
    assert "| SAC | Pendulum-v1 | as they are |" in text
    assert "| commit (MB-MPO's runs) | 0123abc |" in text
    assert f"| torch | {MACHINE['torch']} |" in text
    for picture in (measured.parent / "Pendulum-v1.png", measured.parent.parent / "images" / "results.png"):
        assert picture.read_bytes().startswith(b"\x89PNG")
    assert "(results/Pendulum-v1.png)" in text


def test_variants_have_runs_of_their_own_and_a_table(tmp_path, monkeypatch):
    monkeypatch.setattr(page, "save_environment", lambda *arguments: None)
    monkeypatch.setattr(page, "save_overview", lambda *arguments: None)
    items = [
        {"environment": "Pendulum-v1", "algorithms": ["mbmpo"], "seeds": [0, 1, 2]},
        {
            "environment": "Pendulum-v1",
            "algorithms": ["mbmpo"],
            "seeds": [0, 1],
            "variant": "horizon-10",
            "overrides": {"horizon": 10},
            "max_steps": 200,
        },
    ]
    (folder := tmp_path / "results").mkdir()
    queue = write_queue(folder / "queue.yml", {"Pendulum-v1": {"evaluate_at": [100, 200, 400]}}, items)
    runs = read_queue(queue)
    assert [run.name for run in runs][2:4] == ["mbmpo-Pendulum-v1-seed2", "mbmpo-Pendulum-v1-horizon-10-seed0"]
    write_curve(folder / "runs", "mbmpo", 0, {100: -900, 200: -150, 400: -99})
    write_curve(folder / "runs", "mbmpo", 2, {100: -1, 200: -1, 400: -1})
    for run, returns in ((runs[3], {100: -850}), (runs[4], {100: -800, 200: -700})):
        for step, value in returns.items():
            row = ORIGIN | dict(zip(records.MEASURED, (step, 1.0, 1.0, value, 1.0), strict=True))
            records.append_row(csv_file(folder / "runs", run), row)
    lines = page.write_page(queue, folder / "runs").read_text().splitlines()
    table = lines[lines.index("| variant (seeds 0 1) | 100 | 200 |") :]
    assert table[2:4] == ["| unchanged | -900 - | -150 - |", "| horizon-10 | -850 -800 | - -700 |"]
    assert "horizon-10" not in "\n".join(lines[: lines.index("## Ablation: Pendulum-v1")])


def test_what_was_written_by_hand_stays_on_the_page(measured, monkeypatch):
    monkeypatch.setattr(page, "save_environment", lambda *arguments: None)
    monkeypatch.setattr(page, "save_overview", lambda *arguments: None)
    path = page.write_page(measured, measured.parent / "runs")
    first = path.read_text()
    path.write_text(first.replace("## Pendulum-v1\n", "## Pendulum-v1, by hand\n\nTried: a\\b.\n").replace("-1,200", "stale"))
    page.write_page(measured, measured.parent / "runs")
    assert path.read_text() == first.replace("## Pendulum-v1\n", "## Pendulum-v1, by hand\n\nTried: a\\b.\n")


def test_curves_that_are_drawn(measured):
    of_environment = curves.read_curves(read_queue(measured), measured.parent / "runs", "processor")["Pendulum-v1"]
    assert list(of_environment) == ["mbmpo", "sac", "ppo"]
    steps, means = plots.mean_curve(of_environment["mbmpo"])
    assert steps == [100, 200, 400]
    assert means == pytest.approx([-2400.4 / 3, -1480 / 3, -99.94])
    assert plots.mean_curve(of_environment["mbmpo"][1:])[0] == [100, 200]  # 400: one seed of two makes no mean
    assert plots.mean_curve(of_environment["ppo"]) == ([100, 200], [-1000, -1000])
    assert curves.median_seconds(of_environment["mbmpo"], 200) == 600
    by_wall_time = curves.read_curves(read_queue(measured), measured.parent / "runs", "wall")["Pendulum-v1"]
    assert curves.median_seconds(by_wall_time["mbmpo"], 200) == 5400


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.4, "0 s"), (119, "119 s"), (120, "2.0 min"), (1500, "25 min"), (7200, "2.0 h"), (72_000, "20 h")]
)
def test_duration(seconds, text):
    assert page.duration(seconds) == text
