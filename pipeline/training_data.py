"""What a training reads: rows rendered as scoring renders them, and which tokens have a loss.

::

    ids      ...### Response: Paris is the capital. </s>
    target                     ^^^^^^^^^^^^^^^^^^^^^^^^^   the answer, and the token that ends it

What ends an answer is the special token that the template has after it (`<|im_end|>`), else the
tokenizer's EOS after the last answer. An answer that is cut has no end.
"""

import io
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import ray

from pipeline import models, storage
from pipeline.errors import InputError
from pipeline.inputs import Corpus
from pipeline.rendering import ENDING_TOKENS, RenderedSample, Renderer
from pipeline.rows import read_units
from pipeline.samples import read_samples, sample_id
from pipeline.schemas import EXAMPLES
from pipeline.settings import ScoringSettings
from pipeline.tokenising import renderer
from pipeline.units import Unit, make_plan


@dataclass(frozen=True)
class Examples:
    """Rows to train on: token ids end to end, and where each row begins."""

    ids: npt.NDArray[np.int32]
    targets: npt.NDArray[np.bool_]
    """Which of the tokens have a loss; never the first of a row."""
    starts: npt.NDArray[np.int64]
    """Of each row, and the end of the last one: shape (rows + 1,)."""

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
        return cls(
            ids=pc.list_flatten(table["input_ids"]).to_numpy(),
            targets=pc.list_flatten(table["is_target"]).to_numpy(zero_copy_only=False),
            starts=np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)]),
        )

    @classmethod
    def load(cls, url: str) -> "Examples":
        """From an object that `save_examples` wrote."""
        return cls.from_table(pq.read_table(pa.BufferReader(storage.read_bytes(url))))


def tokenise_rows(units: Sequence[Unit], settings: ScoringSettings) -> tuple[pa.Table, int]:
    """Render and tokenise the rows of units, in Ray tasks.

    Returns:
        The rows that can be trained on, in the EXAMPLES schema and in the order of the units, and
        how many cannot: without an answer that fits, or with a token that the model lacks.
    """
    found = ray.get([_tokenise.remote(unit, settings) for unit in units])
    table = pa.concat_tables([EXAMPLES.empty_table(), *(table for table, _ in found)])
    return table, sum(left_out for _, left_out in found)


def tokenise_corpus(
    corpus: Corpus, settings: ScoringSettings, max_rows: int | None = None
) -> tuple[pa.Table, int]:
    """The same of all rows of a corpus, or of the first so many."""
    plan = make_plan(corpus, "memory://none", "examples", "auto", 0, max_rows)
    return tokenise_rows(plan.units, settings)


def save_examples(url: str, table: pa.Table) -> None:
    """Publish a table for the workers."""
    sink = io.BytesIO()
    pq.write_table(table, sink, compression="zstd", write_page_checksum=True)
    storage.publish(url, sink.getvalue())


@ray.remote
def _tokenise(unit: Unit, settings: ScoringSettings) -> tuple[pa.Table, int]:
    rendering = renderer(settings, direct=False)  # every token of an answer has a loss
    num_embeddings = models.load_config(settings.model).get_text_config().vocab_size
    samples = list(read_samples(next(read_units([unit])), unit.columns))
    columns: list[list[object]] = [[], [], []]
    for sample, rendered in zip(samples, rendering(samples), strict=True):
        if rendered.status == "ok":
            ids, targets = _example(rendered, rendering)
            if ids.max() >= num_embeddings:
                continue
            values = (sample_id(sample.messages), ids, targets)
            for column, value in zip(columns, values, strict=True):
                column.append(value)
    arrays = [pa.array(c, f.type) for c, f in zip(columns, EXAMPLES, strict=True)]
    return pa.Table.from_arrays(arrays, schema=EXAMPLES), len(samples) - len(columns[0])


def _example(
    rendered: RenderedSample, rendering: Renderer
) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.bool_]]:
    """Token ids of a row, and which of them have a loss."""
    ids = list(rendered.input_ids)
    if not rendered.truncated:
        ids += _ending(rendered.next_ids, rendering, last=True)
        del ids[max(len(rendered.input_ids), rendering.max_length) :]
    targets = np.zeros(len(ids), np.bool_)
    for turn in rendered.turns:
        if turn.num_conditioned:
            ending = _ending(ids[turn.end : turn.end + ENDING_TOKENS], rendering, last=False)
            targets[turn.conditioned_start : turn.end + len(ending)] = True
    return np.array(ids, np.int32), targets


def _ending(after: Sequence[int], rendering: Renderer, *, last: bool) -> list[int]:
    """What ends an answer, going by the tokens after it: up to the first special one.

    Between them there may be white space, such as a line break before `<|im_end|>`. Where the
    render of a `last` answer goes on with nothing else, it is the tokenizer's EOS; where it goes on
    with text, such as a tool call, the answer does not end there.
    """
    eos = rendering.tokenizer.eos_token_id
    for number, token in enumerate(after):
        if token in rendering.special_ids or token == eos:
            return list(after[: number + 1])
        if str(rendering.tokenizer.decode([token])).strip():
            return []
    return [eos] if last and eos is not None else []


def refuse_empty(table: pa.Table, left_out: int, what: str) -> None:
    """Raise InputError if there is nothing to train on."""
    if not len(table):
        raise InputError(
            f"{what}: none of its {left_out} rows has an answer that fits, expected at least one. "
            "Look at the layout (input.layout, input.columns), and at score.max_length."
        )
