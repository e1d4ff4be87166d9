"""The colours of all figures, so that a colour means the same in each of them."""

import colorsys

REAL, IMAGINED, ADAPTED, EVALUATED, RANDOM = "black", "#0072b2", "#d55e00", "#009e73", "#7f7f7f"

# Matplotlib's and Tableau's ten colours, without grey, which is for random actions
_MEMBERS = ("#1f77b4", "#ff7f0e", "#2ca02c", "#d62728", "#9467bd", "#8c564b", "#e377c2", "#bcbd22", "#17becf")
# From dark to light, unlike all members
_RANKS = ("#440154", "#472d7b", "#3b528b", "#2c728e", "#21918c", "#28ae80", "#5ec962", "#addc30")


def member_colours(n_members: int) -> list[str]:
    """
    Return the colour of each member of the ensemble.

    :param n_members: number of members
    :return: "#rrggbb", by number of the member
    """
    if n_members <= len(_MEMBERS):
        return list(_MEMBERS[:n_members])
    colours = (colorsys.hls_to_rgb(i / n_members, 0.45, 0.7) for i in range(n_members))
    return ["#" + "".join(f"{round(255 * part):02x}" for part in colour) for colour in colours]


def rank_colours(n_ranks: int) -> list[str]:
    """
    Return colours for things in order, such as the dimensions with the largest errors.

    :param n_ranks: number of things, at most 8
    :return: "#rrggbb", the first one is the darkest
    """
    step = len(_RANKS) / max(n_ranks, 1)
    return [_RANKS[int(i * step)] for i in range(n_ranks)]
