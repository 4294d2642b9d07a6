"""Options of all commands that sample: models, sampler, controls of the image prompt."""

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Annotated, ClassVar, Literal

from ipadapter_jax.cli.model_options import ModelOptions
from ipadapter_jax.cli.option_types import OptionsOfCommand
from ipadapter_jax.errors import InputError
from ipadapter_jax.inputs.former_names import FormerName, FormerValue
from ipadapter_jax.inputs.validation import Uncond
from ipadapter_jax.pipelines.scales import Scale
from ipadapter_jax.storage.paths import PathOrHubId
from ipadapter_jax.storage.text_files import parse_json
from ipadapter_jax.weights import bundled
from ipadapter_jax.weights.hub import found_place

# {argument of a pipeline's call: field of the command} where the names differ. A part of an argument follows a slash.
ARGUMENTS: Mapping[str, str] = {
    "base": "model",
    "num_inference_steps": "steps",
    "num_images_per_prompt": "num_images",
    "image": "init_image",
    "ip_adapter_image": "image",
    "ip_adapter_image_embeds": "image_embeds",
    "ip_adapter_masks": "masks",
    "ip_adapter_scale": "scale",
    "ip_adapter_scale/layers": "layer_scales",
    "ip_adapter_scale/start": "scale_start",
    "ip_adapter_scale/steps": "scale_steps",
    "ip_adapter_uncond": "uncond",
    "negative_ip_adapter_image": "negative_image",
    "return_attention_maps": "attention_maps",
    "fit": "reference_resize",
    "exact_outside_mask": "preserve_unmasked",
}

# Options by their subject, in the order of --help.
IMAGE_PROMPT_OPTIONS = (
    "scale",
    "adapter",
    "image_encoder",
    "layer_scales",
    "scale_start",
    "scale_end",
    "scale_steps",
    "reference_resize",
    "negative_image",
    "uncond",
)
SAMPLING_OPTIONS = (
    "steps",
    "guidance_scale",
    "guidance_rescale",
    "scheduler",
    "karras",
    "timestep_spacing",
    "zero_snr",
    "eta",
    "clip_skip",
)
MODEL_OPTIONS = ("model", "dtype", "variant", "revision", "vae", "text_encoder", "config", "extract_ema")


@dataclasses.dataclass(kw_only=True)
class Sampling(ModelOptions):
    """Options of every command that samples."""

    help_groups: ClassVar[Mapping[str, tuple[str, ...]]]  # of --help, the most used first

    model: Annotated[PathOrHubId, FormerName("base")] = bundled.NAME
    """Base model: a folder in diffusers' layout (PyTorch or Flax weights), a single file (.safetensors or .ckpt), a
    Hub id such as owner/name, or mini, the model inside this package (./mini is a folder of that name)."""
    negative_prompt: str = ""
    """Negative text prompt."""
    adapter: PathOrHubId | None = None
    """IP-Adapter: a file (.safetensors or .bin), or a path on the Hub such as owner/name/folder/file.safetensors. The
    base model mini has two, mini and mini-plus; mini is its default when there is an image prompt."""
    image_encoder: PathOrHubId | None = None
    """CLIP vision model: a folder, a file or a path on the Hub; by default image_encoder next to the adapter."""
    scale: float = 1.0
    """Weight of the image prompt: 0 ignores it, 0.5 to 0.7 balances it with the text, 1 follows it closely."""
    layer_scales: Annotated[str, FormerName("layers")] = "linear"
    """Factors of the scale for the cross-attention layers: a preset ("ease out", "style", "composition", "strong
    style" ...), or JSON: diffusers' dictionary {"up": {"block_1": [0, 1, 0]}}, a weighted sum of presets {"style": 1,
    "composition": 0.5}, or a list with one factor per layer."""
    scale_start: float = 0.0
    """Fraction of the steps after which the image prompt starts to act."""
    scale_end: float = 1.0
    """Fraction of the steps after which the image prompt stops acting."""
    scale_steps: tuple[float, ...] = (1.0,)
    """Factors of the scale at evenly spaced steps, interpolated linearly: "1 0" fades the image prompt out, "0 1" fades
    it in."""
    reference_resize: Annotated[Literal["crop", "resize", "pad", "tile"], FormerName("fit")] = "crop"
    """How reference images that are not square are made square. tile divides each into several squares."""
    negative_image: PathOrHubId | None = None
    """Image to avoid: the image prompt of the unconditional branch of guidance."""
    uncond: Annotated[Uncond, FormerValue("zero pixels", "zero-pixels")] = "default"
    """Image prompt of the unconditional branch without --negative-image: zeros (features that are zero), or the
    features of zero-pixels (after normalization), of a black image or of noise. The default is what the adapter was
    trained with."""
    steps: int = 50
    """Number of denoising steps."""
    guidance_scale: float | None = None
    """Scale of classifier-free guidance; 1 turns it off. By default the model's own, 7.5 for Stable Diffusion."""
    guidance_rescale: float = 0.0
    """How far the standard deviation of the guided prediction is restored to that of the text-conditional one, 0 to 1;
    avoids overexposed images."""
    clip_skip: int = 0
    """Number of last layers of the text encoder to skip."""
    scheduler: Literal["ddim", "ddpm", "pndm", "dpmsolver++", "euler", "euler_a", "unipc", "lcm"] = "ddim"
    """Sampler. dpmsolver++ and unipc need 20 to 30 steps; lcm is for models that were distilled for it."""
    karras: bool = False
    """Use the noise levels of Karras et al., with dpmsolver++, euler or unipc."""
    timestep_spacing: Literal["leading", "trailing", "linspace"] | None = None
    """How timesteps are spaced; by default as the model's scheduler_config.json says, else as the sampler prefers."""
    zero_snr: bool = False
    """Rescale the noise schedule to zero terminal SNR, so that sampling starts from pure noise; for models that were
    trained so. Timesteps are then spaced trailing unless --timestep-spacing says otherwise."""
    eta: float = 0.0
    """Amount of noise that DDIM adds in each step, from 0 (none) to 1 (as DDPM)."""
    height: int | None = None
    """Height in pixels, a multiple of 8; by default the size of --init-image, else the model's own."""
    width: int | None = None
    """Width in pixels, as --height."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Data type of weights and computation; bfloat16 halves the memory and is faster on accelerators."""
    revision: str | None = None
    """Branch, tag or commit of the base model on the Hub."""

    def check(self) -> None:
        """Raises InputError for options that are wrong on their own or together. Opens no file."""
        found_place(self.model, "base model")  # all else depends on it
        self.scale_of()
        if self.steps < 1:
            raise InputError(f"--steps {self.steps} must be at least 1")
        if self.karras and self.scheduler not in ("dpmsolver++", "euler", "unipc"):
            raise InputError(
                f"--karras has no effect with --scheduler {self.scheduler}; it is for dpmsolver++, euler, unipc"
            )
        if not 0 <= self.eta <= 1:
            raise InputError(f"--eta {self.eta} must lie between 0 and 1")
        if self.eta and self.scheduler != "ddim":
            raise InputError(f"--eta has no effect with --scheduler {self.scheduler}; it is for ddim")
        if self.negative_image is not None and self.uncond != "default":
            raise InputError("--negative-image and --uncond both set the unconditional image prompt; give one of them")
        if self.guidance_scale is not None and self.guidance_scale <= 1:
            refuse(
                self,
                ("negative_prompt", "negative_image", "uncond", "guidance_rescale"),
                "without guidance",
                "give a --guidance-scale above 1",
            )

    def scheduler_config(self) -> dict[str, object]:
        """Settings of the scheduler that the options change from the model's own."""
        options = {
            "use_karras_sigmas": self.karras,
            "timestep_spacing": self.timestep_spacing or ("trailing" if self.zero_snr else None),
            "rescale_betas_zero_snr": self.zero_snr,
        }
        return {name: value for name, value in options.items() if value}

    def scale_of(self, value: float | None = None, layer_scales: str | None = None) -> Scale:
        """The scale of the image prompt; arguments replace the options."""
        given = self.layer_scales if layer_scales is None else layer_scales
        factors: object = given
        if given.lstrip().startswith(("{", "[")):
            factors = parse_json(given, "--layer-scales", "an example is '{\"mid\": 1}'")
        assert isinstance(factors, str | dict | list)  # as the text begins
        scale = self.scale if value is None else value
        return Scale(scale, factors, self.scale_start, self.scale_end, self.scale_steps)


def changed(args: OptionsOfCommand, names: Iterable[str]) -> list[str]:
    """The names of those of these options that differ from their defaults, as on the command line."""
    defaults = {field.name: field.default for field in dataclasses.fields(args)}
    return [f"--{name.replace('_', '-')}" for name in names if getattr(args, name) != defaults[name]]


def refuse(args: OptionsOfCommand, names: Iterable[str], why: str, remedy: str) -> None:
    """Raises InputError if one of these options differs from its default, since it has no effect."""
    if ignored := changed(args, names):
        has, them = ("have", "them") if len(ignored) > 1 else ("has", "it")
        raise InputError(f"{', '.join(ignored)} {has} no effect {why}: {remedy}, or leave {them} out")
