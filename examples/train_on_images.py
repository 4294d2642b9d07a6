"""The whole pipeline on a CPU: small networks are trained on the photographs in scikit-image, then an adapter is
trained to generate one of them from its image. Text and image encoder have random weights, which still distinguish 18
images.

    python -m examples.train_on_images --out runs/photographs        needs the extras dev and tfds; 15 to 25 minutes

1. A small VAE is fitted to the photographs (small_vae.py): 64 x 64 px, latents of 8 x 8.
2. `ipadapter-jax train` trains a small UNet on them, with captions and without image prompts.
3. With both frozen, `ipadapter-jax train` trains the adapter alone, mostly without captions.
4. Images are sampled from each image prompt, without text. At least 80 % must be nearest (RMSE at 32 x 32 px) to their
   own photograph; with shuffled prompts the result must be hardly better than chance.
5. Ten steps from each data format give bit-exact losses.

Existing results are reused, so an interrupted call can be resumed. OUT/samples.png has a row for each photograph:
itself, its reconstruction by the VAE, and images sampled from it.
"""

import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tyro
from PIL import Image

from examples import small_vae
from examples.skimage_images import NAMES, photographs, records, write_formats
from ipadapter_jax.images.preprocess import image_grid, square_pixels
from ipadapter_jax.models.clip_config import CLIPTextConfig, CLIPVisionConfig
from ipadapter_jax.models.unet import UNet
from ipadapter_jax.models.unet_config import UNetConfig
from ipadapter_jax.pipelines.stable_diffusion import StableDiffusion
from ipadapter_jax.runtime import random_keys
from ipadapter_jax.runtime.compilation_cache import enable_compilation_cache
from ipadapter_jax.testing.random_weights import write_model
from ipadapter_jax.testing.sizes import ModelConfigs
from ipadapter_jax.weights.component_export import save_component
from ipadapter_jax.weights.components import UNET, VAE_COMPONENT, init_params

SIDE = 64  # pixels
COUNT = 4  # images sampled from each image prompt
UNET_CONFIG = UNetConfig(
    block_out_channels=(32, 64),
    down_block_types=("CrossAttnDownBlock2D",) * 2,
    up_block_types=("CrossAttnUpBlock2D",) * 2,
    layers_per_block=1,
    attention_head_dim=4,
    cross_attention_dim=64,
    norm_num_groups=16,
    sample_size=8,
)
TEXT_CONFIG = CLIPTextConfig(514, 64, 128, 2, 4, eos_token_id=513)
VISION_CONFIG = CLIPVisionConfig(64, 128, 64, 3, 4, image_size=SIDE, patch_size=16)

ALL_RUNS = (
    f"--data.batch-size {len(NAMES)} --optim.learning-rate 1e-3 --optim.warmup-steps 100 --optim.weight-decay 0 "
    "--optim.ema 0.998 --log.validate-every 0 --checkpoint.every 1000 --checkpoint.export-dtype float32"
)
UNET_RUN = "--model.adapter none --model.train unet --data.drop-image 0 --data.drop-text 0.3 --data.drop-both 0"
ADAPTER_RUN = "--data.drop-image 0.05 --data.drop-text 0.85 --data.drop-both 0.05"  # a caption would give it away
ENCODER = Path("ip_adapter", "models", "image_encoder")  # in the folder of the base model

Images = list[Image.Image]


def write_base(folder: Path, squares: np.ndarray, vae_steps: int) -> None:
    """A base model: the VAE fitted to `squares` (B, S, S, 3) uint8, the UNet as it is before training, encoders of
    random weights."""
    vae, params = small_vae.fit(squares, steps=vae_steps)
    write_model(folder, ModelConfigs(UNET_CONFIG, vae.config, TEXT_CONFIG, VISION_CONFIG), "float32")
    drawn = init_params(UNET, UNet(UNET_CONFIG), random_keys.key(0))
    for component, name, tree in ((VAE_COMPONENT, "vae", params), (UNET, "unet", drawn)):
        place = folder / name
        save_component(component, place, tree, np.dtype(np.float32), (place / "config.json").read_bytes())


def train(out: Path, options: str, data: Path, base: Path) -> list[float]:
    """`ipadapter-jax train` with these options and ALL_RUNS; gives the losses that it has logged."""
    places = {"--out": out, "--data.path": data, "--model.base": base, "--model.image-encoder": base / ENCODER}
    words = ["train", "debug", *options.split(), *ALL_RUNS.split()]
    words += [str(word) for pair in places.items() for word in pair]
    print("ipadapter-jax", *words, flush=True)
    subprocess.run([sys.executable, "-m", "ipadapter_jax.cli", *words], check=True)
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [line["loss"] for line in lines if "loss" in line]


def sample(pipe: StableDiffusion, prompts: Sequence[Image.Image]) -> list[Images]:
    """COUNT images of each image prompt; the seeds follow its place in the list."""
    return [
        pipe(
            ip_adapter_image=prompt,
            guidance_scale=4.0,
            num_inference_steps=30,
            num_images_per_prompt=COUNT,
            seed=COUNT * place,
            progress_bar=False,
        )
        for place, prompt in enumerate(prompts)
    ]


def share_nearest_to_own(sampled: Sequence[Images], squares: Images) -> float:
    """Of the images at place i, over all places, those that are nearest to photograph i."""
    own = [nearest(image, squares) == place for place, found in enumerate(sampled) for image in found]
    return sum(own) / len(own)


def nearest(sampled: Image.Image, squares: Images) -> int:
    """The photograph with the least RMSE at 32 x 32 px."""
    small = [np.asarray(image.resize((32, 32), Image.Resampling.BOX), float) for image in (sampled, *squares)]
    return int(np.argmin([np.mean((small[0] - other) ** 2) for other in small[1:]]))


def check_images(out: Path, base: Path, originals: Images, squares: np.ndarray) -> dict[str, Any]:
    """Samples from every photograph, writes OUT/samples.png and measures."""
    pipe = StableDiffusion.from_pretrained(base).with_ip_adapter(
        out / "adapter" / "adapter.safetensors", image_encoder=base / ENCODER
    )
    back = small_vae.through(pipe.vae, pipe.params["vae"], squares)
    own = sample(pipe, originals)
    order = np.random.default_rng(0).permutation(len(originals))
    shuffled = sample(pipe, [originals[i] for i in order])
    targets = [Image.fromarray(square) for square in squares]
    rows = [[target, Image.fromarray(b), *found] for target, b, found in zip(targets, back, own, strict=True)]
    image_grid([image for row in rows for image in row], columns=2 + COUNT).save(out / "samples.png")
    return {
        "photographs": len(originals),
        "vae_psnr_least": float(small_vae.psnr(back, squares).min()),
        "nearest_to_own": share_nearest_to_own(own, targets),
        "nearest_to_own_with_shuffled_prompts": share_nearest_to_own(shuffled, targets),
    }


GOALS: dict[str, Callable[[Any], bool]] = {
    "vae_psnr_least": lambda psnr: psnr >= 24,  # dB
    "nearest_to_own": lambda share: share >= 0.8,
    "nearest_to_own_with_shuffled_prompts": lambda share: share <= 3 / len(NAMES),  # chance is 1 of all
    "same_losses_from_every_format": bool,
}


def main(out: Path, vae_steps: int = 1000, unet_steps: int = 3000, adapter_steps: int = 2000) -> None:
    """Trains all of it in OUT, checks it, and writes OUT/results.json. Ends with an error where a goal is missed."""
    enable_compilation_cache()
    originals = photographs()
    squares = np.stack([square_pixels(image, SIDE) for image in originals.values()])
    shutil.rmtree(out / "data", ignore_errors=True)
    formats = write_formats(out / "data", records(originals))
    base, whole = out / "base", out / "base-with-unet"
    if not base.exists():
        write_base(out / "base.part", squares, vae_steps)
        (out / "base.part").rename(base)
    train(out / "unet", f"{UNET_RUN} --log.every 100 --steps {unet_steps}", formats["json"], base)
    shutil.copytree(base, whole, dirs_exist_ok=True)
    shutil.copytree(out / "unet" / "unet", whole / "unet", dirs_exist_ok=True)
    train(out / "adapter", f"{ADAPTER_RUN} --log.every 100 --steps {adapter_steps}", formats["json"], whole)
    results = check_images(out, whole, list(originals.values()), squares)
    losses = {
        name: train(out / "formats" / name, f"{ADAPTER_RUN} --log.every 1 --steps 10", data, whole)
        for name, data in formats.items()
    }
    results["same_losses_from_every_format"] = all(found == losses["json"] for found in losses.values())
    (out / "results.json").write_text(json.dumps(results, indent=2) + "\n")
    print(json.dumps(results, indent=2))
    if missed := [name for name, good in GOALS.items() if not good(results[name])]:
        raise SystemExit(f"goals missed: {', '.join(missed)}")


if __name__ == "__main__":
    tyro.cli(main)
