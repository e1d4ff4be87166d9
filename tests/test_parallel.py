"""The members of a fit, distributed among threads."""

import threading
from fractions import Fraction
from itertools import pairwise

import pytest
import torch as th

from sb3_mbmpo.dynamics.parallel import FLOPS_PER_THREAD, ParallelTraining, timetable

SIZES = [(n_members, n_threads) for n_members in (1, 2, 3, 5, 8) for n_threads in range(1, n_members + 1)]


@pytest.mark.parametrize(("n_members", "n_threads"), SIZES)
def test_threads_have_equally_much_to_do_and_all_is_done_once(n_members, n_threads):
    table = timetable(n_members, n_threads)
    assert [sum((p.last - p.first) * (p.end - p.begin) for p in pieces) for pieces in table] == (
        [Fraction(n_members, n_threads)] * n_threads
    )
    pieces = [piece for pieces in table for piece in pieces]
    for member in range(n_members):
        parts = sorted((p.begin, p.end) for p in pieces if p.first <= member < p.last)
        assert parts[0][0] == 0
        assert parts[-1][1] == 1
        assert all(before[1] == after[0] for before, after in pairwise(parts))


@pytest.mark.parametrize(("n_members", "n_threads"), SIZES)
def test_without_handing_over_threads_have_whole_members(n_members, n_threads):
    table = timetable(n_members, n_threads, hand_over=False)
    assert [piece for pieces in table for piece in pieces if (piece.begin, piece.end) != (0, 1)] == []
    bounds = [0, *(piece.last for (piece,) in table)]
    assert [piece.first for (piece,) in table] == bounds[:-1]
    assert bounds[-1] == n_members
    assert {last - first for first, last in pairwise(bounds)} <= {n_members // n_threads, -(-n_members // n_threads)}


@pytest.mark.parametrize(("n_members", "n_threads"), SIZES)
def test_nobody_waits_for_a_member_that_is_handed_over(n_members, n_threads):
    ready, begun = {}, {}
    for pieces in timetable(n_members, n_threads):
        now = Fraction(0)
        for piece in pieces:
            if piece.begin > 0:
                begun[piece.first] = now
            now += (piece.last - piece.first) * (piece.end - piece.begin)
            if piece.end < 1:
                ready[piece.first] = now
    assert ready.keys() == begun.keys()
    assert all(ready[member] <= begun[member] for member in begun)


@pytest.fixture
def threads_for_small_networks(monkeypatch):
    monkeypatch.setattr("sb3_mbmpo.dynamics.parallel.FLOPS_PER_THREAD", 1e-3)
    monkeypatch.setattr("sb3_mbmpo.dynamics.parallel.MIN_FLOPS_TO_HAND_OVER", 0)


def train(n_members, n_threads, n_batches, optimizer_class):
    """Train all members but member 1, each with its own batches, whose order affects what it learns."""
    parameter = th.nn.Parameter(th.zeros(n_members, 2))
    optimizer = optimizer_class([parameter], lr=0.1)
    rows = th.stack([th.randperm(n_batches, generator=th.Generator().manual_seed(i)) for i in range(n_members)])
    active = th.tensor([member for member in range(n_members) if member != 1 or n_members == 1])

    def loss_fn(parameters, rows):
        return (parameters[0] - rows).square().sum(1)

    losses = []
    for _ in range(2):
        training = ParallelTraining([parameter], optimizer, loss_fn, 1, n_threads)
        losses += [training.epoch(rows[active], active) for _ in range(2)]
        training.finish()
    return parameter.detach(), th.stack(losses), optimizer.state[parameter]


@pytest.mark.usefixtures("threads_for_small_networks")
@pytest.mark.parametrize("optimizer_class", [th.optim.Adam, lambda p, lr: th.optim.SGD(p, lr=lr, momentum=0.9)])
@pytest.mark.parametrize("n_batches", [1, 2, 7])
@pytest.mark.parametrize(("n_members", "n_threads"), [(1, 4), (3, 2), (5, 2), (5, 3), (5, 4), (5, 5), (2, 9)])
def test_each_member_sees_its_batches_in_order_whatever_the_threads(n_members, n_threads, n_batches, optimizer_class):
    expected = train(n_members, 1, n_batches, optimizer_class)
    weights, losses, state = train(n_members, n_threads, n_batches, optimizer_class)
    assert th.equal(weights, expected[0])
    assert th.equal(losses, expected[1])
    assert state.keys() == expected[2].keys()
    for name, value in state.items():
        assert th.equal(value, expected[2][name])


@pytest.mark.usefixtures("threads_for_small_networks")
def test_a_step_of_one_thread_leaves_the_graphs_of_the_others_alone():
    """Views of one tensor share autograd's version counter: with views, nine out of ten such trainings failed."""
    parameter = th.nn.Parameter(th.zeros(4, 100_000))
    training = ParallelTraining(
        [parameter], th.optim.SGD([parameter], lr=1), lambda parameters, rows: parameters[0][:, 0], batch_size=1, n_threads=4
    )
    training.epoch(th.zeros(4, 100, dtype=th.long), th.arange(4))
    assert parameter[:, 0].tolist() == [-100] * 4


@pytest.mark.parametrize(("work", "n_threads"), [(0.9, 1), (3.9, 1), (4.1, 2), (9.1, 3), (26, 4)])
def test_as_many_threads_as_the_work_of_a_batch_is_worth(work, n_threads):
    n_members, callers, everyone = 4, set(), threading.Barrier(n_threads)
    numbers = int(work * FLOPS_PER_THREAD / (6 * n_members * 64))
    parameter = th.nn.Parameter(th.zeros(n_members, numbers))

    def loss_fn(parameters, rows):
        if threading.get_ident() not in callers:
            callers.add(threading.get_ident())
            everyone.wait(timeout=10)  # no thread is done before the last has started
        return parameters[0][:, 0]

    training = ParallelTraining([parameter], th.optim.SGD([parameter], lr=0), loss_fn, batch_size=64, n_threads=9)
    training.epoch(th.zeros(n_members, 64, dtype=th.long), th.arange(n_members))
    assert len(callers) == n_threads


@pytest.mark.usefixtures("threads_for_small_networks")
@pytest.mark.parametrize("bad", range(3))
def test_an_error_in_any_thread_reaches_the_caller(bad):
    """No thread waits forever for a member that another thread will never hand over."""
    members = th.nn.Parameter(th.arange(3.0))

    def loss_fn(parameters, rows):
        if bad in parameters[0].long():
            raise ArithmeticError(f"member {bad}")
        return 0 * parameters[0]

    training = ParallelTraining([members], th.optim.SGD([members], lr=1), loss_fn, batch_size=1, n_threads=2)
    with pytest.raises(ArithmeticError, match=f"member {bad}"):
        training.epoch(th.zeros(3, 4, dtype=th.long), th.arange(3))
