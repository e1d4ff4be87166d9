"""
Compare the engine's speed with the machine's own limit: ``make bench``.

Every stage is timed against the bare matmuls of the dynamics, with the same shapes and threads, alternating in the same run:
on a shared machine, only their ratio is meaningful. Low precision alternates with single precision, and two processes with
one (``processes.py``). Each configuration runs in a process of its own, so that its peak memory and its threads are its own,
too. A summary compares the ratios with the goals.

``--stages imagination --sizes authors --threads 1`` takes a minute, all of it half an hour.
"""

import argparse
import json
import multiprocessing
import platform
import resource
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch as th
from stable_baselines3.common.env_util import make_vec_env

from sb3_mbmpo import MBMPO
from sb3_mbmpo.common.linalg import conjugate_gradient
from sb3_mbmpo.common.threads import even_shares, in_parallel, single_threaded_operations, worker_threads
from sb3_mbmpo.dynamics.networks import matmul_dtype
from sb3_mbmpo.meta.adaptation import TaskBatch, adapt
from sb3_mbmpo.meta.outer_step import fisher_vector_product, meta_gradient, trust_region_step
from sb3_mbmpo.meta.problem import MetaProblem
from sb3_mbmpo.meta.training import MetaTrainer, adapting_tasks
from sb3_mbmpo.zoo import ENV_ENTRIES, read_config

# Size: its entry of zoo_configs/mbmpo.yml
ENTRIES = {"authors": "HalfCheetah-v5-authors", "half-cheetah": "HalfCheetah-v5", "pendulum": "Pendulum-v1"}
STAGES = ("iteration", "fit", "imagination", "meta_step")
FIT_EPOCHS = 2
CPU = th.device("cpu")


class Bench:
    """One configuration: a model with real data, and the measurements of it."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.arguments, self.n_threads = arguments, arguments.threads
        entry = read_config(ENTRIES[arguments.size])
        env = make_vec_env(entry.get("env_id", ENTRIES[arguments.size]), seed=0, env_kwargs=entry.get("env_kwargs"))
        hyperparams = {key: value for key, value in entry.items() if key not in ENV_ENTRIES}
        dynamics_kwargs = hyperparams.pop("dynamics_kwargs", {}) | {
            "precision": arguments.precision,
            "max_epochs": arguments.epochs,
            "rolling_average_persistency": 1.0,  # no early stopping: the same number of epochs for all configurations
        }
        hyperparams |= {
            "learning_starts": arguments.rows + 1,
            "n_meta_steps": arguments.meta_steps,
            "stop_on_return_drop": False,
        }
        self.model = MBMPO(
            env=env, seed=0, device=arguments.device, dynamics_kwargs=dynamics_kwargs, **{**hyperparams, **arguments.override}
        )
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Nothing will be learned")
            self.model.learn(arguments.rows)  # random steps only: the first fit would come one step later
        self.dynamics = self.model.dynamics
        self.layers = [weight.detach().to(self.dynamics.matmul_dtype) for weight in self.dynamics.weights]
        self.batch_size = dynamics_kwargs.get("batch_size", 256)

    # ---------------------------------------------------------------- time

    def seconds(self, function: Callable[[], object]) -> float:
        """Return the wall time of a call."""
        start = time.perf_counter()
        function()
        if self.dynamics.device.type == "cuda":
            th.cuda.synchronize()
        return time.perf_counter() - start

    def in_turns(self, *functions: Callable[[], object]) -> list[list[float]]:
        """Return the wall times of functions called in turns, after a warm-up turn; so other load affects all alike."""
        turns = [[self.seconds(function) for function in functions] for _ in range(self.arguments.repeat + 1)]
        return [list(times) for times in zip(*turns[1:], strict=True)]

    @contextmanager
    def _in_float32(self) -> Iterator[None]:
        """Let the dynamics multiply in single precision inside the block."""
        before, self.dynamics.precision = self.dynamics.precision, "float32"
        try:
            yield
        finally:
            self.dynamics.precision = before

    # ---------------------------------------------------------------- bare matmuls

    def matmuls_by_rows(self, rows: int, times: int) -> Callable[[], None]:
        """Return a function with the bare matmuls of imagination: the threads share the rows of each of ``times`` passes."""
        jobs = [partial(self._chain(share), times) for share in self._shares(rows)]
        return lambda: in_parallel(jobs, self.n_threads) and None

    def matmuls_by_batch(self, rows: int, times: int, backward: bool) -> Callable[[], None]:
        """Return a function with the bare matmuls of a fit: each thread takes whole batches of ``rows`` rows per member."""
        jobs = [partial(self._chain(rows, backward), count) for count in self._shares(times)]
        return lambda: in_parallel(jobs, self.n_threads) and None

    def _shares(self, number: int) -> list[int]:
        return [share.stop - share.start for share in even_shares(number, self.n_threads)]

    def _chain(self, rows: int, backward: bool = False) -> Callable[[int], None]:
        def random(width: int) -> th.Tensor:
            return th.randn(len(self.layers[0]), rows, width, device=self.dynamics.device).to(self.dynamics.matmul_dtype)

        inputs = [random(weight.shape[1]) for weight in self.layers]
        gradients = [random(weight.shape[2]) for weight in self.layers] if backward else []
        outputs = [th.empty_like(random(weight.shape[2])) for weight in self.layers]
        transposed = [weight.transpose(1, 2) for weight in self.layers]

        @th.no_grad()
        def run(times: int) -> None:
            for _ in range(times):
                for x, weight, out in zip(inputs, self.layers, outputs, strict=True):
                    th.bmm(x, weight, out=out)
                for i, gradient in enumerate(gradients):
                    th.bmm(inputs[i].transpose(1, 2), gradient)
                    if i > 0:
                        th.bmm(gradient, transposed[i])

        return run

    # ---------------------------------------------------------------- stages

    def fit(self) -> dict[str, Any]:
        """Measure rows x models per second of the fit, compared with its bare matmuls, a single thread and float32."""
        model, data = self.model, self.model._transitions()
        n_train = len(data.obs) - int(0.2 * len(data.obs))
        training = self.matmuls_by_batch(self.batch_size, round(FIT_EPOCHS * n_train / self.batch_size), backward=True)
        n_val_batches = round(FIT_EPOCHS * (len(data.obs) - n_train) / (4 * self.batch_size))
        validation = self.matmuls_by_batch(4 * self.batch_size, n_val_batches, backward=False)

        def fit(n_threads: int) -> object:
            options = {"max_epochs": FIT_EPOCHS, "batch_size": self.batch_size, "rolling_average_persistency": 1.0}
            return model.dynamics.fit(data, n_threads=n_threads, **options)

        def bound() -> None:
            training()
            validation()

        def in_float32() -> None:
            with self._in_float32():
                fit(self.n_threads)

        others = self._others(one_thread=partial(fit, 1), float32=in_float32)
        ours, alone, *theirs = self.in_turns(partial(fit, self.n_threads), bound, *others.values())
        result = {
            "rows_x_models_per_s": FIT_EPOCHS * n_train * model.n_models / median(ours),
            "share_of_bound": median(b / a for a, b in zip(ours, alone, strict=True)),
        }
        return result | self._times_as_fast(ours, dict(zip(others, theirs, strict=True)))

    def _others(self, **functions: Callable[[], object]) -> dict[str, Callable[[], object]]:
        """Return those of two further ways to do the same, with one thread and in float32, that are not the way itself."""
        is_other = {"one_thread": self.n_threads > 1, "float32": self.dynamics.matmul_dtype != th.float32}
        return {name: function for name, function in functions.items() if is_other[name]}

    def _times_as_fast(self, ours: Sequence[float], others: dict[str, list[float]]) -> dict[str, float]:
        return {f"times_{name}": median(b / a for a, b in zip(ours, times, strict=True)) for name, times in others.items()}

    def imagination(self) -> dict[str, Any]:
        """Measure imagined steps per second, compared with bare matmuls, with one thread and with float32."""
        trainer, alone = self.trainer(self.n_threads), self.trainer(1)
        s = trainer.settings
        steps, rows = s.n_tasks * s.n_imagined_rollouts * s.horizon, s.n_tasks * s.n_imagined_rollouts // self.model.n_models
        bound = self.matmuls_by_rows(rows, s.horizon)
        parameters = self.model.policy.actor_vector().expand(s.n_tasks, -1)
        with self._in_float32():
            single_precision = self.trainer(self.n_threads)  # it has its own copy of the weights

        def ours() -> None:
            self.rollouts(trainer, parameters)

        others = self._others(
            one_thread=lambda: self.rollouts(alone, parameters), float32=lambda: self.rollouts(single_precision, parameters)
        )
        times, alone_times, *theirs = self.in_turns(ours, bound, *others.values())
        result = {
            "steps_per_s": steps / median(times),
            "gflops": steps * self.dynamics.flops / median(times) / 1e9,
            "bound_gflops": steps * self.dynamics.flops / median(alone_times) / 1e9,
            "share_of_bound": median(b / a for a, b in zip(times, alone_times, strict=True)),
        } | self._times_as_fast(times, dict(zip(others, theirs, strict=True)))
        if self.n_threads > 1:
            process = subprocess.Popen([sys.executable, "-c", "while True: pass"])
            try:
                times, single = self.in_turns(ours, others["one_thread"])
            finally:
                process.kill()
                process.wait()
            result |= self._times_as_fast(times, {"one_thread_beside_a_busy_process": single})
        return result

    def trainer(self, n_threads: int) -> MetaTrainer:
        return self.model._meta_trainer(self.model._generators, n_threads)

    @th.no_grad()
    def rollouts(self, trainer: MetaTrainer, parameters: th.Tensor) -> Any:
        return trainer.imagined(parameters)

    def meta_step(self) -> dict[str, Any]:
        """Measure the seconds of each part of a meta-step, and its ratio to the imagination of its two batches."""
        trainer, meta = self.trainer(self.n_threads), self.model._meta_parameters()
        s = trainer.settings
        parameters = meta.theta.expand(s.n_tasks, -1)
        rollouts, estimate = trainer.imagine(parameters)
        pre = TaskBatch.from_rollouts(rollouts, estimate.advantages)
        adapted_rollouts, adapted_estimate = trainer.imagine(adapt(trainer.actor, meta.theta, [pre], meta.inner_lr))
        post = TaskBatch.from_rollouts(adapted_rollouts, adapted_estimate.advantages)
        problem = MetaProblem(
            trainer.actor,
            (pre,),
            post,
            chunk_size=s.chunk_size,
            groups=trainer.task_slices,
            n_threads=self.n_threads,
            adapts=adapting_tasks(s.n_tasks, s.unadapted_share, like=meta.theta),
        ).adapting_first()
        sample = problem.subsample(self.model.sub_sampling_factor)
        gradient, *_ = meta_gradient(problem, meta)
        product = fisher_vector_product(sample, meta, self.model.cg_damping)

        parts: dict[str, Callable[[], object]] = {
            "advantages of one batch": lambda: trainer.judge(rollouts),
            "critic": lambda: trainer.critic.fit(rollouts, estimate) if trainer.critic else None,
            "adaptation": lambda: trainer._one_inner_step(parameters, pre, meta, None),
            "meta-gradient": lambda: meta_gradient(problem, meta),
            "Fisher graphs": lambda: fisher_vector_product(sample, meta),
            "conjugate gradient": lambda: conjugate_gradient(product, gradient, self.model.cg_max_steps),
            "outer step": lambda: trust_region_step(problem, meta, **s.outer_kwargs),
            "imagination of one batch": lambda: self.rollouts(trainer, parameters),
        }
        times = dict(zip(parts, self.in_turns(*parts.values()), strict=True))
        turns = zip(*(times[name] for name in ("advantages of one batch", "critic", "adaptation", "outer step")), strict=True)
        whole = [2 * advantage + critic + adaptation + outer for advantage, critic, adaptation, outer in turns]
        critic_share = [
            critic / (rest + 2 * imagined)
            for critic, rest, imagined in zip(times["critic"], whole, times["imagination of one batch"], strict=True)
        ]
        imagined = times["imagination of one batch"]
        return {
            "seconds": {name: median(times[name]) for name in times} | {"whole, without imagination": median(whole)},
            "critic_share": median(critic_share),
            "ratio_to_imagination": median(a / (2 * b) for a, b in zip(whole, imagined, strict=True)),
        }

    def iteration(self) -> dict[str, Any]:
        """Measure the seconds of each stage of a whole iteration, as the algorithm logs them."""
        self.model._stopwatch = type(self.model._stopwatch)()
        th.set_num_threads(self.n_threads)
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        self.model.train()
        seconds = {name: value for name, value in self.model._stopwatch.seconds.items() if value > 0}
        after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        s = self.model
        return {
            "seconds": seconds | {"whole": sum(seconds.values())},
            "imagined_steps": (2 * s.n_meta_steps + 1) * s.n_tasks * s.n_imagined_rollouts * s.horizon,
            "peak_memory_mib": after / 1024,
            "peak_memory_of_the_iteration_mib": (after - before) / 1024,
        }


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    """Take all measurements of one configuration in this process."""
    th.set_num_threads(arguments.threads)
    bench = Bench(arguments)
    result: dict[str, Any] = {
        "size": arguments.size,
        "device": str(bench.dynamics.device),
        "threads": arguments.threads,
        "dtype": str(bench.dynamics.matmul_dtype).removeprefix("torch."),
    }
    # First, because the recorded peak memory never decreases
    if "iteration" in arguments.stages:
        result["iteration"] = bench.iteration()
    with single_threaded_operations():
        return result | {stage: getattr(bench, stage)() for stage in STAGES[1:] if stage in arguments.stages}


def lines(result: dict[str, Any]) -> Iterator[str]:
    """Yield the lines of a readable report on one configuration."""

    def others(stage: dict[str, Any]) -> str:
        names = {
            "times_one_thread": "one thread",
            "times_one_thread_beside_a_busy_process": "one thread, both beside a busy process",
        }
        names["times_float32"] = "float32"
        found = [f"{stage[key]:.2f} times {name}" for key, name in names.items() if key in stage]
        return "; " + ", ".join(found) if found else ""

    yield f"## {result['size']}, {result['device']}, {result['threads']} thread(s), {result['dtype']}"
    if imagination := result.get("imagination"):
        yield (
            f"imagination: {imagination['steps_per_s']:,.0f} steps/s, {imagination['gflops']:.0f} GFLOP/s, compared with "
            f"{imagination['bound_gflops']:.0f} for the bare matmuls of the dynamics ({imagination['share_of_bound']:.0%})"
            f"{others(imagination)}"
        )
    if fit := result.get("fit"):
        yield (
            f"fit: {fit['rows_x_models_per_s']:,.0f} rows x models/s, {fit['share_of_bound']:.0%} of its bare matmuls"
            f"{others(fit)}"
        )
    if meta_step := result.get("meta_step"):
        yield (
            f"meta-step: {meta_step['ratio_to_imagination']:.2f} of the imagination of its two batches; the critic is "
            f"{meta_step['critic_share']:.0%} of all; seconds of"
        )
        yield "  " + ", ".join(f"{name} {seconds:.3f}" for name, seconds in meta_step["seconds"].items())
    if iteration := result.get("iteration"):
        yield (
            f"a whole iteration ({iteration['imagined_steps']:,} imagined steps): "
            + ", ".join(f"{name} {seconds:.1f} s" for name, seconds in iteration["seconds"].items())
            + f"; peak memory {iteration['peak_memory_mib']:,.0f} MiB"
        )


def summary(results: Sequence[dict[str, Any]]) -> Iterator[str]:
    """Yield a line for each goal that was measured, on one CPU core or on two."""
    one_core = [result for result in results if result["device"] == "cpu" and result["threads"] == 1]
    for result in one_core:
        where = f"{result['size']}, one core, {result['dtype']}"
        imagination, fit, meta_step = (result.get(stage, {}) for stage in ("imagination", "fit", "meta_step"))
        if result["size"] == "authors" and result["dtype"] == "float32" and imagination:
            yield f"{where}: imagination reaches {imagination['share_of_bound']:.0%} of its matmuls alone (goal: 90 %)"
        for name, stage, goal in [("imagination", imagination, 1.6), ("fit", fit, 1.5)]:
            if "times_float32" in stage:
                aim = f" (goal: {goal})" if result["size"] == "authors" else ""
                yield f"{where}: {name} {stage['times_float32']:.2f} times as fast as float32{aim}"
        if result["size"] != "authors" and meta_step:
            yield f"{where}: the critic takes {meta_step['critic_share']:.0%} of a meta-step"


def scaling(repeat: int) -> list[dict[str, Any]]:
    """Measure the default iterations in two processes and in one, see ``processes.py``, which prints its results."""
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "processes.json"
        command = [sys.executable, "-m", "tests.benchmarks.processes", "--workers", "1x1", "2x1"]
        subprocess.run([*command, "--repeat", str(repeat), "--output", str(output)], check=True)
        return json.loads(output.read_text())


def main(argv: Sequence[str] | None = None) -> list[dict[str, Any]]:
    """Measure the requested configurations, print the results and save them as JSON."""
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.engine", description=__doc__)
    parser.add_argument("--sizes", nargs="+", choices=ENTRIES, default=list(ENTRIES), help="default: all")
    parser.add_argument(
        "--stages", nargs="+", choices=[*STAGES, "processes"], default=[*STAGES, "processes"], help="default: all"
    )
    parser.add_argument("--threads", nargs="+", type=int, default=sorted({1, worker_threads(CPU)}))
    parser.add_argument("--precisions", nargs="+", default=["float32", "auto"], help='"auto" is skipped if it is float32')
    parser.add_argument("--devices", nargs="+", default=["cpu", *(["cuda"] if th.cuda.is_available() else [])])
    parser.add_argument("--repeat", type=int, default=5, help="number of repetitions; the median counts")
    parser.add_argument("--rows", type=int, default=20_000, help="number of real transitions")
    parser.add_argument("--epochs", type=int, default=50, help="epochs of the iteration's fit")
    parser.add_argument("--meta-steps", type=int, default=30, help="meta-steps of the iteration")
    parser.add_argument("--override", type=json.loads, default={}, help="arguments of MBMPO as JSON")
    parser.add_argument("--output", type=Path, default=Path(".benchmarks/engine.json"))
    arguments = parser.parse_args(argv)

    print(
        f"{platform.processor() or platform.machine()}, {worker_threads(CPU)} usable CPUs, PyTorch {th.__version__}",
        flush=True,
    )
    results = []
    for size in arguments.sizes:
        for device in arguments.devices:
            for precision in arguments.precisions:
                if precision == "auto" and matmul_dtype("auto", th.device(device)) == th.float32:
                    print(f"## {size}, {device}: no fast low precision on this machine", flush=True)
                    continue
                for threads in arguments.threads if device == "cpu" else [1]:
                    one = {**vars(arguments), "size": size, "device": device, "precision": precision, "threads": threads}
                    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
                        results.append(pool.submit(measure, argparse.Namespace(**one)).result())
                    print("\n".join(lines(results[-1])), flush=True)
    goals = list(summary(results))
    if "processes" in arguments.stages:
        print("## two processes, with one thread each, compared with one", flush=True)
        results.append({"processes": scaling(arguments.repeat)})
        goals += [
            f"{row['size']}, two cores: two processes {row['times_as_fast']['whole']:.2f} times as fast as one (goal: 1.6)"
            for row in results[-1]["processes"]
            if row["processes"] == 2
        ]
    if goals:
        print("## goals", *goals, sep="\n", flush=True)
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    arguments.output.write_text(json.dumps(results, indent=1))
    print(f"Saved to {arguments.output}")
    return results


if __name__ == "__main__":
    main()
