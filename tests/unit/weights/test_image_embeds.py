"""Image embeddings saved and loaded: ours to the bit, those of diffusers and ComfyUI by content, others refused."""

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
from helpers import ADAPTERS, IMAGE_ENCODER
from safetensors import safe_open
from safetensors.numpy import save_file
from weight_files import refused, write_bin

from ipadapter_jax.errors import InputError, WeightFileError
from ipadapter_jax.weights import verified_write
from ipadapter_jax.weights.formats.tensor_files import open_tensors
from ipadapter_jax.weights.image_embeds import POOLED, STATES, load_image_embeds, save_image_embeds
from ipadapter_jax.weights.ip_adapter_file import open_ip_adapter

ABOUT = {"variant": "plus", "image_encoder": "ViT-H/14"}


def drawn(*shape: int) -> np.ndarray:
    return np.random.default_rng(sum(shape)).standard_normal(shape).astype(np.float32)


def guided(*shape: int) -> np.ndarray:
    """The negative first, zeros as for base adapters."""
    return np.stack([np.zeros(shape, np.float32), drawn(*shape)])


def ours(folder: Path, features: np.ndarray) -> Path:
    save_image_embeds(folder / "a.safetensors", features, ABOUT)
    return folder / "a.safetensors"


def equal(found: np.ndarray, expected: np.ndarray) -> bool:
    same = (found.dtype, found.shape) == (np.float32, expected.shape)
    return same and found.tobytes() == expected.astype(np.float32).tobytes()


# --- ours --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("shape", "kind"),
    [((2, 1, 8), POOLED), ((1, 3, 8), POOLED), ((2, 2, 5, 8), STATES), ((1, 1, 257, 16), STATES)],
)
def test_what_is_saved_is_loaded_to_the_bit(tmp_path, shape, kind):
    features = drawn(*shape)
    features.flat[0] = -0.0
    sha256 = save_image_embeds(tmp_path / "a.safetensors", features, ABOUT)
    assert sha256 == hashlib.sha256((tmp_path / "a.safetensors").read_bytes()).hexdigest()
    [found] = load_image_embeds(tmp_path / "a.safetensors")
    assert equal(found.features, features)
    assert (found.kind, found.variant, found.image_encoder) == (kind, "plus", "ViT-H/14")
    assert save_image_embeds(tmp_path / "b.safetensors", features, ABOUT) == sha256


def test_the_file_as_another_library_reads_it(tmp_path):
    with safe_open(ours(tmp_path, drawn(2, 2, 5, 8)), framework="numpy") as file:
        assert list(file.keys()) == ["hidden_states"]
        metadata = file.metadata()
        assert len(metadata.pop("tensors_sha256")) == 64
        assert metadata == {**ABOUT, "format": "pt", "kind": "hidden_states", "features": "8"}
        assert equal(file.get_tensor("hidden_states"), drawn(2, 2, 5, 8))


def test_little_need_be_said_and_other_dtypes_become_float32(tmp_path):
    save_image_embeds(tmp_path / "a.safetensors", drawn(2, 1, 8).astype(np.float64)[..., ::-1], {})
    [found] = load_image_embeds(tmp_path / "a.safetensors")
    assert equal(found.features, drawn(2, 1, 8)[..., ::-1])
    assert found.variant is None and found.image_encoder is None


def test_one_changed_bit_is_found(tmp_path):
    path = ours(tmp_path, drawn(2, 1, 8))
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    refused(lambda: load_image_embeds(path), f"{path}: its embeddings", "copy the file again", error=WeightFileError)


def test_a_file_cut_short(tmp_path):
    path = ours(tmp_path, drawn(2, 1, 8))
    path.write_bytes(path.read_bytes()[:-1])
    refused(lambda: load_image_embeds(path), f"{path}: not a whole safetensors file", error=WeightFileError)


@pytest.mark.parametrize(
    ("name", "features", "words"),
    [
        ("a.ipadpt", drawn(2, 1, 8), [".safetensors"]),
        ("a.safetensors", np.full((2, 1, 8), np.nan), ["not finite"]),
        ("a.safetensors", np.full((2, 1, 8), 1e300), ["1e+300", "the largest number of float32"]),
        ("a.safetensors", np.array("text"), ["must be an array of numbers"]),
        ("a.safetensors", drawn(1, 8), ["shape (1, 8)", "(branches, images, width)"]),
        ("a.safetensors", drawn(2, 0, 8), ["shape (2, 0, 8)"]),
        ("a.safetensors", drawn(1, 1, 1, 1, 8), ["shape (1, 1, 1, 1, 8)"]),
        ("a.safetensors", drawn(3, 1, 8), ["3 branches instead of 2"]),
    ],
)
@pytest.mark.filterwarnings("ignore:overflow")
def test_what_cannot_be_saved(tmp_path, name, features, words):
    refused(lambda: save_image_embeds(tmp_path / name, features, {}), f"{tmp_path / name}", *words)
    assert not list(tmp_path.iterdir())


def test_failed_verification_leaves_the_older_file(tmp_path, monkeypatch):
    path = ours(tmp_path, drawn(2, 1, 8))
    before = path.read_bytes()

    def damaged(target):
        target.write_bytes(target.read_bytes()[:-4] + b"1234")
        return open_tensors(target)

    monkeypatch.setattr(verified_write, "open_tensors", damaged)
    refused(
        lambda: save_image_embeds(path, drawn(2, 2, 8), {}),
        "bytes on disk differ for image_embeds",
        "save to another disk",
    )
    assert [file.name for file in tmp_path.iterdir()] == ["a.safetensors"]
    assert path.read_bytes() == before


def test_a_place_that_cannot_be_written(tmp_path):
    (tmp_path / "file").touch()
    refused(lambda: save_image_embeds(tmp_path / "file" / "a.safetensors", drawn(2, 1, 8), {}), "not written")
    assert [file.name for file in tmp_path.iterdir()] == ["file"]


# --- named tensors of other programs -----------------------------------------------------------------------------


def test_safetensors_with_one_tensor_for_each_adapter(tmp_path):
    arrays = {str(number): drawn(2, 1, 4 + number) for number in (10, 2, 1)}
    save_file(arrays, tmp_path / "a.safetensors")
    found = load_image_embeds(tmp_path / "a.safetensors")
    assert [embeds.features.shape[-1] for embeds in found] == [5, 6, 14]
    assert all(equal(embeds.features, drawn(*embeds.features.shape)) for embeds in found)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_a_pickled_dict(tmp_path, dtype):
    arrays = {"first": drawn(1, 2, 8).astype(dtype), "second": drawn(2, 1, 5, 8).astype(dtype)}
    first, second = load_image_embeds(write_bin(tmp_path / "a.ipadpt", arrays))
    assert equal(first.features, arrays["first"]) and first.kind == POOLED
    assert equal(second.features, arrays["second"]) and second.kind == STATES


@pytest.mark.parametrize(
    ("tensors", "words"),
    [
        ({"x": np.full((2, 1, 8), np.nan, np.float32)}, ["'x' holds NaN or infinity"]),
        ({"x": np.full((2, 1, 8), 1e300)}, ["'x' reaches 1e+300, too large"]),
        ({"x": np.ones((2, 1, 8), np.int64)}, ["'x' is of int64", "floats"]),
        ({"x": drawn(3, 8)}, ["'x' is not an image embedding", "shape (3, 8)"]),
        ({"x": drawn(2, 1, 8), "y": drawn(8)}, ["'y' is not an image embedding"]),
        ({"x": drawn(6, 1, 8)}, ["6 branches", "num_images_per_prompt=1"]),
        ({"x": drawn(2, 0, 8)}, ["shape (2, 0, 8)"]),
        ({"hidden_states": drawn(1, 5, 8)}, ["hidden_states with 3 axes"]),
        ({"image_embeds": drawn(2, 1, 5, 8)}, ["image_embeds with 4 axes"]),
        ({str(number): drawn(1, 1, 1) for number in range(33)}, ["it holds 33 tensors"]),
        ({}, ["it holds no tensors"]),
    ],
)
def test_tensors_that_are_no_image_embeddings(tmp_path, tensors, words):
    save_file(tensors, tmp_path / "a.safetensors")
    refused(lambda: load_image_embeds(tmp_path / "a.safetensors"), tmp_path, *words, error=WeightFileError)


# --- pickles of other programs -----------------------------------------------------------------------------------


def pickled(path: Path, content, zipped: bool = True) -> Path:
    """torch.save of an array, or of a list of them."""
    torch = pytest.importorskip("torch")
    tensors = [torch.from_numpy(array.copy()) for array in content] if isinstance(content, list) else content
    tensors = torch.from_numpy(content.copy()) if isinstance(content, np.ndarray) else tensors
    torch.save(tensors, path, _use_new_zipfile_serialization=zipped)
    return path


@pytest.mark.torch
@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("patches", [None, True, False])
def test_the_list_of_diffusers(tmp_path, zipped, patches):
    """Its shapes leave nothing open."""
    content = [guided(1, 8), drawn(2, 3, 5, 8), drawn(1, 2, 8), drawn(2, 1, 8).astype(np.float16)]
    found = load_image_embeds(pickled(tmp_path / "a.ipadpt", content, zipped), patches)
    assert [embeds.kind for embeds in found] == [POOLED, STATES, POOLED, POOLED]
    assert all(equal(embeds.features, array) for embeds, array in zip(found, content, strict=True))


@pytest.mark.torch
def test_bfloat16_that_learns_in_a_transposed_view(tmp_path):
    torch = pytest.importorskip("torch")
    tensor = torch.from_numpy(drawn(8, 3, 2)).bfloat16().requires_grad_()
    torch.save((tensor.permute(2, 1, 0),), tmp_path / "a.pt")
    [found] = load_image_embeds(tmp_path / "a.pt")
    assert equal(found.features, tensor.detach().float().numpy().T)


@pytest.mark.torch
@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize(
    ("tensor", "patches", "expected"),
    [
        (drawn(3, 8), None, drawn(3, 8)[None]),  # ComfyUI's positives alone
        (drawn(3, 5, 8), None, drawn(3, 5, 8)[None]),
        (drawn(1, 5, 8), True, drawn(1, 5, 8)[None]),
        (drawn(2, 5, 8), True, drawn(2, 5, 8)[None]),
        (drawn(1, 5, 8), False, drawn(1, 5, 8)),  # diffusers without guidance
        (drawn(1, 3, 5, 8), None, drawn(1, 3, 5, 8)),
        (guided(3, 8), None, guided(3, 8)),  # diffusers
        (guided(3, 8), True, guided(3, 8)),  # whatever the adapter reads, this is pooled
        (guided(3, 5, 8), None, guided(3, 5, 8)),
        (guided(3, 8)[::-1], None, guided(3, 8)),  # ComfyUI's first layout
        (guided(3, 5, 8)[::-1], None, guided(3, 5, 8)),
    ],
)
def test_one_tensor_saved_alone(tmp_path, zipped, tensor, patches, expected):
    [found] = load_image_embeds(pickled(tmp_path / "a.ipadpt", tensor, zipped), patches)
    assert equal(found.features, expected) and found.features.flags.c_contiguous
    assert found.kind == (STATES if expected.ndim == 4 else POOLED)


@pytest.mark.torch
@pytest.mark.parametrize(
    ("tensor", "patches", "words"),
    [
        (drawn(1, 5, 8), None, ["(1, 5, 8) may be", "say with patches"]),
        (drawn(2, 5, 8), None, ["(2, 5, 8) may be", "say with patches"]),
        (np.zeros((2, 5, 8), np.float32), None, ["(2, 5, 8) may be"]),
        (drawn(2, 5, 8), False, ["which of its two branches", "torch.save([tensor], ...)"]),
        (drawn(2, 3, 5, 8), True, ["which of its two branches", "torch.save([tensor], ...)"]),
        (drawn(3, 3, 5, 8), True, ["shape (3, 3, 5, 8)", "save what the encoder gives"]),
        (drawn(8), None, ["shape (8,)"]),
        (drawn(0, 8), None, ["shape (0, 8)"]),
        (drawn(1, 1, 1, 1, 8), None, ["shape (1, 1, 1, 1, 8)"]),
        (np.full((1, 8), np.inf, np.float32), None, ["NaN or infinity"]),
        (np.ones((1, 8), np.int32), None, ["int32", "floats"]),
        ([drawn(2, 5, 8), drawn(2, 8)], True, ["'1' is not an image embedding", "shape (2, 8)"]),
        ([drawn(3, 5, 8)], True, ["'0'", "3 branches"]),
        ([], None, ["holds no dict of tensors, nor a list"]),
        ([[1.0]], None, ["holds no dict of tensors, nor a list"]),
    ],
)
def test_pickles_that_leave_it_open_or_are_no_embeddings(tmp_path, tensor, patches, words):
    path = tmp_path / "a.ipadpt"
    if isinstance(tensor, list) and not all(isinstance(array, np.ndarray) for array in tensor):
        pytest.importorskip("torch").save(tensor, path)
    else:
        pickled(path, tensor)
    refused(lambda: load_image_embeds(path, patches), path, *words, error=WeightFileError)


class Harmful:
    def __reduce__(self):
        return Path.touch, (Path("harmed"),)


@pytest.mark.torch
def test_nothing_is_executed(tmp_path, monkeypatch):
    torch = pytest.importorskip("torch")
    monkeypatch.chdir(tmp_path)
    torch.save([torch.ones(2, 1, 8), Harmful()], "a.ipadpt")
    refused(lambda: load_image_embeds(tmp_path / "a.ipadpt"), "nor a list", error=WeightFileError)
    assert [path.name for path in tmp_path.iterdir()] == ["a.ipadpt"]


@pytest.mark.torch
def test_a_tensor_named_without_end(tmp_path):
    """What few bytes of a pickle repeat must not fill the memory."""
    torch = pytest.importorskip("torch")
    torch.save([torch.ones(1, 1, 1).expand(1, 1, 1 << 17)] * 100_000, tmp_path / "a.ipadpt")
    refused(lambda: load_image_embeds(tmp_path / "a.ipadpt"), "100,000 tensors", error=WeightFileError)


# --- other files -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("path", "words"),
    [
        (ADAPTERS / "ip-adapter_tiny.safetensors", ["this is an IP-Adapter", "give it as the adapter"]),
        (IMAGE_ENCODER / "model.safetensors", ["this is a CLIP image encoder", "give it as the image encoder"]),
        (IMAGE_ENCODER, ["is a folder"]),
        (ADAPTERS / "nothing.safetensors", ["there is no such file"]),
    ],
)
def test_other_weights(path, words):
    refused(lambda: load_image_embeds(path), path, *words, error=WeightFileError)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"<!DOCTYPE html><html>", ["a web page"]),
        (b"\x89PNG\r\n", ["an image"]),
        (b"version https://git-lfs.github.com/spec/v1", ["git-lfs"]),
        (b"", ["empty"]),
        (json.dumps([1.0]).encode(), ["not a weight file"]),
        (b"\x93NUMPY\1\0", ["not a weight file"]),
    ],
)
def test_what_lies_under_such_a_name(tmp_path, content, words):
    (tmp_path / "a.ipadpt").write_bytes(content)
    refused(lambda: load_image_embeds(tmp_path / "a.ipadpt"), tmp_path, *words, error=WeightFileError)


def test_embeddings_given_as_an_adapter_are_named(tmp_path):
    path = ours(tmp_path, drawn(2, 1, 8))
    refused(lambda: open_ip_adapter(path), "a set of image embeddings", "give it in place of images", error=InputError)


# --- arrays of NumPy ---------------------------------------------------------------------------------------------


def saved(path: Path, array: np.ndarray) -> Path:
    np.save(path, array)
    return path


@pytest.mark.parametrize(
    ("array", "patches", "expected"),
    [
        (drawn(8), None, drawn(8)[None, None]),  # the embedding of one image
        (drawn(3, 8), None, drawn(3, 8)[None]),
        (drawn(3, 5, 8), True, drawn(3, 5, 8)[None]),
        (guided(3, 8), None, guided(3, 8)),
        (drawn(1, 3, 5, 8), None, drawn(1, 3, 5, 8)),
        (drawn(3, 8).astype(np.float64), None, drawn(3, 8)[None]),
        (drawn(3, 8).astype(">f4"), None, drawn(3, 8)[None]),
        (np.asfortranarray(drawn(3, 8)), None, drawn(3, 8)[None]),
    ],
)
def test_arrays_of_numpy(tmp_path, array, patches, expected):
    [found] = load_image_embeds(saved(tmp_path / "a.npy", array), patches)
    assert equal(found.features, expected)


def test_arrays_that_are_none(tmp_path):
    objects = tmp_path / "objects.npy"
    np.save(objects, np.array([{"a": 1}], object), allow_pickle=True)
    refused(lambda: load_image_embeds(objects), str(objects), "nor a complete array of NumPy", "save it again")
    refused(lambda: load_image_embeds(saved(tmp_path / "text.npy", np.array(["a"]))), "not of numbers")
    refused(lambda: load_image_embeds(saved(tmp_path / "int.npy", np.ones((1, 8), int))), "int64", "floats")
    whole = saved(tmp_path / "cut.npy", drawn(64, 1024)).read_bytes()
    (tmp_path / "cut.npy").write_bytes(whole[:-7])
    refused(lambda: load_image_embeds(tmp_path / "cut.npy"), "cut.npy", "nor a complete array of NumPy")
    huge = whole[:128].replace(b"(64, 1024)", b"(9**9, 99)")
    (tmp_path / "odd.npy").write_bytes(huge)
    refused(lambda: load_image_embeds(tmp_path / "odd.npy"), "odd.npy", "nor a complete array of NumPy")
    declared = whole[:128].replace(b"(64, 1024)", b"(99999999,)")[:128]
    (tmp_path / "huge.npy").write_bytes(declared)
    refused(lambda: load_image_embeds(tmp_path / "huge.npy"), "huge.npy", "nor a complete array of NumPy")
    refused(lambda: open_ip_adapter(saved(tmp_path / "array.npy", drawn(3, 8))), "not an IP-Adapter file")
