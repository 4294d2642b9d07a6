"""One side of benchmarks/train.py, which starts this script: a process that prepares and then waits for its turns."""

import dataclasses
import functools
import json
import os
import sys
import time
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import tyro

from benchmarks.compare_with_diffusers import ADAPTER, load_diffusers, peers
from benchmarks.sample_worker import resident_peak

# jax and torch are imported inside the classes: each side is a process that has only its own.

DROP = (0.2, 0.2, 0.2)  # more than the paper's 0.05 each: the first batch, where both are compared, shall have some
LEARNING_RATE, WEIGHT_DECAY, BETA1 = 1e-4, 0.01, 0.9
TEXT_TOKENS = 77


@dataclasses.dataclass(frozen=True)
class Settings:
    """Times the training step here and the authors' in PyTorch, and prints one table."""

    weights: Annotated[Path, tyro.conf.arg(help="a folder of random_weights.py, or laid out like one")]
    batch_size: int = 8
    size: Annotated[int, tyro.conf.arg(help="side of the training images, in pixels")] = 512
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    inputs: Annotated[
        Literal["both", "live", "precomputed"], tyro.conf.arg(help="images, or latents and image features")
    ] = "both"
    remat: Annotated[bool, tyro.conf.arg(help="ours: compute the UNet's blocks again in the backward pass")] = False
    compile: Annotated[bool, tyro.conf.arg(help="also a tuned PyTorch: torch.compile, no float32 weights")] = False
    cpu: Annotated[bool, tyro.conf.arg(help="the CPU, although there may be a GPU")] = False
    threads: Annotated[int | None, tyro.conf.arg(help="by default as many as this process may use")] = None
    steps: Annotated[int, tyro.conf.arg(help="of one turn")] = 10
    rounds: Annotated[int, tyro.conf.arg(help="turns of each side")] = 5
    peak_tflops: Annotated[float | None, tyro.conf.arg(help="of the device; by default that of a matrix product")] = (
        None
    )
    out: Annotated[Path | None, tyro.conf.arg(help="a JSON file for all numbers")] = None

    def batch(self) -> dict[str, np.ndarray]:
        """What the data side would hand over: images in one color, or random precomputed features."""
        text, vision = (
            json.loads((self.weights / folder / "config.json").read_text(encoding="utf-8"))
            for folder in ("text_encoder", ADAPTER.parent / "image_encoder")
        )
        rng, rows = np.random.default_rng(0), self.batch_size
        result = {"input_ids": rng.integers(0, text["vocab_size"], (rows, TEXT_TOKENS), np.int32)}
        if self.inputs == "live":
            for name, side in (("pixels", self.size), ("clip_pixels", vision["image_size"])):
                coarse = rng.integers(0, 256, (rows, -(-side // 16), -(-side // 16), 3), np.uint8)
                result[name] = coarse.repeat(16, axis=1).repeat(16, axis=2)[:, :side, :side]
        else:
            shape = (rows, self.size // 8, self.size // 8, 4)
            result["mean"] = 5 * rng.standard_normal(shape, np.float32)
            result["logvar"] = rng.standard_normal(shape, np.float32) - 4
            result["features"] = rng.standard_normal((rows, vision["projection_dim"]), np.float32)
        return result


class Ours:
    """This project: the step that `ipadapter-jax train` takes."""

    def __init__(self, settings: Settings):
        import jax

        from ipadapter_jax.runtime.malloc import disable_trim, is_cpu_only
        from ipadapter_jax.train import config as recipe

        self.settings, self.dtype = settings, settings.dtype
        if is_cpu_only():
            disable_trim()  # as the trainer does
        if self.dtype == "float32":
            jax.config.update("jax_default_matmul_precision", "highest")
        encoder = settings.weights / ADAPTER.parent / "image_encoder"
        drops = dict(zip(("drop_image", "drop_text", "drop_both"), DROP, strict=True))
        self.config = recipe.Train(
            model=recipe.Model(
                base=str(settings.weights),
                image_encoder=str(encoder),
                init_from=str(settings.weights / ADAPTER),
                dtype=self.dtype,
                remat="always" if settings.remat else "never",
            ),
            data=recipe.Data(batch_size=settings.batch_size, resolution=settings.size, **drops),
            optim=recipe.Optim(learning_rate=LEARNING_RATE, weight_decay=WEIGHT_DECAY, beta1=BETA1),
        )
        self._load(encoder)

    def _load(self, encoder: Path) -> None:
        import jax
        import jax.numpy as jnp

        from ipadapter_jax.runtime.mesh import global_mesh, replicated
        from ipadapter_jax.train.networks import PrecomputedEncoder, load_networks
        from ipadapter_jax.train.optim import make_optimizer, partition, trainable_mask
        from ipadapter_jax.train.state import init_train_state, state_shardings
        from ipadapter_jax.train.step import StepResult, make_step
        from ipadapter_jax.weights.components import IMAGE_ENCODER
        from ipadapter_jax.weights.open_component import read_component_config

        encoded = None
        if self.settings.inputs == "precomputed":
            encoded = PrecomputedEncoder(read_component_config(IMAGE_ENCODER, encoder / "config.json").config, None)
        self.mesh = global_mesh()
        loaded = load_networks(self.config, self.mesh, encoded)
        self.networks, self.frozen = loaded.networks, loaded.frozen
        mask = trainable_mask(self.config.model)
        optimizer = make_optimizer(self.config.optim, mask)
        trainable = partition(loaded.frozen.params | loaded.params, mask)

        def begin(params: Any) -> Any:
            return init_train_state(params, optimizer, dtype=self.dtype, ema=False)

        shardings = state_shardings(self.mesh, jax.eval_shape(begin, trainable))
        self.state = jax.jit(begin, out_shardings=shardings)(trainable)
        kept = jnp.dtype(self.dtype)  # in which the cache keeps what encoders made
        self.arrays = {k: v.astype(kept) if v.dtype == np.float32 else v for k, v in self.settings.batch().items()}
        self._step = jax.jit(
            make_step(self.networks, optimizer, self.config, self.mesh),
            donate_argnums=0,
            out_shardings=StepResult._make([shardings, replicated(self.mesh)]),
        )

    def _batch(self) -> Any:
        from ipadapter_jax.train.batches import batch_of
        from ipadapter_jax.train.sharding import global_batch

        size = self.settings.batch_size
        return batch_of(global_batch(self.mesh, self.arrays, list(range(size)), size))

    def draws(self, path: str) -> None:
        """Writes what chance decides in the first step, and the tokens of no text."""
        import jax.numpy as jnp

        from ipadapter_jax.train.step import random_draws

        rows, timesteps = jnp.arange(self.settings.batch_size), self.networks.schedule.num_train_timesteps
        random_keys = random_draws(self.config.seed, jnp.int32(0), rows, self.networks.latent_shape, timesteps, DROP)
        found: dict[str, Any] = {name: np.asarray(value) for name, value in random_keys._asdict().items()}
        np.savez(path, **found, empty_ids=np.asarray(self.frozen.empty_ids))

    def first(self, _draws: str, path: str) -> None:
        """Writes loss, norm of the gradient and the gradient of the adapter's matrices in the first step."""
        import optax

        self.state, metrics = self._step(self.state, self.frozen, self._batch())
        first = optax.tree_utils.tree_get(self.state.opt_state, "mu")  # (1 - beta1) gradient, after one step
        sites = [first["ip_adapter"][name] for name in sorted(first["ip_adapter"], key=int)]
        layers = [first["image_proj"]["proj"], *(site[name] for site in sites for name in ("to_k_ip", "to_v_ip"))]
        gradient = np.concatenate([np.asarray(layer["kernel"]).ravel() for layer in layers]) / (1 - BETA1)
        np.savez(path, loss=metrics.loss, norm=metrics.gradient_norm, gradient=gradient)

    def steps(self) -> None:
        """As the training loop: at most two steps ahead of the outcome that has been looked at."""
        outcomes = []
        for _ in range(self.settings.steps):
            self.state, metrics = self._step(self.state, self.frozen, self._batch())
            outcomes.append(metrics)
            if len(outcomes) > 2:
                int(outcomes.pop(0).bad_steps)
        for metrics in outcomes:
            float(metrics.loss)
        self.state.step.block_until_ready()

    def about(self) -> dict[str, Any]:
        """The device, what a step computes, and how fast a product of large matrices is, in FLOP and FLOP/s."""
        import jax

        from benchmarks.abstract_programs import as_on
        from ipadapter_jax.runtime.flops import count_flops

        device = jax.local_devices()[0]
        name = "CPU" if device.platform == "cpu" else device.device_kind
        with as_on("gpu"):  # as the networks are written: on a CPU some convolutions are less work
            flops = count_flops(jax.make_jaxpr(self._step)(self.state, self.frozen, self._batch())).total()
        return {"device": name, "flops": flops, "product": self._product(2048 if name == "CPU" else 8192)}

    def _product(self, side: int) -> float:
        import jax
        import jax.numpy as jnp

        from ipadapter_jax.runtime import random_keys

        x = jax.random.normal(random_keys.key(0), (side, side), jnp.float32).astype(
            self.dtype
        )  # zeros and ones are faster
        product = jax.jit(lambda x: x @ x)
        product(x).block_until_ready()
        seconds = []
        for _ in range(5):
            start = time.perf_counter()
            last = [product(x) for _ in range(4)][-1]
            last.block_until_ready()
            seconds.append((time.perf_counter() - start) / 4)
        return 2 * side**3 / min(seconds)

    def peak(self) -> int | None:
        """Bytes of the device's own memory, where it has some."""
        import jax

        return (jax.local_devices()[0].memory_stats() or {}).get("peak_bytes_in_use")


class Authors:
    """The authors' step: encoders in the compute dtype, a UNet with float32 weights under autocast, and a loss that is
    fetched at every step. The networks are diffusers', whose IP-Adapter attention is the authors'."""

    tuned = False

    def __init__(self, settings: Settings):
        import torch

        self.settings, self.torch, self.cuda = settings, torch, torch.cuda.is_available()
        torch.set_num_threads(len(os.sched_getaffinity(0)))
        torch.set_flush_denormal(True)  # as XLA does
        torch.backends.cudnn.allow_tf32 = False  # float32 is float32
        self.device, self.dtype = torch.device("cuda" if self.cuda else "cpu"), getattr(torch, settings.dtype)
        pipe = load_diffusers(settings.weights, torch.float32)
        self.unet, self.vae = pipe.unet, pipe.vae
        self.text_encoder, self.image_encoder = pipe.text_encoder, pipe.image_encoder
        for network in (self.unet, self.vae, self.text_encoder, self.image_encoder):
            network.requires_grad_(False)
        self.projection = self.unet.encoder_hid_proj
        # In the order of the authors' files, as ours.
        self.processors: list[Any] = [p for p in self.unet.attn_processors.values() if isinstance(p, torch.nn.Module)]
        self.trainable = [*self.projection.parameters(), *(w for p in self.processors for w in p.parameters())]
        self.text_encoder.to(self.device, self.dtype)
        if settings.inputs == "live":
            self.vae.to(self.device, self.dtype)
            self.image_encoder.to(self.device, self.dtype)
        else:
            del self.vae, self.image_encoder
        self.scaling_factor = pipe.vae.config.scaling_factor
        del pipe
        self._place_unet()
        for weight in self.trainable:
            weight.requires_grad_(True)
        self.schedule = peers()[0].DDPMScheduler.from_pretrained(settings.weights / "scheduler")
        self.optimizer = self._optimizer()
        # As accelerate does for float16; on without need it would cost, off it does nothing.
        self.scaler = torch.amp.GradScaler(self.device.type, init_scale=2.0**15, enabled=settings.dtype == "float16")
        self.arrays = self._host_batch()
        self.empty_ids = self.arrays["input_ids"][0]

    def _place_unet(self) -> None:
        self.unet.to(self.device)

    def _optimizer(self) -> Any:
        return self.torch.optim.AdamW(self.trainable, lr=LEARNING_RATE, weight_decay=WEIGHT_DECAY)

    def _host_batch(self) -> dict[str, Any]:
        """The batch as the authors' data set gives it: images in float32, normalised on the host, (B, C, H, W)."""
        arrays = self.settings.batch()
        if "pixels" in arrays:
            from ipadapter_jax.images.preprocess import CLIP_TABLE

            arrays["pixels"] = arrays["pixels"].astype(np.float32) / 127.5 - 1
            arrays["clip_pixels"] = CLIP_TABLE[arrays["clip_pixels"], np.arange(3)]
        return {k: self._from_numpy(v) if v.ndim == 4 else self.torch.from_numpy(v) for k, v in arrays.items()}

    def _from_numpy(self, images: np.ndarray) -> Any:
        """(B, H, W, C) -> (B, C, H, W)"""
        return self.torch.from_numpy(np.ascontiguousarray(images.transpose(0, 3, 1, 2)))

    def _latents(self, noise: Any | None) -> Any:
        from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution

        if "pixels" in self.arrays:
            posterior = self.vae.encode(self.arrays["pixels"].to(self.device, self.dtype)).latent_dist
        else:
            moments = self.torch.cat([self.arrays["mean"], self.arrays["logvar"]], dim=1)
            posterior = DiagonalGaussianDistribution(moments.to(self.device, self.dtype))
        latents = posterior.sample() if noise is None else posterior.mean + posterior.std * noise.to(self.dtype)
        return latents * self.scaling_factor

    def _features(self, drop: Any) -> Any:
        if "clip_pixels" in self.arrays:
            features = self.image_encoder(self.arrays["clip_pixels"].to(self.device, self.dtype)).image_embeds
        else:
            features = self.arrays["features"].to(self.device, self.dtype)
        return self.torch.where(drop.to(self.device)[:, None], 0, features)

    def _chance(self) -> dict[str, Any]:
        """A step's draws: those of the images on the device, of what is dropped on the host."""
        torch, rows, side = self.torch, self.settings.batch_size, self.settings.size // 8
        chance = torch.rand(rows)
        image, text, both = np.cumsum(DROP)
        return {
            "drop_image": (chance < image) | ((text <= chance) & (chance < both)),
            "drop_text": (image <= chance) & (chance < both),
            "timestep": torch.randint(0, self.schedule.config.num_train_timesteps, (rows,), device=self.device),
            "noise": torch.randn((rows, 4, side, side), device=self.device, dtype=self.dtype),
            "posterior_noise": None,
        }

    def _backward(self, draws: dict[str, Any]) -> Any:
        """Leaves the gradients, times the scale of the loss, with the weights; returns the loss."""
        torch = self.torch
        with torch.no_grad():
            latents = self._latents(draws["posterior_noise"])
            noise = draws["noise"].to(latents.dtype)
            noisy = self.schedule.add_noise(latents, noise, draws["timestep"])
            features = self._features(draws["drop_image"])
            ids = torch.where(draws["drop_text"][:, None], self.empty_ids, self.arrays["input_ids"]).to(self.device)
            text = self.text_encoder(ids)[0]
        with torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32):
            given = {"image_embeds": [features[:, None]]}
            predicted = self.unet(noisy, draws["timestep"], text, added_cond_kwargs=given).sample
        loss = torch.nn.functional.mse_loss(predicted.float(), noise.float())
        self.scaler.scale(loss).backward()
        return loss

    def _update(self) -> None:
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad()

    def first(self, draws: str, path: str) -> None:
        """The same as ours, with the draws of ours."""
        torch, given = self.torch, dict(np.load(draws))
        self.empty_ids = torch.from_numpy(given.pop("empty_ids"))
        chance = {k: self._from_numpy(v) if v.ndim == 4 else torch.from_numpy(v) for k, v in given.items()}
        for name in ("timestep", "noise", "posterior_noise"):
            chance[name] = chance[name].to(self.device)
        loss = self._backward(chance).item()
        scale = self.scaler.get_scale()
        norm = torch.linalg.vector_norm(torch.stack([w.grad.float().norm() for w in self.trainable])).item() / scale
        layers = [self.projection.image_projection_layers[0].image_embeds]
        layers += [layer for processor in self.processors for layer in (*processor.to_k_ip, *processor.to_v_ip)]
        gradients = [layer.weight.grad.float().cpu().numpy().T.ravel() / scale for layer in layers]
        np.savez(path, loss=loss, norm=norm, gradient=np.concatenate(gradients))
        self._update()

    def steps(self) -> None:
        for _ in range(self.settings.steps):
            self._backward(self._chance()).item()
            self._update()
        if self.cuda:
            self.torch.cuda.synchronize()

    def about(self) -> dict[str, Any]:
        return {"device": self.torch.cuda.get_device_name() if self.cuda else "CPU"}

    def peak(self) -> int | None:
        return self.torch.cuda.max_memory_allocated() if self.cuda else None


class Tuned(Authors):
    """The same mathematics as fast as PyTorch readily goes: frozen weights in the compute dtype, channels last,
    compiled networks, one kernel for the optimizer, and no wait for the loss."""

    def _place_unet(self) -> None:
        torch, kept = self.torch, {id(weight) for weight in self.trainable}
        torch.backends.cudnn.benchmark = True
        for weight in self.unet.parameters():
            if id(weight) not in kept:
                weight.data = weight.data.to(self.dtype)
        self.unet.to(self.device, memory_format=torch.channels_last)
        self.unet = torch.compile(self.unet)
        if self.settings.inputs == "live":
            self.vae.to(memory_format=torch.channels_last)
            self.vae.encoder, self.image_encoder = torch.compile(self.vae.encoder), torch.compile(self.image_encoder)

    def _optimizer(self) -> Any:
        settings = {"lr": LEARNING_RATE, "weight_decay": WEIGHT_DECAY}
        return self.torch.optim.AdamW(self.trainable, fused=True, **settings)

    def steps(self) -> None:
        for _ in range(self.settings.steps):
            self._backward(self._chance())
            self._update()
        if self.cuda:
            self.torch.cuda.synchronize()


SIDES = {"ours": Ours, "authors": Authors, "tuned": Tuned}


def work(side: str, settings: Settings, started: float) -> None:
    """Gets ready, answers with the seconds that took since `started`, then answers every request, in lines of JSON.

    Requests: "draws FILE" (only ours), "first DRAWS FILE", "steps" (how long a turn takes), "about", "peak".
    """
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # what libraries print must not come between the answers
    if settings.threads:
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: settings.threads])
    runner: Any = SIDES[side](settings)
    print(json.dumps(time.monotonic() - started), file=answers)
    for line in sys.stdin:
        request, *paths = line.split()
        wall, processor = time.perf_counter(), time.process_time()
        answer = functools.partial(getattr(runner, request), *paths)()
        if request in ("steps", "first"):
            answer = {"wall": time.perf_counter() - wall, "processor": time.process_time() - processor}
        elif request == "peak":
            answer = resident_peak() if answer is None else answer
        print(json.dumps(answer), file=answers)


if __name__ == "__main__":
    given = json.loads(sys.argv[2])
    work(sys.argv[1], Settings(**given | {"weights": Path(given["weights"])}), float(sys.argv[3]))
