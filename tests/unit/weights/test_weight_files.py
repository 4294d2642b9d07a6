"""Variants of weight files: a part that lacks the one that was asked for is read from its plain file, and that is said;
a variant that no part has is refused with those there are."""

import shutil
import warnings
from pathlib import Path

import pytest
from helpers import TORCH_MODEL, flax_folder
from hub import Hub
from weight_files import refused

from ipadapter_jax.cli import main
from ipadapter_jax.models.families import SD1
from ipadapter_jax.weights.base_model import components_of
from ipadapter_jax.weights.component_files import TEXT_ENCODER_FILES, UNET_FILES
from ipadapter_jax.weights.model_source import ModelSource
from ipadapter_jax.weights.open_base_model import open_base, open_base_folder
from ipadapter_jax.weights.weight_files import choose_files, choose_weights, pick_variants, variants

STEM = "diffusion_pytorch_model"
PLAIN = {name: f"{component.files.torch_stem}.safetensors" for name, component in components_of(SD1).items()}


def with_variants(root: Path, **extra: str) -> Path:
    """The recorded model, parts of it also as variants: with_variants(root, unet="non_ema")."""
    shutil.copytree(TORCH_MODEL, root)
    for part, variant in extra.items():
        plain = root / part / PLAIN[part]
        shutil.copy(plain, plain.with_suffix(f".{variant}.safetensors"))
    return root


def read_from(base) -> dict[str, str]:
    return {name: base.part(name).source.name for name in base.components}


@pytest.mark.parametrize("variant", ["fp16", "non_ema"])
@pytest.mark.parametrize(
    "opener", [lambda folder, variant: open_base(ModelSource(folder, variant)), open_base_folder], ids=["any", "folder"]
)
def test_parts_without_the_variant_are_read_plain(tmp_path, variant, opener):
    folder = with_variants(tmp_path / "model", unet=variant)
    with pytest.warns(UserWarning) as told:
        base = opener(folder, variant)
    assert read_from(base) == PLAIN | {"unet": f"{STEM}.{variant}.safetensors"}
    [message] = [str(warning.message) for warning in told]
    for word in (str(folder), repr(variant), "VAE and text encoder have none", "plain weights"):
        assert word in message


def test_it_is_said_once(tmp_path):
    folder = with_variants(tmp_path / "model", unet="fp16", vae="fp16")
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("default")
        for _ in range(3):  # training opens its base model several times
            open_base_folder(folder, "fp16")
    assert ["text encoder has none" in str(warning.message) for warning in told] == [True]


def test_nothing_is_said_where_every_part_has_it(tmp_path):
    folder = with_variants(tmp_path / "model", unet="fp16", vae="fp16", text_encoder="fp16")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        base = open_base(ModelSource(folder, variant="fp16"))
    assert all(".fp16." in name for name in read_from(base).values())


def test_a_replaced_part_needs_no_variant(tmp_path):
    folder = with_variants(tmp_path / "model", unet="fp16", vae="fp16")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        open_base(ModelSource(folder, variant="fp16", text_encoder=TORCH_MODEL / "text_encoder"))


def test_flax_parts_are_plain_and_may_have_variants(tmp_path):
    folder = flax_folder(tmp_path)
    refused(lambda: open_base(ModelSource(folder, variant="fp16")), str(folder), "variant=fp16", "no variants")
    shutil.copy(folder / "unet" / "diffusion_flax_model.msgpack", folder / "unet" / "diffusion_flax_model.bf16.msgpack")
    with pytest.warns(UserWarning, match="'bf16'"):
        base = open_base(ModelSource(folder, variant="bf16"))
    assert base.part("unet").source.name == "diffusion_flax_model.bf16.msgpack"
    assert base.part("vae").source.name == "diffusion_flax_model.msgpack"


def test_a_typo_names_the_variants_there_are(tmp_path):
    folder = with_variants(tmp_path / "model", unet="non_ema", vae="fp16")
    refused(
        lambda: open_base(ModelSource(folder, variant="fp61")),
        f"base model {folder}: variant=fp61: no part of the model has it; choose fp16 or non_ema",
    )
    refused(lambda: open_base(ModelSource(folder, variant="non-ema")), "choose non_ema or fp16")
    refused(lambda: open_base(ModelSource(TORCH_MODEL, variant="")), "variant=: no part", "no variants")
    refused(
        lambda: open_base(ModelSource(TORCH_MODEL / "unet" / PLAIN["unet"], variant="fp16")), "variant is for a folder"
    )


def test_on_the_command_line(tmp_path, capsys):
    folder = with_variants(tmp_path / "model", unet="non_ema")
    assert main(["convert", str(folder), str(tmp_path / "out"), "--variant", "no_ema"]) == 2
    assert "--variant no_ema: no part of the model has it; choose non_ema" in capsys.readouterr().err
    assert main(["convert", str(folder), str(tmp_path / "out"), "--variant", "non_ema"]) == 0
    captured = capsys.readouterr()
    assert "VAE and text encoder have none" in captured.err and (tmp_path / "out" / "unet" / PLAIN["unet"]).is_file()


@pytest.mark.parametrize(
    ("index", "shard"),
    [
        (f"{STEM}.safetensors.index.fp16.json", f"{STEM}.fp16-0000{{}}-of-00002.safetensors"),
        (f"{STEM}.fp16.safetensors.index.json", f"{STEM}.fp16-0000{{}}-of-00002.safetensors"),
        (f"{STEM}.safetensors.fp16.index.json", f"{STEM}-0000{{}}-of-00002.fp16.safetensors"),
    ],
)
def test_shards_of_a_variant(index, shard):
    own = [index, *(shard.format(i) for i in (1, 2))]
    plain = [f"{STEM}.safetensors.index.json", *(f"{STEM}-0000{i}-of-00002.safetensors" for i in (1, 2))]
    names = ["config.json", *own, *plain]
    assert variants(UNET_FILES, names) == ["fp16"]
    for variant, files in (("fp16", own), (None, plain)):
        chosen = choose_files([f"unet/{name}" for name in names], {"unet": UNET_FILES}, (), variant)
        assert sorted(chosen) == sorted(f"unet/{name}" for name in ["config.json", *files])


def test_without_a_name_the_only_variant_is_taken():
    assert choose_weights(UNET_FILES, [f"{STEM}.bf16.safetensors"], "unet", None) == f"{STEM}.bf16.safetensors"
    two = [f"{STEM}.bf16.safetensors", f"{STEM}.ema.safetensors"]
    refused(lambda: choose_weights(UNET_FILES, two, "unet", None), "one of the variants bf16, ema")
    parts = {
        "unet": (UNET_FILES, two),
        "text_encoder": (TEXT_ENCODER_FILES, ["model.safetensors", "model.bf16.safetensors.bak"]),
    }
    assert pick_variants(parts, "bf16") == {"unet": "bf16", "text_encoder": None}


def test_from_the_hub(monkeypatch, tmp_path):
    source = with_variants(tmp_path / "source", unet="non_ema")
    names = [path.relative_to(source).as_posix() for path in source.rglob("*") if path.is_file()]
    hub = Hub(monkeypatch, source, tmp_path / "cache", names)
    refused(lambda: open_base(ModelSource("owner/name", variant="nonema")), "choose non_ema")
    assert not hub.downloaded
    with pytest.warns(UserWarning, match="base model owner/name"):
        base = open_base(ModelSource("owner/name", variant="non_ema"))
    assert read_from(base) == PLAIN | {"unet": f"{STEM}.non_ema.safetensors"}
    assert {name for name in hub.downloaded if name.endswith(".safetensors")} == {
        f"unet/{STEM}.non_ema.safetensors",
        f"vae/{PLAIN['vae']}",
        f"text_encoder/{PLAIN['text_encoder']}",
    }
