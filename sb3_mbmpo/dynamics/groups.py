"""Groups of members, the smallest units of work: a group is computed as a whole, whatever the number of workers.

The last bits of a matmul depend on the number of rows and matrices that are multiplied at a time. So what is multiplied
together must depend on the sizes of the problem only; then any number of workers, who take whole groups, gets the same
numbers.
"""

from sb3_mbmpo.common.threads import even_shares

# Members are grouped until a row of a group takes this many floating-point operations: the calls of smaller groups would cost
# more than their matmuls
FLOPS_PER_GROUP = 300_000
# But there are this many groups at least (if there are as many members), so that several processes have something to do
MIN_GROUPS = 2


def member_groups(n_models: int, flops: int) -> list[slice]:
    """
    Divide the members into neighbouring groups.

    :param n_models: number of members
    :param flops: floating-point operations of one member's prediction for one row
    :return: the members of each group; their numbers differ by at most one
    """
    return even_shares(n_models, min(n_models, max(MIN_GROUPS, n_models * flops // FLOPS_PER_GROUP)))
