"""What a training reads: rows rendered as scoring renders them, and which tokens have a loss.

::

    ids      ...### Response: Paris is the capital. </s>
    target                     ^^^^^^^^^^^^^^^^^^^^^^^^^   the answer, and the token that ends it

The token that ends an answer is what the template has right after it, where that is a special token
(`<|im_end|>`), else the tokenizer's EOS after the last answer. An answer that is cut has none.
"""

import io
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import ray

from pipeline import storage
from pipeline.errors import InputError
from pipeline.inputs import Corpus
from pipeline.rendering import RenderedSample, Renderer
from pipeline.rows import read_rows
from pipeline.samples import read_samples, sample_id
from pipeline.schemas import EXAMPLES
from pipeline.settings import ScoringSettings
from pipeline.tokenising import renderer
from pipeline.units import Unit, make_plan

_ROWS_PER_TASK = 5_000


@dataclass(frozen=True)
class Examples:
    """Rows to train on: token ids end to end, and where each row begins."""

    ids: npt.NDArray[np.int32]
    targets: npt.NDArray[np.bool_]
    """Which of the tokens have a loss; never the first of a row."""
    starts: npt.NDArray[np.int64]
    """Of each row, and the end of the last one: shape (rows + 1,)."""
    sample_ids: npt.NDArray[np.bytes_]

    def __len__(self) -> int:
        """Rows."""
        return len(self.starts) - 1

    @property
    def lengths(self) -> npt.NDArray[np.int64]:
        """Tokens of each row."""
        return np.diff(self.starts)

    def span(self, row: int) -> slice:
        """Where a row lies in `ids` and `targets`."""
        return slice(int(self.starts[row]), int(self.starts[row + 1]))

    @property
    def num_targets(self) -> int:
        """Tokens that have a loss."""
        return int(self.targets.sum())

    @classmethod
    def from_table(cls, table: pa.Table) -> "Examples":
        """From a table in the EXAMPLES schema."""
        table = table.combine_chunks()
        lengths = pc.list_value_length(table["input_ids"]).to_numpy()
        ids = np.frombuffer(b"".join(table["sample_id"].to_pylist()), "S16")
        return cls(
            ids=pc.list_flatten(table["input_ids"]).to_numpy(),
            targets=pc.list_flatten(table["is_target"]).to_numpy(zero_copy_only=False),
            starts=np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)]),
            sample_ids=ids,
        )

    @classmethod
    def load(cls, url: str) -> "Examples":
        """From an object that `save_examples` wrote."""
        return cls.from_table(pq.read_table(pa.BufferReader(storage.read_bytes(url))))


def tokenise_corpus(
    corpus: Corpus, settings: ScoringSettings, max_rows: int | None = None
) -> tuple[pa.Table, int]:
    """Render and tokenise all rows of a corpus, or the first so many, in Ray tasks.

    Returns:
        The rows that can be trained on, in the EXAMPLES schema and in the order of the corpus, and
        how many cannot.
    """
    plan = make_plan(corpus, "memory://none", "examples", _ROWS_PER_TASK, 0, max_rows)
    # A loss needs no pairs: every token of an answer has one.
    settings = replace(settings, pair_tokens=False)
    found = ray.get([_tokenise.remote(unit, settings) for unit in plan.units])
    table = pa.concat_tables([EXAMPLES.empty_table(), *(table for table, _ in found)])
    return table, sum(left_out for _, left_out in found)


def save_examples(url: str, table: pa.Table) -> None:
    """Publish a table for the workers."""
    sink = io.BytesIO()
    pq.write_table(table, sink, compression="zstd", write_page_checksum=True)
    storage.publish(url, sink.getvalue())


@ray.remote
def _tokenise(unit: Unit, settings: ScoringSettings) -> tuple[pa.Table, int]:
    rendering = renderer(settings)
    samples = list(read_samples(read_rows(unit), unit.columns))
    columns: list[list[object]] = [[], [], []]
    for sample, rendered in zip(samples, rendering(samples), strict=True):
        if rendered.status == "ok":
            ids, targets = _example(rendered, rendering)
            values = (sample_id(sample.messages), ids, targets)
            for column, value in zip(columns, values, strict=True):
                column.append(value)
    arrays = [pa.array(c, f.type) for c, f in zip(columns, EXAMPLES, strict=True)]
    return pa.Table.from_arrays(arrays, schema=EXAMPLES), len(samples) - len(columns[0])


def _example(
    rendered: RenderedSample, rendering: Renderer
) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.bool_]]:
    ids = list(rendered.input_ids)
    eos = rendering.tokenizer.eos_token_id
    endings = rendering.special_ids if eos is None else rendering.special_ids | {eos}
    ending = rendered.next_id if rendered.next_id in endings else eos
    if not rendered.truncated and ending is not None and len(ids) < rendering.max_length:
        ids.append(ending)
    targets = np.zeros(len(ids), np.bool_)
    for turn in rendered.turns:
        targets[turn.conditioned_start : turn.end] = True
        if turn.num_conditioned and turn.end < len(ids) and ids[turn.end] in endings:
            targets[turn.end] = True
    return np.array(ids, np.int32), targets


def refuse_empty(table: pa.Table, left_out: int, what: str) -> None:
    """Raise InputError if there is nothing to train on."""
    if not len(table):
        raise InputError(
            f"{what}: none of its {left_out} rows has an answer that fits, expected at least one. "
            "Look at the layout (input.layout, input.columns), and at score.max_length."
        )
