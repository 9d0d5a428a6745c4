"""Prompt embeddings: where a prompt lies, and how well the model knows it, in one pass.

The embedding of a prompt is the mean of the model's last hidden states over its tokens, and its
perplexity is ``exp(nll / (tokens - 1))``: nothing predicts the first token. Only rows with an
answer to learn from are embedded.

Source: arXiv:2308.12032, section 3.1.
"""

import math
from typing import Any

import numpy as np
import pyarrow as pa

from pipeline.engine import Engine, SequenceLoss, TokenSequence
from pipeline.schemas import EMBEDDING, flat_lists


def embed_table(
    tokens: pa.Table, engine: Engine, _prefix_ids: tuple[int, ...]
) -> tuple[pa.Table, int]:
    """Embed the prompts of a unit.

    Args:
        tokens: In the TOKENS schema.
        engine: The resident model.

    Returns:
        The part, in the EMBEDDING schema, and the prompt tokens that were read.
    """
    offsets, values = flat_lists(tokens["input_ids"])
    rows = tokens.select(
        ["row_index", "sample_id", "status", "reason", "num_prompt_tokens"]
    ).to_pylist()
    chosen = []
    sequences = []
    for row, start in zip(rows, offsets, strict=False):
        if row["status"] != "ok":
            continue
        length = row["num_prompt_tokens"]
        if length < 2:  # it has no perplexity
            row["status"] = "too_short"
            continue
        chosen.append(row)
        sequences.append(TokenSequence(values[start : start + length], ((1, length),)))
    for row, loss in zip(chosen, engine.score(sequences, hidden=True), strict=True):
        row |= _measured(loss)
    part = pa.Table.from_pylist(rows, schema=EMBEDDING)
    return part, sum(len(sequence.input_ids) for sequence in sequences)


def _measured(loss: SequenceLoss) -> dict[str, Any]:
    if loss.error:
        return {"status": "error", "reason": loss.error}
    (nll,) = loss.nll_nats
    assert loss.mean_hidden_M is not None
    if not (math.isfinite(nll) and np.isfinite(loss.mean_hidden_M).all()):
        return {"status": "nonfinite"}
    return {"nll_prompt": nll, "embedding": loss.mean_hidden_M}
