"""The page of a report: one HTML file that needs no network, and the PNGs."""

import base64
import html
import inspect
import io
from pathlib import Path
from typing import Any

import gymnasium as gym

import sb3_mbmpo
from sb3_mbmpo.common.atomic import write_whole
from sb3_mbmpo.mbmpo import MBMPO
from sb3_mbmpo.report.episodes import FIRST_SEED
from sb3_mbmpo.report.loading import MakeEnv
from sb3_mbmpo.report.run_log import RunFiles, RunLog
from sb3_mbmpo.report.study import ModelStudy, study_model

STYLE = """body { font: 16px/1.4 sans-serif; max-width: 1100px; margin: 2em auto; padding: 0 1em }
figure { margin: 0 0 2em } figure img { max-width: 100% } figcaption { max-width: 50em }
table { border-collapse: collapse } td, th { padding: .2em .8em; text-align: left; vertical-align: top }
tr:nth-child(even) { background: #f2f2f2 } .changed td { font-weight: bold }"""
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


def summary_table(run: RunLog, study: ModelStudy, env: gym.Env[Any, Any], files: RunFiles) -> str:
    """Return the summary of the run as HTML: environment, real steps, version, returns."""
    rows = {
        "model": files.model.name,
        "environment": "" if env.spec is None else env.spec.id,
        "real steps": run.model.num_timesteps,
        "sb3_mbmpo": f"{getattr(run.model, 'package_version', 'unknown')} (report: {sb3_mbmpo.__version__})",
    }
    for name, actor in study.actors.items():
        returns = [episode.rewards.sum() for episode in actor.episodes]
        spread = f"{min(returns):.4g} to {max(returns):.4g}"
        rows[f"return of {len(returns)} fresh episodes, {name}"] = f"{sum(returns) / len(returns):.4g} ({spread})"
    lines = (f"<tr><td>{html.escape(name)}</td><td>{html.escape(str(value))}</td></tr>" for name, value in rows.items())
    return f"<table>{''.join(lines)}</table>"


def embedded(data: bytes, mime: str, alternative: str) -> str:
    """Return the HTML of an image, with the data embedded."""
    return f"<img alt='{html.escape(alternative)}' src='data:{mime};base64,{base64.b64encode(data).decode()}'>"


def film_section(model: MBMPO, make_env: MakeEnv, seed: int, folder: Path) -> str:
    """Return the HTML of the video, which is also written to ``folder``, or of the reason why there is none."""
    from sb3_mbmpo.report.video import NoFilmError, film

    title = "Film"
    try:
        data = film(model, make_env, FIRST_SEED + seed)
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
    return section(title, embedded(data, "image/webp", title), caption)


def section(title: str, content: str, caption: str) -> str:
    """Return the section as HTML."""
    return f"<h2>{html.escape(title)}</h2><figure>{content}<figcaption>{html.escape(caption)}</figcaption></figure>"


def write_report(
    run: RunLog, files: RunFiles, make_env: MakeEnv, folder: Path, n_episodes: int = 5, seed: int = 0, video: bool = True
) -> Path:
    """
    Write the report on a run.

    :param run: the model and its log
    :param files: the files of the run
    :param make_env: makes the real environment; takes the arguments of ``gymnasium.make``
    :param folder: where to write report.html, the PNG files and film.webp
    :param n_episodes: number of fresh real episodes of the meta-policy, and also of random actions
    :param seed: of those
    :param video: whether to film MuJoCo environments
    :return: the HTML file
    :raises ImportError: without matplotlib
    """
    from sb3_mbmpo.report.plots import draw_expectations, draw_learning_curve, draw_times, model_pictures

    env = make_env()
    study = study_model(run.model, env, n_episodes, seed)
    folder.mkdir(parents=True, exist_ok=True)
    title = f"MB-MPO on {'its environment' if env.spec is None else env.spec.id}"
    parts = [f"<h1>{html.escape(title)}</h1>", summary_table(run, study, env, files)]
    for picture in [draw_learning_curve(run, study), draw_expectations(run), *model_pictures(study), draw_times(run)]:
        image = ""
        if picture.figure is not None:
            png = io.BytesIO()
            picture.figure.savefig(png, format="png", dpi=100)
            write_whole(folder / f"{picture.name}.png", png.getvalue())
            image = embedded(png.getvalue(), "image/png", picture.title)
        parts.append(section(picture.title, image, picture.caption))
    if video:
        parts.append(film_section(run.model, make_env, seed * n_episodes, folder))
    parts += ["<h2>Hyperparameters</h2><p>Bold: not the default.</p>", hyperparameter_table(run.model)]
    head = f"<!DOCTYPE html><html lang='en'><head><meta charset='utf-8'><title>{html.escape(title)}</title>"
    path = folder / "report.html"
    write_whole(path, f"{head}<style>{STYLE}</style></head><body>{''.join(parts)}</body></html>")
    env.close()
    return path
