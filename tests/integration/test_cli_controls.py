"""Controls on the command line: what is written, what goes on after a stop, what is refused before anything is read."""

import csv
import json
from pathlib import Path

import numpy as np
import pytest
from helpers import ORACLES, TORCH_MODEL, forbid_sampling
from integration.test_cli import ADAPTER, CAT, arguments, settings
from PIL import Image
from small_model import small_adapter, small_model

from ipadapter_jax.batch.plan import plan_tasks
from ipadapter_jax.batch.rows import BatchRow
from ipadapter_jax.cli import main
from ipadapter_jax.cli.batch import Batch
from ipadapter_jax.cli.run.batch import check_effects
from ipadapter_jax.cli.run.image_batches import _warn_of_syntax
from ipadapter_jax.inputs.prompt_syntax import PromptSyntaxWarning
from ipadapter_jax.pipelines.outputs import SamplingResult
from ipadapter_jax.pipelines.request import SamplingRequest
from ipadapter_jax.pipelines.stable_diffusion import StableDiffusion

pytestmark = pytest.mark.usefixtures("one_device")
OTHER = ORACLES / "assets" / "img_b.png"
MASKS = [str(ORACLES / "assets" / f"ipmask_{i}.png") for i in (1, 2)]


def pixels(path: Path) -> np.ndarray:
    return np.asarray(Image.open(path))


def test_embeddings_stand_in_for_the_image_and_its_encoder(tmp_path):
    saved, maps = tmp_path / "cat.safetensors", tmp_path / "maps.png"
    assert main(arguments(tmp_path / "a.png", save_image_embeds=saved, attention_maps=maps)) == 0
    again = arguments(tmp_path / "b.png", image=None, image_embeds=saved, image_encoder=None)
    assert main(again) == 0
    np.testing.assert_array_equal(pixels(tmp_path / "a.png"), pixels(tmp_path / "b.png"))
    assert "image_encoder" not in settings(tmp_path / "b.png")["sha256"]
    with Image.open(maps) as figure:
        assert figure.width > 5 * 192  # the image and four tokens


def test_every_control_at_once(tmp_path):
    line = arguments(
        tmp_path / "a.png", image=None, layer_scales="ease out", scale_end=0.9, guidance_rescale=0.5, clip_skip=1
    )
    line += [
        "--image",
        str(CAT),
        str(OTHER),
        "--masks",
        *MASKS,
        "--image-weights",
        "1",
        "0.5",
        "--scale-steps",
        "1",
        "0",
    ]
    line += ["--negative-image", str(OTHER), "--init-image", str(CAT), "--mask-image", MASKS[0], "--preserve-unmasked"]
    assert main(line) == 0
    found = settings(tmp_path / "a.png")
    assert (found["layer_scales"], found["scale_steps"], found["masks"]) == ("ease out", [1.0, 0.0], MASKS)
    original = np.asarray(Image.open(CAT).convert("RGB").resize((64, 64), Image.Resampling.LANCZOS))
    outside = np.asarray(Image.open(MASKS[0]).convert("L").resize((64, 64), Image.Resampling.LANCZOS)) == 0
    assert outside.any() and not outside.all()
    np.testing.assert_array_equal(pixels(tmp_path / "a.png")[outside], original[outside])


@pytest.mark.parametrize(
    ("what", "columns", "rows"), [("scales", 5, 2), pytest.param("presets", 16, 1, marks=pytest.mark.slow)]
)
def test_explore(tmp_path, what, columns, rows):
    recorded = {"model": TORCH_MODEL, "adapter": ADAPTER}  # some presets are for layers that the small model lacks
    models = recorded if what == "presets" else {}
    assert main(arguments(tmp_path / "a.png", grid=what, num_images=rows, **models)) == 0
    with Image.open(tmp_path / "a.png") as figure:
        assert figure.width == 8 + columns * 200 and figure.height == rows * (2 * 24 + 192 + 8)


WRONG = [
    (["--image-embeds", "a.safetensors"], "--image and --image-embeds are both given"),
    (["--masks", "a.png", "b.png"], "--masks: 2 for 1 images"),
    (["--image-weights", "1", "2"], "--image-weights: 2 for 1 images"),
    (["--mask-image", "m.png"], "--mask-image needs --init-image"),
    (["--strength", "0.5"], "--strength needs --init-image"),
    (["--preserve-unmasked"], "--preserve-unmasked needs --mask-image"),
    (["--attention-maps", "maps.jpg"], "--attention-maps maps.jpg: give a name that ends in .png"),
    (["--layer-scales", "stile"], "--layer-scales: no preset 'stile'; did you mean 'style'?"),
    (["--layer-scales", "{mid: 1}"], "--layer-scales: not JSON (Expecting property name"),
    (["--layer-scales", '{"mod": 1}'], "--layer-scales: no preset 'mod'"),
    (["--layer-scales", "[1, 2]"], "--layer-scales: 2 factors for 16 layers"),
    (
        ["--scale-start", "0.9", "--scale-end", "0.1"],
        "--scale-start: start=0.9 and end=0.1 must be parts of the run, 0 <= start < end <= 1",
    ),
    (["--uncond", "white"], "--uncond"),
    (["--save-image-embeds", "a.pt"], "--save-image-embeds a.pt: give a name that ends in .safetensors"),
    (["--grid", "scales", "--masks", "m.png"], "--grid writes a figure instead of images; leave out --masks"),
    (["--clip-skip", "99"], "--clip-skip 99 must be a whole number"),
    (["--guidance-rescale", "2"], "--guidance-rescale 2.0 must lie between 0"),
    (["--negative-image", "gone.png"], "'gone.png' does not exist"),
    (
        ["--negative-image", "a.png", "--uncond", "black"],
        "--negative-image and --uncond both set the unconditional image prompt; give one",
    ),
    (["--eta", "0.5", "--scheduler", "euler"], "--eta has no effect with --scheduler euler; it is for ddim"),
    (
        ["--guidance-scale", "1", "--uncond", "black"],
        "--uncond has no effect without guidance: give a --guidance-scale",
    ),
    (["--guidance-scale", "0.5", "--negative-prompt", "x"], "--negative-prompt has no effect without guidance"),
    (["--guidance-scale", "1", "--guidance-rescale", "0.5"], "--guidance-rescale has no effect without guidance"),
    (["--num-images", "1000000000"], "1,000,000,000 images would need at least"),
]

UNPROMPTED = [
    (
        ["--scale", "0.5"],
        "--scale has no effect without an image prompt: give --image or --image-embeds, or leave it out",
    ),
    (
        ["--layer-scales", "style", "--reference-resize", "pad"],
        "--layer-scales, --reference-resize have no effect without an image prompt",
    ),
    (["--scale-start", "0.5"], "--scale-start has no effect"),
    (["--scale-end", "0.5"], "--scale-end has no effect"),
    (["--scale-steps", "1", "0"], "--scale-steps has no effect"),
    (["--uncond", "black"], "--uncond has no effect"),
    (["--negative-image", "a.png"], "--negative-image has no effect"),
    (["--masks", "a.png"], "--masks has no effect"),
    (["--image-weights", "1"], "--image-weights has no effect"),
]


@pytest.mark.parametrize(("more", "words"), UNPROMPTED)
def test_options_of_image_prompts_need_one(tmp_path, monkeypatch, capsys, more, words):
    forbid_sampling(monkeypatch)
    alone = {"adapter": None, "image": None, "image_encoder": None}
    for base in (TORCH_MODEL, "mini"):
        assert main([*arguments(tmp_path / "a.png", model=base, **alone), *more]) == 2
        [line] = capsys.readouterr().err.splitlines()
        assert words in line and not list(tmp_path.iterdir())


@pytest.mark.parametrize("more", [["--reference-resize", "pad"], ["--negative-image", "a.png"]])
def test_options_of_images_have_no_effect_on_embeddings(tmp_path, monkeypatch, capsys, more):
    forbid_sampling(monkeypatch)
    assert main([*arguments(tmp_path / "a.png", image=None, image_embeds="e.safetensors"), *more]) == 2
    assert f"{more[0]} has no effect on --image-embeds, which are encoded already" in capsys.readouterr().err


@pytest.mark.parametrize(("more", "words"), WRONG)
def test_wrong_options(tmp_path, monkeypatch, capsys, more, words):
    forbid_sampling(monkeypatch)
    assert main([*arguments(tmp_path / "a.png", model=TORCH_MODEL, adapter=ADAPTER), *more]) == 2
    [line] = capsys.readouterr().err.splitlines()
    assert words in line and not list(tmp_path.iterdir())


# --- batch ---------------------------------------------------------------------------------------------------------


def batch(source: Path, out: Path, **changes) -> list[str]:
    options = {
        "model": small_model(),
        "adapter": small_adapter("ip-adapter_tiny"),
        "steps": 2,
        "height": 64,
        "width": 64,
        "batch_size": 2,
        "out": out,
    }
    flat = [
        (f"--{name.replace('_', '-')}", str(value)) for name, value in (options | changes).items() if value is not None
    ]
    return ["batch", str(source), *(word for pair in flat for word in pair)]


@pytest.fixture
def table(tmp_path) -> Path:
    path = tmp_path / "rows.csv"
    with open(path, "w", newline="") as file:
        rows = csv.DictWriter(file, ["name", "prompt", "image", "scale", "seed"])
        rows.writeheader()
        rows.writerow({"name": "cat", "image": CAT, "seed": 3})
        rows.writerow({"name": "half", "image": CAT, "scale": 0.5, "seed": 3, "prompt": "a dog"})
        rows.writerow({"name": "words", "prompt": "a dog", "seed": 4})
        rows.writerow({"name": "gone", "image": "gone.png"})
        rows.writerow({"name": "other", "image": OTHER, "seed": 5})
    return path


def test_batch_gives_what_single_calls_give(tmp_path, table, capsys):
    out = tmp_path / "out"
    assert main(batch(table, out)) == 0
    assert "1 rows could not be used" in capsys.readouterr().err
    assert sorted(path.name for path in out.glob("*.png")) == ["cat.png", "half.png", "other.png", "words.png"]
    assert "gone.png" in json.loads((out / "bad_rows.jsonl").read_text())["reason"]
    single = {
        "cat": {"prompt": "", "seed": 3},
        "half": {"prompt": "a dog", "seed": 3, "scale": 0.5},
        "words": {"prompt": "a dog", "seed": 4, "image": None, "adapter": None},
        "other": {"prompt": "", "seed": 5, "image": OTHER},
    }
    for name, changes in single.items():
        assert main(arguments(tmp_path / f"{name}.png", **changes)) == 0
        difference = np.abs(pixels(out / f"{name}.png").astype(int) - pixels(tmp_path / f"{name}.png"))
        assert difference.max() <= 1, name  # another batch size is another order of additions
    assert settings(out / "half.png")["scale"] == 0.5 and settings(out / "half.png")["prompt"] == "a dog"


def test_a_job_is_checked_once(tmp_path, table, monkeypatch):
    resolved, plans, resolve = [], [], SamplingRequest.resolve
    monkeypatch.setattr(SamplingRequest, "resolve", lambda self, model: resolved.append(self) or resolve(self, model))

    def sample(_pipe, plan, **_):
        plans.append(plan)
        return SamplingResult([Image.new("RGB", (8, 8))] * len(plan.seeds), None)

    monkeypatch.setattr(StableDiffusion, "sample", sample)
    assert main(batch(table, tmp_path / "out", negative_image=OTHER)) == 0
    assert len(resolved) == 1 and all(plan.run is plans[0].run for plan in plans)
    assert [plan.prompts for plan in plans] == [["", "a dog"], ["a dog", "a dog"], ["", ""]]  # padded with the last
    assert [plan.seeds.tolist() for plan in plans] == [[3, 3], [4, 4], [5, 5]]
    [first], words, [last] = (plan.image_prompts for plan in plans)
    assert not words and last.features.negative is first.features.negative  # which is read once


def test_batch_goes_on_and_refuses_other_settings(tmp_path, table, capsys, monkeypatch):
    out = tmp_path / "out"
    assert main(batch(table, out)) == 0
    first = {path: path.read_bytes() for path in out.glob("*.png")}
    (out / "cat.png").unlink()
    assert main(batch(table, out, batch_size=1)) == 0
    assert {path: path.read_bytes() for path in out.glob("*.png")}.keys() == first.keys()
    for path, content in first.items():
        assert path.name == "cat.png" or path.read_bytes() == content
    capsys.readouterr()
    forbid_sampling(monkeypatch)
    assert main(batch(table, out, steps=3)) == 2
    assert "steps: 2 -> 3" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"batch_size": 0}, "--batch-size 0 must be at least 1"),
        ({"num_images": 0}, "--num-images 0 must be at least 1"),
        ({"process": 2, "processes": 2}, "--process 2 of --processes 2"),
        ({"adapter": None}, "name the IP-Adapter that reads them with --adapter"),
        ({"seed": -1}, "--seed -1 must lie between"),
        ({"negative_image": "https://a.b/c.png"}, "the content of a URL may change; download it first"),
        ({"height": 100}, "--height 100 is not a multiple of 8"),
    ],
)
def test_wrong_batches(tmp_path, table, capsys, monkeypatch, changes, words):
    forbid_sampling(monkeypatch)
    assert main(batch(table, tmp_path / "out", **changes)) == 2
    assert words in capsys.readouterr().err and not (tmp_path / "out").exists()


def rows_of(tmp_path: Path, *rows: dict) -> Path:
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(json.dumps(row) for row in rows))
    return path


@pytest.mark.parametrize(
    ("row", "changes", "words"),
    [
        ({"prompt": "a"}, {"scale": 0.5}, "--scale, --adapter have no effect on "),
        (
            {"prompt": "a"},
            {"adapter": None, "reference_resize": "pad"},
            "rows.jsonl, of which no row has an image: name images there",
        ),
        (
            {"prompt": "a", "negative_prompt": "b"},
            {"adapter": None, "guidance_scale": 1},
            "line 1: negative_prompt has no",
        ),
        ({"prompt": "a"}, {"adapter": None, "num_images": 10**9}, "a job of 1,000,000,000 images would need at least"),
        ({"prompt": "a"}, {"adapter": None, "batch_size": 10**7}, "10,000,000 images of 64 x 64 pixels would need"),
    ],
)
def test_batches_without_effect_or_without_bounds(tmp_path, monkeypatch, capsys, row, changes, words):
    forbid_sampling(monkeypatch)
    assert main(batch(rows_of(tmp_path, row), tmp_path / "out", **changes)) == 2
    *_, line = capsys.readouterr().err.splitlines()
    assert words in line and not (tmp_path / "out").exists()


def test_what_no_row_needs_is_a_warning(tmp_path):
    rows = [row(0, prompt="a", seed=1, scale=0.5), row(1, prompt="b", seed=2, scale=0.5, images=(CAT,))]
    args = Batch(source=tmp_path / "rows.csv", out=tmp_path / "out", seed=3, scale=0.7)
    with pytest.warns(UserWarning) as found:
        check_effects(args, rows)
    said = [str(warning.message) for warning in found]
    assert len(said) == 3 and "1 rows, line 1 the first, have a scale, which has no effect" in said[0]
    assert [line.split(" has no effect: every row")[0] for line in said[1:]] == ["--seed", "--scale"]


def test_syntax_of_other_programs_is_said_once_for_all_rows(tmp_path):
    rows = [row(i, prompt=f"a (cat:1.{i})", negative_prompt="BREAK it") for i in range(3)]
    tasks = plan_tasks(rows, num_images=2, seed=0, scale=1.0)
    args = Batch(source=tmp_path / "rows.csv", out=tmp_path / "out", negative_prompt="[x]")
    with pytest.warns(PromptSyntaxWarning) as found:
        _warn_of_syntax(args, tasks)
    assert [str(warning.message).split(" or the like")[0].split(", which")[0] for warning in found] == [
        "3 rows, 'row-0' the first, have '(cat:1.0)'",
        "3 rows, 'row-0' the first, have 'BREAK'",
        "--negative-prompt has '[x]'",
    ]


def row(index: int, **changes) -> BatchRow:
    fields = {"name": f"row-{index}", "prompt": "", "negative_prompt": "", "images": (), "seed": None, "scale": None}
    return BatchRow(index=index, line=index + 1, **fields | changes)


def test_batch_into_its_own_source(tmp_path, capsys):
    assert main(batch(tmp_path, tmp_path / "out")) == 2
    assert "give another folder" in capsys.readouterr().err
