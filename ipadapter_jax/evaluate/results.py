"""Computes results from embeddings on disk: scores of all images, means with intervals, distances, and tables."""

import dataclasses
import io
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet

from ipadapter_jax.data.file_listing import FileSize, digest, size
from ipadapter_jax.evaluate.embeddings import Chunk, read_embeddings
from ipadapter_jax.evaluate.frechet import Distance, Moments
from ipadapter_jax.evaluate.metrics import Interval, Scores, compute_scores, interval
from ipadapter_jax.evaluate.prompts import Reference
from ipadapter_jax.evaluate.protocol import CaptionChoice
from ipadapter_jax.storage.atomic_files import write_atomically
from ipadapter_jax.storage.text_files import encode_utf8

METRIC_TITLES = {"clip_i": "CLIP-I", "clip_t": "CLIP-T", "diversity": "diversity"}


@dataclasses.dataclass(frozen=True, eq=False)
class Results:
    """The results of P image prompts with n images each. intervals: by the keys of METRIC_TITLES. distances: Frechet
    distances by name."""

    references: Sequence[Reference]
    images: Sequence[Sequence[Path]]
    scores: Scores
    intervals: dict[str, Interval]
    distances: dict[str, Distance]

    def summary(self) -> Mapping[str, object]:
        """The numbers, as JSON."""
        return {name: found._asdict() for name, found in self.intervals.items()} | self.distances

    def caveats(self) -> dict[str, str]:
        """{name of a number: warning} for numbers that need one."""
        return {name: found.caveat for name, found in self.distances.items() if found.caveat}

    def files(self) -> dict[str, object]:
        """Identifies the images, as JSON: their number, and a digest of their names and sizes."""
        sizes = [FileSize(path.name, size(str(path))) for paths in self.images for path in paths]
        return {"files": len(sizes), "digest": digest(sizes)}


def compute_results(chunks: Sequence[Chunk], choice: CaptionChoice) -> Results:
    """Reads chunk after chunk. CLIP-FID is the Frechet distance between the embeddings of all images and of all
    image prompts, not normalized."""
    parts: list[Scores] = []
    sums: list[Moments] = []
    for chunk in chunks:
        embedded = read_embeddings(chunk)
        parts.append(compute_scores(embedded, choice))
        sums = sums or [Moments(embedded.references.shape[-1]) for _ in range(2)]
        sums[0].add(embedded.references)
        sums[1].add(embedded.images.reshape(-1, embedded.images.shape[-1]))
    scores = Scores(*(np.concatenate(columns) for columns in zip(*parts, strict=True)))
    return Results(
        references=[reference for chunk in chunks for reference in chunk.references],
        images=[paths for chunk in chunks for paths in chunk.images],
        scores=scores,
        intervals={name: interval(values) for name, values in scores.prompt_means().items()},
        distances={"clip_fid": Distance.between(*sums)},
    )


def write_tables(results: Results, folder: Path) -> None:
    """Writes the tables prompts (a row for each image prompt) and pictures (a row for each image), each as .csv and
    .parquet. The names of files and columns stay, as other programs read them."""
    names = [reference.name for reference in results.references]
    each = results.scores.clip_i.shape[1]
    prompts = {
        "name": names,
        "image": [reference.key for reference in results.references],
        "caption": [reference.captions[0] for reference in results.references],
        **results.scores.prompt_means(),
    }
    images = {
        "name": [name for name in names for _ in range(each)],
        "picture": [path.name for paths in results.images for path in paths],
        "clip_i": results.scores.clip_i.reshape(-1),
        "clip_t": results.scores.clip_t.reshape(-1),
    }
    for title, columns in (("prompts", prompts), ("pictures", images)):
        table = pa.table({name: _as_text(column) for name, column in columns.items()})
        for suffix, write in (("csv", pyarrow.csv.write_csv), ("parquet", pyarrow.parquet.write_table)):
            with io.BytesIO() as file:
                write(table, file)
                write_atomically(folder / f"{title}.{suffix}", file.getvalue())


def _as_text(column: object) -> object:
    """Names with bytes that are not UTF-8 replaced; numbers unchanged."""
    return [encode_utf8(value).decode() for value in column] if isinstance(column, list) else column
