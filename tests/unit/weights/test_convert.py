"""Weights from one format to another and back: every bit is the same, and the other programs read what we write."""

import contextlib
import itertools
import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import consumers
import flax.serialization
import ml_dtypes
import numpy as np
import pytest
from helpers import ADAPTERS, IMAGE_ENCODER, ORACLES, TORCH_MODEL, flax_folder, ldm_file
from safetensors import safe_open
from safetensors.numpy import load_file, save_file
from weight_files import refused

import ipadapter_jax.weights.verified_write
from ipadapter_jax import cli
from ipadapter_jax.errors import WeightFileError
from ipadapter_jax.storage.atomic_files import atomic_replace
from ipadapter_jax.weights.convert import convert
from ipadapter_jax.weights.formats.tensor_files import open_tensors
from ipadapter_jax.weights.formats.torch_pickle import read_torch_file
from ipadapter_jax.weights.inspect import inspect_weights
from ipadapter_jax.weights.model_source import ModelSource
from ipadapter_jax.weights.open_base_model import open_base

FILES = {
    variant: ADAPTERS / f"ip-adapter{mark}_tiny.safetensors"
    for variant, mark in (("base", ""), ("plus", "-plus"), ("full", "-full-face"))
}
DTYPES = {"float16": np.float16, "float32": np.float32, "bfloat16": ml_dtypes.bfloat16}


def content(path: Path) -> dict[str, tuple]:
    """{name: (dtype, shape, bytes)} of a file."""
    tensors = open_tensors(path)
    return {name: (t.dtype.name, tuple(t.shape), t.read().tobytes()) for name, t in sorted(tensors.items())}


# --- adapters ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", FILES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_adapters_there_and_back(tmp_path, variant, dtype):
    source = tmp_path / "source.safetensors"
    save_file({name: array.astype(DTYPES[dtype]) for name, array in load_file(FILES[variant]).items()}, source)
    convert(source, tmp_path / "a.bin")
    convert(tmp_path / "a.bin", tmp_path / "b.safetensors")
    convert(tmp_path / "b.safetensors", tmp_path / "c.bin")
    assert content(tmp_path / "b.safetensors") == content(source)
    assert (tmp_path / "c.bin").read_bytes() == (tmp_path / "a.bin").read_bytes()
    assert list(read_torch_file(tmp_path / "a.bin")) == ["image_proj", "ip_adapter"]
    for reader in consumers.ALL:
        reader({name: shape for name, (_, shape, _) in content(tmp_path / "b.safetensors").items()}, variant)


@pytest.mark.parametrize("variant", FILES)
def test_a_genuine_pickle_becomes_the_released_file(tmp_path, variant):
    genuine = FILES[variant].with_suffix(".bin")
    convert(genuine, tmp_path / "a.safetensors")
    assert content(tmp_path / "a.safetensors") == {
        name: value for name, value in content(genuine).items() if name.startswith(("image_proj.", "ip_adapter."))
    }


def test_what_a_file_said_of_itself_is_kept(tmp_path):
    convert(FILES["plus"], tmp_path / "a.safetensors")
    with safe_open(tmp_path / "a.safetensors", "numpy") as file:
        assert file.metadata()["variant"] == "plus" and "step" not in file.metadata()
    told = {"step": "7", "author": "me", "variant": "base", "format": "np"}  # what its tensors tell wins
    save_file(load_file(FILES["plus"]), tmp_path / "b.safetensors", metadata=told)
    convert(tmp_path / "b.safetensors", tmp_path / "c.safetensors")
    with safe_open(tmp_path / "c.safetensors", "numpy") as file:
        assert file.metadata() | {"step": "7", "author": "me", "variant": "plus"} == file.metadata()


@pytest.mark.parametrize("variant", FILES)
def test_torch_and_diffusers_read_our_pickle(tmp_path, variant):
    torch = pytest.importorskip("torch")
    from diffusers import UNet2DConditionModel

    convert(FILES[variant], tmp_path / "a.bin")
    found = torch.load(tmp_path / "a.bin", weights_only=True)
    for name, array in load_file(FILES[variant]).items():
        part, _, rest = name.partition(".")
        assert found[part][rest].numpy().tobytes() == array.tobytes() and found[part][rest].is_contiguous()
    unet = UNet2DConditionModel.from_pretrained(TORCH_MODEL, subfolder="unet")
    unet._load_ip_adapter_weights([found])


# --- base models -------------------------------------------------------------------------------------------------


def parts(place: Path) -> dict[str, dict[str, tuple]]:
    """The trees of a base model as {path: (dtype, shape, bytes)}."""
    base = open_base(ModelSource(place, config=TORCH_MODEL if place.is_file() else None))
    found = {}
    for name in base.components:
        opened = base.part(name)
        weights = opened.weights
        for path in _paths(opened.component_config.template):
            array = weights.layout.read(path, weights.tensors[weights.layout.key(path)].read())
            found[(name, *path)] = (array.dtype.name, array.shape, np.ascontiguousarray(array).tobytes())
    return found


def _paths(tree) -> list[tuple[str, ...]]:
    from ipadapter_jax.weights.load_tree import leaves

    return list(leaves(tree))


@pytest.fixture(scope="module")
def sources(tmp_path_factory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("sources")
    (root / "flax").mkdir()
    return {"torch": TORCH_MODEL, "flax": flax_folder(root / "flax"), "one file": ldm_file(root / "m.safetensors")}


@pytest.mark.parametrize("source", ["torch", "flax", "one file"])
def test_base_models_there_and_back(sources, tmp_path, source):
    """To each layout, from there to each other one: the bits stay."""
    expected = parts(sources[source])
    options = {"config": TORCH_MODEL} if source == "one file" else {}
    outs = {"torch": tmp_path / "torch", "flax": tmp_path / "flax", "one": tmp_path / "one.safetensors"}
    for kind, out in outs.items():
        convert(ModelSource(sources[source], **options), out, flax=kind == "flax")
        assert parts(out) == expected
    for first, second in itertools.permutations(outs, 2) if source == "torch" else []:
        out = tmp_path / f"{first}-{second}{'.safetensors' if second == 'one' else ''}"
        config = TORCH_MODEL if first == "one" else None
        convert(ModelSource(outs[first], config=config), out, flax=second == "flax")
        assert parts(out) == expected
        for file in sorted(outs[second].rglob("*")) if outs[second].is_dir() else []:
            if file.is_file() and "json" not in file.name:  # weights and tokenizer to the byte
                assert (out / file.relative_to(outs[second])).read_bytes() == file.read_bytes()


def test_flax_files_are_those_that_flax_writes(sources, tmp_path):
    """From float16 PyTorch weights in float32: the sha256 of the genuine legacy files."""
    convert(TORCH_MODEL, tmp_path / "out", flax=True, dtype="float32")
    for name in ("unet/diffusion_flax_model.msgpack", "vae/diffusion_flax_model.msgpack"):
        assert (tmp_path / "out" / name).read_bytes() == (sources["flax"] / name).read_bytes()
    ours = (tmp_path / "out" / "text_encoder" / "flax_model.msgpack").read_bytes()
    assert flax.serialization.msgpack_serialize(flax.serialization.msgpack_restore(ours)) == ours
    genuine = ORACLES / "models" / "sd15_flax" / "text_encoder" / "flax_model.msgpack"  # with its names unsorted
    assert content(tmp_path / "out" / "text_encoder" / "flax_model.msgpack") == content(genuine)
    index = json.loads((tmp_path / "out" / "model_index.json").read_text())
    assert index["unet"] == ["diffusers", "FlaxUNet2DConditionModel"]


def test_diffusers_reads_the_folder_that_we_write(sources, tmp_path):
    torch = pytest.importorskip("torch")
    from diffusers import StableDiffusionPipeline

    for name in ("flax", "one file"):
        out = tmp_path / name.replace(" ", "-")
        convert(ModelSource(sources[name], config=TORCH_MODEL if name == "one file" else None), out)
        pipe = StableDiffusionPipeline.from_pretrained(out, torch_dtype=torch.float16)
        for part in ("unet", "vae", "text_encoder"):
            recorded = load_file(next((TORCH_MODEL / part).glob("*.safetensors")))
            found = {key.removeprefix("text_model."): value for key, value in getattr(pipe, part).state_dict().items()}
            for key, array in recorded.items():
                if not key.endswith("position_ids"):
                    assert found[key.removeprefix("text_model.")].numpy().tobytes() == array.tobytes(), key


@pytest.mark.parametrize("folder", [IMAGE_ENCODER, *(TORCH_MODEL / name for name in ("unet", "vae", "text_encoder"))])
def test_one_network_there_and_back(tmp_path, folder):
    convert(folder, tmp_path / "flax", flax=True)
    assert next((tmp_path / "flax").glob("*.msgpack"))
    convert(tmp_path / "flax", tmp_path / "torch")
    weights = next(folder.glob("*.safetensors"))
    expected = {name: value for name, value in content(weights).items() if "position_ids" not in name}
    assert content(tmp_path / "torch" / weights.name) == expected
    written = json.loads((tmp_path / "torch" / "config.json").read_text())
    assert written == json.loads((folder / "config.json").read_text())


def test_an_inpainting_model_is_named_so(tmp_path):
    tensors = load_file(ldm_file(tmp_path / "a.safetensors"))
    tensors["model.diffusion_model.input_blocks.0.0.weight"] = np.zeros((32, 9, 3, 3), np.float16)
    save_file(tensors, tmp_path / "a.safetensors")
    convert(ModelSource(tmp_path / "a.safetensors", config=TORCH_MODEL), tmp_path / "out")
    index = json.loads((tmp_path / "out" / "model_index.json").read_text())
    assert index["_class_name"] == "StableDiffusionInpaintPipeline"
    assert json.loads((tmp_path / "out" / "unet" / "config.json").read_text())["in_channels"] == 9
    assert open_base(tmp_path / "out").config("unet").in_channels == 9


# --- the command, and what is refused ----------------------------------------------------------------------------


def test_the_command(tmp_path, capsys):
    out = tmp_path / "a.safetensors"
    assert cli.main(["convert", str(FILES["base"].with_suffix(".bin")), str(out), "--dtype", "bfloat16"]) == 0
    assert capsys.readouterr().out == f"{out}\n"
    assert {dtype for dtype, _, _ in content(out).values()} == {"bfloat16"}
    assert cli.main(["convert", str(FILES["base"]), str(out)]) == 2
    error = capsys.readouterr().err
    assert f"{out} exists" in error and error.count("\n") == 1


WRONG = [
    (FILES["base"], "a.ckpt", {}, "saved as .safetensors or .bin"),
    (FILES["base"], "a", {}, "saved as .safetensors or .bin"),
    (FILES["base"], "a.bin", {"flax": True}, "flax has no meaning for an IP-Adapter; leave it out"),
    (FILES["base"], "a.bin", {"vae": TORCH_MODEL}, "vae has no meaning for an IP-Adapter"),
    (FILES["base"], "a.bin", {"dtype": "float8"}, "dtype 'float8'"),
    (TORCH_MODEL, "a.bin", {}, "one .safetensors or as a folder"),
    (TORCH_MODEL, "a.safetensors", {"flax": True}, "flax writes a folder"),
    (TORCH_MODEL, "a", {"config": TORCH_MODEL}, "is a folder"),
    (IMAGE_ENCODER, "a.safetensors", {}, "becomes a folder"),
    (TORCH_MODEL / "tokenizer", "a", {}, "not the folder of a network"),
    (TORCH_MODEL / "nowhere.safetensors", "a.bin", {}, "there is no such file or folder"),
    (ADAPTERS, "a.bin", {}, "name one of its files"),
    (TORCH_MODEL / "vae" / "diffusion_pytorch_model.safetensors", "a", {}, "a VAE alone is not converted"),
]


@pytest.mark.parametrize(("source", "out", "options", "words"), WRONG)
def test_what_cannot_be_converted(tmp_path, source, out, options, words):
    model = {name: value for name, value in options.items() if name not in ("dtype", "flax")}
    how = {name: value for name, value in options.items() if name in ("dtype", "flax")}
    refused(lambda: convert(ModelSource(source, **model), tmp_path / out, **how), words)
    assert not list(tmp_path.iterdir())


SLIPS = {
    "rv.safetensor": "did you mean rv.safetensors?",
    "rv.safetensros": "did you mean rv.safetensors?",
    "rv.SAFETENSORS": "did you mean rv.safetensors?",
    "rv.saftensors": "did you mean rv.safetensors?",
    "rv.bim": "did you mean rv.bin?",
    "rv.bni": "did you mean rv.bin?",
    "rv.cpkt": "nothing is written as .cpkt; an adapter",
    "rv.PT": "nothing is written as .PT",
    "rv.sft": "nothing is written as .sft",
    "rv.pt2": "nothing is written as .pt2",
    "rv.onnx": "nothing is written as .onnx",
    "rv.msgpack": "nothing is written as .msgpack",
}


@pytest.mark.parametrize("out", SLIPS)
@pytest.mark.parametrize("source", [TORCH_MODEL, FILES["base"], IMAGE_ENCODER, "owner/name"])
def test_an_ending_that_is_not_written_makes_no_folder(tmp_path, out, source):
    refused(lambda: convert(source, tmp_path / out), str(tmp_path / out), SLIPS[out], "or as a folder")
    assert not list(tmp_path.iterdir())


NAMES = [
    *("rv.v5", "rv-5.1", "Realistic_Vision_V5.1", "sd.1", ".hidden", "sd15.fp16", "rv.inpainting", "dreamshaper.ema"),
    *("x.bf16", "my.model", "model.final", "rv.beta", "rv.non_ema", "rv.b"),
]


@pytest.mark.parametrize("out", NAMES)
def test_parts_of_names_are_no_endings(tmp_path, out):
    convert(IMAGE_ENCODER, tmp_path / out)
    assert (tmp_path / out / "model.safetensors").is_file()


def test_options_are_named_on_the_command_line(tmp_path, capsys):
    assert cli.main(["convert", str(FILES["base"]), str(tmp_path / "a.bin"), "--extract-ema"]) == 2
    told = "ipadapter-jax: --extract-ema has no meaning for an IP-Adapter; leave it out\n"
    assert capsys.readouterr().err == told


def test_a_source_that_cannot_be_read_is_named(tmp_path, capsys):
    """And not the folder that is being written."""
    shutil.copytree(TORCH_MODEL, tmp_path / "model")
    gone = tmp_path / "model" / "tokenizer" / "z.json"
    gone.symlink_to("/nowhere")
    refused(lambda: convert(tmp_path / "model", tmp_path / "out"), f"{gone}: cannot be read (No such file")
    assert cli.main(["convert", str(tmp_path / "model"), str(tmp_path / "out")]) == 2
    assert capsys.readouterr().err == f"ipadapter-jax: {gone}: cannot be read (No such file or directory)\n"
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_a_byte_order_mark(tmp_path):
    """Which editors on Windows put before text: said where other programs fail at it, read past elsewhere."""
    folder = tmp_path / "model"
    shutil.copytree(TORCH_MODEL, folder)
    weights = folder / "vae" / "diffusion_pytorch_model.safetensors"
    shard = weights.rename(weights.with_name("diffusion_pytorch_model-00001-of-00001.safetensors"))
    index = {"weight_map": dict.fromkeys(load_file(shard), shard.name)}
    weights.with_suffix(".safetensors.index.json").write_text(json.dumps(index))
    mark(weights.with_suffix(".safetensors.index.json"))
    assert parts(folder) == parts(TORCH_MODEL)
    assert inspect_weights(folder)["parts"]["vae"]["sha256"].keys() == {shard.name}
    for path in ("unet/config.json", "scheduler/scheduler_config.json"):
        mark(folder / path)
        refused(lambda: convert(folder, tmp_path / "out"), f"{path} begins with a byte order mark")
        shutil.copy(TORCH_MODEL / path, folder / path)


def mark(path: Path) -> None:
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())


def test_weights_that_do_not_fit_the_dtype(tmp_path):
    tensors = {name: array.astype(np.float32) for name, array in load_file(FILES["base"]).items()}
    tensors["ip_adapter.1.to_k_ip.weight"][0, 0] = 1e6
    save_file(tensors, tmp_path / "a.safetensors")
    refused(
        lambda: convert(tmp_path / "a.safetensors", tmp_path / "b.bin", dtype="float16"), "reaches 1e+06", "float32"
    )
    tensors["ip_adapter.1.to_k_ip.weight"][0, 0] = np.nan
    save_file(tensors, tmp_path / "a.safetensors")
    refused(lambda: convert(tmp_path / "a.safetensors", tmp_path / "b.bin"), "1.to_k_ip.weight holds NaN")
    assert [path.name for path in tmp_path.iterdir()] == ["a.safetensors"]


def test_a_disk_that_fills_leaves_nothing(tmp_path, monkeypatch):
    @contextlib.contextmanager
    def full(path: Path) -> Iterator[Path]:
        with atomic_replace(path) as temporary:
            if "vae" in str(path):
                raise OSError(28, "No space left on device")
            yield temporary

    monkeypatch.setattr(ipadapter_jax.weights.verified_write, "atomic_replace", full)
    refused(lambda: convert(TORCH_MODEL, tmp_path / "out"), "No space left")
    assert not list(tmp_path.iterdir())


def test_an_adapter_of_a_part_too_few(tmp_path):
    tensors = load_file(FILES["base"])
    del tensors["ip_adapter.31.to_v_ip.weight"]
    save_file(tensors, tmp_path / "a.safetensors")
    refused(lambda: convert(tmp_path / "a.safetensors", tmp_path / "b.bin"), "31.to_v_ip", error=WeightFileError)
