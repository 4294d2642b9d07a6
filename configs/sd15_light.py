"""IP-Adapter Light: as sd15.py, for results that follow the text more.

    ipadapter-jax train sd15_light --data.path shards/ --out runs/sd15_light

The file format is that of the base variant. How the released ip-adapter_sd15_light was trained is not published; this
recipe leaves the image out of a quarter of the samples, so that the text alone explains them. Its effect has not been
measured; the scale of the image prompt when sampling (0.5, say) is the other way to the same end.
"""

from ipadapter_jax.train.config import Data, Train

config = Train(out="runs/sd15_light", data=Data(drop_image=0.25))
