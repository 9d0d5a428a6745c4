"""The config's sections on training: brief experience, and the retraining on the cherry subset."""

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, model_validator

from pipeline.config_base import ColumnMap, Layout, Section

Seed = Annotated[int, Field(ge=0, lt=2**32)]
"""Seeds that NumPy, scikit-learn and torch all accept."""


class LoraConfig(Section):
    """Low-rank adapters instead of all weights; needs the extra `lora`. They are merged at the end.

    Source: arXiv:2106.09685.
    """

    rank: Annotated[int, Field(gt=0)] = 16
    """Of the adapters' matrices."""
    alpha: Annotated[float, Field(gt=0)] = 32.0
    """Adapters are scaled by alpha / rank."""
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Of the adapters' inputs."""
    targets: Literal["all-linear"] | Annotated[list[str], Field(min_length=1)] = "all-linear"
    """Modules that get adapters: all linear layers but the vocabulary projection, or names."""


class TrainConfig(Section):
    """How a model is trained on a subset. The defaults are Stanford Alpaca's, which the paper uses.

    Rows are rendered as scoring renders them, and the loss is taken on responses only.
    """

    epochs: Annotated[int, Field(gt=0)] = 3
    """Passes over the subset, each in its own order."""
    max_steps: Annotated[int, Field(gt=0)] | None = None
    """Optimiser steps, in place of epochs: the subset is repeated or cut."""
    learning_rate: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 2e-5
    """At its peak."""
    batch_rows: Annotated[int, Field(gt=0)] = 128
    """Rows of an optimiser step, over all workers."""
    warmup_fraction: Annotated[float, Field(ge=0, lt=1)] = 0.03
    """Share of the steps in which the learning rate rises; then it falls along a cosine to 0."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    """Of AdamW, on matrices."""
    max_grad_norm: Annotated[float, Field(gt=0)] = 1.0
    """Gradients are clipped to it."""
    seed: Seed = 0
    """Of the order of rows, and of dropout."""
    dtype: Literal["auto", "bfloat16", "float32"] = "auto"
    """Of matrix products; weights and their updates are float32. `auto` as in `model.dtype`."""
    max_batch_tokens: Annotated[int, Field(gt=0)] = 4096
    """Tokens that a worker holds activations of at once. A step's rows are packed into as many
    such packs as they need; a row over it is a pack of its own."""
    checkpoint_steps: Annotated[int, Field(gt=0)] = 50
    """Steps after which the state is written to the output, for a resume."""
    workers: Literal["auto"] | Annotated[int, Field(gt=0)] = "auto"
    """Training processes: one GPU each, `auto` is all GPUs; without GPUs, `auto` is one a node."""
    gpus_per_replica: Annotated[int, Field(gt=0)] = 1
    """Workers that share one copy of the weights: above 1 they are sharded (FSDP2) over so many,
    and the replicas beside each other; else each worker has its own (DDP)."""
    lora: LoraConfig | None = None
    """Train adapters only: `lora: {}` with their defaults."""


def _middle(band: tuple[float, float]) -> tuple[float, float]:
    if not 0 <= band[0] < band[1] <= 100:
        raise ValueError("expected two percentiles, the lower first: [25, 75]")
    return band


class ExperienceConfig(Section):
    """Brief experience: which rows the base model sees before it scores, and how.

    Source: arXiv:2308.12032, section 3.1.
    """

    clusters: Annotated[int, Field(gt=0)] = 100
    """K-means clusters of prompt embeddings."""
    per_cluster: Annotated[int, Field(gt=0)] = 10
    """Rows taken of each."""
    band: Annotated[tuple[float, float], AfterValidator(_middle)] = (25, 75)
    """Percentiles of prompt perplexity, within a cluster, between which rows are taken."""
    seed: Seed = 0
    """Of K-means."""
    train: TrainConfig = TrainConfig(epochs=1)
    """The brief training; one epoch unless it says otherwise."""

    @model_validator(mode="before")
    @classmethod
    def _briefly(cls, raw: Any) -> Any:
        if isinstance(raw, dict) and isinstance(raw.get("train"), dict):
            return {**raw, "train": {"epochs": 1, **raw["train"]}}
        return raw


Arm = Literal["cherry", "random_rows", "random_tokens", "all"]


class EvaluateConfig(Section):
    """A held-out set."""

    name: Annotated[str, Field(min_length=1)]
    """In tables and plots."""
    path: Annotated[str, Field(min_length=1)]
    """As `input.path`."""
    layout: Literal["auto"] | Layout = "auto"
    """As `input.layout`."""
    columns: ColumnMap = Field(default={})
    """As `input.columns`."""
    max_rows: Annotated[int, Field(gt=0)] | None = None
    """Only the first so many rows."""
    exact_match: bool = False
    """Also say how many answers greedy decoding gives token by token: for sets of short answers."""


class CompareConfig(Section):
    """What the cherry subset is worth: trainings from the base model, each as `train` says."""

    arms: Annotated[list[Arm], Field(min_length=1)] = Field(
        default=["cherry", "random_rows", "random_tokens", "all"]
    )
    """What is trained on: the cherry subset; as many rows, or as many tokens, drawn at random; all
    rows."""
    seeds: Annotated[list[Seed], Field(min_length=1)] = Field(default=[0, 1, 2])
    """One training of each arm for each: of the order of rows, and of what is drawn."""
    same: Literal["epochs", "steps"] = "epochs"
    """What the arms have in common: `train.epochs`, or the steps of the cherry subset."""
    evaluate: list[EvaluateConfig] = Field(default=[])
    """Held-out sets. Their rows are left out of all arms."""
    holdout_rows: Annotated[int, Field(ge=0)] = 500
    """Rows of the input that are held out too, as the set `input`; 0 for none."""
    points: Annotated[int, Field(ge=2)] = 9
    """Of each curve: steps at which the held-out sets are evaluated, the first and last among
    them."""

    @model_validator(mode="after")
    def _distinct(self) -> "CompareConfig":
        names = [each.name for each in self.evaluate]
        if not names and not self.holdout_rows:
            raise ValueError("nothing to compare by: name sets under evaluate, or set holdout_rows")
        if "input" in names and self.holdout_rows:
            raise ValueError(
                "a set under evaluate is called input, as are the holdout_rows of the input. Call "
                "it otherwise, or set holdout_rows to 0"
            )
        for key, values in (("evaluate", names), ("arms", self.arms), ("seeds", self.seeds)):
            if len(set(values)) < len(values):
                raise ValueError(f"{key}: expected each once, got {', '.join(map(str, values))}")
        return self
