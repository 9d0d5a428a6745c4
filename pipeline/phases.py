"""The phases of the method around scoring, each skipped where its result is there.

::

    base model -> embed prompts -> experience subset -> train briefly -> the model that scores
    base model ------------------------- cherry subset -> train -------> the model that comes out

Source: arXiv:2308.12032, section 3.
"""

import functools
import hashlib

import pyarrow as pa

from pipeline import cluster, listing, manifests, pending, storage, training, training_data
from pipeline.config import Config, ModelConfig
from pipeline.config_training import ExperienceConfig, TrainConfig
from pipeline.errors import InputError, NotScoredError, NotTrainedError
from pipeline.experience import find_experience, select_experience
from pipeline.inputs import Corpus, open_sources
from pipeline.job import Checked, Job, plan, with_model
from pipeline.manifests import Finished
from pipeline.pending import Measured
from pipeline.training_job import TrainJob, plan_training
from pipeline.watching import Progress


def embed(checked: Checked, progress: Progress, *, retry_errors: bool = False) -> Measured:
    """Embed every prompt that has no embedding yet."""
    return pending.measure(plan(checked, measure="prompt"), progress, retry_errors=retry_errors)


def choose_experience(embedded: Measured, settings: ExperienceConfig) -> Finished:
    """Choose the rows of brief experience."""
    job = embedded.job
    return select_experience(
        embedded.plan, job.corpus, job.config.output, settings, embedded.audited
    )


def with_experienced_model(
    checked: Checked, progress: Progress, *, retry_errors: bool = False
) -> Checked:
    """A config with the model that scores: if it says `experience`, the briefly trained one."""
    config = checked.config
    if config.experience is None:
        return checked
    cluster.plan_trainers(config.cluster, config.experience.train)  # before hours of embedding
    embedded = embed(checked, progress, retry_errors=retry_errors)
    subset = choose_experience(embedded, config.experience)
    training_job = _brief_training(checked, subset, config.experience)
    load = functools.partial(_tokenise_subset, plan(checked), subset)
    trained = training.train_all([(training_job, load)], config.cluster, progress)[0]
    return with_model(checked, _model_at(trained.url, config))


def find_experienced_model(checked: Checked) -> Checked:
    """The same, but the model is only looked for: nothing is embedded, written or trained.

    Raises:
        NotTrainedError: The model is not there.
    """
    config = checked.config
    if config.experience is None:
        return checked
    absent = NotTrainedError(
        f"experience: the model of brief experience is not trained yet under {config.output}. "
        "Run: cherry run CONFIG."
    )
    try:
        embedded = pending.measured(plan(checked, measure="prompt"))
    except NotScoredError:  # some prompts have no embedding yet
        raise absent from None
    subset = find_experience(embedded.plan, config.output, config.experience, embedded.audited)
    if subset is not None:
        trained = manifests.find(_brief_training(checked, subset, config.experience).url)
        if trained is not None:
            return with_model(checked, _model_at(trained.url, config))
    raise absent


def retrain(job: Job, selected: Finished, config: TrainConfig, progress: Progress) -> Finished:
    """Train the base model on the cherry subset.

    Args:
        job: Of the base model.
        selected: The subset.
        config: Of the training.
        progress: Told of each step.
    """
    training_job = plan_training(job, "the cherry subset", _contents(selected), config)
    load = functools.partial(_tokenise_subset, job, selected)
    return training.train_all([(training_job, load)], job.config.cluster, progress)[0]


def open_subset(job: Job, subset: Finished) -> Corpus:
    """A subset that was written here, to be read again as the input is.

    Raises:
        InputError: It has no rows.
    """
    if not subset.manifest["parts"]:
        raise InputError(
            f"{subset.url}: the subset has no rows, expected at least one to train on. See "
            "rejected_rows in its manifest."
        )
    urls = [storage.join(subset.url, part["path"]) for part in subset.manifest["parts"]]
    sources = [entry for part in urls for entry in listing.list_objects(part, globs=False)]
    layout = job.config.input.model_copy(update={"on_bad_shard": "fail"})
    return open_sources(sources, layout, job.config.output)


def _brief_training(checked: Checked, subset: Finished, config: ExperienceConfig) -> TrainJob:
    name = "the experience subset"
    return plan_training(plan(checked), name, _contents(subset), config.train)


def _contents(subset: Finished) -> str:
    """Hash over the parts of a subset."""
    hashes = "".join(part["sha256"] for part in subset.manifest["parts"])
    return hashlib.sha256(hashes.encode()).hexdigest()


def _tokenise_subset(job: Job, subset: Finished) -> tuple[pa.Table, int]:
    return training_data.tokenise_corpus(open_subset(job, subset), job.settings)


def _model_at(url: str, config: Config) -> ModelConfig:
    return config.model.model_copy(update={"path": url, "revision": None})
