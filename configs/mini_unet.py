"""The UNet of the bundled model `mini`, trained from random weights on rendered scenes.

    ipadapter-jax train mini_unet --model.base build/mini/base --data.path build/mini/pooled --out build/mini/unet

experiments/mini/build.py runs this recipe. Only the UNet is trained. The text of some samples is dropped, for
classifier-free guidance.
"""

from ipadapter_jax.train.config import Checkpoint, Data, Log, Model, Optim, Train

config = Train(
    out="runs/mini_unet",
    steps=6000,
    model=Model(base="mini", adapter="none", train=("unet",), dtype="float32"),
    data=Data(batch_size=64, resolution=64, drop_image=0.0, drop_text=0.15, drop_both=0.0),
    optim=Optim(learning_rate=1e-3, warmup_steps=200, weight_decay=0.0, clip_norm=1.0, ema=0.999),
    log=Log(every=50, validate_every=0),
    checkpoint=Checkpoint(every=500, keep_last=1),
)
