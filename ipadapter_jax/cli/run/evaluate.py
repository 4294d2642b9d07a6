"""Runs `ipadapter-jax evaluate`: CLIP-I and CLIP-T of an adapter by the paper's protocol."""

import contextlib
import dataclasses
import importlib.metadata
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import tqdm

from ipadapter_jax.batch.plan import plan_tasks
from ipadapter_jax.batch.reference_digests import Digests, ImageDigest
from ipadapter_jax.batch.rows import BatchRow
from ipadapter_jax.cli.evaluate import Evaluate
from ipadapter_jax.cli.run.image_batches import make_images, settings
from ipadapter_jax.cli.run.sampling import load_for_job, versions
from ipadapter_jax.errors import InputError
from ipadapter_jax.evaluate import embeddings
from ipadapter_jax.evaluate.clip_scorer import LazyScorer, open_scorer
from ipadapter_jax.evaluate.embeddings import Chunk
from ipadapter_jax.evaluate.frechet import Distance, distance_of_files
from ipadapter_jax.evaluate.image_sets import find_images, recorded_settings
from ipadapter_jax.evaluate.prompts import Reference, References, open_references
from ipadapter_jax.evaluate.protocol import protocol_deviations
from ipadapter_jax.evaluate.report import html_report
from ipadapter_jax.evaluate.results import METRIC_TITLES, Results, compute_results, write_tables
from ipadapter_jax.inputs.validation import prompt_pairs
from ipadapter_jax.pipelines.feature_encoder import PreparedImages
from ipadapter_jax.runtime.memory_limits import check_job_memory
from ipadapter_jax.runtime.preemption import EXIT_PREEMPTED, GracefulShutdown
from ipadapter_jax.storage.atomic_files import write_atomically
from ipadapter_jax.storage.store import LocalStore
from ipadapter_jax.storage.text_files import encode_utf8


def evaluate(args: Evaluate) -> int:
    """Generates the images that are missing, scores them, and writes the report when all processes have finished.
    Returns the exit code, 75 when it was preempted by SIGTERM before the end."""
    notices: list[str] = []  # printed once all inputs are known to be usable: an error is printed alone
    references = open_references(
        args.data,
        image_root=args.image_root,
        image_column=args.image_column,
        text_column=args.text_column,
        limit=args.limit,
        report=notices.append,
    )
    clip = open_scorer(args.clip)
    fid = {} if args.fid_features is None else {"fid": distance_of_files(*args.fid_features)}
    if args.images_from is not None:
        images = find_images(args.images_from, references.found)
        print(*notices, file=sys.stderr)
    else:
        generated = _generate(args, references, notices)
        if generated.exit_code:
            return generated.exit_code
        images = generated.paths
    with LocalStore(args.out).lock(args.shard):
        return _score(args, references, images, clip, fid)


def _score(
    args: Evaluate,
    references: References,
    images: Sequence[Sequence[Path]],
    clip: LazyScorer,
    fid: dict[str, Distance],
) -> int:
    """Embeds this process's part of the images; the process that finishes last writes the report. Returns the exit
    code."""
    store = LocalStore(args.out)
    scores = store.inside("scores")
    chunks = embeddings.chunks(scores, references.found, images, args.caption_prefix)
    if _embed(args, chunks, clip):
        print("preempted while scoring; rerun the same command to resume", file=sys.stderr)
        return EXIT_PREEMPTED
    if not all(embeddings.is_complete(chunk, clip.identity) for chunk in chunks):
        print(f"process {args.process} has finished; the last one to finish writes {args.out / 'report.html'}")
        return 0
    for written in (store, scores):
        written.remove_partial_files(lambda name: True)  # no process is writing any more
    results = compute_results(chunks, args.caption)
    results = dataclasses.replace(results, distances=results.distances | fid)
    _write(args, references, clip, results)
    return 0


class GeneratedImages(NamedTuple):
    """The paths of the images of each image prompt, those of other processes included, and an exit code: 0 when this
    process has made all of its images."""

    paths: list[list[Path]]
    exit_code: int


def _generate(args: Evaluate, references: References, notices: Sequence[str]) -> GeneratedImages:
    """Generates the missing images of this process. Raises InputError for image prompts that cannot be read: the mean
    over the others would be another number."""
    folder = args.out / "images"
    rows = [_row(args, reference) for reference in references.found]
    check_job_memory(len(rows), args.num_images)
    prompt_pairs([row.prompt for row in rows], args.negative_prompt)  # captions come from files
    tasks = plan_tasks(rows, num_images=args.num_images, seed=args.seed, scale=args.scale)
    mine = [task for task in tasks if task.row.index // embeddings.CHUNK % args.processes == args.process]
    job = load_for_job(args, images=args.batch_size)
    print(*notices, file=sys.stderr)

    def prepare(row: BatchRow) -> PreparedImages:
        return job.pipe.adapters[0].inputs.prepare([references.found[row.index].image()], args.reference_resize)

    def digest_images(row: BatchRow, before: Digests) -> Digests:
        return (ImageDigest(references.found[row.index].digest()),)

    data = {name: value for name, value in references.identity.items() if name != "prompts"}  # --limit may grow
    facts = settings(args, job.pipe) | {"with_caption": args.with_caption, "data": data}
    progress = make_images(job, args, mine, folder, facts, prepare, digest_images=digest_images)
    if progress.invalid:
        raise InputError(
            f"{len(progress.invalid)} image prompts cannot be used, among them {progress.invalid[0].reason}; "
            f"bad_rows*.jsonl in {folder} lists them. Repair them, then rerun the same command to resume"
        )
    paths: list[list[Path]] = [[] for _ in references.found]
    for task in tasks:
        paths[task.row.index].append(folder / task.image_name)
    return GeneratedImages(paths, progress.code)


def _row(args: Evaluate, reference: Reference) -> BatchRow:
    prompt = reference.captions[0] if args.with_caption else ""
    return BatchRow(
        index=reference.index,
        line=reference.index + 1,
        name=reference.name,
        prompt=prompt,
        negative_prompt="",
        images=(Path(reference.key),),  # a name in the data set, not a path
        seed=None,
        scale=None,
    )


def _embed(args: Evaluate, chunks: Sequence[Chunk], clip: LazyScorer) -> bool:
    """Computes the missing embeddings of this process. Returns True if it was preempted before the end."""
    mine = chunks[args.process :: args.processes]
    missing = [chunk for chunk in mine if not embeddings.is_complete(chunk, clip.identity)]
    if not missing:
        return False
    scorer = clip.load()
    with contextlib.ExitStack() as stack:
        stop = stack.enter_context(GracefulShutdown())
        for chunk in stack.enter_context(tqdm.tqdm(missing, desc="scores", unit="chunk", disable=None)):
            if stop.requested:
                return True
            embeddings.embed_chunk(chunk, scorer, clip.identity)
    return False


def _write(args: Evaluate, references: References, clip: LazyScorer, results: Results) -> None:
    """Writes tables, numbers and report, and prints the numbers."""
    made = recorded_settings(args.out / "images" if args.images_from is None else args.images_from)
    deviations = protocol_deviations(
        data=references.identity,
        images=results.scores.clip_i.shape[1],
        is_reference=clip.is_reference,
        prefix=args.caption_prefix,
        made=made,
    )
    about = {
        "scores": results.summary(),
        "caveats": results.caveats(),
        "otherwise than in the paper": deviations,  # keys of evaluation.json stay, as other programs read them
        "data": references.identity,
        "pictures": {**({"from": str(args.images_from)} if made is None else made), **results.files()},
        "scoring": {"caption": args.caption, "caption_prefix": args.caption_prefix, "clip": clip.identity},
        "versions": {**versions(), **{name: importlib.metadata.version(name) for name in ("pillow", "numpy")}},
    }
    about = json.loads(json.dumps(about))
    write_tables(results, args.out)
    write_atomically(args.out / "evaluation.json", encode_utf8(json.dumps(about, indent=2, ensure_ascii=False)) + b"\n")
    write_atomically(args.out / "report.html", encode_utf8(html_report(results, about, deviations, clip.is_reference)))
    if not clip.is_reference:
        print("warning: the scoring CLIP is not ViT-L/14: no comparison with the paper's numbers", file=sys.stderr)
    for name, found in results.intervals.items():
        print(f"{METRIC_TITLES[name]:10}{found.mean:8.4f}   95 %: {found.low:.4f} to {found.high:.4f}")
    for name, found in results.distances.items():
        caveat = f"   {found.caveat}" if found.caveat else ""
        print(f"{name.upper().replace('_', '-'):10}{found:8.4g}{caveat}")
    print(args.out / "report.html")
