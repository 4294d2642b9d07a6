"""A tiny random CLIPModel of PyTorch, saved with a tokenizer, and images to score."""

from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ipadapter_jax.testing.random_weights import write_tokenizer

SIDE, LENGTH, VOCABULARY = 32, 24, 520
CAPTIONS = [["a red fox", "an animal in snow"], ["two cats", "cats on a sofa", "a sofa"], ["a very small bird"]]


def clip_model(folder: Path, *, safe: bool = True, eos: int = VOCABULARY - 1) -> Any:
    """Writes it to `folder` as transformers does, or as a PyTorch pickle of the older days, and returns it."""
    import torch
    import transformers

    torch.manual_seed(0)
    shared = {"num_attention_heads": 4, "num_hidden_layers": 2, "initializer_range": 0.2}
    text = {"hidden_size": 32, "intermediate_size": 48, "vocab_size": VOCABULARY, "max_position_embeddings": LENGTH}
    vision = {"hidden_size": 40, "intermediate_size": 56, "image_size": SIDE, "patch_size": 8}
    config = transformers.CLIPConfig(
        text_config={**shared, **text, "eos_token_id": eos, "bos_token_id": VOCABULARY - 2},
        vision_config={**shared, **vision},
        projection_dim=24,
    )
    model = transformers.CLIPModel(config).eval()
    with torch.no_grad():  # the random projections are far smaller than trained ones: embeddings of near 0
        model.visual_projection.weight.normal_(0, 0.3)
        model.text_projection.weight.normal_(0, 0.3)
    model.save_pretrained(folder)
    if not safe:
        (folder / "model.safetensors").unlink()
        torch.save(model.state_dict(), folder / "pytorch_model.bin")
    write_tokenizer(folder, VOCABULARY, length=LENGTH)
    return model


def images(count: int, seed: int = 0) -> list[Image.Image]:
    """Smooth random images of several shapes."""
    rng = np.random.default_rng(seed)
    made = []
    for number in range(count):
        colours = Image.fromarray(rng.integers(0, 256, (4, 4, 3), np.uint8))
        made.append(colours.resize((40 + 7 * (number % 3), 36 + 5 * (number % 4)), Image.Resampling.BICUBIC))
    return made
