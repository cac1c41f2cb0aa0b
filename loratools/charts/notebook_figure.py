"""A matplotlib figure that a notebook shows, whether pyplot is in use or not."""

from __future__ import annotations

from io import BytesIO

from matplotlib.figure import Figure

# Pixels an inch: those of the picture, and those of the page it is shown on, so that text is sharp on dense screens.
_PICTURE, _PAGE = 150, 110


class NotebookFigure(Figure):
    """A figure with a picture of itself for notebooks.

    A notebook shows the figures of pyplot. This one is made without it, so that drawing leaves a person's pyplot and
    its settings alone; without `_repr_png_`, a cell that ends with it would print no more than its size.
    """

    def _repr_png_(self) -> tuple[bytes, dict[str, int]]:
        """Return the figure as a PNG, and how large the notebook shows it, in pixels of the page."""
        from loratools.charts.figure import fixed_settings

        buffer = BytesIO()
        with fixed_settings():
            self.savefig(buffer, format="png", dpi=_PICTURE)
        width, height = (round(inches * _PAGE) for inches in self.get_size_inches())
        return buffer.getvalue(), {"width": width, "height": height}
