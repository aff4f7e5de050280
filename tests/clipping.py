"""Which texts of a figure are cut off at its edge."""

import matplotlib.pyplot as plt
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from tinyr1_utils import plotting


def visible_texts(figure: Figure) -> list[plt.Text]:
    """Every text that is drawn: not those of ticks outside their axis' view."""
    hidden = set()
    for axes in figure.axes:
        for axis in (axes.xaxis, axes.yaxis):
            low, high = sorted(axis.get_view_interval())
            for tick in axis.get_major_ticks() + axis.get_minor_ticks():
                if not low <= tick.get_loc() <= high:
                    hidden |= {id(tick.label1), id(tick.label2)}
    texts = figure.findobj(plt.Text)
    return [text for text in texts if text.get_visible() and text.get_text().strip() and id(text) not in hidden]


def clipped(figure: Figure) -> list[str]:
    """Draws the figure; the texts that reach over its edge by more than a pixel."""
    with plt.style.context(plotting.STYLE):
        FigureCanvasAgg(figure).draw()
    boxes = [(text.get_text(), text.get_window_extent()) for text in visible_texts(figure)]
    wide, high = figure.bbox.width + 1, figure.bbox.height + 1
    return [text for text, box in boxes if min(box.x0, box.y0) < -1 or box.x1 > wide or box.y1 > high]
