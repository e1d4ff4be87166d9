"""The page of a report: one HTML file that needs no network, and the PNGs."""

import html
import inspect
import io
import zipfile
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import gymnasium as gym

import sb3_mbmpo
from sb3_mbmpo.common.atomic import write_whole
from sb3_mbmpo.common.html_page import NARROW, data_url, page
from sb3_mbmpo.mbmpo import MBMPO
from sb3_mbmpo.report.episodes import evaluation_seed
from sb3_mbmpo.report.loading import MakeEnv
from sb3_mbmpo.report.run_log import RunFiles, RunLog
from sb3_mbmpo.report.study import ModelStudy, study_model

if TYPE_CHECKING:
    from sb3_mbmpo.report.panels import Drawing

STYLE = f"""body {{ font: 16px/1.45 sans-serif }} figure {{ margin: 0 0 2em }} figure img {{ width: 100% }}
figure img.film {{ max-width: 720px }} figcaption {{ max-width: 50em }} td {{ overflow-wrap: anywhere }}
td, th {{ padding: .2em .8em; text-align: left; vertical-align: top }}
.head td:first-child {{ white-space: nowrap }} .changed td {{ font-weight: bold }}
@media (max-width: {NARROW}px) {{ table {{ font-size: 14px }} td, th {{ padding: .2em .4em }}
.head td:first-child {{ white-space: normal; width: 35% }} }}"""
# Arguments of MBMPO that the table of hyperparameters does not show: objects, and those without an effect on learning
NO_HYPERPARAMETERS = {"self", "env", "verbose", "tensorboard_log", "_init_setup_model"}


def hyperparameters(model: MBMPO) -> list[tuple[str, Any, Any]]:
    """Return name, value and default of every argument of ``MBMPO`` that affects learning."""
    values = {**vars(model), "policy": model.policy_class.__name__, "stats_window_size": model._stats_window_size}
    return [
        (name, values[name], "" if parameter.default is inspect.Parameter.empty else parameter.default)
        for name, parameter in inspect.signature(MBMPO.__init__).parameters.items()
        if name not in NO_HYPERPARAMETERS
    ]


def hyperparameter_table(model: MBMPO) -> str:
    """Return the table of hyperparameters as HTML, with values other than the default in bold."""
    lines = ["<tr><th>argument</th><th>value</th><th>default</th></tr>"]
    for name, value, default in hyperparameters(model):
        # MBMPO replaces None by an empty dictionary
        is_changed = (value or None) != (default or None) and name not in ("policy", "device", "seed")
        cells = "".join(f"<td>{html.escape(str(cell))}</td>" for cell in (name, value, default))
        lines.append(f"<tr{' class=changed' if is_changed else ''}>{cells}</tr>")
    return f"<table>{''.join(lines)}</table>"


def summary_table(run: RunLog, study: ModelStudy, env: gym.Env[Any, Any], files: RunFiles, seed: int) -> str:
    """Return the summary of the run as HTML: environment, seed, real steps, versions, returns."""
    rows = {
        "model": files.model.name,
        "environment": "" if env.spec is None else env.spec.id,
        "its arguments": environment_arguments(env),
        "seed": "none" if run.model.seed is None else run.model.seed,
        "real steps": f"{run.model.num_timesteps:,}",
        "trained with": ", ".join(f"{name} {number}" for name, number in trained_with(run.model, files.model).items()),
        "report made with": ", ".join(f"{name} {number}" for name, number in installed(env).items()),
    }
    for actor in study.actors:
        returns = study.returns(actor)
        spread = f"{returns.mean():.4g} ± {returns.std():.3g} ({returns.min():.4g} to {returns.max():.4g})"
        rows[f"return, {actor}"] = f"{spread}, {len(returns)} deterministic episodes" if actor == "meta-policy" else spread
    rows["these episodes"] = f"those of python -m sb3_mbmpo train --seed {seed} --eval-episodes {len(returns)}"
    lines = (f"<tr><td>{html.escape(name)}</td><td>{html.escape(str(value))}</td></tr>" for name, value in rows.items())
    return f"<table class='head'>{''.join(lines)}</table>"


def environment_arguments(env: gym.Env[Any, Any]) -> str:
    """Return the arguments with which the environment was made, where they are not those of its registration."""
    if env.spec is None:
        return "unknown"
    registered = gym.registry.get(env.spec.id)
    given = dict(env.spec.kwargs)
    if registered is None or env.spec.max_episode_steps != registered.max_episode_steps:
        given["max_episode_steps"] = env.spec.max_episode_steps
    defaults = {} if registered is None else registered.kwargs
    changed = {name: value for name, value in given.items() if name not in defaults or defaults[name] != value}
    return ", ".join(f"{name}={value!r}" for name, value in changed.items()) or "none"


# Names of packages in the file of a model, as SB3 writes them, and their own
PACKAGES = {"Stable-Baselines3": "stable_baselines3", "PyTorch": "torch", "Numpy": "numpy", "Gymnasium": "gymnasium"}


def trained_with(model: MBMPO, path: Path) -> dict[str, str]:
    """
    Return the versions with which a model was saved.

    :param model: the model
    :param path: its file, in which SB3 notes the versions
    :return: version by package, and that of Python
    """
    found = {"sb3_mbmpo": str(getattr(model, "package_version", "unknown"))}
    with zipfile.ZipFile(path) as archive:
        text = archive.read("system_info.txt").decode() if "system_info.txt" in archive.namelist() else ""
    for line in text.splitlines():
        name, _, number = line.removeprefix("- ").partition(": ")
        if name in (*PACKAGES, "Python"):
            found[PACKAGES.get(name, name)] = number.strip()
    return found


def installed(env: gym.Env[Any, Any]) -> dict[str, str]:
    """
    Return the versions with which the report was made.

    :param env: the environment; MuJoCo's version is that of its physics
    :return: version by package
    """
    names = [*PACKAGES.values(), *(["mujoco"] if hasattr(env.unwrapped, "mujoco_renderer") else [])]
    return {"sb3_mbmpo": sb3_mbmpo.__version__, **{name: version(name) for name in names}}


def embedded(data: bytes, mime: str, alternative: str, **attributes: str) -> str:
    """Return the HTML of an image, with the data embedded."""
    further = "".join(f" {name}='{value}'" for name, value in attributes.items())
    return f"<img alt='{html.escape(alternative)}'{further} src='{data_url(data, mime)}'>"


def figure_html(draw: "Drawing", title: str, path: Path) -> str:
    """
    Draw a figure for wide and for narrow pages.

    :param draw: draws it in a layout
    :param title: alternative text
    :param path: where the wide one is written, too
    :return: HTML with both, of which the browser shows the one that fits
    """
    from sb3_mbmpo.report.panels import NARROW_PAGE, WIDE_PAGE

    png_wide, png_narrow = io.BytesIO(), io.BytesIO()
    # Sharp on screens with two pixels for each of CSS
    draw(WIDE_PAGE).savefig(png_wide, format="png", dpi=150)
    draw(NARROW_PAGE).savefig(png_narrow, format="png", dpi=170)
    write_whole(path, png_wide.getvalue())
    url = data_url(png_narrow.getvalue(), "image/png")
    source = f"<source media='(max-width: {NARROW}px)' srcset='{url}'>"
    return f"<picture>{source}{embedded(png_wide.getvalue(), 'image/png', title)}</picture>"


def film_section(model: MBMPO, make_env: MakeEnv, seed: int, folder: Path) -> str:
    """Return the HTML of the video, which is also written to ``folder``, or of the reason why there is none."""
    from sb3_mbmpo.report.video import NoFilmError, film

    title = "Film"
    try:
        data = film(model, make_env, evaluation_seed(seed))
    except NoFilmError as error:
        return section(title, "", f"Left out: {error}")
    except Exception as error:  # noqa: BLE001 - graphics drivers fail in many ways; the figures are useful without the video
        reason = f"the simulator cannot render here ({type(error).__name__}: {error}). MUJOCO_GL=egl or osmesa may help."
        return section(title, "", f"Left out: {reason}")
    write_whole(folder / "film.webp", data)
    caption = (
        "Left: a fresh real episode of the meta-policy. Right: the prediction of ensemble member 0 from its first observation "
        "and its actions, rendered from predicted observations. Where the right one moves as no body can, the model is wrong."
    )
    return section(title, embedded(data, "image/webp", title, **{"class": "film"}), caption)


def section(title: str, content: str, caption: str) -> str:
    """Return the section as HTML."""
    return f"<h2>{html.escape(title)}</h2><figure>{content}<figcaption>{html.escape(caption)}</figcaption></figure>"


def write_report(
    run: RunLog,
    files: RunFiles,
    make_env: MakeEnv,
    folder: Path,
    n_episodes: int = 20,
    seed: int | None = None,
    video: bool = True,
) -> Path:
    """
    Write the report on a run.

    :param run: the model and its log
    :param files: the files of the run
    :param make_env: makes the real environment; takes the arguments of ``gymnasium.make``
    :param folder: where to write report.html, the PNG files and film.webp
    :param n_episodes: number of fresh real episodes of the meta-policy, and also of random actions
    :param seed: seed of the run whose evaluation episodes are played; None: this run's
    :param video: whether to film MuJoCo environments
    :return: the HTML file
    :raises ImportError: without matplotlib
    """
    from sb3_mbmpo.report.model_plots import model_pictures
    from sb3_mbmpo.report.run_plots import draw_expectations, draw_learning_curve, draw_times

    env = make_env()
    if seed is None:
        seed = run.model.seed or 0
    study = study_model(run.model, env, n_episodes, seed)
    folder.mkdir(parents=True, exist_ok=True)
    title = f"MB-MPO on {'its environment' if env.spec is None else env.spec.id}"
    parts = [summary_table(run, study, env, files, seed)]
    for picture in [draw_learning_curve(run, study), draw_expectations(run), *model_pictures(study), draw_times(run)]:
        image = ""
        if picture.draw is not None:
            image = figure_html(picture.draw, picture.title, folder / f"{picture.name}.png")
        parts.append(section(picture.title, image, picture.caption))
    if video:
        parts.append(film_section(run.model, make_env, seed, folder))
    parts += ["<h2>Hyperparameters</h2><p>Bold: not the default.</p>", hyperparameter_table(run.model)]
    path = folder / "report.html"
    write_whole(path, page(title, STYLE, parts))
    env.close()
    return path
