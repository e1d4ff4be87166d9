"""Training of all ensemble members together; each has its own data split, early stopping and best weights.

The functions know neither networks nor data, only a loss of row numbers and a list of stacked parameters ``[M, ...]``.

Legend of shapes: ``M`` members, ``B`` rows of a batch.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch as th

from sb3_mbmpo.common.streams import spawned
from sb3_mbmpo.dynamics.parallel import MemberLoss, ParallelTraining, is_stacked

# (passes so far, passes at most, mean best validation loss) after every pass
PassHook = Callable[[int, int, float], None]
# A fit that is too short for whole epochs is divided into at least this many passes, because members may stop only after one
MIN_PASSES = 8
# More validation rows would hardly improve the early stopping, but make fits of much data slower
MAX_VALIDATION_ROWS = 5_000


class FitReport(NamedTuple):
    """
    The result of a fit, with one entry per member.

    :param train_loss: mean training loss of the member's last pass, [M]
    :param val_loss: validation loss of the weights that were kept (the best seen), [M]
    :param epochs: how often the member saw its training rows until it stopped, [M]
    :param gradient_steps: optimiser steps until the member stopped, [M]
    :param val_error: another measure of these weights on the validation rows, NaN if none was asked for, [M]. For
        ``DynamicsEnsemble.fit``: the mean absolute error of the reward, in its units, NaN if it is not learned
    """

    train_loss: np.ndarray
    val_loss: np.ndarray
    epochs: np.ndarray
    gradient_steps: np.ndarray
    val_error: np.ndarray

    def metrics(self) -> dict[str, float]:
        """Return the means over the members for the logger, by key; ``val_error`` is the caller's to name."""
        return {f"dynamics/{name}": float(values.mean()) for name, values in self._asdict().items() if name != "val_error"}


class _EarlyStop:
    """
    The authors' early stopping: a member stops when the exponential rolling average of its validation loss rises.

    The average starts at 1.5 times the first loss, so that a noisy first epoch does not stop the fit at once. (More precisely,
    half of its absolute value is added, because the likelihood loss of probabilistic members may be negative.)

    :param persistency: weight of the past in the rolling average, 0 to 1
    :param n_members: number of members
    """

    def __init__(self, persistency: float, n_members: int) -> None:
        self.persistency = persistency
        self.average = np.full(n_members, np.nan)

    def update(self, val_loss: np.ndarray, members: np.ndarray) -> np.ndarray:
        """
        Record the losses of one pass, and decide which members stop.

        :param val_loss: validation losses of the members that still train, [A]
        :param members: numbers of these members, [A]
        :return: whether each of them stops, [A] bool (True for a loss that is not finite)
        """
        start = val_loss + 0.5 * np.abs(val_loss)
        before = np.where(np.isnan(self.average[members]), start, self.average[members])
        average = self.persistency * before + (1 - self.persistency) * val_loss
        self.average[members] = average
        stops: np.ndarray = ~((average <= before) & np.isfinite(val_loss))
        return stops


def split_rows(n_rows: int, validation_fraction: float, generators: Sequence[th.Generator]) -> tuple[th.Tensor, th.Tensor]:
    """
    Draw a train/validation split for each member. If there are too few rows, validation uses the training rows.

    :param n_rows: number of transitions
    :param validation_fraction: share of the rows that each member holds out, but at most ``MAX_VALIDATION_ROWS`` rows
    :param generators: one for each member, which draws its split
    :return: training rows [M, n_train] and validation rows [M, n_val], long, on the generators' device
    """
    order = _permutations(n_rows, generators)
    n_val = min(int(n_rows * validation_fraction), MAX_VALIDATION_ROWS)
    if n_val == 0:
        return order, order
    return order[:, n_val:], order[:, :n_val]


def _permutations(n_rows: int, generators: Sequence[th.Generator]) -> th.Tensor:
    """Return an independent random order of the rows for each member, [M, n_rows] long."""
    return th.stack([th.randperm(n_rows, generator=generator, device=generator.device) for generator in generators])


class _Passes:
    """
    The order in which each member sees its training rows: epochs in random order, divided into passes.

    A pass is an epoch, or less if the gradient steps do not suffice for ``MIN_PASSES`` epochs. Then the first passes show the
    newest rows, so that the latest data is learned however much data there is.

    :param rows: training rows of each member [M, n_train]
    :param is_new: which of them are new [M, n_train] bool
    :param max_epochs: maximum number of epochs
    :param max_gradient_steps: maximum number of batches
    :param batch_size: rows per batch
    :param generators: one for each member, which draws its order
    """

    def __init__(
        self,
        rows: th.Tensor,
        is_new: th.Tensor,
        *,
        max_epochs: int,
        max_gradient_steps: int,
        batch_size: int,
        generators: Sequence[th.Generator],
    ) -> None:
        self._rows, self._generators = rows, generators
        self.batches_of_epoch = -(-rows.shape[1] // batch_size)
        self.batches = min(self.batches_of_epoch, -(-max_gradient_steps // MIN_PASSES))
        self.number = max(1, min(max_epochs * self.batches_of_epoch, max_gradient_steps) // self.batches)
        self._length = rows.shape[1] if self.batches == self.batches_of_epoch else self.batches * batch_size
        self._queue = rows[:, :0]
        if self.batches < self.batches_of_epoch:
            # The sort is stable: within the new rows and within the others, the order stays random
            self._queue = self._shuffled(is_new)

    def _shuffled(self, is_first: th.Tensor | None = None) -> th.Tensor:
        """Return each member's rows in random order; the rows of ``is_first`` come before the others."""
        order = _permutations(self._rows.shape[1], self._generators)
        if is_first is not None:
            ranks = is_first.gather(1, order).logical_not().to(th.uint8).argsort(dim=1, stable=True)
            order = order.gather(1, ranks)
        return self._rows.gather(1, order)

    def next(self) -> th.Tensor:
        """Return the rows of every member's next pass [M, B]."""
        while self._queue.shape[1] < self._length:
            self._queue = th.cat([self._queue, self._shuffled()], dim=1)
        rows, self._queue = self._queue[:, : self._length], self._queue[:, self._length :]
        return rows


def fit_members(
    parameters: Sequence[th.nn.Parameter],
    optimizer: th.optim.Optimizer,
    loss_fn: MemberLoss,
    n_rows: int,
    *,
    max_epochs: int,
    max_gradient_steps: int,
    batch_size: int,
    validation_fraction: float,
    rolling_average_persistency: float,
    generator: th.Generator,
    n_new_rows: int = 0,
    on_pass: PassHook | None = None,
    n_threads: int = 1,
    groups: Sequence[slice] | None = None,
    error_fn: MemberLoss | None = None,
) -> FitReport:
    """
    Train all members together, one optimiser step per batch, and restore the best weights of each member.

    It is the model-fitting line of algorithm 1 in Clavera et al. 2018. The best weights are restored member by member, because
    a single diverging member ruins the imagination of all its tasks.

    :param parameters: stacked parameters, each [M, ...]; member ``m`` owns slice ``m`` of each
    :param optimizer: an optimiser of these parameters; its state carries over to the next fit
    :param loss_fn: differentiable loss of some members, given their parameters and their own rows
    :param n_rows: number of transitions that the loss function can address
    :param max_epochs: maximum number of epochs
    :param max_gradient_steps: maximum number of optimiser steps, which bounds the time of a fit of much data
    :param batch_size: rows per member and step; fewer rows than that are one batch
    :param validation_fraction: share of the rows that each member holds out, drawn once per fit
    :param rolling_average_persistency: see ``_EarlyStop``
    :param generator: determines each member's own stream of splits and batches, and the device of the row numbers
    :param n_new_rows: number of the last rows that no fit has seen yet
    :param on_pass: called after every pass
    :param n_threads: how many threads share the members
    :param groups: neighbouring members that are computed together; others are not trained. None: all together
    :param error_fn: another measure of some members, given like the loss, for the report
    :return: losses, epochs and gradient steps of each member; NaN, infinite or 0 for those that are not trained
    """
    n_members = len(parameters[0])
    groups = [slice(0, n_members)] if groups is None else groups
    generators = spawned(generator, n_members)
    train_rows, val_rows = split_rows(n_rows, validation_fraction, generators)
    everyone = th.arange(groups[0].start, groups[-1].stop, device=generator.device)

    # The initial weights of a warm start are no candidates: they were trained on rows that are now used for validation
    best_loss = np.full(n_members, np.inf)
    best_weights = [parameter.detach().clone() for parameter in parameters]
    early_stop = _EarlyStop(rolling_average_persistency, n_members)
    train_loss = np.full(n_members, np.nan)
    gradient_steps = np.zeros(n_members, dtype=int)
    active = everyone
    training = ParallelTraining(parameters, optimizer, loss_fn, batch_size, n_threads, groups)

    passes = _Passes(
        train_rows,
        train_rows >= n_rows - n_new_rows,
        max_epochs=max_epochs,
        max_gradient_steps=max_gradient_steps,
        batch_size=batch_size,
        generators=generators,
    )
    for number in range(1, passes.number + 1):
        pass_loss = training.epoch(passes.next()[active], active)

        active_numbers = active.cpu().numpy()
        train_loss[active_numbers] = pass_loss.cpu().numpy()
        gradient_steps[active_numbers] = number * passes.batches

        val_loss = training.mean_loss(val_rows[active], active).cpu().numpy()
        for member, loss_value in zip(active_numbers, val_loss, strict=True):
            if loss_value < best_loss[member]:
                best_loss[member] = loss_value
                for best, parameter in zip(best_weights, parameters, strict=True):
                    best[member] = parameter.detach()[member]

        if on_pass is not None:
            on_pass(number, passes.number, float(best_loss[everyone.cpu().numpy()].mean()))
        stopped = early_stop.update(val_loss, active_numbers)
        active = active[th.as_tensor(~stopped, device=active.device)]
        if len(active) == 0:
            break

    training.finish()
    with th.no_grad():
        for parameter, best in zip(parameters, best_weights, strict=True):
            parameter.copy_(best)
    _forget_divergence(optimizer, parameters)
    val_error = np.full(n_members, np.nan)
    if error_fn is not None:
        val_error[everyone.cpu().numpy()] = training.mean_loss(val_rows[everyone], everyone, error_fn).cpu().numpy()
    return FitReport(train_loss, best_loss, gradient_steps / passes.batches_of_epoch, gradient_steps, val_error)


@th.no_grad()
def _forget_divergence(optimizer: th.optim.Optimizer, parameters: Sequence[th.nn.Parameter]) -> None:
    """Reset the optimiser's averages of diverged members: otherwise they would ruin the first step of every later fit."""
    for parameter in parameters:
        state = optimizer.state.get(parameter, {})
        averages = [value for value in state.values() if is_stacked(value, parameter)]
        if averages:
            diverged = ~th.stack(averages, dim=1).flatten(1).isfinite().all(1)
            for average in averages:
                average[diverged] = 0
