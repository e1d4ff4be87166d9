"""What all figures of a report have in common: title, caption and layout, panels, labels and legends.

Every figure can be drawn in two layouts: for a wide page, and for a narrow one, where its panels are below one another.
matplotlib's global state is not used.
"""

import textwrap
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from sb3_mbmpo.report.colours import member_colours
from sb3_mbmpo.report.matplotlib_parts import Axes, Figure, Line2D


class Layout(NamedTuple):
    """
    The space for a figure.

    :param width: in inches
    :param columns: maximum number of panels beside one another
    """

    width: float
    columns: int

    def wrap(self, text: str, points: float = 11) -> str:
        """Break a text into lines that fit in the width."""
        return textwrap.fill(text, round(self.width * 72 / points * 1.75))


WIDE_PAGE, NARROW_PAGE = Layout(width=11, columns=3), Layout(width=4.4, columns=1)
Drawing = Callable[[Layout], Figure]


class Picture(NamedTuple):
    """
    A figure with title and caption.

    :param name: name of the file, without suffix
    :param title: heading
    :param caption: how to read the figure
    :param draw: draws it in a layout; None if it cannot be drawn, and the caption says why
    """

    name: str
    title: str
    caption: str
    draw: Drawing | None


def missing(name: str, title: str, reason: str) -> Picture:
    """Return a picture without a figure, whose caption gives the reason."""
    return Picture(name, title, f"Left out: {reason}", None)


def new_figure(layout: Layout, title: str, n_panels: int, height: float) -> tuple[Figure, list[Axes]]:
    """
    Make a figure with panels.

    :param layout: the space for it
    :param title: above all panels
    :param n_panels: number of panels
    :param height: of a panel, in inches
    :return: the figure and its panels, row by row
    """
    columns = min(layout.columns, n_panels)
    rows = -(-n_panels // columns)
    figure = Figure(figsize=(layout.width, height * rows + 0.5), layout="constrained")
    figure.suptitle(layout.wrap(title), fontsize=11)
    panels: list[Axes] = list(figure.subplots(rows, columns, squeeze=False).ravel())
    for panel in panels[n_panels:]:
        panel.remove()
    return figure, panels[:n_panels]


def label_axes(axes: Axes, x: str, y: str) -> None:
    """Label both axes of a panel and draw a grid."""
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.grid(alpha=0.3)


def member_handles(n_members: int) -> list[Line2D]:
    """Return a square in each member's colour for a legend."""
    return [
        Line2D([], [], color=colour, marker="s", linestyle="", label=f"member {i}")
        for i, colour in enumerate(member_colours(n_members))
    ]


def legend_below(figure: Figure, layout: Layout, *panels: Axes, handles: Sequence[Any] | None = None, **options: Any) -> None:
    """Draw one legend for all panels, below them, where it covers no data, in as many columns as fit."""
    if handles is None:
        handles = [handle for axes in panels for handle in axes.get_legend_handles_labels()[0]]
    longest = max(len(str(handle.get_label())) for handle in handles)
    columns = min(len(handles), max(1, int(layout.width * 72 / (9 * (0.58 * longest + 4.5)))))
    figure.set_figheight(figure.get_figheight() + 0.19 * -(-len(handles) // columns))
    figure.legend(handles=handles, loc="outside lower center", ncols=columns, fontsize=9, **options)
