"""What `cherry plan` found, as the terminal shows it."""

from rich.console import Console, Group
from rich.table import Table
from rich.text import Text

from pipeline.estimate import Estimate
from pipeline.report import status_table
from pipeline.texts import count

_ACTORS_SHOWN = (1, 2, 4, 8, 16)


def show_estimate(estimate: Estimate, console: Console) -> None:
    """Print what `cherry plan` found."""
    left = estimate.rows - estimate.rows_done
    said = "status, as far as tokenising tells"
    table = status_table("Rows to score", said, estimate.rows_by_status, left)
    lines = [
        f"{count(estimate.rows, 'row')} in {count(estimate.units_total, 'unit')}; "
        f"{estimate.rows_done:,} of them in {count(estimate.units_done, 'unit')} are done"
        + (f", about {n:,} more rows have a score" if (n := estimate.rows_reusable) else "")
        + (f"; {count(n, 'shard')} cannot be read" if (n := estimate.skipped_shards) else ""),
        f"about {estimate.tokens:,} tokens to score: {estimate.tokens_conditioned:,} conditioned, "
        f"{estimate.tokens_direct:,} direct (standard error {100 * estimate.tokens_error:.1f} %, "
        f"{estimate.sampled_rows:,} rows tokenised)",
    ]
    if not left:
        lines[1:] = ["nothing is left to score"]
    elif estimate.seconds_per_million_tokens is None or estimate.model_hours is None:
        lines.append("--score 300 scores 300 rows, and says how long all of them would take")
    else:
        lines.append(
            f"{estimate.seconds_per_million_tokens:,.1f} s for a million tokens, one model on "
            f"{estimate.device}; {estimate.scored_rows:,} rows scored, "
            f"{100 * (estimate.over_one_fraction or 0):.0f} % of them with an IFD of 1 or more"
        )
    if not left:
        console.print(Group(*(Text(line) for line in lines)))
        return
    console.print(table, Group("", *(Text(line) for line in lines), ""), sep="\n")
    if estimate.model_hours is not None:
        console.print(_durations(estimate.model_hours, estimate.cost))


def _durations(model_hours: float, cost: float | None) -> Table:
    """How long scoring takes several numbers of actors, and what it costs any of them."""
    unit, time = ("hours", model_hours) if model_hours >= 1 else ("minutes", 60 * model_hours)
    table = Table(title="Scoring", title_justify="left", show_edge=False, pad_edge=False)
    for name in ("actors", unit, *(["cost"] if cost is not None else [])):
        table.add_column(name, justify="right")
    for actors in _ACTORS_SHOWN:
        costs = [f"{cost:,.2f}"] if cost is not None else []
        table.add_row(f"{actors}", f"{time / actors:,.2f}", *costs)
    return table
