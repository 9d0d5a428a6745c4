"""What a person sees of a comparison: a table, and a sentence for each held-out set."""

from typing import Any

import numpy as np
from rich.console import Console, Group
from rich.table import Table
from rich.text import Text
from scipy.special import stdtrit

from pipeline.comparison import Comparison
from pipeline.texts import count, visible


def show(comparison: Comparison, console: Console) -> None:
    """Print a comparison."""
    report = comparison.report
    for name, before in report["before"].items():
        verdicts = (Text(line) for line in _verdicts(report, name))
        console.print(_table(report, name, before), Group("", *verdicts), "", sep="\n")
    lines = [f"report   {comparison.url}/report.json", f"curves   {comparison.url}/curves.png"]
    console.print(Group(*(Text(visible(line)) for line in lines)), soft_wrap=True)


def _table(report: dict[str, Any], name: str, before: dict[str, float]) -> Table:
    seeds = len(report["seeds"])
    title = f"Held-out set {visible(name)}: loss in nats a token, {count(seeds, 'seed')}"
    table = Table(title=Text(title), title_justify="left", show_edge=False, pad_edge=False)
    table.add_column("trained on")
    for column in ("rows", "tokens", "steps", "loss", "spread"):
        table.add_column(column, justify="right")
    exact = any(name in arm["exact_match"] for arm in report["arms"])
    if exact:
        table.add_column("exact", justify="right")
    matches = [f"{100 * before['exact_match']:.1f} %"] if exact else []
    table.add_row("nothing", "0", "0", "0", f"{before['loss']:.4f}", "", *matches)
    for arm in report["arms"]:
        losses = np.array(arm["loss"][name])
        counts = (f"{round(np.mean(arm[key])):,}" for key in ("rows", "tokens", "steps"))
        matches = [f"{100 * np.mean(arm['exact_match'][name]):.1f} %"] if exact else []
        spread = f"{losses.std(ddof=1):.4f}" if len(losses) > 1 else ""
        label = arm["arm"].replace("_", " ")
        table.add_row(label, *counts, f"{losses.mean():.4f}", spread, *matches)
    return table


def _verdicts(report: dict[str, Any], name: str) -> list[str]:
    """Cherry against each control, plainly, whichever way it went."""
    losses = {arm["arm"]: np.array(arm["loss"][name]) for arm in report["arms"]}
    if "cherry" not in losses:
        return []
    cherry = losses.pop("cherry")
    return [
        f"cherry against {arm.replace('_', ' ')}: {_verdict(cherry, control, len(losses))}"
        for arm, control in losses.items()
    ]


def _verdict(cherry: Any, control: Any, num_controls: int) -> str:
    """How much better or worse, and whether chance would do as much in 1 of 20 such tables.

    Welch's test over seeds, whose level is shared by the controls (Bonferroni). It knows nothing of
    which rows are held out.
    """
    difference = float(cherry.mean() - control.mean())
    if not difference:
        return "no different"
    said = f"{'better' if difference < 0 else 'worse'} by {abs(difference):.4f}"
    if len(cherry) == 1:
        return f"{said}, of one seed"
    errors = np.array([cherry.var(ddof=1), control.var(ddof=1)]) / len(cherry)
    if not errors.any():
        return said
    freedom = errors.sum() ** 2 / (errors**2 / (len(cherry) - 1)).sum()
    level = 0.05 / num_controls
    chance = float(stdtrit(freedom, 1 - level / 2) * np.sqrt(errors.sum()))
    return said if abs(difference) > chance else f"{said}, which chance explains ({chance:.4f})"
