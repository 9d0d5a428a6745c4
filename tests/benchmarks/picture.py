"""The table of `engine.py speed` as a picture: how many times the first contender each is.

python tests/benchmarks/engine.py speed | tee speed.log
python tests/benchmarks/picture.py speed.svg < speed.log
"""

import json
import sys
from typing import Any

from matplotlib import rc_context
from matplotlib.figure import Figure

_COLOURS = {"engine": "#D55E00", "other": "#999999"}
_INCHES_PER_BAR = 0.42


def main() -> None:
    result = json.loads(sys.stdin.read().splitlines()[-1])
    figure = draw(result)
    # No date and no random ids: the same figures give the same bytes.
    with rc_context({"svg.hashsalt": "cherry", "svg.fonttype": "none"}):
        figure.savefig(sys.argv[1], metadata={"Date": None})


def draw(result: dict[str, Any]) -> Figure:
    """Draw a bar for each contender: the median over rounds, and from least to most."""
    contenders = result["contenders"]
    names = list(contenders)
    figure = Figure(figsize=(8.0, 0.8 + _INCHES_PER_BAR * len(names)), layout="constrained")
    axes = figure.subplots()
    for place, name in enumerate(names):
        found = contenders[name]
        low, middle, high = (found["ratio"][each] for each in ("min", "median", "max"))
        axes.barh(
            place,
            middle,
            xerr=[[middle - low], [high - middle]],
            color=_COLOURS["engine" if name.startswith("engine") else "other"],
            error_kw={"ecolor": "#333333", "capsize": 2},
        )
        share = found["share_of_limit"]["median"]
        label = f"{found['tokens_per_s']:,.0f} tokens/s, {share:.0%} of the limit"
        axes.annotate(
            label, (high, place), (6, 0), textcoords="offset points", va="center", fontsize=9
        )
    axes.set_yticks(range(len(names)), names)
    axes.invert_yaxis()
    widest = max(found["ratio"]["max"] for found in contenders.values())
    axes.set_xlim(0, 1.75 * widest)  # labels stand behind the bars
    axes.set_xlabel(f"times as fast as the {names[0]}")
    axes.spines[["top", "right"]].set_visible(False)
    return figure


if __name__ == "__main__":
    main()
