"""Every key of the config is held to one side: it changes what scores are filed under, or not."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import tiny_model

from pipeline.budgets import SelectSettings
from pipeline.config import Config
from pipeline.config_faults import all_keys
from pipeline.config_select import SelectConfig
from pipeline.config_training import TrainConfig
from pipeline.job import check, plan
from pipeline.training_job import plan_training

pytestmark = pytest.mark.ray
ConfigFor = Callable[..., Any]

# Another value of each key than the one of `base`.
CHANGE_THE_SCORE = {
    "model.path": "{other_model}",
    "model.dtype": "bfloat16",
    "score.preset": "superfiltering",
    "score.template": "vicuna",
    "score.pair_tokens": False,
    "score.max_length": 256,
}
CHANGE_THE_UNITS = {  # which rows are read and how, and which of them lie together
    "input.path": "{corpus}/shard-1.parquet",
    "input.layout": "prompt_completion",
    "input.columns": {"response": "input"},
    "input.max_rows": 12,
    "score.unit_rows": 4,
}
CHANGE_NOTHING = {
    "input.on_bad_shard": "skip",
    "output": "{tmp}/elsewhere",
    "model.revision": "{revision}",
    "model.cache_dir": "{tmp}/cache",
    "score.max_batch_tokens": 128,
    "score.share": [],
    "score.compile": False,
    "score.reuse": "units",
    "score.unit_timeout_s": 5.0,
    "score.max_error_fraction": 0.5,
    "cluster.actors": 2,
    "cluster.gpus_per_actor": 0,
    "cluster.threads_per_actor": 1,
    "cluster.autoscaling": True,
    "cluster.cpus_for_tokenising": 1,
    "cluster.max_units_in_flight": 1,
    "cluster.price_per_gpu_hour": 2.5,
}
CHANGE_THE_SELECTION = {
    "select.by": "ifd_ppl_ratio",
    "select.order": "ascending",
    "select.fraction": 0.2,
    "select.fractions": [0.1, 0.2],
    "select.count": 3,
    "select.threshold": 0.4,
    "select.of": "eligible",
    "select.min_ifd": 0.1,
    "select.max_ifd": 0.9,
    "select.min_response_tokens": 2,
    "select.duplicates": "keep",
    "select.group_by": "output",
    "select.quotas": {"a": 1, "*": 0.1},
    "select.floor": 2,
    "select.format": "jsonl",
    "select.rows_per_part": 10,
}
NEEDS = {
    "cluster.autoscaling": {"actors": 1, "gpus_per_actor": 0},
    "select.quotas": {"group_by": "output"},
    "select.floor": {"group_by": "output", "quotas": "proportional"},
}


def test_every_key_is_on_one_side() -> None:
    leaves = {key for key in all_keys(Config) if "." in key or key == "output"}
    # These shape other models, whose weights then are the ones of model.path.
    leaves -= {key for key in leaves if key.startswith(("experience.", "train.", "compare."))}
    sides = [CHANGE_THE_SCORE, CHANGE_THE_UNITS, CHANGE_NOTHING, CHANGE_THE_SELECTION]
    assert leaves == set().union(*sides)
    assert sum(map(len, sides)) == len(leaves)


@pytest.fixture
def planned(
    ray_local: None, config_for: ConfigFor, corpus: Path, tmp_path: Path, model_dir: Path
) -> Callable[[str, Any], tuple[str, list[str]]]:
    """The score fingerprint and the unit ids of the base config with one key changed."""
    other = tmp_path / "other-model"
    shutil.copytree(model_dir, other)
    tiny_model("Llama", seed=1, max_position_embeddings=2048).save_pretrained(other)
    base = config_for(corpus)
    revision = check(base, selecting=False).model.fingerprint
    values = {"tmp": tmp_path, "corpus": corpus, "other_model": other, "revision": revision}

    def build(key: str, value: Any) -> tuple[str, list[str]]:
        raw = base.model_dump(mode="json")
        section, _, leaf = key.rpartition(".")
        filled = value.format(**values) if isinstance(value, str) else value
        if key == "input.layout":
            raw["input"]["columns"] = {"prompt": "instruction", "response": "output"}
        (raw[section] if section else raw).update({leaf: filled} | NEEDS.get(key, {}))
        job = plan(check(Config.model_validate(raw), selecting=False))
        return job.plan.fingerprint, [unit.unit_id for unit in job.plan.units]

    return build


@pytest.mark.parametrize("key", CHANGE_THE_SCORE)
def test_what_changes_a_score_changes_the_path(planned: Any, key: str) -> None:
    before, after = planned("output", "{tmp}/out"), planned(key, CHANGE_THE_SCORE[key])
    assert before[0] != after[0]
    assert not set(before[1]) & set(after[1])


@pytest.mark.parametrize("key", CHANGE_THE_UNITS)
def test_what_changes_the_rows_changes_the_units_only(planned: Any, key: str) -> None:
    before, after = planned("output", "{tmp}/out"), planned(key, CHANGE_THE_UNITS[key])
    assert before[0] == after[0]
    assert before[1] != after[1]


@pytest.mark.parametrize("key", CHANGE_NOTHING | CHANGE_THE_SELECTION)
def test_nothing_else_changes_either(planned: Any, key: str) -> None:
    value = (CHANGE_NOTHING | CHANGE_THE_SELECTION)[key]
    assert planned("output", "{tmp}/out") == planned(key, value)


def test_what_is_the_presets_own_changes_nothing(
    ray_local: None, config_for: ConfigFor, corpus: Path
) -> None:
    spelt_out = {"preset": "cherry", "max_length": 512, "pair_tokens": True, "template": "alpaca"}
    jobs = [
        plan(check(config_for(corpus, score=score), selecting=False)) for score in ({}, spelt_out)
    ]
    assert jobs[0].plan == jobs[1].plan


@pytest.mark.parametrize("key", CHANGE_THE_SELECTION)
def test_every_key_of_the_selection_changes_its_settings(key: str) -> None:
    leaf = key.rpartition(".")[2]
    needs = NEEDS.get(key, {})
    changed = SelectConfig.model_validate({leaf: CHANGE_THE_SELECTION[key], **needs})
    by = changed.by or "ifd_loss_ratio"
    base = SelectSettings.from_config(SelectConfig.model_validate(needs), "ifd_loss_ratio")
    assert SelectSettings.from_config(changed, by) != base


ANOTHER_MODEL = {
    "epochs": 2,
    "max_steps": 7,
    "learning_rate": 1e-4,
    "batch_rows": 64,
    "warmup_fraction": 0.1,
    "weight_decay": 0.1,
    "max_grad_norm": 0.5,
    "seed": 1,
    "dtype": "bfloat16",
    "lora": {},
}
THE_SAME_MODEL = {
    "max_batch_tokens": 1024,
    "checkpoint_steps": 10,
    "workers": 2,
    "gpus_per_replica": 2,
}


def test_every_key_of_a_training_shapes_its_model_or_does_not(
    ray_local: None, config_for: ConfigFor, corpus: Path
) -> None:
    assert set(TrainConfig.model_fields) == ANOTHER_MODEL.keys() | THE_SAME_MODEL.keys()
    job = plan(check(config_for(corpus), selecting=False))
    base = {"dtype": "float32"}

    def train_fp(**changes: Any) -> str:
        config = TrainConfig.model_validate(base | changes)
        return plan_training(job, "rows", "digest", config).train_fp

    for key, value in ANOTHER_MODEL.items():
        assert train_fp(**{key: value}) != train_fp(), key
    for key, value in THE_SAME_MODEL.items():
        assert train_fp(**{key: value}) == train_fp(), key
