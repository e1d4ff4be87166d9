"""rl_zoo3's own commands, in a virtual environment where the package is installed as users install it: as a wheel."""

import os
import re
import shutil
import signal
import subprocess
import sys
import sysconfig
import venv
import warnings
from pathlib import Path
from types import ModuleType

import gymnasium as gym
import optuna
import pytest
import yaml
from rl_zoo3 import exp_manager, hyperparams_opt, utils
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.vec_env import SubprocVecEnv
from tiny import Drift, tiny_model

from sb3_mbmpo import MBMPO, zoo
from sb3_mbmpo.cli.environments import listing
from sb3_mbmpo.report.run_log import find_run, read_run
from sb3_mbmpo.report.run_plots import why_not_comparable
from sb3_mbmpo.zoo import extension
from sb3_mbmpo.zoo.search_space import SPACE, convert, suggest

ROOT = Path(__file__).parent.parent
CONFIG = yaml.safe_load(zoo.config_file().read_text())
KNOWN_AT_IMPORT = "mbmpo" in utils.ALGOS  # before any test calls register()
ENV_IDS = [
    *("Pendulum-v1", "CartPole-v1", "InvertedPendulum-v5", "InvertedDoublePendulum-v5", "MountainCarContinuous-v0"),
    *("Acrobot-v1", "Reacher-v5", "Swimmer-v5", "HalfCheetah-v5", "Hopper-v5", "Walker2d-v5", "Ant-v5"),
]

TINY = (
    "-params learning_starts:40 n_steps:20 n_models:2 n_tasks:2 n_imagined_rollouts:2 horizon:5 n_meta_steps:1 "
    "dynamics_kwargs:dict(net_arch=[8],max_epochs=2) --env-kwargs max_episode_steps:20"
)
TRAIN = f"train --algo mbmpo --env Pendulum-v1 -n 80 --eval-freq 40 --eval-episodes 2 --save-replay-buffer {TINY}"
# In this order: the later ones use what the first one has saved. The last column is a file that must exist afterwards
COMMANDS = [
    (f"rl_zoo3 {TRAIN}", "logs/mbmpo/Pendulum-v1_1/Pendulum-v1.zip"),
    ("rl_zoo3 enjoy --algo mbmpo --env Pendulum-v1 -f logs -n 20 --reward-log rewards", "rewards/0.monitor.csv"),
    ("rl_zoo3 plot_train -a mbmpo -e Pendulum-v1 -f logs -w 1", None),
    ("rl_zoo3 all_plots -a mbmpo -e Pendulum-v1 -f logs --no-display -o results", "results.pkl"),
    ("python -m rl_zoo3.record_video --algo mbmpo --env Pendulum-v1 -f logs -n 5 -o video", "video/*.mp4"),
    (
        # rl_zoo3 closes the environment, here in another process, before it saves the model
        f"python -m rl_zoo3.{TRAIN} --vec-env subproc -i logs/mbmpo/Pendulum-v1_1/Pendulum-v1.zip",
        "logs/mbmpo/Pendulum-v1_2/Pendulum-v1.zip",
    ),
    # The sampler overrides most of -params; this seed draws small networks and short horizons
    (f"rl_zoo3 {TRAIN} -optimize --n-trials 1 --sampler random --seed 148 --no-optim-plots", "logs/mbmpo/report_*.csv"),
]


def run(command, folder, bin_folder):
    """Run a command line in a folder, with the virtual environment's programs first in the path and without a display."""
    env = os.environ | {
        "PATH": f"{bin_folder}{os.pathsep}{os.environ['PATH']}",
        "OMP_NUM_THREADS": "1",
        "MPLBACKEND": "Agg",
        "SDL_VIDEODRIVER": "dummy",
    }
    env.pop("PYTHONPATH", None)
    result = subprocess.run(command.split(), cwd=folder, env=env, capture_output=True, text=True, check=False, timeout=300)
    assert result.returncode == 0, f"{command}\n{result.stdout[-2000:]}\n{result.stderr[-4000:]}"
    return result.stdout + result.stderr


def pip(*arguments):
    subprocess.run(
        [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check", *arguments], check=True, timeout=300
    )


@pytest.fixture(scope="module")
def wheel_bin(tmp_path_factory):
    """
    Create a virtual environment with the wheel in it, and return the folder of its programs.

    It sees our dependencies through a .pth file, because installing them again would take minutes. A folder named in a .pth
    file is not a site directory, so the .pth files in it, which would bring in the editable installation, are not read.
    """
    folder = tmp_path_factory.mktemp("wheel")
    pip("wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", str(folder), str(ROOT))
    venv.create(folder / "venv", with_pip=False)
    programs = folder / "venv" / "bin"
    site = Path(sysconfig.get_path("purelib", vars={"base": str(folder / "venv")}))
    (site / "our_dependencies.pth").write_text(sysconfig.get_path("purelib"))
    pip("--python", str(programs / "python"), "install", "--no-deps", "--ignore-installed", str(*folder.glob("*.whl")))
    # The script that pip would write
    ours = (Path(sys.prefix) / "bin" / "rl_zoo3").read_text().splitlines()
    (programs / "rl_zoo3").write_text("\n".join([f"#!{programs / 'python'}", *ours[1:]]))
    (programs / "rl_zoo3").chmod(0o755)
    return programs


@pytest.fixture(scope="module")
def empty_folder(tmp_path_factory):
    return tmp_path_factory.mktemp("empty")


@pytest.mark.parametrize(("command", "result"), COMMANDS, ids=lambda value: " ".join((value or "").split()[:3]))
def test_literal_command(command, result, wheel_bin, empty_folder):
    output = run(command, empty_folder, wheel_bin)
    assert "rror" not in output.replace("reward_error", "")
    assert result is None or list(empty_folder.glob(result)), output


def test_ctrl_c_leaves_a_model(wheel_bin, tmp_path):
    # As in a terminal, the workers get the signal, too
    command = TRAIN.replace("-n 80 --eval-freq 40", "-n 1000000 --eval-freq 1000000") + " --vec-env subproc"
    with subprocess.Popen(
        [wheel_bin / "rl_zoo3", *command.split()],
        cwd=tmp_path,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    ) as process:
        output = ""
        while "n_updates" not in output:  # of an iteration
            line = process.stdout.readline()
            assert line, f"it ended too early:\n{output}"
            output += line
        os.killpg(process.pid, signal.SIGINT)
        output += process.communicate(timeout=60)[0]
    assert process.returncode == 0, output
    assert "Traceback" not in output
    saved = tmp_path / "logs" / "mbmpo" / "Pendulum-v1_1"
    model = MBMPO.load(saved / "Pendulum-v1.zip")
    assert model.num_timesteps >= 40
    model.load_replay_buffer(saved / "replay_buffer.pkl")
    assert model.replay_buffer.size() >= 40


class CtrlC(BaseCallback):
    """A callback that acts like Ctrl-C in a terminal, where the workers have certainly ended before anything is closed."""

    def _on_step(self):
        for process in self.training_env.processes:
            process.kill()
            process.join()
        raise KeyboardInterrupt


@pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")
def test_workers_that_end_before_rl_zoo3_closes_them_cost_no_model(tmp_path):
    zoo.register()
    env = SubprocVecEnv([Drift, Drift], start_method="fork")
    model = tiny_model(env)
    manager = object.__new__(exp_manager.ExperimentManager)
    manager.algo, manager.log_interval, manager.n_timesteps, manager.callbacks = "mbmpo", -1, 40, [CtrlC()]
    manager.learn(model)
    assert env.closed
    model.save(tmp_path / "model")
    assert MBMPO.load(tmp_path / "model").num_timesteps == 2


def test_the_wheel_is_what_runs(wheel_bin, tmp_path):
    code = "import sb3_mbmpo.zoo as z; print(z.__file__, z.config_file())"
    (tmp_path / "code.py").write_text(code)
    module, config = run("python code.py", tmp_path, wheel_bin).split()
    assert Path(module).is_relative_to(wheel_bin.parent)
    assert Path(config).is_relative_to(wheel_bin.parent)


def test_the_wheel_lists_the_same_environments_and_returns(wheel_bin, tmp_path):
    *listed, _ = listing().splitlines()  # the last line has the path of the configuration
    assert run("python -m sb3_mbmpo --list", tmp_path, wheel_bin).splitlines()[:-1] == listed


def test_hook_costs_less_than_a_millisecond(wheel_bin, tmp_path):
    def microseconds():
        output = run("python -X importtime -c pass", tmp_path, wheel_bin)
        return int(re.search(r"\|\s*(\d+) \|\s*_sb3_mbmpo_zoo_hook", output)[1])

    assert min(microseconds() for _ in range(10)) < 1000  # the minimum of several, because other programs may be running


def test_hook_imports_the_standard_library_only(wheel_bin, tmp_path):
    (tmp_path / "code.py").write_text("import sys; print(*(sorted({name.split('.')[0] for name in sys.modules})))")
    modules = set(run("python code.py", tmp_path, wheel_bin).split())
    assert modules - sys.stdlib_module_names - {"__main__", "__mp_main__"} == {"_sb3_mbmpo_zoo_hook"}


def test_a_source_tree_comes_before_the_wheel(wheel_bin, tmp_path):
    (tmp_path / "sb3_mbmpo").mkdir()
    (tmp_path / "sb3_mbmpo" / "__init__.py").touch()
    (tmp_path / "code.py").write_text("import sb3_mbmpo; print(sb3_mbmpo.__file__)")
    assert Path(run("python code.py", tmp_path, wheel_bin).strip()).is_relative_to(tmp_path)


def test_uninstalling_leaves_nothing_behind(wheel_bin, tmp_path):
    shutil.copytree(wheel_bin.parent, tmp_path / "venv", symlinks=True)
    pip("--python", str(tmp_path / "venv" / "bin" / "python"), "uninstall", "--yes", "sb3-mbmpo")
    assert not list(tmp_path.glob("venv/lib/**/*mbmpo*"))


def test_hook_works_where_the_tests_run():
    assert KNOWN_AT_IMPORT


def test_without_rl_zoo3_the_hook_is_silent(wheel_bin, tmp_path):
    (tmp_path / "code.py").write_text("import sys; sys.path = sys.path[:-1]; import sb3_mbmpo; import rl_zoo3")
    result = subprocess.run([wheel_bin / "python", "code.py"], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert result.stderr.splitlines()[-1] == "ModuleNotFoundError: No module named 'rl_zoo3'"


def test_rl_zoo3_without_the_modules_we_extend_is_warned_of(wheel_bin, tmp_path):
    (tmp_path / "rl_zoo3").mkdir()
    (tmp_path / "rl_zoo3" / "__init__.py").touch()
    (tmp_path / "rl_zoo3" / "exp_manager.py").touch()
    (tmp_path / "code.py").write_text("import rl_zoo3, rl_zoo3.exp_manager")
    output = run("python code.py", tmp_path, wheel_bin)
    assert output.count("RuntimeWarning") == 1
    assert "rl_zoo3 has no rl_zoo3.utils, rl_zoo3.hyperparams_opt" in output
    assert "`python -m sb3_mbmpo train --env ENV`" in output


def test_register_more_than_once():
    zoo.register()
    zoo.register()
    assert utils.ALGOS["mbmpo"] is MBMPO
    assert hyperparams_opt.HYPERPARAMS_CONVERTER["mbmpo"] is convert
    assert [type(finder).__name__ for finder in sys.meta_path].count("ZooFinder") == 1


@pytest.mark.parametrize(("algo", "config"), [("mbmpo", None), ("mbmpo", "mine.yml"), ("ppo", None)])
def test_default_configuration_file(algo, config, tmp_path):
    zoo.register()
    mine = {"Pendulum-v1": {"policy": "MlpPolicy", "n_timesteps": 7}}
    (tmp_path / "mine.yml").write_text(yaml.safe_dump(mine))
    config = config and str(tmp_path / config)
    hyperparams, _ = exp_manager.ExperimentManager(None, algo, "Pendulum-v1", "logs", config=config).read_hyperparameters()
    if algo == "ppo":
        assert "clip_range" in hyperparams
    else:
        assert hyperparams == (mine if config else CONFIG)["Pendulum-v1"]


@pytest.mark.parametrize(("given", "size"), [(None, 27), ({"include_cfrc_ext_in_observation": True}, 105)])
def test_evaluation_has_the_env_kwargs_of_the_entry(given, size, tmp_path):
    zoo.register()
    manager = exp_manager.ExperimentManager(None, "mbmpo", "Ant-v5", str(tmp_path), eval_env_kwargs=given, verbose=0)
    manager._preprocess_hyperparams(manager.read_hyperparameters()[0])
    assert manager.create_envs(1, no_log=True).observation_space.shape == (27,)
    assert manager.create_envs(1, eval_env=True).observation_space.shape == (size,)


@pytest.mark.parametrize("keeps", [True, False])
def test_a_checkpoint_goes_on_with_its_real_steps_or_says_that_they_are_gone(keeps, tmp_path):
    """Train with ``--save-freq``, kill the process, and continue with ``-i`` from the last checkpoint."""
    zoo.register()

    def manager(**kwargs):
        return exp_manager.ExperimentManager(None, "mbmpo", "Pendulum-v1", str(tmp_path), verbose=0, **kwargs)

    first = manager(save_freq=60, save_replay_buffer=keeps)
    first.save_path = str(tmp_path)
    first.create_callbacks()
    env = make_vec_env("Pendulum-v1")
    tiny_model(env).learn(60, callback=first.callbacks)
    second = manager(trained_agent=str(tmp_path / "rl_model_60_steps.zip"))
    if keeps:
        model = second._load_pretrained_agent({"policy": "MlpPolicy"}, env)
    else:
        with pytest.warns(UserWarning, match="replay buffer is empty.*--save-replay-buffer"):
            model = second._load_pretrained_agent({"policy": "MlpPolicy"}, env)
    assert model.replay_buffer.size() == (59 if keeps else 0)  # callbacks run before the last step is stored


def test_a_run_of_the_zoo_has_a_log_whose_imagined_curves_the_report_shows(tmp_path):
    zoo.register()
    manager = exp_manager.ExperimentManager(None, "mbmpo", "Pendulum-v1", str(tmp_path), verbose=0, log_interval=-1)
    manager.create_log_folder()
    manager.create_callbacks()
    model = tiny_model(make_vec_env("Pendulum-v1", seed=0), baseline="linear", horizon=200)
    manager.n_timesteps = 220
    manager.learn(model)
    manager.save_trained_model(model)
    assert len(model.logger.output_formats) == 0
    files = find_run(Path(manager.save_path))
    assert (files.model.name, files.progress.name) == ("Pendulum-v1.zip", "progress.csv")
    run = read_run(files, MBMPO.load(files.model))
    steps, returns = run.column("imagined/ep_rew_mean")
    assert steps.tolist() == list(range(20, 221, 20))
    assert len(returns) == 11
    assert why_not_comparable(run) == ""


def test_a_search_of_the_zoo_writes_no_log(tmp_path):
    zoo.register()
    manager = exp_manager.ExperimentManager(
        None, "mbmpo", "Pendulum-v1", str(tmp_path), verbose=0, optimize_hyperparameters=True
    )
    manager.create_callbacks()
    assert not [callback for callback in manager.callbacks if type(callback).__name__ == "ProgressLog"]


def test_another_version_of_rl_zoo3_is_warned_of_once(monkeypatch):
    monkeypatch.setattr(extension, "_warned", False)
    with pytest.warns(RuntimeWarning, match=r"rl_zoo3.utils \(AttributeError.*python -m sb3_mbmpo train"):
        extension.extend_or_warn(ModuleType("rl_zoo3.utils"))
    with warnings.catch_warnings(action="error"):
        extension.extend_or_warn(ModuleType("rl_zoo3.exp_manager"))


# ---------------------------------------------------------------- configuration file


def test_there_is_an_entry_for_each_environment():
    assert set(ENV_IDS) <= set(CONFIG)


@pytest.mark.parametrize("name", CONFIG)
def test_entry_builds_a_model(name):
    config = zoo.read_config(name)
    env_id, n_timesteps = config.pop("env_id", name if name != "default" else "Pendulum-v1"), config.pop("n_timesteps")
    env = gym.make(env_id, **config.pop("env_kwargs", {}))
    model = MBMPO(env=env, **config)
    assert n_timesteps > model.learning_starts, "nothing would be learned"
    # sb3_mbmpo knows Ant's reward only for observations that include the contact forces
    assert (model._functions.reward.source == "learned") == env_id.startswith("Ant")


# ---------------------------------------------------------------- search space


@pytest.mark.parametrize("seed", range(20))
def test_every_point_of_the_space_builds_a_model(seed):
    trial = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed)).ask()
    arguments = convert(suggest(trial))
    assert yaml.safe_load(yaml.safe_dump(arguments)) == arguments
    model = MBMPO("MlpPolicy", "Pendulum-v1", **arguments)
    assert model.n_tasks % model.n_models == 0


def test_part_of_the_space():
    trial = optuna.create_study().ask()
    assert set(suggest(trial, ["inner_lr", "horizon"])) == {"inner_lr", "horizon"} == set(trial.params)
    assert {name.split(".")[0] for name in SPACE} >= {"inner_lr", "dynamics_kwargs", "policy_kwargs"}


@pytest.mark.parametrize(
    ("params", "arguments"),
    [
        ({"inner_lr": 0.0123456}, {"inner_lr": 0.0123}),
        ({"n_models-n_tasks": "3-12"}, {"n_models": 3, "n_tasks": 12}),
        (
            {"policy_kwargs.net_arch": "32-16", "policy_kwargs.log_std_init": -1.0},
            {"policy_kwargs": {"net_arch": [32, 16], "log_std_init": -1.0}},
        ),
    ],
)
def test_convert(params, arguments):
    assert convert(params) == arguments
