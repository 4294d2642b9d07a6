"""The compiled functions of a pipeline: the pure functions of this folder, jitted and with their
programs cached on disk.

Call them through this module (`programs.denoise(...)`), so that a test or a benchmark can observe them.
"""

from ipadapter_jax.diffusion.sampler_table import SamplerTable, State
from ipadapter_jax.models.text_encoders import TextConditioning
from ipadapter_jax.models.unet import AddedConditioning
from ipadapter_jax.ops.attention import KeyValue
from ipadapter_jax.pipelines import denoise as _denoise
from ipadapter_jax.pipelines import encode
from ipadapter_jax.pipelines.conditioning import (
    Conditioning,
    Guidance,
    ImageBranch,
    PreservedRegion,
    ResidualInputs,
)
from ipadapter_jax.runtime.export_cache import export_cached, register_serializable

register_serializable(TextConditioning)
register_serializable(State, SamplerTable, _denoise.Steps, _denoise.DenoisedState)
register_serializable(Conditioning, Guidance, ImageBranch, KeyValue, AddedConditioning, PreservedRegion, ResidualInputs)

encode_prompts = export_cached(encode.encode_prompts, static=2)
encode_image = export_cached(encode.encode_image, static=2)
image_keys_values = export_cached(encode.image_keys_values, static=2)
text_keys_values = export_cached(encode.text_keys_values, static=1)
encode_init_image = export_cached(encode.encode_init_image, static=1)
denoise = export_cached(_denoise.denoise, static=2)
decode = export_cached(encode.decode, static=2)
