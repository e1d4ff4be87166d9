"""Rows of a meta-step: chunks and threads change nothing, masked rows do not count, sub-samples are what they say."""

import itertools

import pytest
import torch as th
from meta_problem import (
    N_ROWS,
    N_TASKS,
    all_families,
    fisher_vector_product,
    make_problem,
    meta_gradient,
    proximal_step,
    trust_region_step,
)

from sb3_mbmpo.meta.problem import task_chunks


def with_garbage(batch, chosen):
    """Return the batch with the chosen rows (T, B) replaced by valid but absurd numbers."""
    actions = batch.actions.masked_fill(chosen.unsqueeze(-1), 1)
    policy_input = batch.policy_input.masked_fill(chosen.unsqueeze(-1), -50.0)
    return batch._replace(policy_input=policy_input, actions=actions, advantages=batch.advantages.masked_fill(chosen, 1e6))


def everything(problem, phi):
    """Return everything that is computed from a problem, as one tensor."""
    gradient, value, _ = meta_gradient(problem, phi)
    product = fisher_vector_product(problem, phi, 0.1)(gradient)
    # Strong damping, because conjugate gradient would amplify rounding errors that depend on the order of sums
    steps = [trust_region_step(problem, phi, cg_damping=0.1), proximal_step(problem, phi)]
    assert all(report.accepted for _, report in steps)
    numbers = [value, *(number for _, report in steps for number in report[:2])]
    return th.cat([gradient, product, *(new_phi for new_phi, _ in steps), th.tensor(numbers, dtype=phi.dtype)])


@pytest.mark.parametrize(
    ("chunk_size", "n_threads", "sizes"),
    [
        (1, 1, [1, 1, 1]),
        (2 * N_ROWS, 1, [1, 2]),
        (3 * N_ROWS - 1, 1, [1, 2]),
        (3 * N_ROWS, 1, [3]),
        (3 * N_ROWS, 2, [3]),
        (N_ROWS, 64, [1, 1, 1]),
    ],
)
@pytest.mark.parametrize("learned_lr", [False, True])
def test_chunks_and_threads_change_nothing(chunk_size, n_threads, sizes, learned_lr):
    problem, phi = make_problem(n_inner_steps=2, learned_lr=learned_lr, ent_coef=0.3)
    chunked = problem._replace(chunk_size=chunk_size, n_threads=n_threads)
    assert [chunk.n_tasks for chunk in chunked.chunks()] == sizes
    th.testing.assert_close(everything(chunked, phi), everything(problem, phi))


@pytest.mark.parametrize("learned_lr", [False, True])
@pytest.mark.parametrize("groups", [None, [slice(0, 2), slice(2, 3)]], ids=["all together", "two groups"])
@pytest.mark.parametrize("adapting", [[1, 0, 1], [0, 1, 1], [0, 0, 1], [1, 1, 1], [0, 0, 0]], ids=str)
@all_families
def test_adaptations_that_nothing_needs_are_left_out(family, adapting, groups, learned_lr):
    problem, phi = make_problem(family, n_inner_steps=2, learned_lr=learned_lr, groups=groups)
    problem = problem._replace(adapts=th.tensor(adapting, dtype=phi.dtype).unsqueeze(1))
    fewer = problem.adapting_first()
    assert sum(chunk.n_tasks for chunk in fewer.chunks() if not chunk.pre) == adapting.count(0)
    assert sum(chunk.n_tasks for chunk in fewer.chunks()) == N_TASKS
    (gradient, value, _), (expected, expected_value, _) = meta_gradient(fewer, phi), meta_gradient(problem, phi)
    th.testing.assert_close(gradient, expected)
    assert value == pytest.approx(expected_value)
    one, other = fisher_vector_product(fewer, phi, 0.1)(gradient), fisher_vector_product(problem, phi, 0.1)(gradient)
    th.testing.assert_close(one, other)


def test_the_entropy_needs_the_steps_of_all_tasks():
    problem, phi = make_problem(unadapted=True, ent_coef=0.3)
    assert problem.adapting_first() is problem
    assert trust_region_step(problem, phi)[1].accepted


@pytest.mark.parametrize(
    ("groups", "rows", "sizes"),
    [
        ([20], 10_000, [1] * 20),
        ([20], 1_000, [10, 10]),
        ([20], 1_300, [10, 10]),
        ([20], 2_000, [6, 7, 7]),
        ([8, 12], 2_000, [8, 6, 6]),
        ([4, 8, 8], 100, [4, 8, 8]),
        ([1, 1], 99_999, [1, 1]),
    ],
)
def test_chunks_are_even_and_within_groups(groups, rows, sizes):
    bounds = [0, *itertools.accumulate(groups)]
    chunks = task_chunks([slice(*pair) for pair in itertools.pairwise(bounds)], rows, 16_384)
    assert [chunk.stop - chunk.start for chunk in chunks] == sizes
    assert [task for chunk in chunks for task in range(99)[chunk]] == list(range(sum(groups)))


@all_families
def test_masked_rows_change_nothing(family):
    problem, phi = make_problem(family, n_inner_steps=2, ent_coef=0.3)
    pre = tuple(with_garbage(batch, batch.weight == 0) for batch in problem.pre)
    garbage = problem._replace(pre=pre, post=with_garbage(problem.post, problem.post.weight == 0))
    th.testing.assert_close(everything(garbage, phi), everything(problem, phi))


def test_subsampling_by_one_is_the_identity():
    problem, _ = make_problem(n_inner_steps=2)
    same = problem.subsample(1)
    for batch, original in zip([*same.pre, same.post], [*problem.pre, problem.post], strict=True):
        assert all(ours is theirs for ours, theirs in zip(batch, original, strict=True))


@pytest.mark.parametrize(("factor", "rows"), [(2, [0, 2, 4, 6, 8, 10]), (5, [0, 5, 10])])
def test_subsampling_uses_every_kth_row(factor, rows):
    problem, phi = make_problem(n_inner_steps=2)
    sample = problem.subsample(factor)
    for batch, original in zip([*sample.pre, sample.post], [*problem.pre, problem.post], strict=True):
        for ours, theirs in zip(batch[:3], original[:3], strict=True):
            assert th.equal(ours, theirs[:, rows])
        th.testing.assert_close(batch.weight, original.weight[:, rows] / original.weight[:, rows].sum(1, keepdim=True))
    unused = th.ones(N_TASKS, N_ROWS, dtype=th.bool).index_fill(1, th.tensor(rows), False)
    pre = tuple(with_garbage(batch, unused) for batch in problem.pre)
    garbage = problem._replace(pre=pre, post=with_garbage(problem.post, unused)).subsample(factor)
    product, same_product = (fisher_vector_product(x, phi)(phi) for x in (sample, garbage))
    assert th.equal(product, same_product)
