"""Garbage: parts that no current input names, and writes that were never finished.

Nothing is deleted unless asked, nothing younger than a day (another run may be writing it), and not
where the listing looks wrong: no input, units still to score, or more than half of the parts.
"""

import json
import re
import time
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from pipeline import listing, storage
from pipeline.errors import InputError
from pipeline.input_paths import reach_of
from pipeline.job import Job
from pipeline.listing import ObjectInfo
from pipeline.storage_faults import is_outage
from pipeline.texts import count
from pipeline.uploads import Upload, abort_upload, dangling_uploads

KEEP_S = 24 * 3600.0
"""Younger objects are spared."""


@dataclass(frozen=True)
class Garbage:
    """What could go."""

    parts: list[ObjectInfo]
    """Parts that no unit of the current input names, older than a day."""
    uploads: list[Upload]
    """Unfinished multipart uploads and temporary files under the output, older than a day."""
    parts_looked_at: Counter[str]
    """How many, by the folder of all fingerprints: `scores`, `embeddings`. None of elsewhere."""
    num_spared: int
    """Parts that no unit names, younger than a day."""
    num_elsewhere: int
    """Parts of shards that the paths of the input do not reach, or that do not say whose they are:
    left alone, as they may be another input's."""
    num_pending: int
    """Units of the current input that have no part yet."""
    skipped: tuple[str, ...]
    """Why shards of the current input could not be read: what their units are is not known."""

    @property
    def num_bytes(self) -> int:
        """Of the parts."""
        return sum(part.size for part in self.parts)

    @property
    def num_parts(self) -> int:
        """Parts looked at."""
        return self.parts_looked_at.total()

    def summary(self, *, deleted: bool) -> dict[str, object]:
        """What `--json` prints."""
        return {
            "parts": [part.url for part in self.parts],
            "bytes": self.num_bytes,
            "uploads": [upload.url for upload in self.uploads],
            "spared_parts": self.num_spared,
            "parts_of_other_inputs": self.num_elsewhere,
            "parts_total": self.num_parts + self.num_elsewhere,
            "deleted": deleted,
        }


_PART_NAME = re.compile(r"[0-9a-f]{16}/[0-9a-f]{32}\.parquet")


def find(jobs: Sequence[Job], whole: Sequence[Job], *, all_scores: bool = False) -> Garbage:
    """List what could go, by what the current input does not name.

    Args:
        jobs: The current input under its settings: its scores, and the embeddings of its prompts
            where it has brief experience.
        whole: The same without `input.max_rows`, whose rows beyond it keep their parts.
        all_scores: Also of other inputs, and under every other fingerprint of the output: all of
            those parts. Scores are left out where no job names any.
    """
    output = storage.absolute(jobs[0].config.output)
    folders = [job.plan.scores_url for job in jobs]
    if all_scores:
        names = {"embeddings", *(job.settings.folder for job in jobs)}
        folders = [storage.join(output, name) for name in sorted(names)]
    there = [folder for folder in folders if storage.exists(folder)]
    listed = [entry for folder in there for entry in listing.list_objects(folder, globs=False)]
    # Whatever else lies there is somebody's.
    parts = [entry for entry in listed if _PART_NAME.fullmatch(_name_of(entry.url))]
    # By their last two names: s3a:// and s3:// are one bucket.
    named, kept = _names(jobs), _names([*jobs, *whole])
    strays = [part for part in parts if _name_of(part.url) not in kept]
    elsewhere = set() if all_scores else _elsewhere(strays, jobs[0].config.input.paths)
    parts, strays = ([p for p in some if p.url not in elsewhere] for some in (parts, strays))
    before = time.time() - KEEP_S
    old = [part for part in strays if part.modified < before]
    return Garbage(
        parts=old,
        uploads=dangling_uploads(output, KEEP_S),
        parts_looked_at=Counter(_folder_of(part.url) for part in parts),
        num_spared=len(strays) - len(old),
        num_elsewhere=len(elsewhere),
        num_pending=len(named - {_name_of(part.url) for part in parts}),
        skipped=jobs[0].corpus.skipped,
    )


def _elsewhere(parts: list[ObjectInfo], paths: list[str]) -> set[str]:
    """URLs of parts of shards that the paths do not name, nor did while those were there."""
    reached = reach_of(paths)
    urls = [part.url for part in parts]
    with ThreadPoolExecutor(max_workers=16) as pool:
        shards = pool.map(_shard_of, urls)
        return {
            url for url, shard in zip(urls, shards, strict=True) if not (shard and reached(shard))
        }


def _shard_of(part_url: str) -> str | None:
    """Which shard a part is of; None where it is damaged and does not say."""
    try:
        with storage.open_parquet(part_url) as parquet:
            return str(json.loads(parquet.schema_arrow.metadata[b"cherry.unit"])["shard_url"])
    except (ValueError, TypeError, KeyError):
        return None
    except InputError as err:
        if is_outage(err):
            raise
        return None


def _names(jobs: Sequence[Job]) -> set[str]:
    return {_name_of(job.plan.part_url(unit)) for job in jobs for unit in job.plan.units}


def _name_of(part_url: str) -> str:
    return "/".join(part_url.split("/")[-2:])


def _folder_of(part_url: str) -> str:
    return part_url.split("/")[-3]


def delete(garbage: Garbage, *, force: bool = False) -> None:
    """Delete what was found.

    Raises:
        InputError: It looks like a mistake, and `force` is not given.
    """
    if not force:
        _refuse_mistakes(garbage)
    with ThreadPoolExecutor(max_workers=16) as pool:  # each is a request, mostly waiting
        list(pool.map(storage.remove, [part.url for part in garbage.parts]))
        list(pool.map(abort_upload, garbage.uploads))


def _refuse_mistakes(garbage: Garbage) -> None:
    if garbage.parts and garbage.skipped:
        raise InputError(
            f"gc: {count(len(garbage.skipped), 'shard')} cannot be read, whose parts may be among "
            f"the {len(garbage.parts):,} that would go. The first: {garbage.skipped[0]} Mend them "
            "first, or give --force."
        )
    if garbage.parts and garbage.num_pending:
        raise InputError(
            f"gc: {count(garbage.num_pending, 'unit')} of the input without a part yet may take "
            f"scores from the {count(len(garbage.parts), 'part')} that would go. Run cherry score "
            "first, or give --force."
        )
    for folder, going in Counter(_folder_of(part.url) for part in garbage.parts).items():
        there = garbage.parts_looked_at[folder]
        if 2 * going > there:
            raise InputError(
                f"gc: {going} of {there} parts in {folder} would go, more than half. Is input.path "
                "what you mean? If it is, give --force."
            )
