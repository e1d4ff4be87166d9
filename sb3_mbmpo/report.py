"""A report on a run: ``python -m sb3_mbmpo.report RUN_OR_MODEL`` writes one HTML file that needs no network, and the PNGs.

Needs matplotlib: ``pip install "sb3-mbmpo[plots]"``.
"""

import argparse
import base64
import html
import inspect
import io
import os
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import gymnasium as gym
from gymnasium.envs.registration import EnvSpec
from stable_baselines3.common.vec_env import DummyVecEnv, VecEnv, VecNormalize

import sb3_mbmpo
import sb3_mbmpo.envs
from sb3_mbmpo.atomic import write_whole
from sb3_mbmpo.diagnostics import ModelStudy, study_model
from sb3_mbmpo.mbmpo import MBMPO
from sb3_mbmpo.real_episodes import FIRST_SEED
from sb3_mbmpo.run_log import RunFiles, RunLog, find_run, read_run, run_folder
from sb3_mbmpo.save_util import TAKE_A_COPY

MakeEnv = Callable[..., gym.Env[Any, Any]]

STYLE = """body { font: 16px/1.4 sans-serif; max-width: 1100px; margin: 2em auto; padding: 0 1em }
figure { margin: 0 0 2em } figure img { max-width: 100% } figcaption { max-width: 50em }
table { border-collapse: collapse } td, th { padding: .2em .8em; text-align: left; vertical-align: top }
tr:nth-child(even) { background: #f2f2f2 } .changed td { font-weight: bold }"""
# Those of `gymnasium.wrappers` that change what an agent sees; the others write films
_KINDS = ("action", "observation", "reward")
SAFE_WRAPPERS = (
    "gymnasium.wrappers.common:",
    *(f"gymnasium.wrappers.{how}_{kind}:" for how in ("stateful", "transform") for kind in _KINDS),
)
# Arguments of MBMPO that are not shown in the table of hyperparameters: objects, and what does not change what is learned
NO_HYPERPARAMETERS = {"self", "env", "verbose", "tensorboard_log", "_init_setup_model"}


# ---------------------------------------------------------------- the model and its environment


def env_maker(env_id: str | None, model: MBMPO, trust: bool = False) -> MakeEnv:
    """
    Find out how to make the real environment.

    :param env_id: as ``gymnasium.make`` takes it; None: the one that the model's file names
    :param model: loaded
    :param trust: whether what the file names may be imported and called, whatever it is
    :return: makes the real environment; takes the arguments of ``gymnasium.make``
    :raises ValueError: if neither names one, or only the file does, and not one that is registered here
    """
    if env_id is not None:
        return partial(gym.make, env_id)
    saved: str | None = getattr(model, "env_spec", None)
    if saved is None:
        raise ValueError("The model's file does not say how its environment is made: pass `--env ID`.")
    try:
        spec = EnvSpec.from_json(saved)
        spec.kwargs.pop("render_mode", None)
        wrappers = [wrapper.entry_point for wrapper in spec.additional_wrappers]
    except Exception as error:
        raise ValueError(
            f"What the model's file says of its environment makes no sense ({type(error).__name__}: {error}): pass `--env ID`."
        ) from error
    if not trust:
        _check_registered(spec, wrappers)
    return partial(gym.make, spec)


def _check_registered(spec: EnvSpec, wrappers: Sequence[Any]) -> None:
    """Raise ``ValueError`` if making it would import or call what only the file names."""
    known = gym.registry.get(spec.id)
    # Shimmy's environments make whatever their arguments name
    if known is None or known.entry_point != spec.entry_point or str(spec.entry_point).startswith("shimmy"):
        raise ValueError(
            f"The model's file names the environment {spec.id} ({spec.entry_point}), which is not registered here. "
            f"Pass `--env MODULE:{spec.id}`, or, if you know where the file is from, `--trust`."
        )
    for wrapper in wrappers:
        # What else their modules have, such as `deepcopy`, would be called, too
        kind = getattr(gym.wrappers, str(wrapper).rpartition(":")[2], None)
        is_wrapper = isinstance(kind, type) and issubclass(kind, gym.Wrapper)
        if not (str(wrapper).startswith(SAFE_WRAPPERS) and is_wrapper):
            raise ValueError(
                f"The model's file names the wrapper {wrapper}, which is none of Gymnasium's own. "
                "If you know where the file is from, pass `--trust`."
            )


def load_run(files: RunFiles, env_id: str | None, trust: bool = False) -> tuple[MBMPO, MakeEnv]:
    """
    Load the model of a run and its real environment.

    :param files: of the run
    :param env_id: overrides what the model's file says, and vouches for the functions that it names
    :param trust: whether what the file names may be imported and called, whatever it is
    :return: the model with its real environment, and what makes that environment
    :raises ValueError: if the environment is not known or not the model's
    """
    model = MBMPO.load(files.model, verbose=0)  # without an environment, it imports none of the functions that it names
    for name in ("reward_fn", "termination_fn"):
        path = getattr(model, name)
        if isinstance(path, str) and ":" in path and env_id is None and not trust:
            raise ValueError(
                f"The model's file names the function {path} as its {name}. If you know where the file is from, use `--trust`."
            )
    make_env = env_maker(env_id, model, trust)
    try:
        env: VecEnv = DummyVecEnv([make_env])
    except (ImportError, gym.error.Error):
        raise
    except Exception as error:
        raise ValueError(
            f"The environment that {files.model} or `--env` names cannot be made ({type(error).__name__}: {error}): pass "
            "another `--env ID`."
        ) from error
    if files.vec_normalize is not None:
        try:
            env = VecNormalize.load(str(files.vec_normalize), env)
        except Exception as error:
            reason = f"{type(error).__name__}: {error}"
            raise ValueError(f"{files.vec_normalize} cannot be read ({reason}). {TAKE_A_COPY}") from error
        assert isinstance(env, VecNormalize)
        env.training = False
    try:
        return MBMPO.load(files.model, env=env, verbose=0), make_env
    except ValueError as error:
        raise ValueError(f"{files.model} does not fit the environment ({error}): pass its own with `--env ID`.") from error


# ---------------------------------------------------------------- parts of the page


def hyperparameters(model: MBMPO) -> list[tuple[str, Any, Any]]:
    """Return name, value and default of every argument of ``MBMPO`` that decides what is learned."""
    values = {**vars(model), "policy": model.policy_class.__name__, "stats_window_size": model._stats_window_size}
    return [
        (name, values[name], "" if parameter.default is inspect.Parameter.empty else parameter.default)
        for name, parameter in inspect.signature(MBMPO.__init__).parameters.items()
        if name not in NO_HYPERPARAMETERS
    ]


def hyperparameter_table(model: MBMPO) -> str:
    """Return the table as HTML; what is not the default is bold."""
    lines = ["<tr><th>argument</th><th>value</th><th>default</th></tr>"]
    for name, value, default in hyperparameters(model):
        # An empty dictionary is what None becomes
        is_changed = (value or None) != (default or None) and name not in ("policy", "device", "seed")
        cells = "".join(f"<td>{html.escape(str(cell))}</td>" for cell in (name, value, default))
        lines.append(f"<tr{' class=changed' if is_changed else ''}>{cells}</tr>")
    return f"<table>{''.join(lines)}</table>"


def summary_table(run: RunLog, study: ModelStudy, env: gym.Env[Any, Any], files: RunFiles) -> str:
    """Return HTML: what was trained, for how long, how good it is."""
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
    """Return HTML of an image that is part of the page."""
    return f"<img alt='{html.escape(alternative)}' src='data:{mime};base64,{base64.b64encode(data).decode()}'>"


def film_section(model: MBMPO, make_env: MakeEnv, seed: int, folder: Path) -> str:
    """Return HTML: the film, which also goes to ``folder``, or why there is none."""
    from sb3_mbmpo.video import NoFilmError, film

    title = "Film"
    try:
        data = film(model, make_env, FIRST_SEED + seed)
    except NoFilmError as error:
        return section(title, "", f"Left out: {error}")
    except Exception as error:  # noqa: BLE001 - graphics drivers fail in every way there is; the figures are worth having
        reason = f"the simulator cannot render here ({type(error).__name__}: {error}). MUJOCO_GL=egl or osmesa may help."
        return section(title, "", f"Left out: {reason}")
    write_whole(folder / "film.webp", data)
    caption = (
        "Left, a fresh real episode of the meta-policy; right, what member 0 of the ensemble makes of its first observation "
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
    :param files: of the run
    :param make_env: makes the real environment; takes the arguments of ``gymnasium.make``
    :param folder: receives report.html, the PNG files and film.webp
    :param n_episodes: fresh real episodes of the meta-policy, and as many of random actions
    :param seed: of those
    :param video: whether to film MuJoCo environments
    :return: the HTML file
    :raises ImportError: without matplotlib
    """
    from sb3_mbmpo.plots import draw_expectations, draw_learning_curve, draw_times, model_pictures

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


def main(argv: Sequence[str] | None = None) -> None:
    """Write the report on a run."""
    parser = argparse.ArgumentParser(prog="python -m sb3_mbmpo.report", description=__doc__)
    parser.add_argument("run", type=Path, metavar="RUN_OR_MODEL", help="folder of a run, or a model's zip file")
    parser.add_argument("--env", help="environment id, MODULE:ID to import a module first; by default the model's own")
    parser.add_argument(
        "--trust", action="store_true", help="import and call the environment and the functions that the file names"
    )
    parser.add_argument("--output", type=Path, help="folder; by default `report` in the folder of the model's name")
    parser.add_argument("--episodes", type=int, default=5, help="real episodes of the meta-policy, and of random actions")
    parser.add_argument("--seed", type=int, default=0, help="of those episodes")
    parser.add_argument("--no-video", action="store_true", help="no film of MuJoCo environments")
    arguments = parser.parse_args(argv)
    if arguments.episodes < 1:
        parser.error(f"--episodes must be at least 1, not {arguments.episodes}")
    if sys.platform == "linux" and "DISPLAY" not in os.environ:
        os.environ.setdefault("MUJOCO_GL", "egl")  # Gymnasium would look for a window
    try:
        import sb3_mbmpo.plots  # noqa: F401 - before the work, not after it

        files = find_run(arguments.run)
        model, make_env = load_run(files, arguments.env, arguments.trust)
        folder = arguments.output or run_folder(files.model) / "report"
        run = read_run(files, model)
        path = write_report(run, files, make_env, folder, arguments.episodes, arguments.seed, not arguments.no_video)
    except (ImportError, OSError, ValueError, gym.error.Error) as error:
        sys.exit(f"{type(error).__name__}: {error}")
    print(f"Report: {path}")


if __name__ == "__main__":
    main()
