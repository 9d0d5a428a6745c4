"""The config: what parses, what is refused, and what the refusal says."""

from decimal import Decimal
from pathlib import Path
from typing import Any, get_args

import pytest
import yaml
from conftest import REPOSITORY
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import BaseModel
from pydantic_core import PydanticUndefined

from pipeline import config
from pipeline.config import PRESETS, Config, Preset
from pipeline.errors import ConfigError

MINIMAL: dict[str, Any] = {"input": {"path": "in"}, "output": "out", "model": {"path": "m"}}


def refusal(**sections: Any) -> str:
    """What `parse` says of a minimal config with these keys added."""
    with pytest.raises(ConfigError) as caught:
        config.parse({**MINIMAL, **sections})
    assert caught.value.exit_code == 2
    return str(caught.value)


@pytest.fixture
def config_file(tmp_path: Path) -> str:
    path = tmp_path / "job.yaml"
    path.write_text(yaml.safe_dump(MINIMAL))
    return str(path)


def keys_of(model: type[BaseModel], prefix: str = "") -> dict[str, Any]:
    """Every leaf key of a config class, with its default."""
    found: dict[str, Any] = {}
    for name, field in model.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            found |= keys_of(field.annotation, f"{prefix}{name}.")
        else:
            found[prefix + name] = field.default
    return found


def test_a_minimal_config_has_the_documented_defaults(config_file: str) -> None:
    loaded = config.load(config_file)
    assert loaded.input.paths == ["in"]
    assert loaded.input.layout == "auto"
    assert loaded.input.on_bad_shard == "fail"
    assert loaded.model.dtype == "auto"
    assert loaded.score.preset == "cherry"
    assert loaded.score.max_error_fraction == 0.01
    assert loaded.select.fraction is None
    assert loaded.select.of == "all"
    assert loaded.select.max_ifd == 1.0
    assert loaded.cluster.actors == "auto"


def test_a_list_of_paths_stays_a_list() -> None:
    assert config.parse({**MINIMAL, "input": {"path": ["a", "b"]}}).input.paths == ["a", "b"]


def test_overrides_are_laid_over_the_file(config_file: str) -> None:
    overrides = [
        "input.path=[a, b]",
        "input.columns.response=answer",
        "score.max_length=256",
        "select.fraction=0.29",
        "cluster.gpus_per_actor=0",
        "output=s3://bucket/x=y",
    ]
    loaded = config.load(config_file, overrides)
    assert loaded.input.paths == ["a", "b"]
    assert loaded.input.columns == {"response": "answer"}
    assert loaded.score.max_length == 256
    assert loaded.select.fraction == Decimal("0.29")
    assert loaded.cluster.gpus_per_actor == 0
    assert loaded.output == "s3://bucket/x=y"


def test_the_last_override_of_a_key_wins(config_file: str) -> None:
    assert config.load(config_file, ["select.count=1", "select.count=2"]).select.count == 2


def test_an_empty_override_means_null(tmp_path: Path) -> None:
    path = tmp_path / "job.yaml"
    path.write_text(yaml.safe_dump({**MINIMAL, "select": {"fraction": 0.5}}))
    loaded = config.load(str(path), ["select.fraction=", "select.count=3"])
    assert (loaded.select.fraction, loaded.select.count) == (None, 3)


def test_an_override_may_fill_a_section_that_the_file_leaves_empty(tmp_path: Path) -> None:
    path = tmp_path / "job.yaml"
    path.write_text("input: {path: in}\noutput: out\nmodel: {path: m}\nselect:\n")
    assert config.load(str(path), ["select.count=7"]).select.count == 7


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("select", "expected section.key=value"),
        ("=3", "expected section.key=value"),
        ("input.path.x=3", "'path' holds a value, not a section"),
        ("score.preset=[", "not valid YAML"),
        ("score.presett=x", "Did you mean 'score.preset'?"),
    ],
)
def test_a_bad_override_is_named(config_file: str, override: str, said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        config.load(config_file, [override])
    assert said in str(caught.value)


@pytest.mark.parametrize(
    ("sections", "wrong", "nearest"),
    [
        ({"score": {"presett": "cherry"}}, "score.presett", "score.preset"),
        ({"select": {"fractoin": 0.1}}, "select.fractoin", "select.fraction"),
        ({"modle": {"path": "m"}}, "modle", "model"),
        ({"fraction": 0.1}, "fraction", "select.fraction"),
        ({"cluster": {"gpu_per_actor": 1}}, "cluster.gpu_per_actor", "cluster.gpus_per_actor"),
    ],
)
def test_an_unknown_key_is_refused_with_the_nearest_valid_name(
    sections: dict[str, Any], wrong: str, nearest: str
) -> None:
    said = refusal(**sections)
    assert f"key '{wrong}' is unknown. Did you mean '{nearest}'?" in said


def test_gpus_of_a_large_model_are_whole() -> None:
    parsed = config.parse({**MINIMAL, "cluster": {"gpus_per_actor": 2}})
    assert parsed.cluster.gpus_per_actor == 2
    said = refusal(cluster={"gpus_per_actor": 1.5})
    assert "cluster.gpus_per_actor" in said
    assert "got 1.5, expected a share of one GPU or a whole number" in said


def test_work_that_cannot_be_shared_is_named_with_what_can() -> None:
    said = refusal(score={"share": ["prefix"]})
    assert "score.share" in said
    assert "'prefixes', 'equal' or 'turns'" in said


def test_a_key_like_no_other_is_answered_with_all_of_them() -> None:
    said = refusal(qqqq=1)
    assert all(key in said for key in keys_of(Config))


def test_an_unknown_preset_is_refused_with_the_nearest() -> None:
    said = refusal(score={"preset": "chery"})
    assert "key 'score.preset': got 'chery'" in said
    assert "Did you mean 'cherry'?" in said
    assert all(f"'{name}'" in said for name in PRESETS)


@pytest.mark.parametrize(
    ("compare", "says"),
    [
        ({"evaluate": [{"name": "a", "path": "x"}] * 2}, "evaluate: expected each once, got a, a"),
        (
            {"evaluate": [{"name": "input", "path": "x"}]},
            "is called input, as are the holdout_rows",
        ),
        ({"seeds": [1, 1]}, "seeds: expected each once, got 1, 1"),
        ({"arms": ["all", "all"]}, "arms: expected each once, got all, all"),
        ({"holdout_rows": 0}, "nothing to compare by"),
    ],
)
def test_comparisons_that_cannot_be_meant_are_refused(compare: dict[str, Any], says: str) -> None:
    assert says in refusal(compare=compare)


def test_every_fault_is_named_at_once() -> None:
    said = refusal(score={"preset": "nope", "max_length": 0}, select={"off": "all"})
    assert all(key in said for key in ("score.preset", "score.max_length", "select.off"))


def test_a_missing_key_is_named() -> None:
    with pytest.raises(ConfigError, match=r"key 'model\.path' is missing and has no default"):
        config.parse({**MINIMAL, "model": {}})
    with pytest.raises(ConfigError, match=r"key 'compare\.evaluate\.0\.path' is missing"):
        config.parse({**MINIMAL, "compare": {"evaluate": [{"name": "held"}]}})


@pytest.mark.parametrize(
    "budgets",
    [
        {"fraction": 0.1, "count": 5},
        {"fraction": 0, "count": 0},
        {"count": 5, "threshold": 0.8},
        {"fraction": 0.1, "count": 5, "threshold": 0.8},
    ],
)
def test_two_budgets_are_refused(budgets: dict[str, float]) -> None:
    said = refusal(select=budgets)
    assert f"set one of {' and '.join(budgets)}" in said


@pytest.mark.parametrize(
    ("select", "says"),
    [
        ({"quotas": {"a": 1}}, "quotas need group_by"),
        ({"group_by": "g", "quotas": {}}, "the table of quotas is empty"),
        (
            {"group_by": "g", "quotas": {"a": 1}, "count": 3},
            "set one of count and a table of quotas",
        ),
        ({"group_by": "g", "quotas": {"a": 1.5}}, "expected a fraction from 0 to 1"),
        ({"group_by": "g", "quotas": {"a": True}}, "expected a count (100) or a fraction"),
        ({"group_by": "g", "quotas": {"a": "web"}}, "expected a count (100) or a fraction"),
        ({"group_by": "g", "quotas": {"a": "1"}}, "expected a count (100) or a fraction"),
        ({"group_by": "g", "quotas": {7: 1}}, "put it in quotes, '7'"),
        ({"group_by": "g", "quotas": "proportion"}, "Did you mean 'proportional'?"),
        ({"group_by": "g", "quotas": "proportional", "threshold": 0.5}, "no rows to deal out"),
        ({"group_by": "g", "floor": 3}, "floor needs quotas: proportional"),
        ({"fractions": [0.1, 1.1]}, "key 'select.fractions': got 1.1"),
        ({"fraction": 0.1, "fractions": [0.1]}, "set one of fraction and fractions"),
        ({"count": True}, "key 'select.count': got True"),
        ({"count": 2**62}, "key 'select.count'"),
        ({"min_ifd": 0.9, "max_ifd": 0.5}, "no row has min_ifd 0.9 <= ratio < max_ifd 0.5"),
        ({"threshold": 1.2}, "over the threshold 1.2: max_ifd is 1"),
        ({"threshold": 0.1, "min_ifd": 0.2, "order": "ascending"}, "under the threshold 0.1"),
    ],
)
def test_selections_that_cannot_be_meant_are_refused(select: dict[str, Any], says: str) -> None:
    said = refusal(select=select)
    assert says in said
    assert said.count("\n") == 0


@pytest.mark.parametrize("fraction", [-0.1, 1.0001, 10, "nan", "inf", "ten percent", True])
def test_a_fraction_outside_0_to_1_is_refused(fraction: Any) -> None:
    assert f"key 'select.fraction': got {fraction!r}" in refusal(select={"fraction": fraction})


@pytest.mark.parametrize(("given", "kept"), [(0, "0"), (1, "1"), (0.29, "0.29"), ("0.1", "0.1")])
def test_a_fraction_is_kept_as_the_decimal_that_was_written(given: Any, kept: str) -> None:
    parsed = config.parse({**MINIMAL, "select": {"fraction": given}})
    assert parsed.select.fraction == Decimal(kept)


@pytest.mark.parametrize(
    "url",
    [
        "s3://AKIA123:secret@bucket/x",
        "s3://AKIA123:sec/ret+key=@bucket/x",
        "S3://AKIA123:secret@bucket/x",
        "simplecache::s3://AKIA123:secret@bucket/x",
        "https://token@host/x",
        "https://host/x.parquet?X-Amz-Credential=AKIA123&X-Amz-Signature=0f3a",
        "https://host/x.parquet?sv=2024&sig=AKIA123",
    ],
)
@pytest.mark.parametrize("key", ["input", "output", "model"])
def test_a_url_with_credentials_is_refused_and_not_repeated(key: str, url: str) -> None:
    section = url if key == "output" else {"path": url}
    said = refusal(**{key: section})
    assert "a URL carries credentials" in said
    assert "AWS_SECRET_ACCESS_KEY" in said
    assert "AKIA123" not in said
    assert "@" not in said


@pytest.mark.parametrize("url", ["s3:/cherry/o", "s3://", "s3:", "gs:///x", "hdfs:/x", "S3:/x"])
@pytest.mark.parametrize("key", ["input.path", "output", "model.path"])
def test_a_mistyped_url_is_no_local_path(key: str, url: str) -> None:
    section = url if key == "output" else {"path": url}
    said = refusal(**{key.partition(".")[0]: section})
    assert f"key '{key}': got {url}, expected a path, or a URL such as s3://BUCKET/KEY" in said


@pytest.mark.parametrize(
    "url",
    [
        "abfss://container@account.dfs.core.windows.net/x",
        "hdfs://etl@namenode:8020/x",
        "simplecache::abfs://container@account.dfs.core.windows.net/x",
    ],
)
def test_a_user_in_a_url_is_no_secret_but_is_lost_in_listings(url: str) -> None:
    said = refusal(input={"path": url})
    assert f"got {url}, expected a URL without '@'" in said
    assert "AZURE_STORAGE_ACCOUNT_NAME" in said
    assert "credentials" not in said


@pytest.mark.parametrize(
    "url",
    ["/data/hdfs://a@b/x", "file:///data/x", "memory:///x", "hf://datasets/a/b", "a:b/c", "/s3:/x"],
)
def test_what_may_be_meant_is_taken(url: str) -> None:
    assert config.parse({**MINIMAL, "output": url}).output == url


@pytest.mark.parametrize(
    "url", ["s3://bucket/a@b", "s3://bucket/t=1:2/a@b", "/data/a@b", "hdfs://host:8020/a@b"]
)
def test_an_at_sign_in_a_key_is_no_credential(url: str) -> None:
    assert config.parse({**MINIMAL, "output": url}).output == url


def test_a_preset_is_used_as_it_is_unless_overridden() -> None:
    for name, preset in PRESETS.items():
        assert config.parse({**MINIMAL, "score": {"preset": name}}).preset == preset


def test_overrides_of_a_preset_leave_the_rest_of_it() -> None:
    parsed = config.parse(
        {
            **MINIMAL,
            "score": {"preset": "superfiltering", "pair_tokens": True, "max_length": 300},
            "select": {"by": "ifd_loss_ratio"},
        }
    )
    assert parsed.preset == Preset("plain", "ifd_loss_ratio", True, 300)


def test_pair_tokens_false_overrides_a_preset_that_pairs() -> None:
    parsed = config.parse({**MINIMAL, "score": {"template": "chat", "pair_tokens": False}})
    assert parsed.preset == Preset("chat", "ifd_loss_ratio", False, 512)


def test_a_config_cannot_be_changed_after_it_was_checked() -> None:
    parsed = config.parse(MINIMAL)
    with pytest.raises(ValueError, match="frozen"):
        parsed.select.count = 3  # type: ignore[misc]


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"- a\n- b\n", "got list, expected keys such as input"),
        (b"", "got nothing"),
        (b"input: [\n", "cannot be read as YAML"),
        (b"input: \xff\n", "cannot be read as YAML"),
        (b"output: !!python/object/apply:os.getcwd []\n", "cannot be read as YAML"),
    ],
)
def test_a_file_that_is_no_config_is_named(tmp_path: Path, content: bytes, said: str) -> None:
    path = tmp_path / "job.yaml"
    path.write_bytes(content)
    with pytest.raises(ConfigError) as caught:
        config.load(str(path))
    assert f"config {path}: " in str(caught.value)
    assert said in str(caught.value)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"absent\.yaml: there is no such file"):
        config.load(str(tmp_path / "absent.yaml"))


def test_the_reference_config_holds_every_key_with_its_default() -> None:
    written = yaml.safe_load((REPOSITORY / "configs/cherry.yaml").read_text())
    flat = {
        f"{section}.{key}" if key else section: value
        for section, body in written.items()
        for key, value in (body.items() if isinstance(body, dict) else [("", body)])
    }
    expected = keys_of(Config)
    assert list(flat) == list(expected)
    required = {key for key, default in expected.items() if default is PydanticUndefined}
    assert required == {"input.path", "output", "model.path"}
    assert {k: v for k, v in flat.items() if k not in required} == {
        k: list(v) if isinstance(v, tuple) else v for k, v in expected.items() if k not in required
    }


def test_a_subset_of_another_form_is_not_trained_on() -> None:
    for section in ("train", "compare"):
        said = refusal(select={"format": "messages_jsonl"}, **{section: {}})
        assert "select.format messages_jsonl has other columns: set parquet or jsonl" in said


def test_the_self_guided_config_holds_every_key_with_its_default() -> None:
    written = yaml.safe_load((REPOSITORY / "configs/self_guided.yaml").read_text())
    for name in ("experience", "train", "compare"):
        section = get_args(Config.model_fields[name].annotation)[0]  # of X | None
        assert list(written[name]) == list(section.model_fields)
        assert section.model_validate(written[name]) == section()


@pytest.mark.parametrize(
    "path", sorted((REPOSITORY / "configs").glob("*.yaml")), ids=lambda p: p.name
)
def test_every_config_of_the_repository_loads(path: Path) -> None:
    assert config.load(str(path)).output


_counts = st.integers(1, 10**9)
_floats = st.floats(-1e6, 1e6)
_names = st.text(st.characters(codec="utf-8", exclude_categories=["Cc", "Cs"]), min_size=1)
_budgets = st.sampled_from(["fraction", "fractions", "count", "threshold", None])


@st.composite
def raw_configs(draw: st.DrawFn) -> dict[str, Any]:
    values = {
        "fraction": draw(st.decimals(0, 1, places=6)),
        "fractions": draw(st.lists(st.decimals(0, 1, places=6), min_size=1)),
        "count": draw(_counts),
        "threshold": draw(_floats),
    }
    budget = draw(_budgets)
    return {
        "input": {
            "path": draw(st.lists(_names.filter(lambda n: "@" not in n), min_size=1)),
            "columns": draw(st.dictionaries(st.sampled_from(["prompt", "response"]), _names)),
            "max_rows": draw(st.none() | _counts),
        },
        "output": "out",
        "model": {"path": "m", "dtype": draw(st.sampled_from(["auto", "float32"]))},
        "score": {
            "preset": draw(st.sampled_from(sorted(PRESETS))),
            "pair_tokens": draw(st.none() | st.booleans()),
            "unit_rows": draw(st.just("auto") | _counts),
            "max_error_fraction": draw(st.floats(0, 1)),
        },
        "select": {"max_ifd": None if budget == "threshold" else draw(st.none() | _floats)}
        | ({budget: values[budget]} if budget else {}),
    }


@settings(deadline=None, max_examples=50)  # the machine may be busy
@given(raw_configs())
def test_a_config_written_as_yaml_reads_back_as_itself(
    tmp_path_factory: pytest.TempPathFactory, raw: dict[str, Any]
) -> None:
    parsed = config.parse(raw)
    path = tmp_path_factory.getbasetemp() / "round_trip.yaml"
    path.write_text(yaml.safe_dump(parsed.model_dump(mode="json")), encoding="utf-8")
    assert config.load(str(path)) == parsed


def test_a_url_with_credentials_is_never_quoted() -> None:
    assert "topsecret" not in refusal(input={"path": ["s3://AKIA:topsecret@b/x", 5]})
    said = refusal(output=["s3://AKIA:topsecret@b/x"])
    assert "topsecret" not in said
    assert "key 'output': got a URL with credentials, expected text" in said


@pytest.mark.parametrize(
    ("sections", "key"),
    [
        ({"train": {"seed": 2**32}}, "train.seed"),
        ({"experience": {"seed": 2**32}}, "experience.seed"),
        ({"compare": {"seeds": [0, 2**32]}}, "compare.seeds"),
    ],
)
def test_a_seed_that_some_library_would_refuse_is_refused(
    sections: dict[str, Any], key: str
) -> None:
    assert f"key '{key}" in refusal(**sections)


@pytest.mark.parametrize("seconds", [float("inf"), 1e12])
def test_a_timeout_that_no_clock_takes_is_refused(seconds: float) -> None:
    assert "key 'score.unit_timeout_s'" in refusal(score={"unit_timeout_s": seconds})


def test_a_key_that_stands_twice_in_an_override_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(MINIMAL))
    with pytest.raises(ConfigError, match="the key 'web' is there twice"):
        config.load(str(path), ["select.quotas={web: 0.1, web: 0.2}"])
