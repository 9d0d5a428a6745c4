"""What a training is: everything that shapes its model, and where it keeps what.

::

    <output>/training/<train_fp>/rows.parquet            tokens of all rows, for the workers
                                 checkpoints/step-*.pt   the newest two; gone when it is done
    <output>/models/<train_fp>/                          config, safetensors, tokenizer
                               _MANIFEST.json            written last: with it the model is done

`train_fp` holds the base's weights, the rows, template and settings; not the number of workers.
"""

from dataclasses import dataclass, field, replace
from typing import Any

from pipeline import models, storage
from pipeline.config_training import TrainConfig
from pipeline.job import Job, resolve_dtype
from pipeline.rendering import RENDERING_VERSION
from pipeline.samples import CANONICALISER_VERSION
from pipeline.settings import ModelRef
from pipeline.tokenising import renderer
from pipeline.units import fingerprint

TRAINING_VERSION = 5

# Where a training runs, how much of it is held at once and how often it is saved: the loss of a
# step is the same but for rounding.
_NO_PART_OF_A_MODEL = {"workers", "gpus_per_replica", "max_batch_tokens", "checkpoint_steps"}


@dataclass(frozen=True)
class HeldOut:
    """Sets that are evaluated along the way."""

    urls: dict[str, str] = field(default_factory=dict)
    """Examples of each set, by its name."""
    points: int = 2
    """Steps at which they are evaluated, the first and the last among them."""


@dataclass(frozen=True)
class TrainJob:
    """What every worker of a training knows."""

    model: ModelRef
    config: TrainConfig
    dtype: str
    max_length: int
    train_fp: str
    output: str
    manifest: dict[str, Any]
    """What is known of it before it begins."""
    held_out: HeldOut = HeldOut()
    keep_model: bool = True
    """False keeps the manifest only, under `<output>/comparison/runs`."""
    threads: int = 1
    """Torch threads of a worker without a GPU."""

    @property
    def url(self) -> str:
        """Where the model will be."""
        folder = "models" if self.keep_model else "comparison/runs"
        return storage.join(self.output, folder, self.train_fp)

    @property
    def examples_url(self) -> str:
        """Tokens of all rows."""
        return storage.join(self.output, "training", self.train_fp, "rows.parquet")

    @property
    def checkpoints_url(self) -> str:
        """Its newest states."""
        return storage.join(self.output, "training", self.train_fp, "checkpoints")

    def ready(self, facts: dict[str, Any], threads: int) -> "TrainJob":
        """With what was found out of its rows, and of the cluster."""
        return replace(self, manifest=self.manifest | facts, threads=threads)


def plan_training(
    job: Job,
    trained_on: str,
    rows_sha256: str,
    config: TrainConfig,
    held_out: HeldOut | None = None,
    *,
    keep_model: bool = True,
) -> TrainJob:
    """Resolve a training.

    Args:
        job: Of the model to train; its template, length limit and output.
        trained_on: What the rows are, for a person.
        rows_sha256: Of the rows, in order.
        config: Of the training.
        held_out: Sets to evaluate.
        keep_model: Whether the model is wanted, or only what became of it.
    """
    settings = job.settings
    rendering = renderer(settings)
    dtype = resolve_dtype(config.dtype, job.config.cluster)
    facts: dict[str, object] = {
        "base_model": settings.model.fingerprint,
        "tokenizer": models.tokenizer_fingerprint(rendering.tokenizer),
        "template": rendering.template_text,
        "max_length": settings.max_length,
        "rows_sha256": rows_sha256,
        "eos_token_id": rendering.tokenizer.eos_token_id,  # may end an answer
        "rendering_version": RENDERING_VERSION,
        "canonicaliser_version": CANONICALISER_VERSION,
        "settings": config.model_dump(mode="json", exclude=_NO_PART_OF_A_MODEL) | {"dtype": dtype},
        "training_version": TRAINING_VERSION,
    }
    if held_out:
        facts["held_out"] = {"sets": held_out.urls, "points": held_out.points}
    train_fp = fingerprint(facts)
    return TrainJob(
        model=settings.model,
        config=config,
        dtype=dtype,
        max_length=settings.max_length,
        train_fp=train_fp,
        output=storage.absolute(job.config.output),
        manifest={"train_fingerprint": train_fp, "trained_on": trained_on, **facts},
        held_out=held_out or HeldOut(),
        keep_model=keep_model,
    )
