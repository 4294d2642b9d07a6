"""A test of the setup that takes two minutes on any machine: 20 steps of a tiny model on any data.

    python -m ipadapter_jax.testing.random_weights --size tiny --out weights/tiny
    ipadapter-jax train debug --data.path photos/ --out runs/debug

The model's weights are random. The run shows only that the loss is finite and that a run can be resumed.
"""

from ipadapter_jax.train.config import Checkpoint, Data, Log, Model, Train

TINY = "weights/tiny"

config = Train(
    out="runs/debug",
    steps=20,
    model=Model(base=TINY, image_encoder=f"{TINY}/ip_adapter/models/image_encoder", dtype="float32"),
    data=Data(batch_size=8, resolution=64),
    log=Log(every=5, validate_every=10, validation_size=4, sample_steps=5),
    checkpoint=Checkpoint(every=10),
)
