"""What the figures use of matplotlib, or an error that names the extra with which it comes."""

try:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D
    from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter
except ImportError as error:
    raise ImportError("Figures need matplotlib: pip install 'sb3-mbmpo[plots]'.") from error

__all__ = ["Axes", "Figure", "Line2D", "LogLocator", "MaxNLocator", "NullFormatter"]
