"""Groups of members, the smallest units of work: a group is computed as a whole, by one thread of one process.

The last bits of a matmul depend on the number of rows and matrices that are multiplied at a time. So the groups depend on the
sizes of the problem, never on the number of threads; then any number of threads gets the same numbers. Only processes that
are more than the groups make these smaller.
"""

from collections.abc import Sequence
from itertools import accumulate, pairwise

from sb3_mbmpo.common.threads import even_shares

# Members are grouped until a row of a group takes this many floating-point operations: the calls of smaller groups would cost
# more than their matmuls
FLOPS_PER_GROUP = 2_000_000
# Up to this number of processes have the same groups, and therefore learn the same, to the last bit. With 3, a single process
# would be up to a sixth slower at the default sizes
SAME_DIGITS_UP_TO = 1


def member_groups(n_models: int, flops: int, at_least: int = 1) -> list[slice]:
    """
    Divide the members into neighbouring groups, symmetrically, so that two processes have equally many.

    :param n_models: number of members; if it is odd, the middle one is a group by itself
    :param flops: floating-point operations of one member's prediction for one row
    :param at_least: minimum number of groups, if there are as many members
    :return: the members of each group
    """
    half, is_odd = divmod(n_models, 2)
    number = max(at_least, n_models * flops // FLOPS_PER_GROUP)
    if number == 1:
        return [slice(0, n_models)]
    sizes = [share.stop - share.start for share in even_shares(half, min(half, -(-(number - is_odd) // 2)))] if half else []
    bounds = [0, *accumulate([*sizes, *[1] * is_odd, *reversed(sizes)])]
    return [slice(*pair) for pair in pairwise(bounds)]


def shares_of_processes(groups: Sequence[slice], n_processes: int) -> list[list[slice]]:
    """
    Share out groups over processes, as evenly as whole groups allow.

    :param groups: neighbouring members or tasks
    :param n_processes: number of processes, at most that of groups
    :return: the groups of each process, in order, at least one
    """
    shares, first = [], 0
    for process in range(n_processes):
        bound = (process + 1) * groups[-1].stop / n_processes
        later = n_processes - process - 1  # each of them needs a group, too
        last = min(range(first + 1, len(groups) - later + 1), key=lambda i: abs(groups[i - 1].stop - bound))
        shares.append(list(groups[first:last]))
        first = last
    return shares


def worthwhile_processes(n_models: int, flops: int, n_cpus: int) -> int:
    """
    Return how many processes of one machine should share its CPUs.

    The threads of a process share whole groups. If all members are one group, because the networks are small, threads gain
    next to nothing (1.0 times as fast with two, where two processes were 1.3 times as fast); otherwise threads are better,
    because they need no messages.

    :param n_models: number of members
    :param flops: floating-point operations of one member's prediction for one row
    :param n_cpus: number of CPUs
    """
    return min(n_models, n_cpus) if len(member_groups(n_models, flops)) == 1 else 1


def stacks(shares: Sequence[Sequence[slice]], tasks_of_model: int, flops: int) -> list[list[int]]:
    """
    Divide the members for the imagination of their tasks.

    Each entry of a stack imagines equally many tasks. So that two processes can imagine half of the tasks each, and all of
    them together, a stack has the members of which it imagines half of the tasks once, and the others twice.

    :param shares: the groups of each process, in order
    :param tasks_of_model: number of tasks of a member
    :param flops: floating-point operations of one member's prediction for one row
    :return: the members of each stack, in the order of their tasks
    """
    groups = [group for share in shares for group in share]
    n_models = groups[-1].stop
    if len(shares) == 1 or SAME_DIGITS_UP_TO > 1 or len(member_groups(n_models, flops)) > 1:
        return [list(range(n_models)[group]) for group in groups]
    if len(shares) == 2 and n_models % 2 == 1 and tasks_of_model % 2 == 0:
        twice = [member for member in range(n_models) for _ in range(2)]
        return [twice[:n_models], twice[n_models:]]
    return [list(range(share[0].start, share[-1].stop)) for share in shares]


def merged(groups: Sequence[slice], flops: int) -> list[slice]:
    """
    Divide the members of one process anew, into groups as large as the networks allow.

    :param groups: neighbouring groups
    :param flops: floating-point operations of one member's prediction for one row
    """
    first = groups[0].start
    return [slice(first + group.start, first + group.stop) for group in member_groups(groups[-1].stop - first, flops)]
