"""The demo corpus: its promises, and its plants under SmolLM2."""

from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from conftest import REPOSITORY
from test_metric import tokens_table

from pipeline import inputs, model_files, models
from pipeline.config import ModelConfig, load
from pipeline.engine import Engine
from pipeline.layouts import find_columns
from pipeline.metric import score_table
from pipeline.rendering import Renderer
from pipeline.samples import read_samples, sample_id


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> pa.Table:
    config = load(str(REPOSITORY / "configs/demo.yaml"))
    folder = config.input.model_copy(update={"path": str(REPOSITORY / "configs/demo/corpus")})
    corpus = inputs.open_corpus(folder, str(tmp_path_factory.mktemp("demo")))
    assert len(corpus.shards) == 4
    tables = [pq.read_table(shard.read_url) for shard in corpus.shards]
    return pa.concat_tables(tables, promote_options="permissive")


def test_corpus_has_what_its_page_says(rows: pa.Table) -> None:
    assert len(rows) == 425
    assert Counter(rows["plant"].to_pylist()) == {
        None: 381, "ignores_instruction": 12, "copies_instruction": 12, "duplicate": 6,
        "empty_response": 3, "no_assistant": 2, "overlong_prompt": 2, "overlong_response": 1,
        "one_token": 2, "malformed_null": 2, "malformed_role": 2,
    }  # fmt: skip
    assert Counter(rows["language"].to_pylist())["de"] == 50
    columns = find_columns(rows.schema, "demo", "auto", {})
    assert columns.layout == "messages"
    samples = list(read_samples(rows, columns))
    assert sum(s.malformed is not None for s in samples) == 5
    ids = Counter(sample_id(s.messages) for s in samples if s.messages)
    assert sorted(ids.values())[-7:] == [1, 2, 2, 2, 2, 2, 2]


@pytest.mark.smollm2
def test_planted_answers_land_where_they_must(rows: pa.Table, smollm2: Path) -> None:
    ref = model_files.resolve(ModelConfig(path=str(smollm2)))
    tokenizer = models.load_tokenizer(ref)
    engine = Engine(models.load(ref, torch.float32, torch.device("cpu")))
    renderer = Renderer(tokenizer, "chat", 2048, True)
    ratios: dict[str, list[float]] = {}
    for plant in ("ignores_instruction", "copies_instruction"):
        chosen = rows.filter(pa.compute.equal(rows["plant"], plant))
        samples = list(read_samples(chosen, find_columns(rows.schema, "demo", "auto", {})))
        part, _ = score_table(tokens_table(renderer, samples), engine, renderer.prefix_ids)
        ratios[plant] = part["ifd_loss_ratio"].to_pylist()
    assert min(ratios["ignores_instruction"]) >= 1.0
    assert max(ratios["copies_instruction"]) < 0.5


def test_demo_config_pins_the_model_by_content() -> None:
    settings: Any = load(str(REPOSITORY / "configs/demo.yaml"))
    assert settings.model.revision.startswith("sha256:")
