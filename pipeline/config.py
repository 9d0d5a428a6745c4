"""The config: typed, strict, each key documented where it is declared.

``load`` reads a YAML file, lays ``--set a.b=v`` over it and returns a frozen ``Config``. Unknown
keys are refused with the nearest valid name. Nothing here reads the environment: credentials and
endpoints come from the storage libraries' own chains, and a URL that carries one is refused.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import Field, ValidationError, field_validator, model_validator

from pipeline.config_base import ColumnMap, Layout, Section
from pipeline.config_faults import describe, fault_of_url
from pipeline.config_select import Ratio, SelectConfig
from pipeline.config_training import CompareConfig, ExperienceConfig, TrainConfig
from pipeline.errors import ConfigError
from pipeline.sharing import SHARES, Share

TemplateName = Literal["alpaca", "wizardlm", "vicuna", "plain", "chat"]
PresetName = Literal["cherry", "cherry-wizardlm", "cherry-vicuna", "superfiltering", "chat"]


@dataclass(frozen=True)
class Preset:
    """The four choices that published IFD programs make together."""

    template: TemplateName
    ratio: Ratio
    pair_tokens: bool
    max_length: int


PRESETS: dict[str, Preset] = {
    "cherry": Preset("alpaca", "ifd_loss_ratio", True, 512),
    "cherry-wizardlm": Preset("wizardlm", "ifd_loss_ratio", True, 512),
    "cherry-vicuna": Preset("vicuna", "ifd_loss_ratio", True, 2048),
    "superfiltering": Preset("plain", "ifd_ppl_ratio", False, 1024),
    "chat": Preset("chat", "ifd_loss_ratio", True, 2048),
}


_Url = Annotated[str, Field(min_length=1)]


class InputConfig(Section):
    """Where the corpus is and how its rows read."""

    path: _Url | Annotated[list[_Url], Field(min_length=1)]
    """Parquet, JSON or JSONL (.gz, .zst): files, directories or globs at any fsspec URL."""
    layout: Literal["auto"] | Layout = "auto"
    """`auto` looks for messages, conversations, prompt/completion, Alpaca, in this order."""
    columns: ColumnMap = Field(default={})
    """Names of columns that differ from the layout's own, such as `{response: answer}`; null leaves
    an optional field out: input, system, history."""
    max_rows: Annotated[int, Field(gt=0)] | None = None
    """Only the first so many rows, in the order of shards: for a try."""
    on_bad_shard: Literal["fail", "skip"] = "fail"
    """An unreadable shard ends the run before it starts, or is skipped (exit 3)."""

    @property
    def paths(self) -> list[str]:
        """`path` as a list."""
        return [self.path] if isinstance(self.path, str) else list(self.path)


class ModelConfig(Section):
    """The language model whose losses make the score."""

    path: _Url
    """Hub id, directory, `.gguf` file, or object-store URL of a safetensors directory."""
    revision: str | None = None
    """Hub: branch, tag or commit. A `.gguf` or local directory: `sha256:...` that it must have."""
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = "auto"
    """`auto` is bfloat16 on CUDA and on CPUs that have it in hardware, float32 otherwise. Half
    precision is that of weights and products; what layers add up stays float32."""
    cache_dir: str | None = None
    """Per node: converted and downloaded models. Null is `~/.cache/cherry`."""


class ScoreConfig(Section):
    """How a sample becomes a number."""

    preset: PresetName = "cherry"
    """Template, ratio, pairing and max_length of a published program, or `chat`."""
    template: TemplateName | None = None
    """Null is the preset's."""
    pair_tokens: bool | None = None
    """Score the same tokens on both sides. Null is the preset's; false is Superfiltering's way."""
    max_length: Annotated[int, Field(gt=1)] | None = None
    """Tokens. Null is the preset's or the model's limit, whichever is less."""
    max_batch_tokens: Literal["auto"] | Annotated[int, Field(gt=0)] = "auto"
    """Tokens of a pack; `auto` follows from the kind of device, never from timing."""
    share: tuple[Share, ...] = SHARES
    """Work done once for several: what rows of a pack begin with (`prefixes`), passes over the same
    tokens (`equal`), and the conditioned pass of a conversation (`turns`). Scores agree within
    1e-5 in float32; `[]` computes everything plainly."""
    compile: Literal["auto"] | bool = "auto"
    """What is compiled on the nodes: our own kernels, by a C compiler, and the model's layers, on
    CPUs by a C++ compiler. `auto` leaves the layers out on CPUs where rows times parameters are
    under 10**12, some ten minutes of two cores. `true` is everything, `false` nothing. Scores agree
    within 1e-5 in float32."""
    unit_rows: Literal["auto"] | Annotated[int, Field(gt=0)] = "auto"
    """Rows of a work unit. `auto` aims at tens of seconds from footer and model size alone."""
    reuse: Literal["rows", "units"] = "rows"
    """Finished units are never scored again. `rows` also takes the score of a row that has one
    under the same settings though its shard was rewritten, appended to or cut otherwise."""
    unit_timeout_s: Annotated[float, Field(gt=0, le=1e7)] = 3600.0
    """A unit that takes longer than this in any stage loses its process and is tried again, in
    the end row by row; a row alone has a tenth of it."""
    max_error_fraction: Annotated[float, Field(ge=0, le=1)] = 0.01
    """Above this share of rows that are `error`, `nonfinite` or `malformed` the run exits 3."""


class ClusterConfig(Section):
    """What the scoring actors get. None of it changes a score or a fingerprint."""

    actors: Literal["auto"] | Annotated[int, Field(gt=0)] = "auto"
    """Models held at once; `auto` is one per GPU, more as GPUs join and fewer as they leave, or one
    per node without GPUs."""
    gpus_per_actor: Literal["auto"] | Annotated[float, Field(ge=0, allow_inf_nan=False)] = "auto"
    """`auto` is 1 where the cluster has GPUs and 0 where it has none. A model that one GPU is too
    small for is spread over 2 or more of a node, layer by layer."""
    threads_per_actor: Literal["auto"] | Annotated[int, Field(gt=0)] = "auto"
    """Torch threads on a CPU. `auto` is all cores of the node, whatever the number of actors,
    because the last bits of a score follow the thread count."""
    autoscaling: bool = False
    """Nodes join when asked for: the GPUs that `actors` need may be more than those that are up."""
    cpus_for_tokenising: Literal["auto"] | Annotated[int, Field(gt=0)] = "auto"
    """Cores that read and tokenise at once, at most; `auto` is what scoring leaves."""
    max_units_in_flight: Annotated[int, Field(gt=0)] = 2
    """Units that one model holds, the one in work included. With 1 it waits for each; more are lost
    with it when its process dies."""
    price_per_gpu_hour: Annotated[float, Field(ge=0, allow_inf_nan=False)] | None = None
    """Dollars, of an actor where there are no GPUs: for `cherry plan` and the progress."""

    @field_validator("gpus_per_actor")
    @classmethod
    def _whole_above_one(cls, value: Any) -> Any:
        if value != "auto" and value > 1 and value != int(value):
            raise ValueError(f"got {value:g}, expected a share of one GPU or a whole number")
        return value

    @model_validator(mode="after")
    def _says_what_may_join(self) -> "ClusterConfig":
        if self.autoscaling and "auto" in (self.actors, self.gpus_per_actor):
            raise ValueError(
                "autoscaling needs numbers for cluster.actors and cluster.gpus_per_actor: what is "
                "up says nothing of what may join"
            )
        return self


class Config(Section):
    """A whole run."""

    input: InputConfig
    """The corpus."""
    output: _Url
    """Directory or bucket prefix that gets scores/ and cherry/."""
    model: ModelConfig
    """The scoring model."""
    score: ScoreConfig = ScoreConfig()
    """The metric."""
    select: SelectConfig = SelectConfig()
    """The selection."""
    experience: ExperienceConfig | None = None
    """With it (`experience: {}` for the defaults) the model is briefly trained before it scores."""
    train: TrainConfig | None = None
    """With it, the base model is trained on the cherry subset in the end."""
    compare: CompareConfig | None = None
    """What `cherry compare` does."""
    cluster: ClusterConfig = ClusterConfig()
    """The machines."""

    @model_validator(mode="after")
    def _subset_reads_as_the_input(self) -> "Config":
        if (self.train or self.compare) and self.select.format not in ("parquet", "jsonl"):
            raise ValueError(
                f"train and compare read the cherry subset as the input is read, and select.format "
                f"{self.select.format} has other columns: set parquet or jsonl"
            )
        return self

    @model_validator(mode="after")
    def _urls_are_sound(self) -> "Config":
        urls = {
            "input.path": self.input.paths,
            "output": [self.output],
            "model.path": [self.model.path],
            "compare.evaluate": [e.path for e in self.compare.evaluate] if self.compare else [],
        }
        for key, given in urls.items():
            for fault in filter(None, map(fault_of_url, given)):
                raise ValueError(f"key '{key}': {fault}")
        return self

    @property
    def preset(self) -> Preset:
        """The preset with the config's overrides, max_length still unresolved against the model."""
        preset = PRESETS[self.score.preset]
        pair = self.score.pair_tokens
        return Preset(
            template=self.score.template or preset.template,
            ratio=self.select.by or preset.ratio,
            pair_tokens=preset.pair_tokens if pair is None else pair,
            max_length=self.score.max_length or preset.max_length,
        )


def _refuse_twice(node: yaml.Node | None, seen: set[yaml.Node]) -> None:
    """Refuse keys that stand twice in a section: YAML takes the last, without a word."""
    if not isinstance(node, yaml.CollectionNode) or node in seen:
        return
    seen.add(node)  # an alias is the node itself, and may lie within it
    keys: set[str] = set()
    for child in node.value:
        key, value = child if isinstance(child, tuple) else (None, child)
        if isinstance(key, yaml.ScalarNode):
            if key.value in keys:
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key '{key.value}' is there twice", key.start_mark
                )
            keys.add(key.value)
        _refuse_twice(value, seen)


def load(path: str, overrides: list[str] | None = None) -> Config:
    """Read a config file and lay `section.key=value` overrides over it.

    Args:
        path: A YAML file.
        overrides: Each `a.b=value`; the value is read as YAML.

    Raises:
        ConfigError: The file is missing or no mapping, a key is unknown, or a value is not valid.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
        _refuse_twice(yaml.compose(text, yaml.SafeLoader), set())
        raw = yaml.safe_load(text)
    except FileNotFoundError:
        raise ConfigError(f"config {path}: there is no such file.") from None
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as err:
        raise ConfigError(f"config {path}: cannot be read as YAML: {err}") from err
    if not isinstance(raw, dict):
        raise ConfigError(
            f"config {path}: got {'nothing' if raw is None else type(raw).__name__}, expected keys "
            "such as input, output, model."
        )
    for override in overrides or []:
        _apply_override(raw, override)
    return parse(raw, where=f"config {path}{' with --set' if overrides else ''}")


def parse(raw: dict[str, Any], where: str = "config") -> Config:
    """Validate a raw mapping; every fault is named in one ConfigError."""
    # A section whose every key is commented out reads as null: it has its defaults, or is off.
    always = {"input", "model", "score", "select", "cluster"}
    raw = {key: {} if value is None and key in always else value for key, value in raw.items()}
    try:
        return Config.model_validate(raw)
    except ValidationError as err:
        faults = describe([dict(fault) for fault in err.errors()], Config)
        raise ConfigError(f"{where}: " + "\n".join(faults)) from None


def _apply_override(raw: dict[str, Any], override: str) -> None:
    key, sign, value = override.partition("=")
    if not sign or not key:
        raise ConfigError(f"--set {override}: expected section.key=value.")
    *parents, leaf = key.split(".")
    node = raw
    for name in parents:
        child = node.setdefault(name, {})
        if child is None:
            child = node[name] = {}
        if not isinstance(child, dict):
            raise ConfigError(f"--set {override}: '{name}' holds a value, not a section.")
        node = child
    try:
        _refuse_twice(yaml.compose(value, yaml.SafeLoader), set())
        node[leaf] = yaml.safe_load(value)
    except yaml.YAMLError as err:
        raise ConfigError(f"--set {override}: the value is not valid YAML: {err}") from None
