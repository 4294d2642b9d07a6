"""IP-Adapter Plus (arXiv 2308.06721, section 4.4.2): 16 tokens from all patches, through a Resampler.

    ipadapter-jax train sd15_plus --data.path shards/ --out runs/sd15_plus

Everything else is as in sd15.py. Precomputed patches are 650 kB per sample in bfloat16 (`ipadapter-jax encode
--features penultimate`), ten times as much as for the base variant: training from images may be the better choice.
"""

from ipadapter_jax.train.config import Model, Train

config = Train(out="runs/sd15_plus", model=Model(adapter="plus"))
