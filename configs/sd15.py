"""The paper's run (arXiv 2308.06721, section 4.1): IP-Adapter for Stable Diffusion 1.5 from the global CLIP embedding.

    ipadapter-jax train sd15 --data.path shards/ --out runs/sd15

64 samples a step (8 on each of 8 accelerators), 1,000,000 steps, AdamW at 1e-4 with weight decay 0.01, 512 px. The
image, the text and both are dropped for 5 % of the samples each. The new key and value projections start as copies of
the text's. Trains 22,319,616 parameters. On 8 V100 add `--model.dtype float16`.

Speed: 1.67 TFLOP per sample from precomputed features (`ipadapter-jax encode`), 3.1 from images. At half of an H200's
790 TFLOP/s that would be 237 and 126 samples a second, 3.1 and 5.9 days for the whole run; computed, not measured.
"""

from ipadapter_jax.train.config import Train

config = Train(out="runs/sd15")
