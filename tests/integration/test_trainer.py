"""Whole runs of a small model: what they leave, and that stopping, faults and formats change nothing else."""

import hashlib
import json
import os
import re
import signal
from pathlib import Path

import jax
import numpy as np
import pytest
from helpers import IMAGE_ENCODER, jax_settings
from PIL import Image
from training import changed, nano, photographs

from ipadapter_jax import StableDiffusion, cli
from ipadapter_jax.errors import InputError
from ipadapter_jax.images.contact_sheet import GAP, LINE
from ipadapter_jax.train.config import Train
from ipadapter_jax.train.precompute import PrecomputeConfig, precompute
from ipadapter_jax.train.preemption import CoordinatedShutdown
from ipadapter_jax.train.trainer import EXIT_PREEMPTED, train
from ipadapter_jax.weights.ip_adapter_file import open_ip_adapter

pytestmark = pytest.mark.usefixtures("single_device")

STEPS = 8


def logged(folder: Path, name: str = "loss") -> dict[int, float]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return {line["step"]: line[name] for line in lines if name in line}


def digest(folder: Path) -> str:
    return hashlib.sha256((folder / "adapter.safetensors").read_bytes()).hexdigest()


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return photographs(tmp_path_factory.mktemp("data") / "photos")


@pytest.fixture(scope="module")
def run(data) -> Train:
    return nano(steps=STEPS, data__path=str(data))


def encoded(run: Train, out: Path, **changes) -> Path:
    """The data of a run, precomputed."""
    places = {"model": run.model.base, "image_encoder": run.model.image_encoder, "data": run.data.path}
    precompute(PrecomputeConfig(**places, out=out, resolution=run.data.resolution, dtype="float32", **changes))
    return out


@pytest.fixture(scope="module")
def patches(run, tmp_path_factory) -> Path:
    return encoded(run, tmp_path_factory.mktemp("patches") / "cache", features="penultimate")


@pytest.fixture(scope="module")
def done(run, tmp_path_factory) -> Path:
    """The folder of a run that nothing has disturbed."""
    folder = tmp_path_factory.mktemp("run") / "done"
    assert train(changed(run, out=str(folder), log__validate_every=4, log__tensorboard=True)) == 0
    return folder


def test_the_files_of_a_run(done) -> None:
    assert list(logged(done)) == list(range(1, STEPS + 1))
    validation = logged(done, "validation_loss")
    assert list(validation) == [0, 4, STEPS] and validation[STEPS] < validation[0]
    assert {f"validation_loss_{i}" for i in range(4)} <= json.loads((done / "metrics.jsonl").open().readline()).keys()
    assert [path.name for path in sorted((done / "samples").iterdir())] == [
        "samples-0000000.png",
        "samples-0000004.png",
        "samples-0000008.png",
    ]
    assert set(logged(done, "learning_rate").values()) == {float(np.float32(1e-3))}
    (events,) = (done / "tensorboard").iterdir()
    assert all(part in events.read_bytes() for part in (b'"sources"', b'"vae": "/', b"learning_rate", b"samples"))
    with Image.open(done / "samples" / "samples-0000004.png") as grid:
        assert grid.size == (GAP + 3 * (192 + GAP), 4 * (2 * LINE + 192 + GAP) + LINE + GAP)
    assert (done / "README.md").read_text().startswith("---\nlibrary_name: diffusers")
    assert (done / "skipped.jsonl").read_text() == ""


@pytest.mark.torch
def test_a_scoring_clip_writes_curves(run, tmp_path) -> None:
    """Of the images of the sample grid, whose captions are those of the data."""
    from clip_models import clip_model  # writes a tiny CLIPModel of transformers

    clip_model(tmp_path / "clip")
    config = changed(run, out=str(tmp_path / "run"), log__validate_every=STEPS, log__clip=str(tmp_path / "clip"))
    assert train(config) == 0
    for name, low, high in (("clip_i", -1, 1), ("clip_t", 0, 2.5), ("diversity", 0, 2)):
        scores = logged(tmp_path / "run", name)
        assert list(scores) == [0, STEPS] and all(low <= score <= high for score in scores.values())


def test_the_adapter_is_used_by_the_sampler(done, run, data) -> None:
    pipe = StableDiffusion.from_pretrained(run.model.base)
    pipe = pipe.with_ip_adapter(done / "adapter.safetensors", image_encoder=run.model.image_encoder)
    options = {"num_inference_steps": 2, "height": 8, "width": 8, "output_type": "np"}
    images = [pipe("", ip_adapter_image=data / "000.png", ip_adapter_scale=scale, **options) for scale in (0.0, 1.0)]
    assert np.abs(images[0] - images[1]).max() > 1e-3


def test_resuming_is_bit_exact(done, run, tmp_path, caplog) -> None:
    config = changed(run, out=str(tmp_path / "run"))
    with caplog.at_level("INFO", "ipadapter_jax"):
        assert train(changed(config, steps=5)) == 0
    said = [record.getMessage() for record in caplog.records if record.name == "ipadapter_jax"]
    lines = [re.sub(r"[\d.]+ s$", "N s", line) for line in said if " ..." in line or "done in" in line]
    assert lines == [  # compiling takes minutes on a large model, and nothing else is to be seen
        "reading the weights ...",
        "reading the weights: done in N s",
        "tracing the training step ...",
        "tracing the training step: done in N s",
        "compiling the training step (may take minutes) ...",
        "compiling the training step: done in N s",
    ]
    assert train(config) == 0
    assert logged(tmp_path / "run") == logged(done)
    assert digest(tmp_path / "run") == digest(done)
    (tmp_path / "run" / "adapter.safetensors").unlink()
    assert train(config) == 0  # all is done but the file
    assert logged(tmp_path / "run") == logged(done) and digest(tmp_path / "run") == digest(done)


def test_the_random_generator_of_the_environment_has_no_effect(done, run, tmp_path) -> None:
    config = changed(run, out=str(tmp_path / "run"))
    assert train(changed(config, steps=3)) == 0
    with jax_settings({"jax_default_prng_impl": "rbg", "jax_threefry_partitionable": False}):
        assert train(config) == 0
    assert logged(tmp_path / "run") == logged(done)
    assert digest(tmp_path / "run") == digest(done)


def test_another_generator_is_refused(done, run, monkeypatch) -> None:
    monkeypatch.setattr("ipadapter_jax.train.run_identity.GENERATOR", "philox")
    with pytest.raises(InputError, match='generator: "threefry2x32, partitionable" -> "philox"'):
        train(changed(run, out=str(done), steps=STEPS + 4))


def test_sigterm_saves_and_exits_as_preempted(done, run, tmp_path, monkeypatch) -> None:
    folder, should_stop = tmp_path / "run", CoordinatedShutdown.should_stop

    def at_step_3(self, step: int) -> bool:
        if step == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        return should_stop(self, step)

    with monkeypatch.context() as patch:
        patch.setattr(CoordinatedShutdown, "should_stop", at_step_3)
        assert train(changed(run, out=str(folder))) == EXIT_PREEMPTED
    assert max(logged(folder)) == 3 and (folder / "checkpoints" / "3").is_dir()
    assert train(changed(run, out=str(folder))) == 0
    assert logged(folder) == logged(done) and digest(folder) == digest(done)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"optim__learning_rate": 2e-3}, "settings.optim.learning_rate: 0.001 -> 0.002"),
        ({"data__drop_text": 0.0}, "settings.data.drop_text"),
        ({"seed": 1}, "settings.seed: 0 -> 1"),
    ],
)
def test_another_run_in_its_folder_is_refused(done, run, change, named) -> None:
    before = digest(done)
    with pytest.raises(InputError, match=named):
        train(changed(run, out=str(done), steps=STEPS + 4, **change))
    assert digest(done) == before


def test_other_data_are_refused(done, run, tmp_path) -> None:
    with pytest.raises(InputError, match=r"data\.source\.records: 12 -> 9"):
        train(changed(run, out=str(done), data__path=str(photographs(tmp_path / "other", count=9))))


def test_moved_data_are_accepted(done, run, tmp_path) -> None:
    folder = tmp_path / "moved"
    assert train(changed(run, out=str(done), data__path=str(photographs(folder)))) == 0


def test_unreadable_records_are_replaced_and_listed(run, tmp_path) -> None:
    data = photographs(tmp_path / "photos")
    (data / "003.png").write_bytes(b"no image")
    config = changed(run, data__path=str(data), out=str(tmp_path / "run"), data__max_unreadable_fraction=1.0)
    assert train(config) == 0
    (skipped,) = [json.loads(line) for line in (tmp_path / "run" / "skipped.jsonl").read_text().splitlines()]
    assert skipped["key"].startswith("003") and logged(tmp_path / "run", "bad_records")[STEPS] >= 1
    first = digest(tmp_path / "run")
    assert train(changed(config, out=str(tmp_path / "again"))) == 0
    assert digest(tmp_path / "again") == first


def test_precomputed_features_give_the_losses_of_images(done, run, data, tmp_path) -> None:
    cache = encoded(run, tmp_path / "cache")
    config = changed(run, data__path=str(cache), out=str(tmp_path / "run"), log__validate_every=STEPS)
    assert train(config) == 0
    for name in ("loss", "validation_loss"):
        live, cached = logged(done, name), logged(tmp_path / "run", name)
        np.testing.assert_allclose([cached[i] for i in cached], [live[i] for i in cached], rtol=1e-5)
    with pytest.raises(InputError, match="the validation data are images"):
        train(changed(config, out=str(tmp_path / "mixed"), log__validation_path=str(data)))
    with pytest.raises(InputError, match=r"image_encoder.*encode the data again"):
        train(changed(config, out=str(tmp_path / "other"), model__image_encoder=str(IMAGE_ENCODER)))


@pytest.mark.slow  # test_precompute.py compares the batches of both
@pytest.mark.parametrize("adapter", ["plus", "full"])
def test_precomputed_patches_give_the_losses_of_images(run, patches, tmp_path, adapter) -> None:
    live = changed(run, model__adapter=adapter, model__resampler_heads=2, steps=3)
    live = changed(live, log__validate_every=3, log__sample_steps=0)
    for name, path in (("live", run.data.path), ("cached", str(patches))):
        assert train(changed(live, data__path=path, out=str(tmp_path / name))) == 0
    for name, count in (("loss", 3), ("validation_loss", 2)):
        expected, found = (list(logged(tmp_path / run, name).values()) for run in ("live", "cached"))
        assert len(expected) == count  # validated before the first step, too
        np.testing.assert_allclose(found, expected, rtol=1e-5)


def test_float16_scales_its_loss_and_samples(run, data, tmp_path) -> None:
    config = changed(run, model__dtype="float16", out=str(tmp_path / "run"), log__validate_every=STEPS)
    assert train(config) == 0
    assert all(np.isfinite(loss) for loss in logged(tmp_path / "run").values())
    assert set(logged(tmp_path / "run", "loss_scale").values()) == {2.0**15}
    pipe = StableDiffusion.from_pretrained(run.model.base, dtype="float16")
    pipe = pipe.with_ip_adapter(tmp_path / "run" / "adapter.safetensors", image_encoder=run.model.image_encoder)
    (image,) = pipe("", ip_adapter_image=data / "000.png", num_inference_steps=2, output_type="np")
    assert np.isfinite(image).all()


def test_a_run_that_diverges_stops_with_advice(run, tmp_path) -> None:
    config = changed(run, optim__learning_rate=1e25, optim__max_nonfinite_steps=3, steps=40, out=str(tmp_path / "run"))
    with pytest.raises(InputError, match=r"3 steps in a row.*learning-rate"):
        train(config)


def test_training_the_unet_alone(run, tmp_path) -> None:
    """The same step with the mask the other way round, and then an adapter on the UNet that this leaves."""
    config = changed(
        run,
        model__adapter="none",
        model__train=("unet",),
        steps=2,
        checkpoint__export_dtype="float32",
        out=str(tmp_path / "run"),
        optim__ema=0.5,
    )
    assert train(config) == 0
    base = StableDiffusion.from_pretrained(run.model.base)
    os.symlink(tmp_path / "run" / "unet", tmp_path / "unet")
    for name in ("vae", "text_encoder", "tokenizer", "scheduler"):
        os.symlink(Path(run.model.base) / name, tmp_path / name)
    trained = StableDiffusion.from_pretrained(tmp_path)
    moved = jax.tree.map(lambda a, b: float(abs(a - b).max()), base.params["unet"], trained.params["unet"])
    assert max(jax.tree.leaves(moved)) > 1e-4
    assert not (tmp_path / "run" / "adapter.safetensors").exists()


def test_the_newest_checkpoint_is_converted_to_a_file(done, tmp_path, capsys):
    """What the run itself exported, to the bit; the run is left as it is."""
    before = sorted(path.name for path in (done / "checkpoints").iterdir())
    half = ["--dtype", "float16"]
    assert cli.main(["convert", str(done), str(tmp_path / "a.safetensors"), *half]) == 0
    step = done / "checkpoints" / str(STEPS)
    assert cli.main(["convert", str(step), str(tmp_path / "step.safetensors"), *half]) == 0
    assert (tmp_path / "step.safetensors").read_bytes() == (tmp_path / "a.safetensors").read_bytes()
    expected, found = (open_ip_adapter(folder) for folder in (done / "adapter.safetensors", tmp_path / "a.safetensors"))
    assert found.tensors.keys() == expected.tensors.keys()
    for name, tensor in expected.tensors.items():
        assert found.tensors[name].read().tobytes() == tensor.read().tobytes()
    assert found.metadata == expected.metadata
    assert sorted(path.name for path in (done / "checkpoints").iterdir()) == before
    assert cli.main(["convert", str(done), str(tmp_path / "c.safetensors")]) == 0  # by default nothing is rounded
    assert {t.dtype.name for t in open_ip_adapter(tmp_path / "c.safetensors").tensors.values()} == {"float32"}
    assert cli.main(["convert", str(done), str(tmp_path / "c"), "--flax"]) == 2
    (empty := tmp_path / "run" / "checkpoints").mkdir(parents=True)
    assert cli.main(["convert", str(empty.parent), str(tmp_path / "b.bin")]) == 2
    assert "nothing was saved yet" in capsys.readouterr().err
