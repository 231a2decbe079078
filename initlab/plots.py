"""Plots that more than one notebook draws. The style itself is `style.mplstyle`."""

import matplotlib.pyplot as plt
from IPython.display import display
from matplotlib.figure import Figure


def show(figure: Figure, alt: str) -> None:
    """Display `figure` in a notebook with `alt` as the text for who cannot see it, and close it."""
    display(figure, metadata={"image/png": {"alt": alt}})
    plt.close(figure)
