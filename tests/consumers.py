"""Strict readers that model what other programs ask of an adapter file, from names and shapes alone.

Each says what its program would stumble over. Read from the programs' sources: the authors' ip_adapter.py, diffusers'
loaders, ComfyUI_IPAdapter_plus, sd-webui-controlnet (A1111) and InvokeAI.
"""

import re
from collections.abc import Mapping

Shapes = Mapping[str, tuple[int, ...]]

_PROJECTIONS = {
    "base": {"proj.weight", "proj.bias", "norm.weight", "norm.bias"},
    "full": {f"proj.{n}.{end}" for n in (0, 2, 3) for end in ("weight", "bias")},
    "plus": {
        "latents",
        *(f"{name}.{end}" for name in ("proj_in", "proj_out", "norm_out") for end in ("weight", "bias")),
    }
    | {
        f"layers.{i}.{name}"
        for i in range(4)
        for name in (
            *("0.norm1.weight", "0.norm1.bias", "0.norm2.weight", "0.norm2.bias", "0.to_q.weight", "0.to_kv.weight"),
            *("0.to_out.weight", "1.0.weight", "1.0.bias", "1.1.weight", "1.3.weight"),
        )
    },
}


def split(shapes: Shapes) -> tuple[dict, dict]:
    return tuple(
        {name.removeprefix(f"{part}."): shape for name, shape in shapes.items() if name.startswith(f"{part}.")}
        for part in ("image_proj", "ip_adapter")
    )


def authors(shapes: Shapes, variant: str) -> None:
    """load_state_dict, strict, of the projection's class and of a ModuleList with one entry per attention."""
    projection, adapter = split(shapes)
    assert projection.keys() == _PROJECTIONS[variant]
    assert adapter.keys() == {f"{2 * i + 1}.to_{part}_ip.weight" for i in range(16) for part in "kv"}


def diffusers(shapes: Shapes, variant: str) -> None:
    """The variant by the first key that matches; 4 tokens in base, depth 4 and a width of 4 in plus."""
    projection, adapter = split(shapes)
    width = adapter["1.to_k_ip.weight"][1]
    if "proj.weight" in projection:
        assert variant == "base" and projection["proj.weight"][0] == 4 * width
    elif "proj.3.weight" in projection:
        assert variant == "full" and projection["proj.3.weight"] == (width,)
    else:
        assert not {"perceiver_resampler.proj_in.weight", "norm.weight"} & projection.keys()
        hidden = projection["latents"][2]
        assert variant == "plus" and projection["layers.0.0.to_q.weight"][0] % 64 == 0
        assert projection["layers.3.1.1.weight"] == (4 * hidden, hidden) and "layers.4.1.1.weight" not in projection
        assert projection["proj_out.weight"][0] == width


def comfyui(shapes: Shapes, variant: str) -> None:
    """Flags by keys; needs the first cross-attention's keys; builds what is there."""
    projection, adapter = split(shapes)
    assert adapter and "1.to_k_ip.weight" in adapter
    assert ("proj.3.weight" in projection) == (variant == "full")
    assert ("layers.0.1.1.weight" in projection) == (variant == "plus")
    assert not any("_lora" in name for name in adapter)


def a1111(shapes: Shapes, variant: str) -> None:
    """Keys and values in the order of their numbers, which it pairs; the tokens of base by division."""
    projection, adapter = split(shapes)
    numbers = sorted({int(name.split(".")[0]) for name in adapter})
    assert numbers == list(range(1, 33, 2))
    if variant == "base":
        assert projection["proj.weight"][0] % adapter["1.to_k_ip.weight"][1] == 0


def invokeai(shapes: Shapes, variant: str) -> None:
    """Any tensor beyond the two parts is an error; the family by the width of the tokens."""
    assert all(re.match(r"(image_proj|ip_adapter|image_proj_model|adapter_modules)\.", name) for name in shapes)
    assert variant in _PROJECTIONS
    assert split(shapes)[1]["1.to_k_ip.weight"][1] in (768, 1024, 2048, 32)  # and the tiny one of the tests


ALL = (authors, diffusers, comfyui, a1111, invokeai)
