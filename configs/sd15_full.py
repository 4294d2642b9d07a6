"""IP-Adapter Full, the variant of the released full-face file: one token per patch, through an MLP.

    ipadapter-jax train sd15_full --data.path shards/ --out runs/sd15_full

Everything else is as in sd15.py. With 257 image tokens each cross-attention layer has about four times as many keys.
For faces, give crops of the face as image prompts (a column cond_image next to the image).
"""

from ipadapter_jax.train.config import Model, Train

config = Train(out="runs/sd15_full", model=Model(adapter="full"))
