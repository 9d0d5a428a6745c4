"""The phases of the method around scoring, each skipped where its result is there.

::

    base model -> embed prompts -> experience subset -> train briefly -> the model that scores
    base model ------------------------- cherry subset -> train -------> the model that comes out

Source: arXiv:2308.12032, section 3.
"""

import hashlib
from typing import Any

from pipeline import accounting, pending, storage, training, training_data
from pipeline.config import Config, InputConfig
from pipeline.config_training import ExperienceConfig, TrainConfig
from pipeline.errors import InputError
from pipeline.experience import Experience, select_experience
from pipeline.inputs import Corpus, open_sources
from pipeline.job import Checked, Job, plan, with_model
from pipeline.pending import Progress, Silence
from pipeline.selection import Selection
from pipeline.training import Trained
from pipeline.training_job import plan_training


def experience(checked: Checked, settings: ExperienceConfig, progress: Progress) -> Experience:
    """Embed every prompt that has no embedding yet, and choose the rows of brief experience."""
    job = plan(checked, measure="prompt")
    done = pending.score(job, progress)
    finished = job.plan.without({unit.unit_id for unit in done if unit.failure})
    audited = accounting.audit(finished)
    return select_experience(finished, job.corpus, job.config.output, settings, audited)


def experienced(checked: Checked, progress: Progress | None) -> Checked:
    """A config with the model that scores: the briefly trained one, if it says `experience`.

    Args:
        checked: With the base model.
        progress: None if nothing may be embedded or trained for it.

    Raises:
        InputError: The model is not trained yet, and may not be.
    """
    config = checked.config
    if config.experience is None:
        return checked
    if progress is None:
        embedding = plan(checked, measure="prompt").plan
        if embedding.pending(embedding.parts()):
            raise _not_there(config)
    subset = experience(checked, config.experience, progress or Silence())
    trained = _train(
        plan(checked),
        subset.url,
        subset.manifest,
        "the experience subset",
        config.experience.train,
        progress,
        config.input,
    )
    model = config.model.model_copy(update={"path": trained.url, "revision": None})
    return with_model(checked, model)


def retrain(job: Job, selected: Selection, config: TrainConfig, progress: Progress) -> Trained:
    """Train the base model on the cherry subset.

    Args:
        job: Of the base model.
        selected: The subset.
        config: Of the training.
        progress: Told of each step.
    """
    if not selected.manifest["parts"]:
        raise InputError(
            f"{selected.url}: the cherry subset has no rows, expected at least one to train on. "
            "See rejected_rows in its manifest."
        )
    layout = cherry_layout(job.config)
    name = "the cherry subset"
    return _train(job, selected.url, selected.manifest, name, config, progress, layout)


def cherry_layout(config: Config) -> InputConfig:
    """How the cherry subset reads: as the input does, or as what trainers read."""
    own_columns = config.select.format in ("parquet", "jsonl")
    return config.input if own_columns else InputConfig(path="-")


def open_subset(config: Config, url: str, manifest: dict[str, Any], layout: InputConfig) -> Corpus:
    """A subset that was written here, to be read again as the input is."""
    urls = [storage.join(url, part["path"]) for part in manifest["parts"]]
    sources = [entry for part in urls for entry in storage.list_objects(part)]
    return open_sources(sources, layout, config.output)


def _train(
    job: Job,
    url: str,
    manifest: dict[str, Any],
    name: str,
    config: TrainConfig,
    progress: Progress | None,
    layout: InputConfig,
) -> Trained:
    """Train the job's model on a subset, unless that is done; if nobody may, it must be done."""
    contents = "".join(part["sha256"] for part in manifest["parts"])
    training_job = plan_training(job, name, hashlib.sha256(contents.encode()).hexdigest(), config)
    if progress is None:
        if (trained := training.finished(training_job)) is None:
            raise _not_there(job.config)
        return trained

    def load() -> tuple[Any, int]:
        rows = open_subset(job.config, url, manifest, layout)
        return training_data.tokenise_corpus(rows, job.settings)

    return training.train_all([(training_job, load)], job.config.cluster, progress)[0]


def _not_there(config: Config) -> InputError:
    return InputError(
        f"experience: the model of brief experience is not trained yet under {config.output}. "
        "Run: cherry run CONFIG."
    )
