"""IP-Adapter Light: like sd15.py, for results that follow the text more.

    ipadapter-jax train sd15_light --data.path shards/ --out runs/sd15_light

The file format is that of the base variant. It is not published how the released ip-adapter_sd15_light was trained.
This recipe drops the image of a quarter of the samples, so that the text alone describes them. The effect has not been
measured. A lower scale of the image prompt when sampling, such as 0.5, has the same purpose.
"""

from ipadapter_jax.train.config import Data, Train

config = Train(out="runs/sd15_light", data=Data(drop_image=0.25))
