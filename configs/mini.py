"""The base adapter of the bundled model `mini`: a quarter of an hour on two CPU cores, from a feature cache.

    python -m experiments.mini.render_scenes --out data/scenes
    ipadapter-jax train mini --data.path data/scenes/... --out runs/mini

It differs from sd15.py where a small model and a short run need it: the learning rate is higher, and most captions are
dropped, since these captions alone would reveal the image.
"""

from ipadapter_jax.train.config import Checkpoint, Data, Log, Model, Optim, Train

config = Train(
    out="runs/mini",
    steps=2500,
    model=Model(base="mini", image_encoder="mini/image_encoder", dtype="float32"),
    data=Data(batch_size=64, resolution=64, drop_image=0.05, drop_text=0.55, drop_both=0.05),
    optim=Optim(learning_rate=1e-3, warmup_steps=100, ema=0.998),
    log=Log(every=50, validate_every=0),
    checkpoint=Checkpoint(every=500, keep_last=1),
)
