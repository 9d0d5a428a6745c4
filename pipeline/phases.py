"""The phases of the method around scoring, each skipped where its result is there.

::

    base model -> embed prompts -> experience subset -> train briefly -> the model that scores
    base model ------------------------- cherry subset -> train -------> the model that comes out

Source: arXiv:2308.12032, section 3.
"""

import functools
import hashlib

import pyarrow as pa

from pipeline import accounting, pending, storage, training, training_data
from pipeline.config import Config, InputConfig, ModelConfig
from pipeline.config_training import ExperienceConfig, TrainConfig
from pipeline.errors import InputError, NotTrainedError
from pipeline.experience import Experience, select_experience
from pipeline.inputs import Corpus, open_sources
from pipeline.job import Checked, Job, plan, with_model
from pipeline.pending import Progress, Silence
from pipeline.selection import Selection
from pipeline.training import Trained
from pipeline.training_job import TrainJob, plan_training


def experience(checked: Checked, settings: ExperienceConfig, progress: Progress) -> Experience:
    """Embed every prompt that has no embedding yet, and choose the rows of brief experience."""
    job = plan(checked, measure="prompt")
    done = pending.score(job, progress)
    finished = job.plan.without({unit.unit_id for unit in done if unit.failure})
    audited = accounting.audit(finished)
    return select_experience(finished, job.corpus, job.config.output, settings, audited)


def experienced(checked: Checked, progress: Progress) -> Checked:
    """A config with the model that scores: if it says `experience`, the briefly trained one."""
    config = checked.config
    if config.experience is None:
        return checked
    subset = experience(checked, config.experience, progress)
    training_job = _brief_training(checked, subset, config.experience)
    load = functools.partial(_tokens, plan(checked), subset, config.input)
    trained = training.train_all([(training_job, load)], config.cluster, progress)[0]
    return with_model(checked, _model_at(trained.url, config))


def experienced_before(checked: Checked) -> Checked:
    """The same where nothing may be embedded or trained for it.

    Raises:
        NotTrainedError: The model is not there.
    """
    config = checked.config
    if config.experience is None:
        return checked
    embedding = plan(checked, measure="prompt").plan
    if not embedding.pending(embedding.parts()):
        subset = experience(checked, config.experience, Silence())
        trained = training.finished(_brief_training(checked, subset, config.experience))
        if trained is not None:
            return with_model(checked, _model_at(trained.url, config))
    raise NotTrainedError(
        f"experience: the model of brief experience is not trained yet under {config.output}. "
        "Run: cherry run CONFIG."
    )


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
    training_job = plan_training(job, "the cherry subset", _contents(selected), config)
    load = functools.partial(_tokens, job, selected, job.config.input)
    return training.train_all([(training_job, load)], job.config.cluster, progress)[0]


def open_subset(config: Config, subset: Selection | Experience, layout: InputConfig) -> Corpus:
    """A subset that was written here, to be read again as the input is."""
    urls = [storage.join(subset.url, part["path"]) for part in subset.manifest["parts"]]
    sources = [entry for part in urls for entry in storage.list_objects(part)]
    return open_sources(sources, layout.model_copy(update={"on_bad_shard": "fail"}), config.output)


def _brief_training(checked: Checked, subset: Experience, config: ExperienceConfig) -> TrainJob:
    name = "the experience subset"
    return plan_training(plan(checked), name, _contents(subset), config.train)


def _contents(subset: Selection | Experience) -> str:
    """Hash over the parts of a subset."""
    hashes = "".join(part["sha256"] for part in subset.manifest["parts"])
    return hashlib.sha256(hashes.encode()).hexdigest()


def _tokens(job: Job, subset: Selection | Experience, layout: InputConfig) -> tuple[pa.Table, int]:
    rows = open_subset(job.config, subset, layout)
    return training_data.tokenise_corpus(rows, job.settings)


def _model_at(url: str, config: Config) -> ModelConfig:
    return config.model.model_copy(update={"path": url, "revision": None})
