"""What there is to do: a config checked against its input and model, and cut into units."""

import logging
from collections import Counter
from dataclasses import dataclass, replace
from importlib.util import find_spec
from typing import Any

import torch

from pipeline import cluster, devices, inputs, model_files, models, storage, units
from pipeline.adapters import add_adapters
from pipeline.budgets import SelectSettings
from pipeline.columns import merged_schema, output_schema
from pipeline.compiled import Compiled
from pipeline.config import ClusterConfig, Config, ModelConfig
from pipeline.config_training import TrainConfig
from pipeline.errors import ConfigError, InputError
from pipeline.inputs import Corpus, Shard
from pipeline.rendering import Renderer
from pipeline.schemas import EXPERIENCE
from pipeline.settings import Measure, ModelRef, ScoringSettings
from pipeline.storage_faults import using_output
from pipeline.units import Plan

log = logging.getLogger("cherry")

_WORTH_COMPILING = 10**12
"""A CPU's layers are compiled from so many parameters times rows on: some ten minutes of two cores
at 135M, of which compiled layers spare a twentieth or more, and compiling costs seconds."""


@dataclass(frozen=True)
class Checked:
    """A config, its input and the description of its model, found to be sound."""

    config: Config
    corpus: Corpus
    model: ModelRef
    renderer: Renderer
    num_parameters: int


@dataclass(frozen=True)
class Job:
    """What there is to do: resolved settings and planned units."""

    config: Config
    corpus: Corpus
    settings: ScoringSettings
    plan: Plan


def check(config: Config, *, selecting: bool) -> Checked:
    """Read the input's footers and the model's description; nothing is started.

    Raises:
        ConfigError, InputError, ModelError: With what to do about it.
    """
    ref = model_files.resolve(config.model)
    corpus = inputs.open_corpus(config.input, config.output)
    if selecting:
        settings = SelectSettings.from_config(config.select, config.preset.ratio)
        output_schema(corpus, settings)  # what cannot be written is named before hours of scoring
    _check_training(config, corpus)
    for layout, count in Counter(s.columns.describe() for s in corpus.shards).items():
        log.info("%d shard%s read as %s", count, "s"[: count > 1], layout)
    checked = _describe(config, corpus, ref)
    _save_config(config)
    inputs.remember_footers(corpus, config.output)
    return checked


def with_model(checked: Checked, model: ModelConfig) -> Checked:
    """The same corpus and settings with another model."""
    config = checked.config.model_copy(update={"model": model})
    return _describe(config, checked.corpus, model_files.resolve(model))


def without_max_rows(checked: Checked) -> Checked:
    """The same without `input.max_rows`, which is for a try: with all rows of its shards."""
    whole = checked.config.input.model_copy(update={"max_rows": None})
    return replace(checked, config=checked.config.model_copy(update={"input": whole}))


def _describe(config: Config, corpus: Corpus, ref: ModelRef) -> Checked:
    architecture = models.load_config(ref)
    preset = config.preset
    renderer = Renderer(
        models.load_tokenizer(ref),
        preset.template,
        _max_length(config, architecture),
        preset.pair_tokens,
    )
    num_parameters = sum(p.numel() for p in models.outline(architecture).parameters())
    for training in _trainings(config):
        if training.lora:  # it may name modules that the model has not
            add_adapters(models.outline(architecture), training.lora, training.seed)
    return Checked(config, corpus, ref, renderer, num_parameters)


def plan(checked: Checked, measure: Measure = "ifd") -> Job:
    """Resolve what depends on the cluster's kind of device, and cut the corpus into units."""
    config, renderer = checked.config, checked.renderer
    settings = ScoringSettings(
        model=checked.model,
        template=renderer.template,
        pair_tokens=renderer.pair_tokens,
        max_length=renderer.max_length,
        dtype=resolve_dtype(config.model.dtype, config.cluster),
        max_batch_tokens=config.score.max_batch_tokens,
        share=config.score.share,
        compiled=_compiled(checked),
        measure=measure,
    )
    score_fp = settings.fingerprint(
        renderer.template_text, models.tokenizer_fingerprint(renderer.tokenizer)
    )
    planned = units.make_plan(
        checked.corpus,
        config.output,
        score_fp,
        config.score.unit_rows,
        checked.num_parameters,
        config.input.max_rows,
        settings.folder,
    )
    return Job(config, checked.corpus, settings, planned)


def _trainings(config: Config) -> list[TrainConfig]:
    trainings = [config.experience.train] if config.experience else []
    if config.train or config.compare:
        trainings.append(config.train or TrainConfig())
    return trainings


def _check_training(config: Config, corpus: Corpus) -> None:
    """What training could not do is named before hours of scoring, too."""
    if config.experience:
        merged_schema(corpus, EXPERIENCE)
        rows = _num_rows(config, corpus)
        if rows < config.experience.clusters:
            raise ConfigError(
                f"key 'experience.clusters': got {config.experience.clusters}, expected at most "
                f"{rows}, the rows of the input."
            )
    trainings = _trainings(config)
    if not trainings:
        return
    if any(training.lora for training in trainings) and find_spec("peft") is None:
        raise ConfigError("train.lora: it needs an extra: pip install 'cherry-pipeline[lora]'")
    _refuse_layouts_apart(corpus)


def _refuse_layouts_apart(corpus: Corpus) -> None:
    """What is trained on is read as one: a field may be absent in a shard, but not another column.

    Pieces of JSON without a good line have no columns, and nothing to say.
    """
    read = [shard for shard in corpus.shards if shard.num_rows and shard.columns.names]
    first_with: dict[str, Shard] = {}
    for shard in read:
        if shard.columns.layout != read[0].columns.layout:
            raise _apart(shard, read[0])
        for name, column in shard.columns.names.items():
            known = first_with.setdefault(name, shard)
            if known.columns.names[name] != column:
                raise _apart(shard, known)


def _apart(shard: Shard, other: Shard) -> InputError:
    return InputError(
        f"shard {shard.url} reads as {shard.columns.describe()}, shard {other.url} as "
        f"{other.columns.describe()}: experience, train and compare read a subset of all of them "
        "as one. Convert one of them, or run the shards as two corpora."
    )


def _save_config(config: Config) -> None:
    """Keep the resolved config beside the results; notices an output that cannot be written."""
    text = config.model_dump_json(indent=1)
    name = f"{units.fingerprint(config.model_dump(mode='json'))}.json"
    url = storage.join(storage.absolute(config.output), "configs", name)
    with using_output():
        storage.publish(url, text.encode())


def _max_length(config: Config, architecture: Any) -> int:
    wanted = config.preset.max_length
    limit = getattr(architecture.get_text_config(), "max_position_embeddings", None)
    named = config.score.max_length
    if named and limit and named > limit:
        raise ConfigError(
            f"key 'score.max_length': got {named}, expected at most {limit}, the positions of "
            f"{config.model.path}."
        )
    return min(wanted, limit) if limit else wanted


def _num_rows(config: Config, corpus: Corpus) -> int:
    rows = sum(shard.num_rows for shard in corpus.shards)
    return min(rows, config.input.max_rows or rows)


def _compiled(checked: Checked) -> Compiled:
    """`auto` on CPUs: layers of long jobs, too, by the whole corpus and not by what is left of it.

    So every unit is scored in one way, however often a run is interrupted.
    """
    config = checked.config
    if config.score.compile != "auto" or cluster.scores_on_gpus(config.cluster):
        return config.score.compile
    work = checked.num_parameters * _num_rows(config, checked.corpus)
    return True if work >= _WORTH_COMPILING else "auto"


def resolve_dtype(wanted: str, config: ClusterConfig) -> Any:
    """`auto`: bfloat16 where models run on GPUs or on CPUs that multiply it in hardware."""
    if wanted != "auto":
        return wanted
    device = torch.device("cuda" if cluster.scores_on_gpus(config) else "cpu")
    return str(devices.auto_dtype(device)).removeprefix("torch.")
