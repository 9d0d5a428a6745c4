"""The two reference programs' losses for real samples, and none of their code.

../shared/golden holds what Cherry_LLM and Superfiltering give with SmolLM2-135M in float32.
"""

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import torch
from test_metric import tokens_table

from pipeline import model_files, models
from pipeline.config import PRESETS, ModelConfig
from pipeline.engine import Engine
from pipeline.layouts import find_columns
from pipeline.metric import score_table
from pipeline.rendering import Renderer
from pipeline.samples import read_samples

pytestmark = pytest.mark.smollm2


@pytest.fixture(scope="module")
def resident(smollm2: Path) -> tuple[Engine, Any]:
    ref = model_files.resolve(ModelConfig(path=str(smollm2)))
    model = models.load(ref, torch.float32, torch.device("cpu"))
    return Engine(model), models.load_tokenizer(ref)


@pytest.mark.slow
@pytest.mark.parametrize("preset", ["cherry", "superfiltering"])
def test_every_loss_is_the_reference_program_s(
    preset: str, resident: tuple[Engine, Any], shared: Path
) -> None:
    lines = (shared / "golden/reference_scores.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    names = ("instruction", "input", "output")
    table = pa.Table.from_pylist([{name: row[name] for name in names} for row in rows])
    engine, tokenizer = resident
    chosen = PRESETS[preset]
    renderer = Renderer(tokenizer, chosen.template, chosen.max_length, chosen.pair_tokens)
    samples = list(read_samples(table, find_columns(table.schema, "golden", "auto", {})))
    part, _ = score_table(tokens_table(renderer, samples), engine, renderer.prefix_ids)
    differences = []
    for row, ours in zip(rows, part.to_pylist(), strict=True):
        reference = row[preset]
        if reference["loss_conditioned"] is None or reference["loss_direct"] is None:
            assert ours["status"] in ("too_short", "prompt_overlong"), row
            continue
        conditioned = ours["nll_conditioned"] / ours["num_response_tokens"]
        differences.append(abs(conditioned - reference["loss_conditioned"]))
        if not ours["truncated"]:  # there the references keep one direct token more
            direct = ours["nll_direct"] / ours["num_direct_tokens"]
            differences.append(abs(direct - reference["loss_direct"]))
    assert len(differences) >= 280
    assert max(differences) < 1e-4  # asked for: 1e-3
