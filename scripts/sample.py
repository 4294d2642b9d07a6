"""Sampling with an image prompt on one screen: from an image and a prompt to images in one jitted call.

    python -m ipadapter_jax.testing.random_weights --size tiny --out weights/tiny
    python -m scripts.sample --model weights/tiny --adapter weights/tiny/ip_adapter/models/ip-adapter_sd15.safetensors \
        --image assets/reference.jpg --prompt "a cat" --size 256 --out out/sample.png

Copy it and change what you like. `ipadapter_jax.StableDiffusion` does the same with all checks, several devices and a
progress bar.
"""

from pathlib import Path
from typing import Annotated, Any

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from PIL import Image

from ipadapter_jax import StableDiffusion
from ipadapter_jax.diffusion.guidance import guide
from ipadapter_jax.diffusion.sampler_table import init_state, sampler_step
from ipadapter_jax.diffusion.samplers import sample_table
from ipadapter_jax.images.preprocess import clip_pixel_values, image_grid, load_image, to_uint8
from ipadapter_jax.models.unet import UNet
from ipadapter_jax.models.vae import VAE, denormalize
from ipadapter_jax.pipelines.ip_adapter import encoders_of
from ipadapter_jax.runtime import random_keys
from ipadapter_jax.weights.tokenizer import tokenize


def main(
    model: Annotated[str, tyro.conf.arg(aliases=["--base"])],  # its former name
    adapter: str,
    image: Path,
    prompt: str = "",
    negative_prompt: str = "",
    scale: float = 0.6,
    guidance_scale: float = 7.5,
    steps: int = 50,
    num_images: int = 4,
    size: int = 512,
    seed: int = 0,
    out: Path = Path("out/sample.png"),
) -> None:
    """Samples with a base adapter (4 tokens): square images of `size` pixels."""
    pipe = StableDiffusion.from_pretrained(model).with_ip_adapter(adapter)
    if len(pipe.text.tokenizers) > 1:
        raise SystemExit(f"{model}: give a model with one text encoder, of SD 1.x or SD 2.x")
    unet, vae, text_encoder, schedule = pipe.unet, pipe.vae, pipe.text_encoder, pipe.schedule
    ip = pipe.adapters[0]
    [encoder] = encoders_of(pipe.adapters)
    params = pipe.params | ip.params | {"image_encoder": encoder.params}

    @jax.jit
    def sample(params, ids, pixels, latents, scale, guidance_scale):
        """ids (2, 77), negative first; pixels (1, 224, 224, 3); latents (B, h, w, 4) -> images (B, H, W, 3)."""

        def apply(module, part, *inputs, method=None) -> Any:
            return module.apply({"params": params[part]}, *inputs, method=method)

        batch = latents.shape[0]
        text = apply(text_encoder, "text_encoder", ids).last_hidden_state
        embeds = apply(encoder.module, "image_encoder", pixels).image_embeds
        tokens = apply(ip.projection, "image_proj", jnp.concatenate([jnp.zeros_like(embeds), embeds]))

        # Keys and values of both branches, once: row 2 b + g of the network's batch is branch g of image b.
        text_kv, image_kv = jax.tree.map(
            lambda x: jnp.tile(x, (batch, 1, 1)),
            (apply(unet, "unet", text, method=UNet.text_kv), apply(ip.keys, "ip_adapter", tokens)),
        )
        weight = jnp.full((1, len(text_kv)), scale)

        def body(state, step):
            time = jnp.full((batch,), step.timestep)
            output = apply(unet, "unet", step.input_scale * state.x, time, text_kv, [image_kv], weight)
            output = guide(output.reshape(batch, 2, *output.shape[1:]), guidance_scale)
            return sampler_step(step, state, output), None

        table, sigma, _ = sample_table("ddim", schedule, steps)  # or another one without fresh noise: euler, unipc
        state, _ = jax.lax.scan(body, init_state(latents * sigma), table)
        decoded = apply(vae, "vae", state.x, method=VAE.decode)
        return denormalize(decoded)

    ids = tokenize(pipe.tokenizer, [negative_prompt, prompt], text_encoder.config.max_position_embeddings)
    pixels = clip_pixel_values([load_image(image)], encoder.module.config.image_size)
    side = size // vae.config.downscale
    latents = jax.random.normal(random_keys.key(seed), (num_images, side, side, unet.config.in_channels))
    images = to_uint8(np.asarray(sample(params, ids, pixels, latents, scale, guidance_scale)))
    out.parent.mkdir(parents=True, exist_ok=True)
    image_grid([Image.fromarray(image) for image in images]).save(out)
    print(out)


if __name__ == "__main__":
    tyro.cli(main)
