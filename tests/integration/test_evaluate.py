"""The whole command on mini and held-out scenes in COCO's layout: killed, split, resumed, and on images of others."""

import csv
import json
import os
import re
import shutil
import sys
from pathlib import Path

import numpy as np
import pyarrow.parquet
import pytest
from helpers import TORCH_MODEL, forbid_sampling
from PIL import Image

from experiments.mini import evaluate
from ipadapter_jax.cli import main
from ipadapter_jax.evaluate import embeddings
from ipadapter_jax.evaluate.clip_scorer import open_scorer
from ipadapter_jax.evaluate.frechet import Moments, frechet_distance
from ipadapter_jax.evaluate.metrics import interval, score
from ipadapter_jax.storage.file_lock import shard_lock

pytestmark = pytest.mark.usefixtures("single_device")

PROMPTS, EACH = 6, 2
TABLES = evaluate.TABLES


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """The data, the scoring CLIP and, in `whole`, a run that nobody disturbed."""
    root = tmp_path_factory.mktemp("evaluate")
    evaluate.write_coco(root / "coco", PROMPTS)
    evaluate.write_clip(root / "clip")
    assert main(words(root, root / "whole")) == 0
    return root


def words(root: Path, out: Path, *more: object, **changes) -> list[str]:
    """A small complete command line; None leaves an option out."""
    options = {
        "out": out,
        "image_root": root / "coco" / "val2017",
        "clip": root / "clip",
        "num_images": EACH,
        "steps": 4,
        "batch_size": 4,
    } | changes
    flat = [(f"--{name.replace('_', '-')}", str(value)) for name, value in options.items() if value is not None]
    annotations = root / "coco" / "annotations" / "captions_val2017.json"
    return ["evaluate", str(annotations), *(word for pair in flat for word in pair), *map(str, more)]


def tables(out: Path) -> dict[str, bytes]:
    return {name: (out / name).read_bytes() for name in TABLES}


def test_the_numbers_are_those_of_the_images(place):
    """Scored again from the files, by the functions on arrays."""
    out = place / "whole"
    prompts = [*csv.DictReader((out / "prompts.csv").open(encoding="utf-8"))]
    names = [row["name"] for row in prompts]
    assert names == [f"{index:012d}" for index in range(PROMPTS)]
    references = [Image.open(place / "coco" / "val2017" / row["image"]) for row in prompts]
    images = [[Image.open(out / "images" / f"{name}-{k}.png") for k in range(EACH)] for name in names]
    scorer = open_scorer(place / "clip").load()
    found = score(scorer, images, references, [[row["caption"]] for row in prompts])
    means = found.prompt_means()
    for name, values in means.items():
        np.testing.assert_allclose([float(row[name]) for row in prompts], values, atol=1e-6)
    summary = json.loads((out / "evaluation.json").read_text())["scores"]
    expected = interval(np.array([float(row["clip_i"]) for row in prompts]))
    assert summary["clip_i"] == pytest.approx(expected._asdict())
    assert summary["clip_i"]["mean"] > 0.8 and summary["clip_t"]["mean"] > 1.2  # mini follows its prompts
    squares = [np.asarray(image.convert("RGB")) for image in [*references, *(p for group in images for p in group)]]
    rows, sums = scorer.images(squares), [Moments(128), Moments(128)]
    sums[0].add(rows[:PROMPTS])
    sums[1].add(rows[PROMPTS:])
    assert summary["clip_fid"] == pytest.approx(frechet_distance(*sums), rel=1e-4)
    each = pyarrow.parquet.read_table(out / "pictures.parquet").to_pylist()
    assert [row["picture"] for row in each] == [f"{name}-{k}.png" for name in names for k in range(EACH)]
    np.testing.assert_allclose([row["clip_t"] for row in each], found.clip_t.reshape(-1), atol=1e-6)


def test_the_report_says_what_was_done(place):
    page = (place / "whole" / "report.html").read_text(encoding="utf-8")
    body = page.split("<body>\n")[1]
    assert body.startswith('<p class="warning">Warning: the scoring CLIP is not ViT-L/14.')
    assert "IP-Adapter</td><td>adapter</td>" in page and page.count("<svg") == 3 and "http" not in body
    assert page.count("data:image/jpeg") == PROMPTS * (1 + EACH)  # each prompt once, as best or as worst
    best, worst = page.split("<h2>Best")[1].split("<h2>Worst")
    shown = [re.findall(r"<figcaption>(\d+):", part) for part in (best, worst)]
    assert [len(names) for names in shown] == [3, 3] and len({*shown[0], *shown[1]}) == PROMPTS
    caveat = "biased: 6 and 12 images for 128 features; compare only with distances of as many images"
    assert f"<small>{caveat}</small>" in page.split("</table>")[0]
    about = json.loads((place / "whole" / "evaluation.json").read_text())
    assert about["otherwise than in the paper"] == [
        "the scoring CLIP is not OpenAI's ViT-L/14",
        "6 image prompts of another data set or of a part of it, not COCO 2017 val",
        "images of each image prompt: 2, not 4",
        "steps: 4, not 50",
        "guidance scale: 4.0, not 7.5",
    ]
    assert about["caveats"] == {"clip_fid": caveat}
    assert {"unet", "ip_adapter"} <= about["pictures"]["sha256"].keys() and about["pictures"]["files"] == 12
    assert "model.safetensors" in about["scoring"]["clip"]["sha256"] and "jax" in about["versions"]


@pytest.mark.slow  # three processes; unit/batch/test_runner.py kills jobs, and below is what a kill leaves
def test_killed_twice_it_ends_with_the_same_numbers(place, tmp_path):
    out = tmp_path / "out"
    command = [sys.executable, "-m", "ipadapter_jax.cli", *words(place, out)]
    died = [evaluate.killed_when(command, dict(os.environ), out / "images", "*.png", count) for count in (1, 6)]
    assert died == [True, True]
    assert main(words(place, out)) == 0
    assert tables(out) == tables(place / "whole")
    assert (out / "report.html").read_bytes() == (place / "whole" / "report.html").read_bytes()


def test_processes_share_the_work(place, tmp_path, monkeypatch, capsys):
    """Two prompts to a file, so that either process has some; the one that ends last writes the report."""
    monkeypatch.setattr(embeddings, "CHUNK", 2)
    out = tmp_path / "out"
    assert main(words(place, out, process=1, processes=2)) == 0
    assert "process 1 has finished" in capsys.readouterr().out and not (out / "report.html").exists()
    assert len([*(out / "images").glob("*.png")]) == 2 * EACH
    assert main(words(place, out, process=0, processes=2)) == 0
    scores = [json.loads((folder / "evaluation.json").read_text())["scores"] for folder in (out, place / "whole")]
    assert scores[0]["clip_i"] == pytest.approx(scores[1]["clip_i"], abs=1e-6)
    assert [path.name for path in sorted((out / "scores").iterdir())] == [f"00000{i}.safetensors" for i in (0, 2, 4)]


def test_what_is_there_is_not_made_again_and_what_has_changed_is(place, tmp_path, monkeypatch):
    out = tmp_path / "out"
    shutil.copytree(place / "whole", out)
    scored = []
    embed = embeddings.embed_chunk
    monkeypatch.setattr(embeddings, "embed_chunk", lambda chunk, *rest: (scored.append(chunk), embed(chunk, *rest)))
    forbid_sampling(monkeypatch)
    assert main(words(place, out, caption="best")) == 0 and not scored  # another choice needs no network
    prompts, before = ([*csv.DictReader((f / "prompts.csv").open())] for f in (out, place / "whole"))
    assert all(float(a["clip_t"]) >= float(b["clip_t"]) for a, b in zip(prompts, before, strict=True))
    assert main(words(place, out)) == 0 and tables(out) == tables(place / "whole")
    [scores] = (out / "scores").iterdir()
    whole = scores.read_bytes()
    scores.write_bytes(whole[:-512] + bytes(512))  # damaged since, though as long as it was
    assert main(words(place, out)) == 0 and len(scored) == 1 and scores.read_bytes() == whole
    scored.clear()
    scores.write_bytes(whole[:-9])
    (out / "scores" / ".part-000000.safetensors-abcd1234").write_bytes(b"")  # what a kill leaves
    assert main(words(place, out)) == 0 and len(scored) == 1 and tables(out) == tables(place / "whole")
    assert [path.name for path in (out / "scores").iterdir()] == ["000000.safetensors"]
    Image.new("RGB", (64, 64), "red").save(out / "images" / "000000000003-1.png")
    assert main(words(place, out)) == 0 and len(scored) == 2
    assert tables(out)["prompts.csv"] != tables(place / "whole")["prompts.csv"]


def test_an_image_prompt_that_was_replaced_is_refused(place, tmp_path, monkeypatch, capsys):
    """Under its name, and as large as before: its images are of another one."""
    forbid_sampling(monkeypatch)
    shutil.copytree(place / "coco", tmp_path / "coco")
    shutil.copytree(place / "clip", tmp_path / "clip")
    shutil.copytree(place / "whole", tmp_path / "out")
    assert main(words(tmp_path, tmp_path / "out")) == 0  # moved, not replaced
    image = tmp_path / "coco" / "val2017" / "000000000002.png"
    image.write_bytes(image.read_bytes() + b"\0")
    assert main(words(tmp_path, tmp_path / "out")) == 2
    said = capsys.readouterr().err
    assert "2 images there were made from other rows, 000000000002-0.png" in said
    assert "image 000000000002.png has been replaced by another" in said


def test_processes_that_split_the_work_otherwise_are_refused(place, tmp_path, monkeypatch, capsys):
    """They would score twice, and one would remove what the other is writing."""
    forbid_sampling(monkeypatch)
    more = {"images_from": place / "whole" / "images", "num_images": None, "steps": None, "batch_size": None}
    with shard_lock(tmp_path / "out", (1, 2)):
        assert main(words(place, tmp_path / "out", **more)) == 2
    assert "with another number of processes" in capsys.readouterr().err


def test_images_of_another_program(place, tmp_path, monkeypatch):
    """The same images by name and by a list, in a folder that knows nothing of them: the same numbers."""
    forbid_sampling(monkeypatch)
    monkeypatch.setattr("ipadapter_jax.pipelines.sample_batch.draw_noise", None)
    monkeypatch.setattr("ipadapter_jax.pipelines.stable_diffusion.StableDiffusion.from_opened", None)
    theirs = tmp_path / "theirs"
    shutil.copytree(place / "whole" / "images", theirs, ignore=shutil.ignore_patterns("job*", "lock*"))
    more = {"images_from": theirs, "num_images": None, "steps": None, "batch_size": None}
    assert main(words(place, tmp_path / "by name", **more)) == 0
    rows = [f"{path.stem[:-2]}.png,{path.name}" for path in sorted(theirs.iterdir())]
    (theirs / "list.csv").write_text("\n".join(["name,image", *rows]))
    assert main(words(place, tmp_path / "by list", **more | {"images_from": theirs / "list.csv"})) == 0
    for folder in ("by name", "by list"):
        for table in ("prompts.csv", "pictures.csv"):
            assert tables(tmp_path / folder)[table] == tables(place / "whole")[table]
        about = json.loads((tmp_path / folder / "evaluation.json").read_text())
        assert "how the images were made is not known here" in about["otherwise than in the paper"]
    (theirs / "000000000002-1.png").write_bytes(b"no image")
    with pytest.raises(Exception, match="000000000002-1.png"):
        main([*words(place, tmp_path / "damaged", **more), "--debug"])


def test_more_measures(place, tmp_path, capsys):
    """FID of features that were given, and the caption as text prompt, for two of the prompts."""
    rng = np.random.default_rng(0)
    for name in "ab":
        np.save(tmp_path / f"{name}.npy", rng.normal(size=(20, 4)))
    features = ("--fid-features", tmp_path / "a.npy", tmp_path / "b.npy")
    assert main(words(place, tmp_path / "out", "--with-caption", *features, limit=2, num_images=1)) == 0
    about = json.loads((tmp_path / "out" / "evaluation.json").read_text())
    assert about["scores"].keys() == {"clip_i", "clip_t", "clip_fid", "fid"}
    assert about["caveats"].keys() == {"clip_fid"}  # 20 images for 4 features are enough
    output = capsys.readouterr()
    assert "2 records, 0 files not used\n" in output.err
    said = {line.split()[0]: line for line in output.out.splitlines()}
    assert "biased: 2 and 2 images for 128 features" in said["CLIP-FID"] and "biased" not in said["FID"]
    assert "the text prompt was the caption, not empty" in about["otherwise than in the paper"]
    with Image.open(tmp_path / "out" / "images" / "000000000000.png") as image:
        assert json.loads(image.text["ipadapter_jax"])["prompt"].startswith("a large red dotted heart")


WRONG = [
    ({"image_root": "{tmp}"}, "6 of 6 images, 000000000000.png the first, are not in"),
    ({"clip": str(TORCH_MODEL / "text_encoder")}, "no whole CLIP model"),
    ({"clip": "{tmp}/nowhere"}, "nowhere"),
    (
        {"images_from": "{tmp}", "num_images": None, "steps": None, "batch_size": None},
        "6 of 6 image prompts, 000000000000 the first, have no image there",
    ),
    (
        {"images_from": "{tmp}", "adapter": "mini"},
        "--adapter, --steps, --num-images, --batch-size have no effect on the images of --images-from: leave",
    ),
    ({"model": str(TORCH_MODEL)}, "name the IP-Adapter to evaluate with --adapter"),
    ({"limit": 0}, "--limit 0"),
    ({"num_images": 0}, "--num-images 0"),
    ({"process": 2, "processes": 2}, "--process 2 of --processes 2"),
    ({"caption": "longest"}, "longest"),
]


@pytest.mark.parametrize(("changes", "message"), WRONG, ids=[str(changes) for changes, _ in WRONG])
def test_bad_input_is_one_line_before_anything_is_computed(place, tmp_path, changes, message, monkeypatch, capsys):
    forbid_sampling(monkeypatch)
    changes = {name: value.format(tmp=tmp_path) if isinstance(value, str) else value for name, value in changes.items()}
    assert main(words(place, tmp_path / "out", **changes)) == 2
    complaint = capsys.readouterr().err
    assert message in complaint and complaint.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_an_image_prompt_that_is_damaged_ends_it(place, tmp_path, capsys):
    """A mean over the others would pass for one over all. Once repaired, the same command resumes."""
    shutil.copytree(place / "coco", tmp_path / "coco")
    damaged = tmp_path / "coco" / "val2017" / "000000000001.png"
    whole = damaged.read_bytes()
    damaged.write_bytes(whole[:100])
    shutil.copytree(place / "clip", tmp_path / "clip")
    out = tmp_path / "out"
    assert main(words(tmp_path, out)) == 2
    assert "1 image prompts cannot be used, among them '000000000001.png'" in capsys.readouterr().err
    assert len([*(out / "images").glob("*.png")]) == (PROMPTS - 1) * EACH and not (out / "report.html").exists()
    damaged.write_bytes(whole)
    assert main(words(tmp_path, out)) == 0
    assert tables(out)["prompts.csv"] == tables(place / "whole")["prompts.csv"]
    annotations = tmp_path / "coco" / "annotations" / "captions_val2017.json"
    annotations.write_text(annotations.read_text() + "\n")
    assert main(words(tmp_path, out)) == 2  # made for other annotations
    assert "data.sha256" in capsys.readouterr().err
