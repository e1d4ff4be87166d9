"""The queue: which algorithm is trained in which environment with which seeds, and when it is evaluated."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from sb3_mbmpo.zoo import config_file

OURS = "mbmpo"
PEERS = ("sac", "tqc", "crossq", "ppo", "trpo", "dqn")
N_EVAL_EPISODES = 10


@dataclass(frozen=True)
class Run:
    """
    One training, with everything that determines its learning curve.

    :param algo: "mbmpo", or rl_zoo3's name of a peer
    :param environment: name of the environment in the queue and in file names
    :param env_id: Gymnasium's id of the environment
    :param env_kwargs: arguments of the environment; the same for all algorithms
    :param entry: entry of ``zoo_configs/mbmpo.yml`` with our hyperparameters
    :param seed: seed of the training
    :param evaluate_at: real steps at which to evaluate, ascending; the last value ends the run
    :param learning_starts: maximum number of random first steps of a peer; None: as many as our entry has
    :param n_eval_episodes: number of episodes of each evaluation
    :param overrides: arguments that replace those of our entry or of rl_zoo3's settings
    :param variant: name of an ablation with these overrides; empty for runs that are no ablation
    """

    algo: str
    environment: str
    env_id: str
    env_kwargs: Mapping[str, Any]
    entry: str
    seed: int
    evaluate_at: tuple[int, ...]
    learning_starts: int | None = None
    n_eval_episodes: int = N_EVAL_EPISODES
    overrides: Mapping[str, Any] = field(default_factory=dict)
    variant: str = ""

    @property
    def name(self) -> str:
        """Return the name of the run, which its files have, too."""
        parts = (self.algo, self.environment.rpartition(":")[2], self.variant, f"seed{self.seed}")
        return "-".join(part for part in parts if part)

    @property
    def n_timesteps(self) -> int:
        """Return the number of real steps of the whole run."""
        return self.evaluate_at[-1]


def read_queue(path: Path) -> list[Run]:
    """
    Read all runs of a queue, in the order in which they are trained.

    :param path: a YAML file. Its ``environments`` map a name to ``evaluate_at``, the ``learning_starts`` of the peers, and
        those of ``entry``, ``env_id`` and ``env_kwargs`` that differ from the entry of ``zoo_configs/mbmpo.yml`` with this
        name. Its ``queue`` lists ``environment``, ``algorithms``, ``seeds`` and, optionally, ``max_steps``, ``overrides`` and
        ``variant``
    :return: the runs
    :raises ValueError: if something in the file is missing, misspelt or listed twice
    """
    document = read_document(path)
    ours = yaml.safe_load(config_file().read_text())
    environments = {name: _environment(name, given, ours) for name, given in document["environments"].items()}
    runs: dict[str, Run] = {}
    for item in document["queue"]:
        for run in _runs_of(item, environments, document.get("n_eval_episodes", N_EVAL_EPISODES)):
            if run.name in runs:
                raise ValueError(f"{path} lists {run.name} twice: each run writes one file, so list it only once.")
            runs[run.name] = run
    return list(runs.values())


def read_document(path: Path) -> dict[str, Any]:
    """
    Read the YAML file of a queue and check its top level.

    :param path: a YAML file, see ``read_queue``. Its ``picture`` names the environments that the README's plot shows
    :return: content of the file
    :raises ValueError: if something at the top level is missing or misspelt
    """
    return _mapping(yaml.safe_load(path.read_text()), f"{path}", ("environments", "queue"), ("n_eval_episodes", "picture"))


def _mapping(value: Any, where: str, required: Sequence[str], others: Sequence[str]) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise ValueError(f"{where} must be a dictionary with {', '.join(required)}, not {value!r}.")
    missing, unknown = set(required) - set(value), set(value) - {*required, *others}
    if missing or unknown:
        raise ValueError(
            f"{where} lacks {sorted(missing) or 'nothing'} and has the unknown {sorted(unknown) or 'nothing'}: "
            f"it must have {', '.join(required)}, and may have {', '.join(others)}."
        )
    return value


def _environment(name: str, given: Any, ours: Mapping[str, Any]) -> dict[str, Any]:
    """Return an environment of the queue, with missing values taken from our entry."""
    given = _mapping(given, f"Environment {name}", ("evaluate_at",), ("entry", "env_id", "env_kwargs", "learning_starts"))
    entry = given.get("entry", name)
    if entry not in ours:
        raise ValueError(f"zoo_configs/mbmpo.yml has no entry {entry!r} for the environment {name}: choose one with `entry`.")
    steps = given["evaluate_at"]
    if not steps or not all(isinstance(step, int) and step > 0 for step in steps) or sorted(set(steps)) != steps:
        raise ValueError(f"evaluate_at of {name} must be a list of positive, ascending real steps, not {steps}.")
    config = ours[entry]
    return {
        "environment": name,
        "entry": entry,
        "env_id": given.get("env_id", config.get("env_id", entry)),
        "env_kwargs": given.get("env_kwargs", config.get("env_kwargs", {})),
        "evaluate_at": tuple(steps),
        "learning_starts": given.get("learning_starts"),
    }


def _runs_of(item: Any, environments: Mapping[str, Mapping[str, Any]], n_eval_episodes: int) -> list[Run]:
    """Return the runs of one item of the queue: all algorithms with the first seed, then with the second, and so on."""
    item = _mapping(
        item, f"The queue's {item!r}", ("environment", "algorithms", "seeds"), ("max_steps", "overrides", "variant")
    )
    name, max_steps = item["environment"], item.get("max_steps", float("inf"))
    if name not in environments:
        raise ValueError(f"The queue's environment {name!r} is not one of {', '.join(environments)}.")
    unknown = set(item["algorithms"]) - {OURS, *PEERS}
    if unknown:
        raise ValueError(f"The queue's algorithms {sorted(unknown)} are not among {', '.join((OURS, *PEERS))}.")
    environment = dict(environments[name])
    environment["evaluate_at"] = tuple(step for step in environment["evaluate_at"] if step <= max_steps)
    if not environment["evaluate_at"]:
        raise ValueError(
            f"max_steps={max_steps} leaves no evaluation of {name}: the first is at {environments[name]['evaluate_at'][0]}."
        )
    return [
        Run(
            algo=algo,
            seed=seed,
            n_eval_episodes=n_eval_episodes,
            overrides=item.get("overrides", {}),
            variant=item.get("variant", ""),
            **environment,
        )
        for seed in item["seeds"]
        for algo in item["algorithms"]
    ]
