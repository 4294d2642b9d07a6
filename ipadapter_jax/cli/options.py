"""What all commands that sample are told: models, sampler, controls of the image prompt."""

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Annotated, Any, ClassVar, Literal

from ipadapter_jax.errors import InputError
from ipadapter_jax.inputs.former_names import FormerName, FormerValue
from ipadapter_jax.inputs.validation import Uncond
from ipadapter_jax.pipelines.scales import Scale
from ipadapter_jax.storage.paths import PathOrHubId
from ipadapter_jax.storage.text_files import parse_json
from ipadapter_jax.weights import bundled
from ipadapter_jax.weights.hub import found_place

# What the call of a pipeline names otherwise than the command line does. A part of an argument is given after a /.
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

HELP_IMAGE_PROMPT = (
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
HELP_SAMPLING = (
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
HELP_MODEL = ("model", "dtype", "variant", "revision", "vae", "text_encoder", "config", "extract_ema")


@dataclasses.dataclass(kw_only=True)
class Sampling:
    """Options of every command that samples."""

    help_groups: ClassVar[Mapping[str, tuple[str, ...]]]  # of --help, the most used first

    model: Annotated[PathOrHubId, FormerName("base")] = bundled.NAME
    """Base model: a folder in diffusers' layout (PyTorch or Flax weights), a single file (.safetensors or .ckpt), a
    Hub id such as owner/name, or mini, the model inside this package (./mini is a folder of that name)."""
    config: PathOrHubId | None = None
    """For a single file: folder or Hub id of its family, for settings and tokenizer; by default Stable Diffusion
    1.5."""
    vae: PathOrHubId | None = None
    """Another VAE than the base model's: a folder, a Hub id or a file."""
    text_encoder: PathOrHubId | None = None
    """Another text encoder than the base model's: a folder, a Hub id or a file."""
    extract_ema: bool = False
    """For a single file: take the moving average of its UNet."""
    negative_prompt: str = ""
    """What to avoid."""
    adapter: PathOrHubId | None = None
    """IP-Adapter file (.safetensors or .bin), or a place on the Hub such as owner/name/folder/file.safetensors. The
    base model mini has two, mini and mini-plus; with an image prompt the first is its default."""
    image_encoder: PathOrHubId | None = None
    """Folder, file or Hub place of the CLIP vision model; by default image_encoder beside the adapter."""
    scale: float = 1.0
    """Weight of the image prompt: 0 is the base model, 0.5 to 0.7 balances with the text, 1 follows the image."""
    layer_scales: Annotated[str, FormerName("layers")] = "linear"
    """Where the image prompt acts: a preset ("ease out", "style", "composition", "strong style" ...), or as JSON
    diffusers' dictionary {"up": {"block_1": [0, 1, 0]}}, a sum of presets {"style": 1, "composition": 0.5}, or a list
    with a factor for each layer."""
    scale_start: float = 0.0
    """From which part of the steps on the image prompt acts."""
    scale_end: float = 1.0
    """Up to which part of the steps."""
    scale_steps: tuple[float, ...] = (1.0,)
    """Factors of the scale spread over the steps, linear between: "1 0" fades out, "0 1" in."""
    reference_resize: Annotated[Literal["crop", "resize", "pad", "tile"], FormerName("fit")] = "crop"
    """How a reference that is not square becomes so; tile makes several squares of it."""
    negative_image: PathOrHubId | None = None
    """An image to keep away from: what the unconditional branch of guidance sees."""
    uncond: Annotated[Uncond, FormerValue("zero pixels", "zero-pixels")] = "default"
    """What that branch sees without one: zeros (features), zero-pixels, black or noise. The default is what the
    adapter was trained with."""
    steps: int = 50
    """Denoising steps."""
    guidance_scale: float | None = None
    """Classifier-free guidance; 1 turns it off. By default the model's own, 7.5 for Stable Diffusion."""
    guidance_rescale: float = 0.0
    """How far the guided prediction gets back the spread of the unguided one, 0 to 1; against burnt colours."""
    clip_skip: int = 0
    """Layers of the text encoder to leave out for the prompt."""
    scheduler: Literal["ddim", "ddpm", "pndm", "dpmsolver++", "euler", "euler_a", "unipc", "lcm"] = "ddim"
    """The sampler. dpmsolver++ and unipc need 20 to 30 steps; lcm is for models that were distilled for it."""
    karras: bool = False
    """Noise levels after Karras et al., for dpmsolver++, euler and unipc."""
    timestep_spacing: Literal["leading", "trailing", "linspace"] | None = None
    """Where the steps lie; by default as the model's scheduler_config.json says, or as the sampler prefers."""
    zero_snr: bool = False
    """Rescale the noise schedule so that the first step starts from pure noise, for models trained so; the spacing is
    then trailing unless another is given."""
    eta: float = 0.0
    """Fresh noise in every step, from 0 (none) to 1 (as DDPM)."""
    height: int | None = None
    """Height in pixels, a multiple of 8; by default the model's own size, or that of an image to paint over."""
    width: int | None = None
    """Width in pixels."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Of weights and networks; bfloat16 halves the memory and is the fast one on accelerators."""
    variant: str | None = None
    """Which weight files of the base model to prefer, such as fp16."""
    revision: str | None = None
    """Branch, tag or commit of the base model on the Hub."""

    def check(self) -> None:
        """Raises InputError for what can be told before any file is opened."""
        found_place(self.model, "base model")  # all else depends on it
        self.scale_of()
        if self.steps < 1:
            raise InputError(f"--steps {self.steps} must be at least 1")
        if self.karras and self.scheduler not in ("dpmsolver++", "euler", "unipc"):
            raise InputError(
                f"--karras has no meaning for --scheduler {self.scheduler}; it is for dpmsolver++, euler, unipc"
            )
        if not 0 <= self.eta <= 1:
            raise InputError(f"--eta {self.eta} must lie between 0 and 1")
        if self.eta and self.scheduler != "ddim":
            raise InputError(f"--eta has no effect with --scheduler {self.scheduler}; it is for ddim")
        if self.negative_image is not None and self.uncond != "default":
            raise InputError("--negative-image and --uncond say the same; give one of them")
        if self.guidance_scale is not None and self.guidance_scale <= 1:
            refuse(
                self,
                ("negative_prompt", "negative_image", "uncond", "guidance_rescale"),
                "without guidance",
                "give a --guidance-scale above 1",
            )

    def scheduler_config(self) -> dict[str, Any]:
        """What the options change of the model's own settings."""
        options = {
            "use_karras_sigmas": self.karras,
            "timestep_spacing": self.timestep_spacing or ("trailing" if self.zero_snr else None),
            "rescale_betas_zero_snr": self.zero_snr,
        }
        return {name: value for name, value in options.items() if value}

    def scale_of(self, value: float | None = None, layer_scales: str | None = None) -> Scale:
        """The scale of the image prompt, by default as the options say."""
        given: Any = self.layer_scales if layer_scales is None else layer_scales
        if given.lstrip().startswith(("{", "[")):
            given = parse_json(given, "--layer-scales", "an example is '{\"mid\": 1}'")
        return Scale(self.scale if value is None else value, given, self.scale_start, self.scale_end, self.scale_steps)

    def arguments(self, negative: Any) -> dict[str, Any]:
        """For the call of a pipeline: all that does not differ from image to image. `negative`: the image of
        --negative-image, or its path."""
        return {
            "negative_ip_adapter_image": negative,
            "ip_adapter_uncond": self.uncond,
            "fit": self.reference_resize,
            "num_inference_steps": self.steps,
            "guidance_scale": self.guidance_scale,
            "guidance_rescale": self.guidance_rescale,
            "clip_skip": self.clip_skip,
            "scheduler": self.scheduler,
            "scheduler_config": self.scheduler_config(),
            "eta": self.eta,
            "height": self.height,
            "width": self.width,
            "progress_bar": False,  # commands have their own
        }


OF_IMAGE_PROMPTS = (
    "scale",
    "layer_scales",
    "scale_start",
    "scale_end",
    "scale_steps",
    "reference_resize",
    "negative_image",
    "uncond",
    "image_encoder",
    "adapter",
)


def changed(args: Any, names: Iterable[str]) -> list[str]:
    """Those of these options that differ from their defaults, as a person writes them."""
    defaults = {field.name: field.default for field in dataclasses.fields(args)}
    return [f"--{name.replace('_', '-')}" for name in names if getattr(args, name) != defaults[name]]


def refuse(args: Any, names: Iterable[str], why: str, remedy: str) -> None:
    """Raises InputError where one of these options was changed, as it has no effect."""
    if ignored := changed(args, names):
        has, them = ("have", "them") if len(ignored) > 1 else ("has", "it")
        raise InputError(f"{', '.join(ignored)} {has} no effect {why}: {remedy}, or leave {them} out")
