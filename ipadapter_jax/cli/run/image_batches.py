"""Runs the job of a command that makes thousands of images."""

import dataclasses
import json
import os
import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
import tqdm
from PIL import Image

from ipadapter_jax.batch.job_settings import CONFIGURATIONS
from ipadapter_jax.batch.plan import ImageTask
from ipadapter_jax.batch.reference_digests import DigestImages
from ipadapter_jax.batch.rows import BatchRow, InvalidRow
from ipadapter_jax.batch.runner import BatchProgress, run_job
from ipadapter_jax.cli.batch_options import BatchOptions
from ipadapter_jax.cli.run.sampling import LoadedJob, configurations, digests, png, versions
from ipadapter_jax.inputs.prompt_syntax import PromptSyntaxWarning, find_foreign_syntax, warn_of_foreign_syntax
from ipadapter_jax.inputs.validation import missing_texts, prompt_pairs
from ipadapter_jax.pipelines.feature_encoder import PreparedImages
from ipadapter_jax.pipelines.image_prompt_settings import ImagePromptSettings, PerPrompt
from ipadapter_jax.pipelines.image_prompts import PlannedImagePrompt
from ipadapter_jax.pipelines.stable_diffusion import StableDiffusion
from ipadapter_jax.storage.atomic_files import sha256


def settings(args: BatchOptions, pipe: StableDiffusion) -> dict[str, object]:
    """Everything that the images depend on besides the rows, as JSON."""
    apart = ("batch_size", "process", "processes")  # an image is the same in any batch
    names = [field.name for field in dataclasses.fields(BatchOptions) if field.name not in apart]
    settings = {name: getattr(args, name) for name in names}
    settings["guidance_scale"] = pipe.guidance_scale if args.guidance_scale is None else args.guidance_scale
    files = digests(pipe)
    if args.negative_image is not None and os.path.isfile(args.negative_image):
        files["negative_image"] = {os.path.basename(args.negative_image): sha256(Path(args.negative_image))}
    facts = {"sha256": files, CONFIGURATIONS: configurations(pipe), "versions": versions()}
    return json.loads(json.dumps(settings | facts))


def make_images(
    job: LoadedJob,
    args: BatchOptions,
    tasks: Sequence[ImageTask],
    out: Path,
    settings: Mapping[str, object],
    load: Callable[[BatchRow], PreparedImages | None],
    invalid: Sequence[InvalidRow] = (),
    digest_images: DigestImages | None = None,
) -> BatchProgress:
    """Runs the tasks of this process as a job into `out`, with a progress bar on a terminal.

    settings: from `settings`, and everything else that the images depend on besides the rows. load: prepares a row's
    images for the image encoder. invalid, digest_images: as `run_job` takes them. Raises InputError as `run_job` does.
    """
    _warn_of_syntax(args, tasks)
    bar = tqdm.tqdm(total=len(tasks), desc="images", unit="image", disable=None)
    with bar, warnings.catch_warnings():
        warnings.simplefilter("ignore", PromptSyntaxWarning)  # warned of once, for all rows

        def on_progress(progress: BatchProgress) -> None:
            bar.n = progress.before + progress.made
            bar.refresh()

        progress = run_job(
            tasks,
            out,
            settings=settings,
            batch_size=args.batch_size,
            load=load,
            make=_Batches(job, args).make,
            encode=lambda task, image: png(image, _metadata(settings, task)),
            invalid=invalid,
            shard=args.shard,
            shape_key=lambda task, content: 0 if content is None else len(content.pixels),
            digest_images=digest_images,
            on_progress=on_progress,
        )
    if progress.stopped:
        print(
            f"stopped at {progress.before + progress.made} of {progress.total}; rerun the same command to resume",
            file=sys.stderr,
        )
    return progress


def _warn_of_syntax(args: BatchOptions, tasks: Sequence[ImageTask]) -> None:
    """Warns of other programs' syntax in the prompts of a job, with the number of rows and the first of them."""
    rows = {task.row.index: task.row for task in tasks}.values()
    found: dict[str, list[tuple[str, str]]] = {}  # by what it means: what to call the row, and the piece
    for row in rows:
        for text in (row.prompt, row.negative_prompt):
            for piece, meaning in find_foreign_syntax(text):
                found.setdefault(meaning, []).append((row.name, piece))
    for meaning, places in found.items():
        [name, piece], count = places[0], len({name for name, _ in places})
        rows_are = f"{count} rows, {name!r} the first, have" if count > 1 else f"row {name!r} has"
        warnings.warn(
            f"{rows_are} {piece!r} or the like, which is read as plain text; in other programs it is {meaning}",
            PromptSyntaxWarning,
            stacklevel=2,
        )
    warn_of_foreign_syntax({"--negative-prompt": [args.negative_prompt]})


class _Batches:
    """Makes the images of batches. The images of --negative-image are read once."""

    def __init__(self, job: LoadedJob, args: BatchOptions) -> None:
        self._job, self._args, self._configs = job, args, job.pipe.configs
        self._negative = None
        if args.negative_image is not None and self._configs.adapters:
            [adapter] = self._configs.adapters
            self._negative = adapter.prepare_negative([args.negative_image], args.reference_resize)

    def make(self, given: list[tuple[ImageTask, PreparedImages | None]]) -> Sequence[Image.Image]:
        """The images of a batch. A short batch is padded with its last item, so that one program serves all."""
        filled = given + given[-1:] * (self._args.batch_size - len(given))
        tasks = [task for task, _ in filled]
        prompts = [content for _, content in filled if content is not None]  # of all items, or of none
        negatives = [task.row.negative_prompt or self._args.negative_prompt or None for task in tasks]
        texts = prompt_pairs([task.row.prompt for task in tasks], negatives)
        plan = dataclasses.replace(
            self._job.plan,
            prompts=texts.prompts,
            negative_prompts=texts.negatives,
            second=texts,
            zero_negative=self._configs.zeros_for_no_negative & missing_texts(negatives, len(tasks)),
            seeds=np.asarray([task.seed for task in tasks], np.uint32),
            image_prompts=self._image_prompts(tasks, prompts) if prompts else [],
        )
        pipe = self._job.pipe if prompts else dataclasses.replace(self._job.pipe, adapters=())
        images = pipe.sample(plan, progress_bar=False).images
        assert isinstance(images, list)  # of PIL: the request names no other type
        return images[: len(given)]

    def _image_prompts(self, tasks: Sequence[ImageTask], prompts: list[PreparedImages]) -> list[PlannedImagePrompt]:
        settings = ImagePromptSettings(
            images=PerPrompt(prompts),
            negative=self._negative,
            uncond=self._args.uncond,
            scale=PerPrompt([self._args.scale_of(task.scale) for task in tasks]),
            fit=self._args.reference_resize,
        )
        plan = self._job.plan
        return self._configs.image_prompts(settings, plan.run, plan.guided, plan.latent_shape, len(tasks))


def _metadata(settings: Mapping[str, object], task: ImageTask) -> dict[str, object]:
    """The metadata of an image's file."""
    row = task.row
    own = {"prompt": row.prompt, "image": [str(path) for path in row.images], "seed": task.seed, "scale": task.scale}
    own["negative_prompt"] = row.negative_prompt or settings["negative_prompt"]
    return {**settings, **own}
