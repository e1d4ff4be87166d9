"""A meta-step of a small policy in double precision, and reference implementations without regard to speed."""

import pytest
import torch as th
from gymnasium import spaces

from sb3_mbmpo import MlpPolicy
from sb3_mbmpo.meta import outer_step as meta
from sb3_mbmpo.meta.adaptation import TaskBatch, adapt
from sb3_mbmpo.meta.problem import MetaParameters, MetaProblem
from sb3_mbmpo.meta.training import adapting_tasks

ACTION_SPACES = {
    "gaussian": spaces.Box(-1, 1, (2,)),
    "categorical": spaces.Discrete(3),
    "bernoulli": spaces.MultiBinary(2),
}
N_TASKS, N_ROWS = 3, 12
TRPO = dict(
    target_kl=0.01,
    momentum=0.0,
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


def trust_region_step(problem, phi, previous=None, **kwargs):
    new, report = meta.trust_region_step(problem, at(problem, phi), previous, **{**TRPO, **kwargs})
    return new.vector(), report


def proximal_step(problem, phi, **kwargs):
    new, report = meta.proximal_step(problem, at(problem, phi), **kwargs)
    return new.vector(), report


all_families = pytest.mark.parametrize("family", ACTION_SPACES)
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
