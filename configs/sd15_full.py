"""IP-Adapter Full, the variant of the released full-face file: one token per patch, through a perceptron.

    ipadapter-jax train sd15_full --data.path shards/ --out runs/sd15_full

Everything else as in sd15.py. 257 image tokens make each cross-attention about four times as long. For faces, give
crops of the face as image prompts (a column cond_image beside the image).
"""

from ipadapter_jax.train.config import Model, Train

config = Train(out="runs/sd15_full", model=Model(adapter="full"))
