"""The page of the report on a run: all in one file, and its numbers those of the training."""

import base64
import html
import importlib.metadata
import io
import re
import sys
from html.parser import HTMLParser

import gymnasium as gym
import numpy as np
import pytest
import torch as th
from PIL import Image
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.evaluation import evaluate_policy
from tiny import Drift, tiny_model
from tiny_report import FIGURES

from sb3_mbmpo.report.__main__ import main as report_main
from sb3_mbmpo.report.episodes import RandomPolicy, evaluation_seed
from sb3_mbmpo.report.page import environment_arguments
from sb3_mbmpo.report.study import study_model


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


def test_a_report_has_all_figures_in_one_file(point_run, tmp_path):
    report_main([str(point_run), "--output", str(tmp_path), "--episodes", "2"])
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


def test_a_model_alone_gets_a_sentence_where_the_log_is_missing(point_run, tmp_path):
    model = tmp_path / "alone.zip"
    model.write_bytes(point_run.with_suffix(".zip").read_bytes())
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
def test_what_is_wrong_is_said_in_a_line(point_run, arguments, message):
    with pytest.raises(SystemExit, match=message):
        report_main([str(point_run) if argument == "RUN" else argument for argument in arguments])


def test_a_file_without_an_environment_asks_for_it(tmp_path):
    tiny_model(Drift()).save(tmp_path / "model")
    with pytest.raises(SystemExit, match="does not say how its environment is made: pass `--env ID`"):
        report_main([str(tmp_path / "model.zip")])


def test_without_matplotlib_the_extra_is_named(point_run, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.axes", None)
    for name in ("matplotlib_parts", "panels", "run_plots", "model_plots"):
        monkeypatch.delitem(sys.modules, f"sb3_mbmpo.report.{name}", raising=False)
        monkeypatch.delattr(f"sb3_mbmpo.report.{name}", raising=False)
    with pytest.raises(SystemExit, match=r"pip install 'sb3-mbmpo\[plots\]'"):
        report_main([str(point_run)])


def test_the_head_has_the_numbers_that_the_training_printed(point_run, tmp_path):
    report_main([str(point_run), "--output", str(tmp_path), "--episodes", "3", "--no-video"])
    lines = (point_run / "output.txt").read_text().splitlines()
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
        ("sb3_mbmpo.envs:Point2D-v0", {}, "none"),
    ],
)
def test_the_head_has_the_environments_arguments(env_id, kwargs, expected):
    assert environment_arguments(gym.make(env_id, **kwargs)) == expected
