"""The configurations of mini: Stable Diffusion's networks with 16 MB of float16 weights, adapters included."""

from pathlib import Path

from ipadapter_jax.models.clip_config import CLIPTextConfig, CLIPVisionConfig
from ipadapter_jax.models.unet_config import UNetConfig
from ipadapter_jax.models.vae import VAEConfig

SIDE = 64  # pixels
TOKENS = 48  # length of a prompt
VOCABULARY = 800

# Latents are 8 x 8 x 16. They have as many numbers as 16 x 16 x 4, but the UNet is twice as fast on a CPU.
VAE_CONFIG = VAEConfig(
    latent_channels=16, block_out_channels=(16, 32, 64, 64), layers_per_block=1, norm_num_groups=8, scaling_factor=1.0
)
UNET_CONFIG = UNetConfig(
    in_channels=16,
    out_channels=16,
    block_out_channels=(96, 112),
    down_block_types=("CrossAttnDownBlock2D",) * 2,
    up_block_types=("CrossAttnUpBlock2D",) * 2,
    layers_per_block=1,
    attention_head_dim=4,
    cross_attention_dim=128,
    norm_num_groups=16,
    sample_size=SIDE // 8,
)
TEXT_CONFIG = CLIPTextConfig(VOCABULARY, 128, 256, 3, 4, max_position_embeddings=TOKENS, eos_token_id=VOCABULARY - 1)
VISION_CONFIG = CLIPVisionConfig(128, 384, 128, 4, 4, image_size=SIDE, patch_size=8)
CONFIGS = (UNET_CONFIG, VAE_CONFIG, TEXT_CONFIG, VISION_CONFIG)

SCHEDULER = {
    "_class_name": "DDIMScheduler",
    "_diffusers_version": "0.35.0",
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "clip_sample": False,
    "num_train_timesteps": 1000,
    "prediction_type": "v_prediction",
    "rescale_betas_zero_snr": False,
    "set_alpha_to_one": False,
    "steps_offset": 1,
    "timestep_spacing": "leading",
    "trained_betas": None,
}
PREPROCESSOR = {  # of the image encoder, for PyTorch users; the values are those of CLIP at mini's size
    "crop_size": {"height": SIDE, "width": SIDE},
    "do_center_crop": True,
    "do_convert_rgb": True,
    "do_normalize": True,
    "do_rescale": True,
    "do_resize": True,
    "image_mean": [0.48145466, 0.4578275, 0.40821073],
    "image_processor_type": "CLIPImageProcessor",
    "image_std": [0.26862954, 0.26130258, 0.27577711],
    "resample": 3,
    "rescale_factor": 1 / 255,
    "size": {"shortest_edge": SIDE},
}
ENCODER = Path("image_encoder")  # in mini's folder, beside the adapters
