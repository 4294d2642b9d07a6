"""What two folders of outputs are told to differ in. No model is run."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, PngImagePlugin
from safetensors.numpy import save_file

from benchmarks.compare_trees import JOBS, write_inputs
from benchmarks.output_differences import compare, table


def write_outputs(folder: Path) -> Path:
    """What a job might write, with all that is not compared different at every call."""
    job = folder / "job"
    (job / "run" / "samples").mkdir(parents=True)
    chunks = PngImagePlugin.PngInfo()
    chunks.add_text("ipadapter_jax", folder.name)
    Image.fromarray(pixels()).save(job / "image.png", pnginfo=chunks)
    figure = np.full((248, 8, 3), 255, np.uint8)
    figure[4, :3] = len(folder.name)  # of a label
    Image.fromarray(figure).save(job / "run" / "samples" / "samples-0000004.png")
    save_file(tensors(), job / "adapter.safetensors", {"format": "pt", "ipadapter_jax": folder.name})
    lines = [{"step": step, "loss": 1 / step, "images_per_second": len(folder.name) / step} for step in (1, 2)]
    (job / "run" / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (job / "run" / "README.md").write_text(folder.name)
    (job / "exit_code").write_text("0")
    return folder


def pixels() -> np.ndarray:
    return np.arange(4 * 4 * 3, dtype=np.uint8).reshape(4, 4, 3)


def tensors() -> dict[str, np.ndarray]:
    return {"a": np.zeros(3, np.float32), "b": np.ones((2, 2), np.float16)}


@pytest.fixture
def folders(tmp_path: Path) -> tuple[Path, Path]:
    return write_outputs(tmp_path / "before"), write_outputs(tmp_path / "afterwards")


def found(folders: tuple[Path, Path]) -> str:
    [row] = compare(*folders)
    return row.difference


def test_equal(folders: tuple[Path, Path]) -> None:
    [row] = compare(*folders)
    assert (row.job, row.files, row.difference) == ("job", 5, "")
    assert table([row]) == "job    5 files  equal\n1 jobs, 5 files; 0 jobs differ"


def test_one_value_of_one_pixel(folders: tuple[Path, Path]) -> None:
    changed = pixels()
    changed[1, 2, 0] += 1
    Image.fromarray(changed).save(folders[1] / "job" / "image.png")
    assert found(folders).startswith("job/image.png: pixels (4, 4, 3), byte 18: b'\\x12")


def test_an_image_inside_a_figure(folders: tuple[Path, Path]) -> None:
    path = folders[1] / "job" / "run" / "samples" / "samples-0000004.png"
    figure = np.array(Image.open(path))
    figure[48, 0, 0] = 254
    Image.fromarray(figure).save(path)
    assert "samples-0000004.png: pixels" in found(folders)


def test_one_byte_of_a_tensor(folders: tuple[Path, Path]) -> None:
    path = folders[1] / "job" / "adapter.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    assert found(folders).startswith("job/adapter.safetensors: b, byte 7: ")


@pytest.mark.parametrize(
    "changed",
    [
        tensors() | {"a": np.zeros(3, np.int32)},  # the same bytes
        tensors() | {"b": np.ones(4, np.float16)},
        {"a": tensors()["a"]},
    ],
)
def test_another_dtype_shape_or_name(folders: tuple[Path, Path], changed: dict[str, np.ndarray]) -> None:
    save_file(changed, folders[1] / "job" / "adapter.safetensors", {"format": "pt"})
    assert found(folders).startswith("job/adapter.safetensors: header, byte ")


def test_the_metadata_of_a_file(folders: tuple[Path, Path]) -> None:
    save_file(tensors(), folders[1] / "job" / "adapter.safetensors", {"format": "pt", "variant": "plus"})
    assert found(folders).startswith("job/adapter.safetensors: header, byte ")


def test_a_loss_in_its_last_digit(folders: tuple[Path, Path]) -> None:
    path = folders[1] / "job" / "run" / "metrics.jsonl"
    path.write_text(path.read_text().replace('"loss": 0.5', '"loss": 0.5000000000000001'))
    assert found(folders).startswith("job/run/metrics.jsonl: line 2, byte ")


def test_a_missing_file_and_a_new_one(folders: tuple[Path, Path]) -> None:
    (folders[1] / "job" / "image.png").unlink()
    assert found(folders) == "job/image.png: only before"
    assert found(folders[::-1]) == "job/image.png: only after"


def test_a_missing_job(folders: tuple[Path, Path]) -> None:
    (folders[0] / "other").mkdir()
    (folders[0] / "other" / "exit_code").write_text("0")
    assert [row.difference for row in compare(*folders)] == ["", "other/exit_code: only before"]


def test_a_job_that_fails_in_both_is_not_equal(folders: tuple[Path, Path]) -> None:
    for folder in folders:
        (folder / "job" / "exit_code").write_text("2")
    assert found(folders) == "in both: exit code 2"


def test_the_inputs_of_all_jobs_are_there(tmp_path: Path) -> None:
    write_inputs(tmp_path / "inputs")
    named = {word for words in JOBS.values() for word in words if word.startswith("inputs/")}
    assert named and all((tmp_path / name).exists() for name in named)


def test_a_job_reads_what_an_earlier_one_wrote() -> None:
    names = list(JOBS)
    for number, words in enumerate(JOBS.values()):
        for word in words:
            if "/" in word and word.partition("/")[0] in names:
                assert word.partition("/")[0] in names[:number], word
