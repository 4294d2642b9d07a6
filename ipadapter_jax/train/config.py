"""A training run as data: what a recipe states and the command line overrides."""

import dataclasses
import math
from typing import Annotated, Literal

from ipadapter_jax.errors import InputError
from ipadapter_jax.inputs.former_names import FormerName, accepts_former_names
from ipadapter_jax.runtime.memory_limits import check_memory
from ipadapter_jax.storage.paths import PathOrHubId, check_utf8

Dtype = Literal["float32", "bfloat16", "float16"]


@dataclasses.dataclass(frozen=True)
class Model:
    """What is trained, and on which frozen networks."""

    base: PathOrHubId = "stable-diffusion-v1-5/stable-diffusion-v1-5"
    """Base model: a folder in diffusers' layout or a Hub id."""
    image_encoder: PathOrHubId = "h94/IP-Adapter/models/image_encoder"
    """Folder or Hub place of the CLIP vision model that reads the image prompts."""
    adapter: Literal["base", "plus", "full", "none"] = "base"
    """Variant of the image prompt: base (global embedding), plus (Resampler), full (all patches); none trains without
    image prompts."""
    num_tokens: int | None = None
    """Image tokens; by default 4 (base) and 16 (plus). full has one per position of the encoder."""
    resampler_depth: int = 4
    """Layers of the Resampler (plus)."""
    resampler_heads: int = 12
    """Attention heads of 64 channels of the Resampler (plus)."""
    init_from: PathOrHubId | None = None
    """Begin from this adapter (.safetensors, .bin, or a place on the Hub), not from the paper's initial weights."""
    train: tuple[Literal["unet", "image_proj", "ip_adapter"], ...] = ("image_proj", "ip_adapter")
    """The trainable parts; all others are frozen."""
    dtype: Dtype = "bfloat16"
    """Of the computation and of frozen weights; trainable parameters are float32, and start as copies of the
    frozen keys and values in this dtype. float16 scales its loss."""
    remat: Literal["auto", "always", "never"] = "auto"
    """Compute the inside of the UNet's blocks again in the backward pass: a third of the activations for a third more
    work. auto: where a step would not fit into a device's memory otherwise."""
    variant: str | None = None
    """Which weight files of the base model to prefer, such as fp16."""


@accepts_former_names
@dataclasses.dataclass(frozen=True)
class Data:
    """Where samples come from and how they are loaded."""

    path: PathOrHubId = ""
    """JSON list, folder, tar shards, Parquet, ArrayRecord, a tfds directory, or what `ipadapter-jax encode` wrote."""
    image_root: PathOrHubId | None = None
    """Folder that the file names of a JSON list are relative to; by default the list's own."""
    image_column: str | None = None
    """Column of the images, where its name is not a usual one."""
    text_column: str | None = None
    """Column of the captions."""
    cond_image_column: str | None = None
    """Column of the image prompts, where these differ from the images."""
    batch_size: int = 64
    """Samples in a step, over all devices and processes."""
    resolution: int = 512
    """Side of the square training images, in pixels."""
    drop_image: float = 0.05
    """Share of samples that lose their image prompt (for classifier-free guidance)."""
    drop_text: float = 0.05
    """Share that loses its text."""
    drop_both: float = 0.05
    """Share that loses both."""
    workers: int = 0
    """Processes that decode images; 0 decodes in threads of the main process."""
    threads: int = 16
    """Threads that read and decode, in each of these processes."""
    max_unreadable_fraction: Annotated[float, FormerName("max_bad_share")] = 0.1
    """Stop when more than this fraction of the records cannot be read."""


@accepts_former_names
@dataclasses.dataclass(frozen=True)
class Optim:
    """AdamW with a constant learning rate after a linear warm-up."""

    learning_rate: float = 1e-4
    weight_decay: float = 0.01
    """Decoupled, on all trainable parameters, as the authors'."""
    beta1: float = 0.9
    beta2: float = 0.999
    epsilon: float = 1e-8
    warmup_steps: int = 0
    """Steps over which the learning rate rises from 0."""
    clip_norm: float | None = None
    """Gradients are scaled down to this global norm."""
    accumulate: int = 1
    """Parts that a batch is computed in, one after the other, to save memory; the result is that of the whole."""
    ema: float | None = None
    """Decay of a moving average of the weights (0.9999, say), which is then what is exported."""
    max_nonfinite_steps: Annotated[int, FormerName("max_bad_steps")] = 20
    """Stop after so many consecutive steps whose gradients are NaN or infinite. Each such step is skipped."""


@dataclasses.dataclass(frozen=True)
class Log:
    """What a person sees."""

    every: int = 50
    """Steps between lines of metrics.jsonl."""
    tensorboard: bool = True
    wandb: str | None = None
    """Project on Weights & Biases to log to as well."""
    validate_every: int = 5000
    """Steps between validation losses and sample grids; 0 for never."""
    validation_path: PathOrHubId | None = None
    """Records to validate on, in any format of the training data; by default the first ones of the training data."""
    validation_size: int = 16
    """Samples in the fixed validation batch; the first 4 become the image prompts of the sample grid."""
    sample_steps: int = 30
    """Denoising steps of the sample grid; 0 for no grid."""
    clip: PathOrHubId | None = None
    """A whole CLIP, folder or Hub id such as openai/clip-vit-large-patch14, that scores the images of the grid:
    CLIP-I, CLIP-T and diversity as curves. They are few: a trend, not a result."""
    guidance_scale: float = 7.5


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """What is kept on disk."""

    every: int = 2000
    """Steps between saves of everything that resuming needs, and of the adapter file."""
    keep_last: int = 3
    keep_every: int | None = None
    """Also keep the checkpoints of every so many steps."""
    export_dtype: Dtype = "float16"
    """Of adapter.safetensors."""


@dataclasses.dataclass(frozen=True)
class Mesh:
    """How the work is sharded: the batch and the optimizer's state over all devices."""

    fsdp: int = 1
    """Devices in a group that shards the frozen weights; with 1, every device has a whole copy."""
    coordinator: str | None = None
    """host:port of process 0, for several processes without SLURM or a TPU pod."""
    processes: int | None = None
    """How many processes, with `coordinator`."""
    process: int | None = None
    """Number of this process, from 0, with `coordinator`."""
    heartbeat_seconds: int = 100
    """A process that is silent for so long is given up, and the others end."""


@dataclasses.dataclass(frozen=True)
class Train:
    """Trains an IP-Adapter. A run that was stopped resumes from its newest checkpoint in `out`."""

    out: PathOrHubId = "runs/adapter"
    """Folder of the run: checkpoints, logs, adapter.safetensors."""
    steps: int = 1_000_000
    seed: int = 0
    model: Model = dataclasses.field(default_factory=Model)
    data: Data = dataclasses.field(default_factory=Data)
    optim: Optim = dataclasses.field(default_factory=Optim)
    mesh: Mesh = dataclasses.field(default_factory=Mesh)
    log: Log = dataclasses.field(default_factory=Log)
    checkpoint: Checkpoint = dataclasses.field(default_factory=Checkpoint)
    dry_run: bool = False
    """Print what every host would run, and stop."""


# These may change when a run resumes: they do not affect the trained weights.
_FREE = (
    "out",
    "steps",
    "dry_run",
    "mesh",
    "log",
    "checkpoint",
    "data.workers",
    "data.threads",
    "data.max_unreadable_fraction",
)
_FREE += ("model.remat", "optim.accumulate", "optim.max_nonfinite_steps")
_FREE_PATHS = ("data.path", "data.image_root", "model.base", "model.image_encoder", "model.init_from")  # may be moved


def identity(config: Train) -> dict[str, object]:
    """What a resumed run must share with the run that it continues, as JSON. Files are identified by their content."""
    found = dataclasses.asdict(config)
    for name in (*_FREE, *_FREE_PATHS):
        *parents, last = name.split(".")
        node = found
        for parent in parents:
            node = node[parent]
        del node[last]
    return found | {"model": found["model"] | {"train": sorted(found["model"]["train"])}}


def check(config: Train) -> None:
    """Raises InputError naming the setting that cannot be used."""
    data, optim, model, log = config.data, config.optim, config.model, config.log
    if "://" in config.out:
        raise InputError(f"--out {config.out}: give a folder on a disk that all hosts see; buckets cannot be written")
    check_utf8(config.out, "the format of checkpoints")
    if not data.path:
        raise InputError("--data.path is missing: name the training data (JSON list, folder, tars, Parquet, ...)")
    _check_counts(config)
    drops = (data.drop_image, data.drop_text, data.drop_both)
    if min(drops) < 0 or not sum(drops) <= 1:
        raise InputError(f"the drop rates {drops} must not be negative, and at most 1 together")
    if not 0 <= data.max_unreadable_fraction <= 1:
        raise InputError(f"--data.max-unreadable-fraction {data.max_unreadable_fraction} must lie between 0 and 1")
    if not (optim.learning_rate > 0 and math.isfinite(optim.learning_rate)):
        raise InputError(f"--optim.learning-rate {optim.learning_rate} must be a positive number")
    for name, value in (("beta1", optim.beta1), ("beta2", optim.beta2), ("ema", optim.ema)):
        if value is not None and not 0 <= value < 1:
            raise InputError(f"--optim.{name} {value} must lie between 0 and 1")
    if not optim.epsilon > 0 or not math.isfinite(optim.weight_decay) or not math.isfinite(log.guidance_scale):
        raise InputError("--optim.epsilon must be positive, weight decay and guidance scale finite numbers")
    if optim.clip_norm is not None and not optim.clip_norm > 0:
        raise InputError(f"--optim.clip-norm {optim.clip_norm} must be positive")
    if data.batch_size % optim.accumulate:
        raise InputError(f"--optim.accumulate {optim.accumulate} must divide the batch of {data.batch_size}")
    if not 0 <= config.seed < 2**32:
        raise InputError(f"--seed {config.seed} must lie below 2^32")
    one = 3 * data.resolution**2 * (1 + 4)  # bytes: as it is read, and as the VAE sees it
    check_memory(one, f"--data.resolution {data.resolution}", "choose a smaller one")
    _check_model(model)


def _check_counts(config: Train) -> None:
    """Raises InputError naming a number that is too small."""
    data, optim, model, log = config.data, config.optim, config.model, config.log
    positive = {
        "steps": config.steps,
        "data.batch_size": data.batch_size,
        "data.threads": data.threads,
        "optim.accumulate": optim.accumulate,
        "optim.max_nonfinite_steps": optim.max_nonfinite_steps,
        "log.every": log.every,
        "log.validation_size": log.validation_size,
        "checkpoint.every": config.checkpoint.every,
        "checkpoint.keep_last": config.checkpoint.keep_last,
        "mesh.fsdp": config.mesh.fsdp,
        "mesh.heartbeat_seconds": config.mesh.heartbeat_seconds,
        "model.resampler_depth": model.resampler_depth,
        "model.resampler_heads": model.resampler_heads,
        "data.resolution": data.resolution,
        "model.num_tokens": model.num_tokens,
        "checkpoint.keep_every": config.checkpoint.keep_every,
    }
    not_negative = {
        "seed": config.seed,
        "data.workers": data.workers,
        "optim.warmup_steps": optim.warmup_steps,
        "log.validate_every": log.validate_every,
        "log.sample_steps": log.sample_steps,
        "optim.weight_decay": optim.weight_decay,
    }
    for least, values in ((1, positive), (0, not_negative)):
        for name, value in values.items():
            if value is not None and value < least:
                raise InputError(f"--{flag(name)} {value} must be at least {least}")


def _check_model(model: Model) -> None:
    if not model.train or len(set(model.train)) != len(model.train):
        raise InputError(f"--model.train {' '.join(model.train) or '(nothing)'}: name each trainable part once")
    adapter_parts = {"image_proj", "ip_adapter"} & set(model.train)
    if model.adapter == "none" and (adapter_parts or model.init_from):
        raise InputError("--model.adapter none has no image_proj and ip_adapter to train: say --model.train unet")
    if model.adapter == "full" and model.num_tokens is not None:
        raise InputError("--model.num-tokens: the variant full has one token per position of its encoder")


def check_batch_memory(config: Train, processes: int) -> None:
    """Raises InputError when a process could not hold its part of a batch."""
    data, log = config.data, config.log
    samples = max(data.batch_size, log.validation_size if log.validate_every else 0)
    what = f"a batch of {samples:,} images of {data.resolution} pixels"
    check_memory(
        3 * data.resolution**2 * samples // processes, what, "give a smaller --data.batch-size or --log.validation-size"
    )


def flag(name: str) -> str:
    """A setting's name as the command line has it."""
    return name.replace("_", "-")
