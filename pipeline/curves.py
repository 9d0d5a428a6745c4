"""The curves of a comparison as a picture: held-out loss over steps, a line an arm."""

import io
from typing import Any

import numpy as np

from pipeline.texts import plain

# Okabe and Ito's colours, which all eyes tell apart.
_COLOURS = {
    "cherry": "#D55E00",
    "random_rows": "#0072B2",
    "random_tokens": "#56B4E9",
    "all": "#555555",
}
_INCHES_PER_PANEL = (5.0, 3.6)


def draw_curves(report: dict[str, Any], form: str) -> bytes:
    """Draw a panel for each held-out set: the mean over seeds, and a band from least to most.

    Args:
        report: Of a comparison.
        form: `png` or `svg`.
    """
    from matplotlib import rc_context  # not before: most commands draw nothing
    from matplotlib.figure import Figure

    names = list(report["before"])
    width, height = _INCHES_PER_PANEL
    figure = Figure(figsize=(width * len(names), height), layout="constrained")
    for axes, name in zip(np.atleast_1d(figure.subplots(1, len(names))), names, strict=True):
        for arm in report["arms"]:
            # Seeds may have other rows, and so other steps: all of them at the steps of the first.
            curves = [np.array(curve) for curve in arm["curves"][name]]
            steps = curves[0][:, 0]
            losses = np.stack([_resampled(curve, len(steps), steps) for curve in curves])
            colour = _COLOURS[arm["arm"]]
            label = f"{arm['arm'].replace('_', ' ')} ({round(np.mean(arm['rows'])):,} rows)"
            axes.plot(steps, losses.mean(0), color=colour, label=label)
            axes.fill_between(steps, losses.min(0), losses.max(0), color=colour, alpha=0.2, lw=0)
        # Names come from the config: a dollar sign would start a formula.
        axes.set_title(plain(name).replace("$", r"\$"), fontsize=10)
        axes.set_xlabel("optimiser steps")
        axes.set_ylabel("loss of held-out answers, nats a token")
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False, fontsize=8)
    sink = io.BytesIO()
    # No date and no random ids: the same report gives the same bytes.
    with rc_context({"svg.hashsalt": "cherry"}):
        figure.savefig(sink, format=form, dpi=150, metadata={"Date": None} if form == "svg" else {})
    return sink.getvalue()


def _resampled(curve: Any, num_points: int, steps: Any) -> Any:
    """Losses of a curve at the same shares of its steps as `steps` are of theirs."""
    if len(curve) == num_points and (curve[:, 0] == steps).all():
        return curve[:, 1]
    return np.interp(steps / steps[-1], curve[:, 0] / curve[-1, 0], curve[:, 1])
