"""The meta-step compared with finite differences, explicit Hessians and recomputed objectives, in double precision."""

import itertools

import numpy as np
import pytest
import torch as th
from gymnasium import spaces

from sb3_mbmpo import MlpPolicy
from sb3_mbmpo.common.linalg import conjugate_gradient
from sb3_mbmpo.imagination.rollouts import ImaginedRollouts
from sb3_mbmpo.meta import outer_step as meta
from sb3_mbmpo.meta.adaptation import TaskBatch, adapt
from sb3_mbmpo.meta.outer_step import MetaParameters, MetaProblem, StepReport, task_chunks
from sb3_mbmpo.meta.training import adapting_tasks

ACTION_SPACES = {
    "gaussian": spaces.Box(-1, 1, (2,)),
    "categorical": spaces.Discrete(3),
    "bernoulli": spaces.MultiBinary(2),
}
N_TASKS, N_ROWS = 3, 12
TRPO = dict(
    target_kl=0.01,
    cg_max_steps=10,
    cg_damping=1e-5,
    line_search_shrinking_factor=0.8,
    line_search_max_iter=15,
    sub_sampling_factor=1,
)
# Large enough for the second order to matter, see test_the_second_order_matters
INNER_LR = 0.5


# The tests move along vectors phi: theta, or theta followed by as many step sizes


def at(problem, phi):
    is_learned = len(phi) > len(problem.actor.__self__.actor_vector())
    return MetaParameters(*phi.chunk(2)) if is_learned else MetaParameters(phi, INNER_LR)


def meta_gradient(problem, phi):
    return meta.meta_gradient(problem, at(problem, phi))


def fisher_vector_product(problem, phi, damping=0.0):
    return meta.fisher_vector_product(problem, at(problem, phi), damping)


def trust_region_step(problem, phi, **kwargs):
    new, report = meta.trust_region_step(problem, at(problem, phi), **{**TRPO, **kwargs})
    return new.vector(), report


def proximal_step(problem, phi, **kwargs):
    new, report = meta.proximal_step(problem, at(problem, phi), **kwargs)
    return new.vector(), report


all_families = pytest.mark.parametrize("family", ACTION_SPACES)
inner_steps = pytest.mark.parametrize("n_inner_steps", [1, 2, 3])
VARIANTS = {
    "plain": {},
    "learned lr": {"learned_lr": True},
    "first order": {"first_order": True},
    "first order, learned lr": {"first_order": True, "learned_lr": True},
    "entropy": {"ent_coef": 0.3},
    "a task does not adapt": {"unadapted": True},
    "a task does not adapt, learned lr": {"unadapted": True, "learned_lr": True},
}
all_variants = pytest.mark.parametrize("variant", VARIANTS.values(), ids=VARIANTS)
# An approximate gradient need not point uphill
EXACT = {name: variant for name, variant in VARIANTS.items() if "first_order" not in variant}
exact_variants = pytest.mark.parametrize("variant", EXACT.values(), ids=EXACT)


def seeded(seed):
    return th.Generator().manual_seed(seed)


def make_policy(family):
    th.manual_seed(0)
    return MlpPolicy(spaces.Box(-1, 1, (2,)), ACTION_SPACES[family], lambda _: 0.0, net_arch=dict(pi=[4], vf=[])).double()


def random_batch(actor, parameters, draw):
    """Draw steps of the policies; in each task, two follow a termination."""
    policy_input = th.randn(N_TASKS, N_ROWS, 2, generator=draw, dtype=th.double)
    actions = actor(parameters)(policy_input).sample(draw)
    advantages = th.randn(N_TASKS, N_ROWS, generator=draw, dtype=th.double)
    alive = th.ones_like(advantages)
    alive[:, 2 * N_ROWS // 3 :: 2] = 0
    return TaskBatch(policy_input, actions, advantages, alive / alive.sum(1, keepdim=True))


def make_problem(family="gaussian", n_inner_steps=1, learned_lr=False, unadapted=False, **kwargs):
    """Make a meta-step of a small policy with random advantages, and the outer variable with which its data was imagined."""
    draw = seeded(1)
    policy = make_policy(family)
    theta = policy.actor_vector()
    # Stable-Baselines3 initialises the last layer near 0, where most parameters have little effect
    theta += 0.3 * th.randn(len(theta), generator=draw, dtype=th.double)
    learned = INNER_LR * (1 + th.rand(len(theta), generator=draw, dtype=th.double))
    adapts = adapting_tasks(N_TASKS, 1 / N_TASKS, like=theta) if unadapted else None
    step_size = (learned if learned_lr else INNER_LR) * (1 if adapts is None else adapts)
    pre, parameters = [], theta.expand(N_TASKS, -1)
    for _ in range(n_inner_steps):
        pre.append(random_batch(policy.actor, parameters, draw))
        parameters = adapt(policy.actor, parameters, pre[-1:], step_size)
    post = random_batch(policy.actor, parameters, draw)
    problem = MetaProblem(policy.actor, tuple(pre), post, **{"chunk_size": 16_384, "adapts": adapts, **kwargs})
    return problem, th.cat([theta, learned]) if learned_lr else theta


# -- Reference implementations, without regard to speed -------------------------------------------------------------------


def start_and_step_size(problem, phi):
    """Return theta and the inner step size, which is 0 in tasks that do not adapt."""
    theta, lr = at(problem, phi)
    return theta, lr if problem.adapts is None else lr * problem.adapts


def inner_gradients(problem, phi):
    """Return the gradient of each inner step (steps, T, P) as constants."""
    theta, lr = start_and_step_size(problem, phi)
    parameters, gradients = theta.expand(N_TASKS, -1), []
    for batch in problem.pre:
        point = parameters.detach().requires_grad_()
        log_prob = problem.actor(point)(batch.policy_input).log_prob(batch.actions)
        gradients.append(th.autograd.grad((batch.weight * batch.advantages * log_prob).sum(), point)[0])
        parameters = parameters + lr * gradients[-1]
    return th.stack(gradients)


def post_distribution(problem, phi, frozen=None):
    """Return the adapted policies; with ``frozen`` inner gradients, this is the first-order approximation."""
    theta, lr = start_and_step_size(problem, phi)
    gradients = inner_gradients(problem, phi) if frozen is None else frozen
    return problem.actor(theta + lr * gradients.sum(0))(problem.post.policy_input)


def outer_objective(problem, phi, old_phi, frozen=None):
    """Return the mean over tasks of mean(ratio A) plus entropy, including the adaptation."""
    post, pre = problem.post, problem.pre[0]
    old, new = (post_distribution(problem, x, frozen).log_prob(post.actions) for x in (old_phi, phi))
    surrogate = (post.weight * post.advantages * th.exp(new - old)).sum(1)
    theta, _ = at(problem, phi)
    entropy = problem.actor(theta.expand(N_TASKS, -1))(pre.policy_input).entropy()
    return float((surrogate + problem.ent_coef * (pre.weight * entropy).sum(1)).mean())


def mean_kl(problem, phi, old_phi):
    divergence = post_distribution(problem, old_phi).kl_divergence(post_distribution(problem, phi))
    return float((problem.post.weight * divergence).sum(1).mean())


def finite_differences(function, x, eps=1e-5):
    """Return central differences; in double precision, both of their errors are near 1e-10 of the function."""
    steps = eps * th.eye(len(x), dtype=x.dtype)
    return th.tensor([function(x + step) - function(x - step) for step in steps], dtype=x.dtype) / (2 * eps)


def matrix_of(product, size):
    return th.stack([product(unit) for unit in th.eye(size, dtype=th.double)])


def with_garbage(batch, chosen):
    """Return the batch with the chosen rows (T, B) replaced by valid but absurd numbers."""
    actions = batch.actions.masked_fill(chosen.unsqueeze(-1), 1)
    policy_input = batch.policy_input.masked_fill(chosen.unsqueeze(-1), -50.0)
    return batch._replace(policy_input=policy_input, actions=actions, advantages=batch.advantages.masked_fill(chosen, 1e6))


# -- The adaptation and its gradient --------------------------------------------------------------------------------------


@all_families
@inner_steps
@all_variants
def test_the_meta_gradient_equals_finite_differences(family, n_inner_steps, variant):
    problem, phi = make_problem(family, n_inner_steps, **variant)
    frozen = inner_gradients(problem, phi) if problem.first_order else None
    gradient, value, _ = meta_gradient(problem, phi)
    expected = finite_differences(lambda x: outer_objective(problem, x, phi, frozen), phi)
    th.testing.assert_close(gradient, expected, rtol=1e-6, atol=1e-8)
    assert value == pytest.approx(outer_objective(problem, phi, phi))


def test_a_task_that_does_not_adapt_keeps_the_meta_policy():
    problem, phi = make_problem(n_inner_steps=2, unadapted=True)
    adapted = problem.adapted(at(problem, phi))
    assert [bool(th.equal(parameters, phi)) for parameters in adapted] == [False] * (N_TASKS - 1) + [True]


@all_families
@inner_steps
def test_the_second_order_matters(family, n_inner_steps):
    problem, phi = make_problem(family, n_inner_steps)
    full, first_order = (meta_gradient(problem._replace(first_order=order), phi)[0] for order in (False, True))
    # Ten thousand times the tolerance above
    assert (full - first_order).norm() > 0.05 * full.norm()


@all_families
@all_variants
def test_the_adaptation_is_one_policy_gradient_step_a_batch(family, variant):
    problem, phi = make_problem(family, n_inner_steps=2, **variant)
    theta, lr = start_and_step_size(problem, phi)
    adapted = theta + lr * inner_gradients(problem, phi).sum(0)
    th.testing.assert_close(problem.adapted(at(problem, phi)), adapted)
    th.testing.assert_close(problem.adapted(at(problem, phi.clone().requires_grad_()), create_graph=True), adapted)
    # From the parameters after the first step, with which the second batch is imagined
    first = adapt(problem.actor, theta, problem.pre[:1], lr)
    th.testing.assert_close(adapt(problem.actor, first, problem.pre[1:], lr), adapted)


def test_a_batch_holds_the_rollouts_row_by_row():
    T, H, N = 2, 3, 4
    index = th.arange(T * H * N, dtype=th.double).view(T, H, N)
    lengths = th.tensor([[3, 3, 1, 3], [1, 2, 3, 3]]).unsqueeze(1)
    alive = th.arange(H).view(1, H, 1) < lengths
    rollouts = ImaginedRollouts(index[..., None], index[..., None] + 0.5, index, alive, ~alive, index[:, :1, :, None])
    batch = TaskBatch.from_rollouts(rollouts, -index)
    assert th.equal(batch.policy_input[..., 0], -batch.advantages)
    assert th.equal(batch.actions, batch.policy_input + 0.5)
    th.testing.assert_close(batch.weight.sum(1), th.ones(T, dtype=th.double))
    # 10 and 9 living steps
    weights = alive.flatten(1) * th.tensor([[1 / 10], [1 / 9]], dtype=th.double)
    th.testing.assert_close(batch.weight.gather(1, batch.policy_input[..., 0].long() % (H * N)), weights)


# -- Rows: chunks, masks, sub-samples -------------------------------------------------------------------------------------


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


# -- Curvature and conjugate gradient -------------------------------------------------------------------------------------


@all_families
@pytest.mark.parametrize("n_inner_steps", [1, 2])
@all_variants
def test_the_fisher_product_is_the_hessian_of_the_kl_through_the_inner_step(family, n_inner_steps, variant):
    problem, phi = make_problem(family, n_inner_steps, **variant)
    old = problem.adapted_distribution(at(problem, phi)).detach()

    def kl(x):
        divergence = old.kl_divergence(problem.adapted_distribution(at(problem, x), create_graph=True))
        return (problem.post.weight * divergence).sum(1).mean()

    hessian = th.autograd.functional.hessian(kl, phi)
    fisher = matrix_of(fisher_vector_product(problem, phi), len(phi))
    th.testing.assert_close(fisher, hessian, rtol=1e-8, atol=1e-10)
    th.testing.assert_close(fisher, fisher.T, rtol=1e-8, atol=1e-10)
    eigenvalues = th.linalg.eigvalsh(fisher)
    assert eigenvalues[0] > -1e-12 * eigenvalues[-1]
    damped = matrix_of(fisher_vector_product(problem, phi, damping=0.25), len(phi))
    th.testing.assert_close(damped, fisher + 0.25 * th.eye(len(phi), dtype=th.double))


def random_system(size, seed=0):
    """Draw a symmetric positive definite matrix and a right-hand side."""
    factor = th.randn(size, size, generator=seeded(seed), dtype=th.double)
    return factor @ factor.T / size + 0.1 * th.eye(size, dtype=th.double), factor[0] + 1


@pytest.mark.parametrize("size", [1, 2, 10, 40])
@pytest.mark.parametrize("seed", range(3))
def test_conjugate_gradient_solves_spd_systems(size, seed):
    A, b = random_system(size, seed)
    # Exact after `size` steps, except for rounding, hence twice as many
    x, image = conjugate_gradient(lambda v: A @ v, b, 2 * size, tolerance=1e-24)
    th.testing.assert_close(image, A @ x)
    th.testing.assert_close(x, th.linalg.solve(A, b), rtol=1e-9, atol=1e-9)


def test_conjugate_gradient_stops_at_the_tolerance():
    A, b = random_system(40)
    calls = []
    x, image = conjugate_gradient(lambda v: calls.append(v) or A @ v, b, 1000, tolerance=1e-4)
    assert (A @ x - b).norm() <= 1e-2 * b.norm() * (1 + 1e-6)
    assert len(calls) < 40
    th.testing.assert_close(image, A @ x)
    one_less, _ = conjugate_gradient(lambda v: A @ v, b, len(calls) - 1, tolerance=0.0)
    assert (A @ one_less - b).norm() > 1e-2 * b.norm(), "stopped late"


def test_conjugate_gradient_of_zero_is_zero_without_a_product():
    def product(v):
        raise AssertionError("nothing to multiply")

    assert all(th.equal(zero, th.zeros(5)) for zero in conjugate_gradient(product, th.zeros(5), 10))


def test_conjugate_gradient_draws_no_random_numbers():
    A, b = random_system(10)
    first, _ = conjugate_gradient(lambda v: A @ v, b, 5)
    th.manual_seed(123)
    assert th.equal(conjugate_gradient(lambda v: A @ v, b, 5)[0], first)


# -- Outer steps ----------------------------------------------------------------------------------------------------------


def assert_report_is_true(report, problem, phi, new_phi):
    gain = outer_objective(problem, new_phi, phi) - outer_objective(problem, phi, phi)
    assert report.objective_gain == pytest.approx(gain, rel=1e-8)
    assert report.kl_divergence == pytest.approx(mean_kl(problem, new_phi, phi), rel=1e-8)
    assert report.accepted


@all_families
@exact_variants
@pytest.mark.parametrize("kwargs", [{}, {"target_kl": 0.3}, {"sub_sampling_factor": 2}], ids=str)
def test_a_trust_region_step_improves_within_the_bound(family, variant, kwargs):
    problem, phi = make_problem(family, n_inner_steps=2, **variant)
    new_phi, report = trust_region_step(problem, phi, **kwargs)
    assert_report_is_true(report, problem, phi, new_phi)
    assert report.objective_gain > 0
    # A step far below the bound would mean a wrong scale
    assert 0.1 * kwargs.get("target_kl", 0.01) < report.kl_divergence <= kwargs.get("target_kl", 0.01)


@pytest.mark.parametrize(("target_kl", "factor"), [(0.01, 1), (0.5, 1), (0.01, 3)])
def test_a_trust_region_step_is_a_natural_gradient_step(target_kl, factor):
    problem, phi = make_problem()
    kwargs = dict(cg_max_steps=100, cg_damping=0.1, sub_sampling_factor=factor)
    new_phi, report = trust_region_step(problem, phi, target_kl=target_kl, **kwargs)
    full_step = (new_phi - phi) / 0.8 ** (report.line_search_steps - 1)
    image = fisher_vector_product(problem.subsample(factor), phi, damping=0.1)(full_step)
    assert 0.5 * full_step @ image == pytest.approx(target_kl)
    gradient, _, _ = meta_gradient(problem, phi)
    # Conjugate gradient leaves a residual of 1e-5 of the gradient
    th.testing.assert_close(image / image.norm(), gradient / gradient.norm(), rtol=0, atol=1e-4)


def test_the_line_search_goes_back_only_as_far_as_it_must():
    problem, phi = make_problem()
    kwargs = dict(target_kl=0.5, line_search_shrinking_factor=0.9)
    new_phi, report = trust_region_step(problem, phi, **kwargs)
    assert report.line_search_steps > 1
    before = phi + (new_phi - phi) / 0.9
    assert mean_kl(problem, before, phi) > 0.5 or outer_objective(problem, before, phi) < outer_objective(problem, phi, phi)
    too_short = trust_region_step(problem, phi, **kwargs, line_search_max_iter=report.line_search_steps - 1)
    assert too_short[0] is phi
    assert too_short[1] == StepReport(0.0, 0.0, False, report.line_search_steps - 1)


@pytest.mark.parametrize("evaluation", [(np.inf, np.inf), (-np.inf, 0.0), (np.nan, 0.0), (np.inf, np.nan)], ids=str)
def test_no_good_candidate_leaves_the_parameters(evaluation, monkeypatch):
    problem, phi = make_problem()
    monkeypatch.setattr(meta, "_evaluate", lambda *_: meta._Evaluation(*evaluation, is_usable=True))
    new_phi, report = trust_region_step(problem, phi, line_search_max_iter=4)
    assert new_phi is phi
    assert report == StepReport(0.0, 0.0, False, 4)


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("stage", ["pre", "post"])
@pytest.mark.parametrize("step", [trust_region_step, proximal_step])
def test_advantages_that_are_not_finite_leave_the_parameters(step, stage, value):
    problem, phi = make_problem()
    batch = problem.post if stage == "post" else problem.pre[0]
    batch.advantages[1, 2] = value
    original = phi.clone()
    new_phi, report = step(problem, phi)
    assert new_phi is phi
    assert th.equal(phi, original)
    assert report == StepReport(0.0, 0.0, False, 0)


def test_zero_advantages_leave_the_parameters():
    problem, phi = make_problem()
    problem.post.advantages.zero_()
    new_phi, report = trust_region_step(problem, phi)
    assert new_phi is phi
    assert report == StepReport(0.0, 0.0, False, 0)
    th.testing.assert_close(proximal_step(problem, phi)[0], phi)


@all_families
@exact_variants
def test_a_proximal_step_improves_the_objective(family, variant):
    problem, phi = make_problem(family, n_inner_steps=2, **variant)
    original = phi.clone()
    new_phi, report = proximal_step(problem, phi)
    assert_report_is_true(report, problem, phi, new_phi)
    assert report.objective_gain > 0
    assert th.equal(phi, original)


@all_variants
def test_the_first_proximal_epoch_is_adam_on_the_meta_gradient(variant):
    problem, phi = make_problem(n_inner_steps=2, **variant)
    gradient, _, _ = meta_gradient(problem, phi)
    new_phi, _ = proximal_step(problem, phi, learning_rate=0.01, n_epochs=1)
    th.testing.assert_close(new_phi, phi + 0.01 * gradient / (gradient.abs() + 1e-8))


def test_clipping_bounds_the_proximal_step():
    problem, phi = make_problem()
    kwargs = dict(learning_rate=0.01, n_epochs=50)
    moved = [mean_kl(problem, proximal_step(problem, phi, clip_range=clip, **kwargs)[0], phi) for clip in (0.02, 0.2, 1e3)]
    assert moved[0] < 0.5 * moved[1] < 0.25 * moved[2]


def in_single_precision(problem):
    batches = [
        TaskBatch(*(x.float() if x.is_floating_point() else x for x in batch)) for batch in (*problem.pre, problem.post)
    ]
    return problem._replace(pre=tuple(batches[:-1]), post=batches[-1])


@all_families
@pytest.mark.parametrize("step", [trust_region_step, proximal_step])
def test_single_precision_suffices(step, family):
    problem, phi = make_problem(family, n_inner_steps=2, ent_coef=0.3)
    single = in_single_precision(problem)
    gradient, _, _ = meta_gradient(single, phi.float())
    th.testing.assert_close(gradient, meta_gradient(problem, phi)[0].float(), rtol=1e-4, atol=1e-5)
    new_phi, report = step(single, phi.float())
    assert new_phi.dtype == th.float32
    # Conjugate gradient ends at another point, but not at a worse one
    assert report.objective_gain == pytest.approx(step(problem, phi)[1].objective_gain, rel=0.05)
    assert report.kl_divergence == pytest.approx(mean_kl(problem, new_phi.double(), phi), rel=1e-3)


@pytest.mark.parametrize("step", [trust_region_step, proximal_step])
def test_meta_steps_improve_the_adapted_policies(step):
    """Each task wants another action; after a few meta-steps one inner step from theta suffices."""
    policy = make_policy("gaussian")
    goals = th.tensor([[0.5, 1.0], [0.5, -1.0], [1.0, 0.0]], dtype=th.double)
    draw = seeded(0)

    def act(parameters):
        policy_input = th.randn(len(goals), 200, 2, generator=draw, dtype=th.double)
        actions = policy.actor(parameters)(policy_input).sample(draw)
        rewards = -(actions - goals.unsqueeze(1)).square().sum(-1)
        advantages = (rewards - rewards.mean(1, keepdim=True)) / rewards.std(1, keepdim=True)
        return TaskBatch(policy_input, actions, advantages, th.full_like(rewards, 1 / 200)), float(rewards.mean())

    theta, returns = policy.actor_vector(), []
    for _ in range(20):
        pre, _ = act(theta.expand(len(goals), -1))
        post, post_return = act(adapt(policy.actor, theta, [pre], 0.1))
        problem = MetaProblem(policy.actor, (pre,), post, chunk_size=16_384)
        returns.append(post_return)
        theta, report = step(problem, theta, **({"target_kl": 0.05} if step is trust_region_step else {"learning_rate": 0.02}))
        assert report.accepted
        assert step is proximal_step or report.kl_divergence <= 0.05
    # 600 rewards with a standard deviation of at most 3: means have a standard error of 0.12
    assert returns[-1] > returns[0] + 1
