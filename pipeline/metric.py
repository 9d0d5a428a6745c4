"""The metric: from the token ids of a unit to losses, ratios and a status for every row.

IFD is the model's loss on a response given its instruction over its loss on the response alone:

* ``ifd_loss_ratio = mean_conditioned / mean_direct`` (Cherry_LLM, arXiv:2308.12032, section 3.2);
* ``ifd_ppl_ratio = exp(mean_conditioned - mean_direct)`` (Superfiltering, arXiv:2402.00530).

Sums are kept in nats with their token counts, so that turns combine; means are taken once.
"""

import math
from typing import Any

import numpy as np
import pyarrow as pa

from pipeline.engine import Engine, SequenceLoss, TokenSequence
from pipeline.rendering import TokenTurn
from pipeline.schemas import PART, flat_lists
from pipeline.sharing import TokenIds


def score_table(
    tokens: pa.Table, engine: Engine, prefix_ids: tuple[int, ...]
) -> tuple[pa.Table, int]:
    """Score a unit.

    Args:
        tokens: In the TOKENS schema.
        engine: The resident model.
        prefix_ids: What the tokenizer puts before a text.

    Returns:
        The part, in the PART schema, and the tokens of both passes, before any work is shared.
    """
    offsets, values = flat_lists(tokens["input_ids"])
    prefix = np.array(prefix_ids, dtype=np.int32)
    rows = tokens.drop_columns("input_ids").to_pylist()
    sequences: list[TokenSequence] = []
    owners: list[int] = []
    num_tokens = 0
    for index, row in enumerate(rows):
        if row["status"] == "ok":
            row["turns"] = [TokenTurn(*turn) for turn in row["turns"]]
            ids = values[offsets[index] : offsets[index + 1]]
            conditioned = conditioned_passes(ids, row["turns"], "turns" in engine.share)
            direct = direct_passes(ids, row["turns"], prefix)
            sequences += conditioned + direct
            owners += [index] * len(conditioned + direct)
            num_tokens += len(ids) + sum(len(each.input_ids) for each in direct)
    losses: dict[int, list[SequenceLoss]] = {index: [] for index in range(len(rows))}
    for index, loss in zip(owners, engine.score(sequences), strict=True):
        losses[index].append(loss)
    scored = [_score_row(row, losses[index]) for index, row in enumerate(rows)]
    part = pa.Table.from_pylist(scored, schema=PART)
    return part, num_tokens


def conditioned_passes(ids_T: TokenIds, turns: list[TokenTurn], share: bool) -> list[TokenSequence]:
    """One pass over all turns of a row, or one a turn."""
    spans = [(t.conditioned_start, t.end) for t in turns if t.num_conditioned]
    if share:
        return [TokenSequence(ids_T, tuple(spans))]
    return [TokenSequence(ids_T[: span[1]], (span,)) for span in spans]


def direct_passes(ids_T: TokenIds, turns: list[TokenTurn], prefix: TokenIds) -> list[TokenSequence]:
    """One pass a turn, over what comes after its prompt."""
    passes = []
    for turn in turns:
        if turn.num_direct:
            shift = len(prefix) - turn.direct_start
            span = (turn.direct_scored_start + shift, turn.end + shift)
            direct_T = np.concatenate([prefix, ids_T[turn.direct_start : turn.end]])
            passes.append(TokenSequence(direct_T, (span,)))
    return passes


def _score_row(row: dict[str, Any], losses: list[SequenceLoss]) -> dict[str, Any]:
    out = {
        "row_index": row["row_index"],
        "sample_id": row["sample_id"],
        "status": row["status"],
        "reason": row["reason"],
        "num_prompt_tokens": row["num_prompt_tokens"],
        "num_response_tokens": 0,
        "num_direct_tokens": 0,
        "truncated": row["truncated"],
    }
    if row["status"] != "ok":
        return out
    turns: list[TokenTurn] = row["turns"]
    out["num_response_tokens"] = num_conditioned = sum(t.num_conditioned for t in turns)
    out["num_direct_tokens"] = num_direct = sum(t.num_direct for t in turns)
    if failed := [loss.error for loss in losses if loss.error]:
        return {**out, "status": "error", "reason": failed[0]}
    nlls = iter([nll for loss in losses for nll in loss.nll_nats])
    conditioned = iter([next(nlls) for turn in turns if turn.num_conditioned])
    direct = nlls
    per_turn = [
        {
            "num_response_tokens": turn.num_conditioned,
            "num_direct_tokens": turn.num_direct,
            "nll_conditioned": next(conditioned) if turn.num_conditioned else 0.0,
            "nll_direct": next(direct) if turn.num_direct else 0.0,
        }
        for turn in turns
    ]
    nll_conditioned = math.fsum(t["nll_conditioned"] for t in per_turn)
    nll_direct = math.fsum(t["nll_direct"] for t in per_turn)
    ratios = ifd_ratios(nll_conditioned / num_conditioned, nll_direct / num_direct)
    if ratios is None:
        return {**out, "status": "nonfinite"}
    return {
        **out,
        "nll_conditioned": nll_conditioned,
        "nll_direct": nll_direct,
        "ifd_loss_ratio": ratios[0],
        "ifd_ppl_ratio": ratios[1],
        "turns": per_turn,
    }


def ifd_ratios(mean_conditioned: float, mean_direct: float) -> tuple[float, float] | None:
    """Both IFD ratios of two mean losses in nats, or None where either is not finite.

    Source: arXiv:2308.12032, section 3.2 (loss ratio); arXiv:2402.00530 (perplexity ratio).
    """
    if not (math.isfinite(mean_conditioned) and math.isfinite(mean_direct)) or mean_direct == 0:
        return None
    try:
        ratios = mean_conditioned / mean_direct, math.exp(mean_conditioned - mean_direct)
    except OverflowError:
        return None
    return ratios if all(map(math.isfinite, ratios)) else None
