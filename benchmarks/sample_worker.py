"""One side of benchmarks/sample.py, which starts this script: a process that prepares and then waits for its turns."""

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
from PIL import Image

from benchmarks.compare_with_diffusers import load_diffusers, load_ours, peers

STAGES = {"imports": "imports", "load": "weights", "image": "compile and sample"}


@dataclasses.dataclass(frozen=True)
class Settings:
    """Times sampling here and in PyTorch diffusers, and prints one table."""

    weights: Annotated[Path, tyro.conf.arg(help="a folder of random_weights.py, or laid out like one")]
    image: Annotated[Path | None, tyro.conf.arg(help="the image prompt; by default an astronaut")] = None
    prompt: str = "a photo"
    negative_prompt: str = ""
    scale: Annotated[float, tyro.conf.arg(help="of the image prompt")] = 0.7
    guidance_scale: Annotated[float, tyro.conf.arg(help="small: guidance magnifies roundings, not the work")] = 1.5
    steps: int = 50
    batch: Annotated[int, tyro.conf.arg(help="images at a time; guidance doubles the UNet's batch")] = 1
    height: int = 512
    width: int = 512
    seed: int = 0
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    compile: Annotated[bool, tyro.conf.arg(help="PyTorch: torch.compile, max-autotune, channels last")] = False
    cpu: Annotated[bool, tyro.conf.arg(help="the CPU, although there may be a GPU")] = False
    threads: Annotated[int | None, tyro.conf.arg(help="by default as many as this process may use")] = None
    rounds: int = 5
    peak_tflops: Annotated[float | None, tyro.conf.arg(help="of the device; known for an H200")] = None
    out: Annotated[Path | None, tyro.conf.arg(help="a Markdown file for the table")] = None

    @property
    def call(self) -> dict[str, Any]:
        """What both pipelines take under the same name."""
        return {
            "guidance_scale": self.guidance_scale,
            "num_inference_steps": self.steps,
            "num_images_per_prompt": self.batch,
            "height": self.height,
            "width": self.width,
        }

    @property
    def words(self) -> dict[str, str]:
        return {"prompt": self.prompt, "negative_prompt": self.negative_prompt}

    @property
    def noise(self) -> np.ndarray:
        """Initial latents (B, h, w, 4)."""
        shape = (self.batch, self.height // 8, self.width // 8, 4)
        return np.random.default_rng(self.seed).standard_normal(shape, np.float32)


class Ours:
    """This project."""

    def __init__(self, settings: Settings, reference: Image.Image):
        self.settings, self.reference = settings, reference

    def imports(self) -> None:
        import jax

        from ipadapter_jax.pipelines import programs

        if self.settings.dtype == "float32":
            jax.config.update("jax_default_matmul_precision", "highest")
        # So that the loop can be timed alone, with the arguments and thus the program that the pipeline gives it.
        self._denoise, programs.denoise = programs.denoise, self._recorded  # type: ignore[assignment]

    def _recorded(self, *args, **kwargs):
        self._loop = functools.partial(self._denoise, *args, **kwargs)
        return self._loop()

    def load(self) -> None:
        import jax

        self.pipe = load_ours(self.settings.weights, self.settings.dtype)
        jax.block_until_ready((self.pipe.params, [adapter.params for adapter in self.pipe.adapters]))

    def image(self) -> None:
        prompts = {"ip_adapter_image": self.reference, "ip_adapter_scale": self.settings.scale, **self.settings.words}
        self.pipe(**prompts, latents=self.settings.noise, progress_bar=False, **self.settings.call)

    def loop(self) -> Any:
        state, _ = self._loop()
        return state.x.block_until_ready()

    def latents(self) -> np.ndarray:
        return np.asarray(self.loop())

    def device(self) -> tuple[str, int | None]:
        """Its name, and the peak of its own memory in bytes where it has one."""
        import jax

        device = jax.local_devices()[0]
        name = "CPU" if device.platform == "cpu" else device.device_kind
        return name, (device.memory_stats() or {}).get("peak_bytes_in_use")


class Torch:
    """PyTorch diffusers."""

    def __init__(self, settings: Settings, reference: Image.Image):
        self.settings, self.reference = settings, reference

    def imports(self) -> None:
        import torch

        diffusers, transformers = peers()
        # Modules of their own, which they import only when asked.
        _ = diffusers.StableDiffusionPipeline, diffusers.DDIMScheduler, transformers.CLIPImageProcessorPil
        torch.set_num_threads(len(os.sched_getaffinity(0)))
        torch.set_flush_denormal(True)  # as XLA does
        torch.backends.cudnn.allow_tf32 = False  # float32 is float32

    def load(self) -> None:
        import torch

        self.cuda, dtype = torch.cuda.is_available(), getattr(torch, self.settings.dtype)
        self.pipe = load_diffusers(self.settings.weights, dtype, "cuda" if self.cuda else "cpu")
        self.pipe.set_ip_adapter_scale(self.settings.scale)
        noise = torch.from_numpy(self.settings.noise).permute(0, 3, 1, 2).contiguous()
        self.noise = noise.to(self.pipe.device, dtype)
        if self.settings.compile:
            for network in (self.pipe.unet, self.pipe.vae):
                network.to(memory_format=torch.channels_last)
            compiled = functools.partial(torch.compile, mode="max-autotune", fullgraph=True)
            self.pipe.unet, self.pipe.vae.decode = compiled(self.pipe.unet), compiled(self.pipe.vae.decode)

    def image(self) -> None:
        prompts = {"ip_adapter_image": self.reference, **self.settings.words}
        self.pipe(**prompts, latents=self.noise, **self.settings.call)

    @functools.cached_property
    def encoded(self) -> dict[str, Any]:
        """The prompts as the loop takes them."""
        import torch

        settings, device = self.settings, self.pipe.device
        with torch.no_grad():
            prompt, negative = self.pipe.encode_prompt(settings.prompt, device, 1, True, settings.negative_prompt)
            image = self.pipe.prepare_ip_adapter_image_embeds(self.reference, None, device, 1, True)
        return {"prompt_embeds": prompt, "negative_prompt_embeds": negative, "ip_adapter_image_embeds": image}

    def loop(self) -> Any:
        import torch

        latents = self.pipe(**self.encoded, latents=self.noise, output_type="latent", **self.settings.call).images
        if self.cuda:
            torch.cuda.synchronize()
        return latents

    def latents(self) -> np.ndarray:
        return self.loop().permute(0, 2, 3, 1).float().cpu().numpy()

    def device(self) -> tuple[str, int | None]:
        import torch

        return (torch.cuda.get_device_name(), torch.cuda.max_memory_allocated()) if self.cuda else ("CPU", None)


def resident_peak() -> int:
    """Bytes of this process. getrusage would not do: it begins with the peak of the process that started this one."""
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    return 1024 * int(status.partition("VmHWM:")[2].split()[0])


def work(side: str, settings: Settings, started: float) -> None:
    """Starts up, answers with the seconds of every stage since `started`, then answers every request, in lines of JSON.

    Requests: "loop" and "image" (how long one takes), "latents FILE" (saves the loop's), "device".
    """
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # what libraries print must not come between the answers
    if settings.threads:
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: settings.threads])
    assert settings.image is not None
    runner = {"ours": Ours, "torch": Torch}[side](settings, Image.open(settings.image))
    seconds: dict[str, float] = {}
    for stage in STAGES:
        getattr(runner, stage)()
        seconds[stage] = time.monotonic() - started - sum(seconds.values())
    print(json.dumps(seconds), file=answers)
    for line in sys.stdin:
        request, _, path = line.rstrip("\n").partition(" ")
        if request == "device":
            name, peak = runner.device()
            answer: Any = {"name": name, "peak": resident_peak() if peak is None else peak}
        elif request == "latents":
            answer = np.save(path, runner.latents())
        else:
            wall, processor = time.perf_counter(), time.process_time()
            getattr(runner, request)()
            answer = {"wall": time.perf_counter() - wall, "processor": time.process_time() - processor}
        print(json.dumps(answer), file=answers)


if __name__ == "__main__":
    given = json.loads(sys.argv[2])
    paths = {name: Path(given[name]) for name in ("weights", "image")}
    work(sys.argv[1], Settings(**given | paths), float(sys.argv[3]))
