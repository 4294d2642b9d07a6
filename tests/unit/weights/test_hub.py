"""Which files are asked of the Hub, and what is said when it gives none. The network itself is never needed."""

from pathlib import Path

import huggingface_hub
import pytest
from helpers import ADAPTERS, TORCH_MODEL
from hub import Hub
from huggingface_hub import constants, errors
from small_model import CONFIG, small_adapter, small_model
from weight_files import refused

from ipadapter_jax import StableDiffusion
from ipadapter_jax.errors import InputError
from ipadapter_jax.pipelines.ip_adapter import open_adapter
from ipadapter_jax.weights.hub import local_path
from ipadapter_jax.weights.model_source import ModelSource
from ipadapter_jax.weights.open_base_model import open_base

BASE = {path.relative_to(TORCH_MODEL).as_posix() for path in TORCH_MODEL.rglob("*") if path.is_file()}
NEEDED = BASE - {"feature_extractor/preprocessor_config.json"}
OTHERS = {"README.md", ".gitattributes", "v1-5-pruned.safetensors", "safety_checker/config.json"} | {
    f"{folder}/{stem}{mark}.{suffix}"
    for folder, stem in [
        ("unet", "diffusion_pytorch_model"),
        ("vae", "diffusion_pytorch_model"),
        ("text_encoder", "model"),
    ]
    + [("safety_checker", "model")]
    for mark, suffix in [("", "bin"), (".fp16", "safetensors"), (".fp16", "bin"), (".non_ema", "safetensors")]
}


def test_a_base_model_needs_one_weight_file_per_network(monkeypatch, tmp_path):
    hub = Hub(monkeypatch, TORCH_MODEL, tmp_path, BASE | OTHERS)
    pipe = StableDiffusion.from_pretrained("owner/name", revision="main2")
    assert hub.downloaded == NEEDED
    assert hub.calls == [("list", "owner/name", "main2"), ("download", "owner/name", "main2")]
    assert pipe.sources["unet"] == tmp_path / "unet" / "diffusion_pytorch_model.safetensors"


def test_a_base_model_of_two_text_encoders(monkeypatch, tmp_path):
    """Both encoders with both tokenizers are downloaded."""
    source = TORCH_MODEL.parent / "sdxl_torch"
    names = {path.relative_to(source).as_posix() for path in source.rglob("*") if path.is_file()}
    hub = Hub(monkeypatch, source, tmp_path, names | {"text_encoder_2/model.fp16.safetensors", "README.md"})
    base = open_base("owner/name")
    assert hub.downloaded == names
    assert list(base.tokenizers) == ["text_encoder", "text_encoder_2"]


def test_an_adapter_and_the_encoder_beside_it(monkeypatch, tmp_path):
    (tmp_path / "repo").symlink_to(ADAPTERS.parent)
    names = {path.relative_to(ADAPTERS.parent).as_posix() for path in ADAPTERS.rglob("*") if path.is_file()}
    extra = {"models/image_encoder/pytorch_model.bin", "sdxl_models/image_encoder/model.safetensors", "README.md"}
    hub = Hub(monkeypatch, tmp_path / "repo", tmp_path / "cache", names | extra)
    base = StableDiffusion.from_pretrained(TORCH_MODEL)
    pipe = base.with_ip_adapter("owner/name/models/ip-adapter_tiny.bin", revision="v2")
    assert pipe.adapters[0].source == tmp_path / "cache/models/ip-adapter_tiny.bin"
    assert hub.downloaded == {
        "models/ip-adapter_tiny.bin",
        "models/image_encoder/config.json",
        "models/image_encoder/model.safetensors",
    }
    assert {(repo, revision) for _, repo, revision in hub.calls} == {("owner/name", "v2")}


@pytest.mark.parametrize(
    ("variant", "file"),
    [(None, "diffusion_pytorch_model.safetensors"), ("fp16", "diffusion_pytorch_model.fp16.safetensors")],
)
def test_the_variant_decides_what_is_downloaded(monkeypatch, tmp_path, variant, file):
    source = tmp_path / "source"
    for name in BASE | OTHERS:
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        plain = TORCH_MODEL / name.replace(".fp16", "")
        (source / name).write_bytes(plain.read_bytes() if plain.is_file() else b"")
    hub = Hub(monkeypatch, source, tmp_path / "cache", BASE | OTHERS)
    StableDiffusion.from_pretrained("owner/name", variant=variant)
    assert {name for name in hub.downloaded if name.startswith("unet/")} == {"unet/config.json", f"unet/{file}"}


def everything(names):
    return names


@pytest.mark.parametrize("pinned", ["0123abc", "refs/pr/1"])
@pytest.mark.parametrize("inside", ["", "/models/a.bin"])
def test_a_place_pins_its_revision(monkeypatch, tmp_path, caplog, pinned, inside):
    """Also where another one is given, which is for the places that pin none."""
    (tmp_path / "source" / "models").mkdir(parents=True)
    (tmp_path / "source" / "models" / "a.bin").write_bytes(b"weights")
    hub = Hub(monkeypatch, tmp_path / "source", tmp_path / "cache", ["models/a.bin"])
    with caplog.at_level("INFO"):
        found = local_path(f"owner/name@{pinned}{inside}", everything, what="adapter", revision="v2")
    assert found == Path(f"{tmp_path / 'cache'}{inside}")
    assert hub.calls == [("list", "owner/name", pinned), ("download", "owner/name", pinned)]
    assert f"adapter owner/name: {tmp_path / 'cache'}" in caplog.messages  # of which the last part is the commit


def test_a_path_that_exists_wins(monkeypatch, tmp_path):
    hub = Hub(monkeypatch, tmp_path, tmp_path, [])
    (tmp_path / "owner" / "name").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert local_path("owner/name", everything, what="base model") == Path("owner/name")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert local_path("~/owner", everything, what="base model") == tmp_path / "owner"
    assert not hub.calls


@pytest.mark.parametrize(
    "reference",
    ["name", "", ".", "./owner/name", "../owner/name", "/owner/name", "~/owner/name", "~nobody/name", "owner\\name"]
    + ["C:\\owner\\name", "owner/name/../../secret", "owner/..", "n" * 5000, "a\0b"],
)
def test_what_can_only_be_a_path(monkeypatch, tmp_path, reference):
    hub = Hub(monkeypatch, tmp_path, tmp_path, [])
    monkeypatch.chdir(tmp_path)
    if reference == ".":
        assert local_path(reference, everything, what="adapter") == Path(".")
    else:
        with pytest.raises(InputError, match="adapter .*there is no such file or folder here, and it is not a Hub id"):
            local_path(reference, everything, what="adapter")
    assert not hub.calls


def test_a_place_that_the_repository_lacks(monkeypatch, tmp_path):
    Hub(monkeypatch, tmp_path, tmp_path, ["models/a.bin", "models2/b.bin"])
    for inside in ("models/b.bin", "model", "models/a.bin/c"):
        refused(
            lambda inside=inside: local_path(f"owner/name/{inside}", everything, what="adapter"),
            f"adapter owner/name: the repository has no {inside}",
        )
    chosen = []
    with pytest.raises(InputError, match="a folder"):
        local_path("owner/name/models", lambda names: chosen.extend(names) or stop(), what="adapter")
    assert chosen == ["a.bin"]


def stop():
    raise InputError("the adapter is a folder")


# --- no network --------------------------------------------------------------------------------------------------


@pytest.fixture
def cached(monkeypatch, tmp_path) -> Path:
    """A snapshot of owner/name as huggingface_hub keeps it; every request fails, for the tests are offline."""
    repository, commit = tmp_path / "models--owner--name", "0123456789abcdef0123456789abcdef01234567"
    for ref in ("main", "v2"):
        (repository / "refs").mkdir(parents=True, exist_ok=True)
        (repository / "refs" / ref).write_text(commit)
    snapshot = repository / "snapshots" / commit
    (snapshot / "models").mkdir(parents=True)
    (snapshot / "models" / "a.bin").write_bytes(b"weights")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    return snapshot


@pytest.mark.parametrize("revision", [None, "v2"])
def test_an_earlier_download_serves_offline(cached, caplog, revision):
    assert local_path("owner/name", everything, what="base model", revision=revision) == cached
    assert "using the copy downloaded earlier" in caplog.messages[0]
    assert local_path("owner/name/models/a.bin", everything, what="adapter").read_bytes() == b"weights"


@pytest.mark.parametrize(
    ("reference", "revision"),
    [("owner/name/models/b.bin", None), ("owner/name", "v3"), ("owner/other", None), ("owner/a name?", None)],
)
def test_what_was_never_downloaded(cached, reference, revision):
    repo = "/".join(reference.split("/")[:2])
    refused(
        lambda: local_path(reference, everything, what="base model", revision=revision),
        f"base model {repo}: not a path on this machine, and could not be downloaded from the Hugging Face Hub: ",
    )


def response(kind: type[Exception]) -> Exception:
    """An error of the Hub as its client raises it; how one is made differs between releases."""
    error = kind.__new__(kind)
    error.args = ("404 Client Error. (Request ID: Root=1-2)\n\nRepository Not Found for url: https://x.",)
    return error


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (response(errors.RepositoryNotFoundError), "no such repository, or a private one"),
        (response(errors.GatedRepoError), "accept its license"),
        (response(errors.RevisionNotFoundError), "no such revision"),
        (ConnectionError("[Errno 111] Connection refused\nmore"), "[Errno 111] Connection refused"),
        (TimeoutError(), "TimeoutError"),
        (RuntimeError("of an HTTP client"), "of an HTTP client"),
    ],
)
def test_every_error_of_the_hub_is_one_line(monkeypatch, cached, error, words):
    def fail(*_, **__):
        raise error

    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", fail)
    message = refused(lambda: local_path("owner/other", everything, what="base model"), "owner/other", words)
    assert "Request ID" not in message


def test_a_download_that_stops(monkeypatch, tmp_path):
    hub = Hub(monkeypatch, tmp_path, tmp_path, ["a.bin"])

    def fail(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    words = ["adapter owner/name: the download stopped", "No space left on device"]
    refused(lambda: local_path("owner/name/a.bin", everything, what="adapter"), *words)
    assert hub.calls


def test_a_revision_without_effect_is_refused(tmp_path):
    adapter = small_adapter("ip-adapter_tiny")

    def open_model(place, revision):
        return open_base(ModelSource(place, revision=revision))

    for open_, place, words in (
        (
            open_model,
            small_model(),
            "revision=v2 has no effect: base model .* is here and not on the Hub; leave it out",
        ),
        (open_model, "mini", "revision=v2 has no effect: base model mini is here"),
        (open_model, "owner/name@v1", "revision=v2 has no effect: base model owner/name@v1 names its own"),
        (
            lambda place, revision: open_adapter(place, None, CONFIG, revision),
            adapter,
            "has no effect: adapter .* is here",
        ),
    ):
        with pytest.raises(InputError, match=words):
            open_(place, revision="v2")
