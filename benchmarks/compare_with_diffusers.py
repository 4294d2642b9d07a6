"""Samples the same image with this project and with PyTorch diffusers, and reports the differences.

    python -m ipadapter_jax.testing.random_weights --size full --out weights/full
    python -m benchmarks.compare_with_diffusers --weights weights/full --out out/compare.png
    python -m benchmarks.compare_with_diffusers --weights ipadapter_jax/mini --adapter ip-adapter_mini.safetensors \
        --height 64 --width 64

Both use the same weights, prompt, photograph and noise, in float32 on the CPU. They run one after the other, so 12 GB
suffice at full size, where it takes some minutes. The exit code is 0 if the goals are met, else 1. Needs the extra
`torch`.
"""

import dataclasses
import gc
import importlib.util
import json
import sys
import warnings
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import tyro
from PIL import Image, ImageDraw

# jax and torch are imported inside functions: each side is also loaded alone, and the help needs neither.

ADAPTER = Path("ip_adapter", "models", "ip-adapter_sd15.safetensors")  # below a folder of random_weights.py
MAX_LATENTS_ERROR = 1e-3
MIN_SHARE_WITHIN_1 = 0.999


@dataclasses.dataclass(frozen=True)
class Comparison:
    """Both results, final latents (h, w, 4) and pixels (H, W, 3) uint8; what follows from them."""

    our_latents: np.ndarray
    their_latents: np.ndarray
    our_pixels: np.ndarray
    their_pixels: np.ndarray

    @property
    def latents_error(self) -> float:
        """The largest difference, relative to the root mean square of the reference."""
        difference = self.our_latents - self.their_latents
        return float(np.abs(difference).max() / np.sqrt(np.square(self.their_latents).mean()))

    @property
    def latents_error_l2(self) -> float:
        difference = self.our_latents - self.their_latents
        return float(np.linalg.norm(difference) / np.linalg.norm(self.their_latents))

    @property
    def pixel_differences(self) -> np.ndarray:
        """(H, W): levels of 255, the largest of the three colors."""
        return np.abs(self.our_pixels.astype(int) - self.their_pixels).max(axis=-1)

    @property
    def share_within_1(self) -> float:
        return float((self.pixel_differences <= 1).mean())

    @property
    def good(self) -> bool:
        return self.latents_error <= MAX_LATENTS_ERROR and self.share_within_1 >= MIN_SHARE_WITHIN_1


def compare(
    weights: Path,
    image: Image.Image,
    *,
    adapter: Path | None = ADAPTER,
    prompt: str = "a photo",
    negative_prompt: str = "",
    scale: float = 0.7,
    steps: int = 3,
    guidance_scale: float = 7.5,
    height: int | None = 512,
    width: int | None = 512,
    seed: int = 0,
) -> Comparison:
    """The same call to both, in float32, from the noise that ours draws for this seed; without `adapter` no image
    prompt, without a size the model's own."""
    call = {
        "prompt": prompt,
        "negative_prompt": negative_prompt,
        "ip_adapter_image": image if adapter else None,
        "num_inference_steps": steps,
        "guidance_scale": guidance_scale,
        "height": height,
        "width": width,
        "output_type": "latent",
    }
    noise, our_latents, our_pixels = _sample_ours(weights, adapter, call, scale, seed)
    gc.collect()  # before the other model comes
    their_latents, their_pixels = _sample_theirs(weights, adapter, call, scale, noise)
    return Comparison(our_latents, their_latents, our_pixels, their_pixels)


def _sample_ours(
    weights: Path, adapter: Path | None, call: dict, scale: float, seed: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Initial latents, final latents, pixels."""
    import jax

    from ipadapter_jax.images.preprocess import to_uint8
    from ipadapter_jax.models.vae import denormalize
    from ipadapter_jax.pipelines import programs
    from ipadapter_jax.pipelines.sample_batch import SampleBatch

    with jax.default_matmul_precision("highest"):
        pipe = load_ours(weights, "float32", adapter)
        latents = pipe(**call, ip_adapter_scale=scale, seed=seed, progress_bar=False)
        batch = SampleBatch(pipe.mesh, np.asarray([seed], np.uint32), np.zeros(1, int))
        noise = batch.noise(latents.shape[1:], 0)
        decoded = programs.decode(pipe.vae, pipe.mesh, pipe.params["vae"], batch.sharded(latents))
    pixels = denormalize(np.asarray(decoded)[0])
    return np.asarray(noise)[0], latents[0], to_uint8(pixels)


def _sample_theirs(
    weights: Path, adapter: Path | None, call: dict, scale: float, noise: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Final latents, pixels."""
    import torch

    pipe = load_diffusers(weights, torch.float32, adapter=adapter)
    if adapter:
        pipe.set_ip_adapter_scale(scale)
    latents = pipe(**call, latents=torch.from_numpy(noise.transpose(2, 0, 1)[None].copy())).images
    with torch.no_grad():
        decoded = pipe.vae.decode(latents / pipe.vae.config.scaling_factor).sample
    image = pipe.image_processor.postprocess(decoded, output_type="pil")[0]
    return latents[0].permute(1, 2, 0).numpy(), np.asarray(image)


def load_ours(weights: Path, dtype: str, adapter: Path | None = ADAPTER) -> Any:
    """Our pipeline with the adapter that lies there below `weights`."""
    from ipadapter_jax import StableDiffusion

    pipe = StableDiffusion.from_pretrained(weights, dtype=dtype)
    return pipe.with_ip_adapter(weights / adapter) if adapter else pipe


def load_diffusers(weights: Path, dtype: Any, device: str = "cpu", adapter: Path | None = ADAPTER) -> Any:
    """diffusers' pipeline with the same adapter, DDIM in place of the scheduler in the folder; dtype is torch's."""
    diffusers, transformers = peers()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # newer releases call torch_dtype dtype
        pipe = diffusers.StableDiffusionPipeline.from_pretrained(
            weights, safety_checker=None, torch_dtype=dtype, local_files_only=True
        )
    pipe.scheduler = diffusers.DDIMScheduler.from_config(pipe.scheduler.config)
    if adapter:
        config = weights / adapter.parent / "image_encoder" / "config.json"
        size = json.loads(config.read_text(encoding="utf-8"))["image_size"]
        # Named, because the default one is another where torchvision is installed, and rounds in another way.
        processor = transformers.CLIPImageProcessorPil(size=size, crop_size=size)
        pipe.register_modules(feature_extractor=processor)
        pipe.load_ip_adapter(str(weights), adapter.parent.as_posix(), adapter.name, local_files_only=True)
    pipe.set_progress_bar_config(disable=True)
    return pipe.to(device)


def peers() -> tuple[Any, Any]:
    """The modules diffusers and transformers, silenced."""
    libraries = {}
    for name in ("transformers", "diffusers"):  # in this order: transformers has remarks on what diffusers imports
        library: Any = importlib.import_module(name)
        library.utils.logging.set_verbosity_error()
        library.utils.logging.disable_progress_bar()
        libraries[name] = library
    return libraries["diffusers"], libraries["transformers"]


def photograph(path: Path | None = None) -> Image.Image:
    """The image in this file; by default the photograph of an astronaut that comes with scikit-image."""
    from ipadapter_jax.images.preprocess import load_image

    if path is not None:
        return load_image(path)
    from skimage import data

    return Image.fromarray(data.astronaut())


def require_peers() -> None:
    """Ends the process with one line where the peers are missing."""
    missing = [name for name in ("torch", "diffusers", "skimage") if importlib.util.find_spec(name) is None]
    if missing:
        sys.exit(f"{', '.join(missing)} missing; install the peers: pip install -e '.[torch,dev]' -c constraints.txt")


def side_by_side(result: Comparison) -> Image.Image:
    """Ours, theirs and the difference, stretched so that the largest one is white."""
    worst = max(1, int(result.pixel_differences.max()))
    difference = np.abs(result.our_pixels.astype(int) - result.their_pixels) * (255 // worst)
    panels = {
        "ipadapter_jax": result.our_pixels,
        "diffusers": result.their_pixels,
        f"difference x {255 // worst}": difference.astype(np.uint8),
    }
    height, width = result.our_pixels.shape[:2]
    caption, gap = 16, 4
    sheet = Image.new("RGB", (len(panels) * (width + gap) - gap, height + caption), "white")
    for number, (title, pixels) in enumerate(panels.items()):
        ImageDraw.Draw(sheet).text((number * (width + gap) + 2, 2), title, fill="black")
        sheet.paste(Image.fromarray(pixels), (number * (width + gap), caption))
    return sheet


def main(
    weights: Annotated[Path, tyro.conf.arg(help="a folder of random_weights.py, or laid out like one")],
    out: Annotated[Path, tyro.conf.arg(help="both images and their difference")] = Path("out/compare.png"),
    adapter: Annotated[Path | None, tyro.conf.arg(help="below that folder, image_encoder beside it")] = ADAPTER,
    image: Annotated[Path | None, tyro.conf.arg(help="the image prompt; by default an astronaut")] = None,
    prompt: str = "a photo",
    negative_prompt: str = "",
    scale: Annotated[float, tyro.conf.arg(help="of the image prompt")] = 0.7,
    steps: int = 3,
    guidance_scale: float = 7.5,
    height: int = 512,
    width: int = 512,
    seed: int = 0,
) -> int:
    """Compares latents and pixels and returns the exit code."""
    require_peers()
    result = compare(
        weights,
        photograph(image),
        adapter=adapter,
        prompt=prompt,
        negative_prompt=negative_prompt,
        scale=scale,
        steps=steps,
        guidance_scale=guidance_scale,
        height=height,
        width=width,
        seed=seed,
    )
    out.parent.mkdir(parents=True, exist_ok=True)
    side_by_side(result).save(out)
    print(f"{width}x{height}, {steps} steps, float32        measured     goal")
    print(f"latents, largest difference / rms  {result.latents_error:9.2e}  {MAX_LATENTS_ERROR:9.0e} at most")
    print(f"latents, relative L2 error         {result.latents_error_l2:9.2e}")
    print(f"pixels within 1 level              {result.share_within_1:9.4%}  {MIN_SHARE_WITHIN_1:9.1%} at least")
    print(f"pixels, largest difference         {result.pixel_differences.max():9d}")
    print(f"{out}: both images and their difference")
    return 0 if result.good else 1


if __name__ == "__main__":
    sys.exit(tyro.cli(main))
