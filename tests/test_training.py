"""The fit of stacked members, with hand-written losses.

Most of the losses are scripted: the weights count optimiser steps, so that the value of a restored weight is its epoch, and
the validation losses come from a table.
"""

import numpy as np
import pytest
import torch as th

from sb3_mbmpo.common.streams import spawned
from sb3_mbmpo.dynamics.training import MAX_VALIDATION_ROWS, fit_members, split_rows

NAN = float("nan")


def seeded(seed=0):
    return th.Generator().manual_seed(seed)


def stacked(*shape):
    return th.nn.Parameter(th.zeros(shape))


def numbers(n_members):
    """Return a parameter that tells a loss which members it was called for.

    The loss must use it, as in 0 * numbers, because otherwise it has no gradient.
    """
    return th.nn.Parameter(th.arange(n_members).float())


def fit(parameters, loss_fn, n_rows=10, optimizer=None, seed=0, **kwargs):
    options = {
        "max_epochs": 4,
        "max_gradient_steps": 1_000_000,
        "batch_size": 100,
        "validation_fraction": 0.2,
        "rolling_average_persistency": 0.9,
    } | kwargs
    optimizer = optimizer or th.optim.SGD(parameters, lr=1)
    return fit_members(parameters, optimizer, loss_fn, n_rows, generator=seeded(seed), **options)


class Script:
    """A loss with which every step adds 1 to all weights of the active members; validation losses come from a table."""

    def __init__(self, val_losses, parameters):
        self.val_losses = th.tensor(val_losses)  # [epoch, member]
        self.parameters = parameters  # the last one holds the members' numbers
        self.epoch = 0
        self.weights = []  # of all members, after each epoch

    def __call__(self, parameters, rows):
        *weights, members = parameters
        if th.is_grad_enabled():
            return -sum(weight.flatten(1).sum(1) for weight in weights) + 0 * members
        self.weights.append(self.parameters[0].detach().flatten(1)[:, 0].clone())
        self.epoch += 1
        return self.val_losses[self.epoch - 1, members.long()]


def play(*val_losses_of_members, **kwargs):
    """Fit one member for each list of validation losses, and return the report, the final weights and the script."""
    n_members = len(val_losses_of_members)
    parameters = [stacked(n_members, 2, 3), stacked(n_members, 1, 1), numbers(n_members)]
    script = Script(np.array(val_losses_of_members, dtype=np.float32).T, parameters)
    report = fit(parameters, script, max_epochs=len(val_losses_of_members[0]), **kwargs)
    return report, [parameter.detach() for parameter in parameters[:-1]], script


# -- Splits and batches ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("n_rows", "fraction", "n_val"), [(10, 0.2, 2), (11, 0.5, 5), (100, 0.01, 1)])
def test_each_member_has_a_split_of_its_own(n_rows, fraction, n_val):
    train, val = split_rows(n_rows, fraction, spawned(seeded(), 3))
    assert train.shape == (3, n_rows - n_val)
    assert val.shape == (3, n_val)
    # Disjoint and complete
    assert th.equal(th.cat([train, val], dim=1).sort(1).values, th.arange(n_rows).expand(3, -1))
    assert len({frozenset(rows.tolist()) for rows in val}) == 3


@pytest.mark.parametrize(("n_rows", "fraction"), [(1, 0.2), (4, 0.2), (10, 0.0)])
def test_without_rows_to_spare_the_training_rows_validate(n_rows, fraction):
    for rows in split_rows(n_rows, fraction, spawned(seeded(), 2)):
        assert th.equal(rows.sort(1).values, th.arange(n_rows).expand(2, -1))


class Witness:
    """A loss that records the training and validation rows of each epoch; the loss of a row is its number."""

    def __init__(self):
        self.epochs = []
        self.was_training = False

    def __call__(self, parameters, rows):
        training = th.is_grad_enabled()
        if training and not self.was_training:
            self.epochs.append({True: [], False: []})
        self.was_training = training
        self.epochs[-1][training].append(rows)
        return rows.float().mean(1) + 0 * parameters[0]

    def rows(self, epoch, training):
        return th.cat(self.epochs[epoch][training], dim=1)


# 3 does not divide the 21 training rows of 26: the last batch is shorter, and 5 validation rows are more than 4 x 1
@pytest.mark.parametrize("batch_size", [1, 4, 1000])
def test_every_epoch_trains_on_each_training_row_once_and_on_no_other(batch_size):
    witness = Witness()
    report = fit([stacked(2)], witness, n_rows=26, batch_size=batch_size, max_epochs=3)

    train, val = split_rows(26, 0.2, spawned(seeded(), 2))  # the first draws of the members' own generators
    for epoch in range(3):
        assert th.equal(witness.rows(epoch, True).sort(1).values, train.sort(1).values)
        assert th.equal(witness.rows(epoch, False).sort(1).values, val.sort(1).values)
    # Every row weighs the same, whatever the batch it was in
    np.testing.assert_allclose(report.train_loss, train.float().mean(1))
    np.testing.assert_allclose(report.val_loss, val.float().mean(1))


# -- Limits ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("n_rows", "max_epochs", "max_gradient_steps", "passes", "rows_of_pass", "epochs"),
    [
        (80, 3, 1000, 3, 80, 3),  # epochs are fewer: 3 of 8 batches
        (80, 1000, 64, 8, 80, 8),  # steps are fewer: 8 epochs, as many as there are to be validations
        (80, 1000, 32, 8, 40, 4),  # ... not enough for 8 epochs: half of one a pass
        (80, 1, 32, 2, 40, 1),  # ... and one epoch at most
        (800, 1000, 16, 8, 20, 0.2),  # not even one epoch
        (80, 1000, 3, 3, 10, 0.375),  # not even 8 batches
        (5, 1000, 1, 1, 5, 1),  # a batch that is not full
    ],
)
def test_epochs_and_gradient_steps_bound_a_fit(n_rows, max_epochs, max_gradient_steps, passes, rows_of_pass, epochs):
    witness = Witness()
    bounds = {"max_epochs": max_epochs, "max_gradient_steps": max_gradient_steps}
    options = {"validation_fraction": 0, "rolling_average_persistency": 1, "batch_size": 10}
    report = fit([stacked(2)], witness, n_rows, **bounds, **options)
    assert [witness.rows(i, True).shape[1] for i in range(len(witness.epochs))] == [rows_of_pass] * passes
    assert report.epochs.tolist() == [epochs] * 2
    assert report.gradient_steps.tolist() == [passes * -(-rows_of_pass // 10)] * 2


def test_short_passes_show_every_row_equally_often_and_the_newest_first():
    witness = Witness()
    bounds = {"max_epochs": 1000, "max_gradient_steps": 24, "batch_size": 10}
    fit([stacked(2)], witness, 80, validation_fraction=0, n_new_rows=25, **bounds)
    passes = [witness.rows(i, True) for i in range(8)]  # of 30 rows
    for member in range(2):
        assert set(range(55, 80)) < set(passes[0][member].tolist())
        counts = th.bincount(th.cat([rows[member] for rows in passes]), minlength=80)
        assert counts.sum() == 240
        assert (counts == 3).all()
    assert not th.equal(passes[0][0], passes[0][1])


def test_there_are_no_more_validation_rows_than_a_fit_needs():
    train, val = split_rows(50_000, 0.2, spawned(seeded(), 2))
    assert (train.shape, val.shape) == ((2, 45_000), (2, MAX_VALIDATION_ROWS))


def test_batches_are_mixed_anew_for_each_member_and_epoch():
    witness = Witness()
    fit([stacked(2)], witness, n_rows=30, validation_fraction=0, max_epochs=2)
    orders = [tuple(rows.tolist()) for epoch in range(2) for rows in witness.rows(epoch, True)]
    assert len(set(orders)) == 4


@pytest.mark.parametrize("n_rows", [1, 3])
@pytest.mark.parametrize("validation_fraction", [0, 0.2])
def test_fewer_rows_than_a_batch_still_train(n_rows, validation_fraction):
    parameter = stacked(2, 1)
    data = 1 + th.arange(n_rows).float()

    def squared_error(parameters, rows):
        return (parameters[0] - data[rows]).square().mean(1)

    report = fit(
        [parameter],
        squared_error,
        n_rows,
        th.optim.SGD([parameter], lr=0.25),
        validation_fraction=validation_fraction,
        max_epochs=30,
    )
    # Every step halves the error; float32 losses cannot distinguish errors below the square root of 1e-7
    np.testing.assert_allclose(parameter.detach(), np.full((2, 1), data.mean()), rtol=1e-3)
    np.testing.assert_allclose(report.val_loss, np.full(2, data.var(correction=0)), atol=1e-6)


# -- Early stopping -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("persistency", "val_losses", "epochs"),
    [
        (0.0, [1, 2, 1, 1], 2),
        (0.0, [4, 3, 2, 1], 4),
        # Rolling average from 1.5 x 2 = 3: 2.5, 2.25, 3.125
        (0.5, [2, 2, 4, 1], 3),
        # A noisy start, from 1.5: 1.25, 1.225, 1.2125, 1.206
        (0.5, [1, 1.2, 1.2, 1.2], 4),
        # Log-likelihoods may be negative: from -0.5: -0.75, -1.375, -2.1875, -3.09375
        (0.5, [-1, -2, -3, -4], 4),
        # From -1: -1.5, -1.25
        (0.5, [-2, -1, -4, -4], 2),
        (0.5, [1, NAN, 1, 1], 2),
        (0.5, [float("inf"), 1, 1, 1], 1),
    ],
)
def test_a_member_stops_when_its_rolling_average_rises(persistency, val_losses, epochs):
    report, _, script = play(val_losses, rolling_average_persistency=persistency)
    assert report.epochs.tolist() == [epochs]
    assert script.epoch == epochs, "a fit whose members have all stopped is over"


def test_members_stop_one_by_one():
    report, _, _ = play([1, 2, 0, 0], [4, 3, 2, 1], [4, 3, 5, 0], rolling_average_persistency=0)
    assert report.epochs.tolist() == [2, 4, 3]


# -- Best weights ---------------------------------------------------------------------------------------------------------


def test_every_member_ends_with_the_weights_of_its_own_best_epoch():
    report, weights, script = play([5, 1, 2, 3], [5, 4, 3, 4], [1, 2, 3, 4], rolling_average_persistency=1)  # no early stop
    assert report.epochs.tolist() == [4, 4, 4]
    assert report.val_loss.tolist() == [1, 3, 1]
    # Weights count epochs
    for parameter in weights:
        assert th.equal(parameter, th.tensor([2.0, 3.0, 1.0]).view(3, 1, 1).expand_as(parameter))
    assert script.weights[-1].tolist() == [4, 4, 4]


@pytest.mark.parametrize("make_optimizer", [th.optim.Adam, lambda p: th.optim.SGD(p, lr=1, momentum=0.9)], ids=["Adam", "SGD"])
def test_momentum_that_moves_stopped_members_does_not_matter(make_optimizer):
    parameters = [stacked(2, 1), numbers(2)]
    script = Script([[1.0, 4.0], [2.0, 3.0], [0.0, 2.0], [0.0, 1.0]], parameters)
    fit(parameters, script, optimizer=make_optimizer(parameters), rolling_average_persistency=0)
    after_epoch = th.stack(script.weights)
    assert after_epoch[3, 0] > after_epoch[1, 0], "nothing pushes the stopped member, so the test is void"
    assert parameters[0].flatten().tolist() == [after_epoch[0, 0], after_epoch[3, 1]]


def test_weights_from_before_the_fit_do_not_compete():
    parameters = [stacked(1, 1), numbers(1)]
    fit(parameters, Script([[7.0]], parameters), max_epochs=1)
    assert parameters[0].item() == 1
    # Worse than the last fit's best loss, which came from other validation rows
    fit(parameters, Script([[9.0]], parameters), max_epochs=1)
    assert parameters[0].item() == 2


# -- Members that diverge -------------------------------------------------------------------------------------------------


def squared_distance(factor):
    """Return a loss that is, for member m, factor[m] x the squared distance of its weights from m + 1."""

    def loss_fn(parameters, rows):
        weights, members = parameters
        targets = 1 + members.detach().unsqueeze(1)
        return th.tensor(factor)[members.long()] * (weights - targets).square().sum(1) + 0 * members

    return loss_fn


def fit_three(parameters, optimizer, factor, **kwargs):
    return fit(parameters, squared_distance(factor), optimizer=optimizer, max_epochs=60, **kwargs)


@pytest.fixture
def threads_for_small_networks(monkeypatch):
    monkeypatch.setattr("sb3_mbmpo.dynamics.parallel.FLOPS_PER_THREAD", 1)


@pytest.mark.usefixtures("threads_for_small_networks")
@pytest.mark.parametrize("n_threads", [1, 2, 3])
def test_a_member_that_diverges_keeps_its_weights_and_leaves_the_others_alone(n_threads):
    healthy, hurt = ([stacked(3, 2), numbers(3)] for _ in range(2))
    fit_three(healthy, th.optim.Adam(healthy, lr=0.1), [1.0, 1.0, 1.0])
    report = fit_three(hurt, th.optim.Adam(hurt, lr=0.1), [NAN, 1.0, 1.0], n_threads=n_threads)
    assert report.epochs.tolist() == [1, 60, 60]
    assert np.isnan(report.train_loss).tolist() == [True, False, False]
    assert report.val_loss[0] == np.inf
    assert hurt[0][0].tolist() == [0, 0]
    assert th.equal(hurt[0][1:], healthy[0][1:])


@pytest.mark.usefixtures("threads_for_small_networks")
@pytest.mark.parametrize("n_threads", [1, 2])
def test_a_member_that_diverged_learns_again_in_the_next_fit(n_threads):
    parameters = [stacked(3, 2), numbers(3)]
    optimizer = th.optim.Adam(parameters, lr=0.1)
    fit_three(parameters, optimizer, [NAN, 1.0, 1.0], n_threads=n_threads)
    report = fit_three(parameters, optimizer, [1.0, 1.0, 1.0], n_threads=n_threads)
    # 60 steps of about 0.1 reach a target at distance 1
    assert report.val_loss[0] < 0.01


# -- Reports and repeatability --------------------------------------------------------------------------------------------


def test_the_hook_hears_of_every_pass_and_the_mean_best_loss():
    heard = []
    play([4, 3, 5, 1], [4, 5, 2, 2], on_pass=lambda *event: heard.append(event))
    assert heard == [(1, 4, 4), (2, 4, 3.5), (3, 4, 2.5), (4, 4, 1.5)]


def noisy_fit(seed):
    """Return the weights after a fit that depends on the order in which rows are drawn."""
    parameter, data = stacked(2, 3), th.randn(20, 3, generator=seeded(1))
    fit([parameter], lambda parameters, rows: (parameters[0].unsqueeze(1) - data[rows]).square().mean((1, 2)), 20, seed=seed)
    return parameter


def test_the_generator_decides_everything():
    assert th.equal(noisy_fit(0), noisy_fit(0))
    assert not th.equal(noisy_fit(0), noisy_fit(1))
    assert not th.equal(noisy_fit(0)[0], noisy_fit(0)[1])
