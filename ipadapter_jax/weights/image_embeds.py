"""Image embeddings as files: the output of the image encoder, saved so that it can be used without the encoder.

Shapes: G guidance branches (2, the negative first; or 1, the positive alone), n images, L positions, width F.
"""

import dataclasses
import re
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from ipadapter_jax.errors import InputError, WeightFileError
from ipadapter_jax.inputs.validation import to_float32
from ipadapter_jax.storage.paths import expand_home
from ipadapter_jax.weights.dtype_cast import cast_for_device
from ipadapter_jax.weights.formats.container import ARRAY
from ipadapter_jax.weights.formats.safetensors_writer import DIGEST, digest, safetensors_chunks
from ipadapter_jax.weights.formats.tensor_files import open_file
from ipadapter_jax.weights.formats.torch_pickle import UNNAMED
from ipadapter_jax.weights.identify import IMAGE_EMBEDS, UNKNOWN, identify
from ipadapter_jax.weights.lazy import Tensor, in_memory
from ipadapter_jax.weights.verified_write import write_verified

POOLED, STATES = "image_embeds", "hidden_states"
_KINDS = {3: POOLED, 4: STATES}  # by the number of axes
_MAX_ADAPTERS = 32  # in one file; a hostile pickle of few bytes can name a tensor a hundred thousand times


@dataclasses.dataclass(frozen=True, eq=False)
class ImageEmbeds:
    """`features`, float32: (G, n, F) for base and light adapters, (G, n, L, F) for plus and full ones. `variant` of the
    adapter and `image_encoder` come from the file's metadata, if present."""

    features: np.ndarray
    variant: str | None = None
    image_encoder: str | None = None

    @property
    def kind(self) -> str:
        """POOLED, the projected embeddings, or STATES, the penultimate hidden states."""
        return _KINDS[self.features.ndim]


def save_image_embeds(path: Path, features: object, metadata: Mapping[str, str]) -> str:
    """Writes (G, n, F) or (G, n, L, F) as float32 and what `metadata` says, such as variant and image_encoder, and
    returns the file's sha256. Until the file has been read back and compared, an older one of this name stays.

    Raises InputError naming the file for other shapes, numbers that are not finite, another ending than .safetensors,
    or a place that cannot be written.
    """
    path = expand_home(Path(path))
    if path.suffix != ".safetensors":
        raise InputError(f"{path}: image embeddings are saved as .safetensors; give it such a name")
    array = to_float32(features, f"{path}: the image embeddings")
    if problem := _problem(array.shape):
        raise InputError(f"{path}: the image embeddings have {problem}")
    kind = _KINDS[array.ndim]
    tensors = {kind: in_memory(array)}
    about = {"kind": kind, "features": str(array.shape[-1]), "format": "pt", DIGEST: digest(tensors)}
    return write_verified(path, safetensors_chunks(tensors, {**metadata, **about}), tensors)


def load_image_embeds(path: Path, patches: bool | None = None) -> list[ImageEmbeds]:
    """The embeddings in a file, one for each adapter. The content tells the format:

    - ours: one tensor, with a digest that is checked;
    - diffusers' `torch.save(pipeline.prepare_ip_adapter_image_embeds(...))`: a list with (G, n, F) or (G, n, L, F) for
      each adapter. Named tensors, in safetensors or a pickle, are the same in the order of their names;
    - the node "Save IPAdapter Embeds" of ComfyUI: one tensor without a name, in its first layout the branches with the
      positive before the negative, later the positive alone, (n, F) or (n, L, F);
    - numpy.save: the same, or the embedding of one image, (F,).

    `patches` says whether the adapter reads hidden states (plus and full); it is used only if the shape of a tensor
    without a name is ambiguous. The caller must check that kind, positions and width are those that the adapter reads:
    only the width distinguishes the projected tokens that A1111 saves, (n, 4 or 16, 768), from hidden states.

    Raises WeightFileError for all other files, naming the file, what it is and where it can be used.
    """
    path = expand_home(Path(path))
    container, tensors, metadata = open_file(path)
    kind = identify(tensors)
    if kind.name not in (IMAGE_EMBEDS, UNKNOWN):
        raise WeightFileError(f"{path}: not image embeddings; this is {kind}: {kind.advice}")
    if not tensors:
        raise WeightFileError(f"{path}: not image embeddings: it holds no tensors; save them again")
    if DIGEST in metadata and metadata[DIGEST] != digest(tensors):
        raise WeightFileError(f"{path}: its embeddings are not those that were written: damaged; copy the file again")
    if container == ARRAY and len(tensors[UNNAMED].shape) == 1:
        return [ImageEmbeds(_read(path, UNNAMED, tensors[UNNAMED])[None, None])]
    if tensors.keys() == {UNNAMED}:
        return [ImageEmbeds(_alone(path, tensors[UNNAMED], patches))]
    if len(tensors) > _MAX_ADAPTERS:
        raise WeightFileError(
            f"{path}: not image embeddings: it holds {len(tensors):,} tensors, not one for an adapter"
        )
    for name, tensor in tensors.items():  # all of them before any is read
        if problem := _problem(tensor.shape):
            raise WeightFileError(f"{path}: {name[:60]!r} is not an image embedding: it has {problem}")
        if name in _KINDS.values() and name != _KINDS[len(tensor.shape)]:
            raise WeightFileError(f"{path}: {name} with {len(tensor.shape)} axes; {POOLED} have 3, {STATES} have 4")
    about = metadata.get("variant"), metadata.get("image_encoder")
    return [ImageEmbeds(_read(path, name, tensors[name]), *about) for name in sorted(tensors, key=_natural)]


def _problem(shape: tuple[int, ...]) -> str:
    """What is wrong with the shape, and the remedy; empty when nothing is."""
    if len(shape) not in _KINDS or 0 in shape:
        return f"shape {shape}; needed is (branches, images, width) or (branches, images, positions, width)"
    if shape[0] > 2:  # diffusers repeats both branches for each image to be made
        return f"{shape[0]} branches instead of 2, negative and positive, or 1; save them with num_images_per_prompt=1"
    return ""


def _read(path: Path, name: str, tensor: Tensor) -> np.ndarray:
    """The tensor as float32. Raises WeightFileError naming it unless it is of finite floats."""
    what = f"{path}: {name[:60]!r}"
    if tensor.dtype.kind != "f" and tensor.dtype.name != "bfloat16":
        raise WeightFileError(f"{what} is of {tensor.dtype}, image embeddings are floats; save what the encoder gives")
    return cast_for_device(tensor.read(), np.dtype(np.float32), what)


def _alone(path: Path, tensor: Tensor, patches: bool | None) -> np.ndarray:
    """A tensor that was saved without a name, with its branches in front, the negative first.

    Whether the first axis is branches or images, and which of two branches is the negative one (the first for
    diffusers, the second for ComfyUI), zeros tell: they are the negative of base adapters and never an image.
    """
    shape = tensor.shape
    if not 2 <= len(shape) <= 4 or 0 in shape or (len(shape) == 4 and shape[0] > 2):
        raise WeightFileError(
            f"{path}: a tensor of shape {shape}; image embeddings saved alone are (images, width), (images, "
            "positions, width), or these with one or two branches in front; save what the encoder gives"
        )
    array = _read(path, UNNAMED, tensor)
    zeros = [not branch.any() for branch in array] if shape[0] == 2 and len(shape) > 2 else []
    if any(zeros) and not all(zeros):
        return array if zeros[0] else np.ascontiguousarray(array[::-1])
    if len(shape) == 2 or (len(shape) == 3 and (shape[0] > 2 or patches)):
        return array[None]
    if len(shape) == 3 and patches is None:
        raise WeightFileError(
            f"{path}: a tensor of shape {shape} may be (branches, images, width) or (images, positions, width); "
            "say with patches whether the adapter reads hidden states, as plus and full do"
        )
    if len(array) == 2:
        raise WeightFileError(
            f"{path}: a tensor of shape {shape} does not tell which of its two branches is the negative one; "
            "save it in a list, torch.save([tensor], ...), or by name as .safetensors, with the negative branch first"
        )
    return array


def _natural(name: str) -> list[str | int]:
    """A key that sorts 2 before 10."""
    return [int(part) if part.isdecimal() else part for part in re.split(r"(\d+)", name)]
