"""What a score depends on, and what scoring needs besides."""

from dataclasses import dataclass
from typing import Literal

import pyarrow as pa

from pipeline.cluster import Workers
from pipeline.config import TemplateName
from pipeline.rendering import RENDERING_VERSION
from pipeline.reuse import KnownRows
from pipeline.schemas import EMBEDDING, PART
from pipeline.sharing import SHARES, Share
from pipeline.units import fingerprint

SCORING_VERSION = 4
EMBEDDING_VERSION = 5

Measure = Literal["ifd", "prompt"]


@dataclass(frozen=True)
class ModelRef:
    """A resolved model: small, and the same on every node."""

    path: str
    kind: Literal["directory", "gguf", "url", "hub"]
    fingerprint: str
    """Of the weights and the architecture: a content hash, a commit, or the ETags of all files that
    are fetched from a URL, so that no two nodes have different ones."""
    cache_dir: str

    def describe(self) -> str:
        """Name and short fingerprint, for the terminal."""
        return f"{self.path} ({self.fingerprint[:19]})"


@dataclass(frozen=True)
class ScoringSettings:
    """Resolved settings of scoring: no `auto` and no null is left where a score depends on it."""

    model: ModelRef
    template: TemplateName
    pair_tokens: bool
    max_length: int
    dtype: Literal["bfloat16", "float16", "float32"]
    max_batch_tokens: int | Literal["auto"]
    """`auto` is resolved on the actor's device; packs agree within rounding, so it is no part of
    the fingerprint."""
    share: tuple[Share, ...] = SHARES
    """Work that is done once for several rows; scores agree within rounding, so neither is this."""
    compiled: Literal["auto"] | bool = "auto"
    """What is compiled; likewise."""
    measure: Measure = "ifd"
    """What is asked of the model: both losses of the responses, or the embedding and the loss of
    the prompts, for brief experience."""

    @property
    def part_schema(self) -> pa.Schema:
        """Of the parts."""
        return PART if self.measure == "ifd" else EMBEDDING

    @property
    def folder(self) -> str:
        """Of the parts, under the output."""
        return "scores" if self.measure == "ifd" else "embeddings"

    def fingerprint(self, template_text: str, tokenizer_fp: str) -> str:
        """`score_fp`: everything that can change a score."""
        versions: dict[str, object] = {"scoring_version": SCORING_VERSION}
        if self.measure == "prompt":
            versions["embedding_version"] = EMBEDDING_VERSION
        return fingerprint(
            {
                "model": self.model.fingerprint,
                "tokenizer": tokenizer_fp,
                "template": template_text,
                "pair_tokens": self.pair_tokens,
                "max_length": self.max_length,
                "dtype": self.dtype,
                "rendering_version": RENDERING_VERSION,
                **versions,
            }
        )


@dataclass(frozen=True)
class Scoring:
    """How units are scored in one run: known to every process of it, and no part of a result."""

    settings: ScoringSettings
    scores_url: str
    workers: Workers
    timeout_s: float
    """Of one unit in one stage."""
    known: KnownRows | None = None
    """Rows that have a score already."""
    rescore: bool = False
    """Units have parts: their rows with status error are scored again, and the parts replaced."""

    @property
    def device(self) -> str:
        """Of the models: `cuda` or `cpu`."""
        return "cuda" if self.workers.num_gpus else "cpu"
