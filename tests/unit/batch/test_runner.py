"""Jobs with a fake device: all images are there, once, whatever happens meanwhile."""

import dataclasses
import importlib.util
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest

from ipadapter_jax.batch.rows import BatchRow, InvalidRow
from ipadapter_jax.errors import InputError, NonFiniteImageError, argument, errors_name_options
from ipadapter_jax.storage.atomic_files import sha256
from ipadapter_jax.storage.file_lock import file_lock

PROGRAM = Path(__file__).with_name("fake_job.py")
spec = importlib.util.spec_from_file_location("fake_job", PROGRAM)
fake_job = importlib.util.module_from_spec(spec)
spec.loader.exec_module(fake_job)
run, tasks, png = fake_job.run, fake_job.tasks, fake_job.png

IN_FLIGHT = 3 * fake_job.BATCH  # two batches unwritten and one that is being made


def objects(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def check_whole(out: Path, planned: list, manifests: tuple[str, ...] = ("job.jsonl",)) -> None:
    """Every image, with its content, and a line for each; no more and no less."""
    assert {path.name: path.read_bytes() for path in out.glob("*.png")} == {w.image_name: png(w.seed) for w in planned}
    lines = [line for name in manifests for line in objects(out / name)]
    assert sorted(line["picture"] for line in lines) == sorted(task.image_name for task in planned)
    seeds = {task.image_name: task.seed for task in planned}
    assert all(line["seed"] == seeds[line["picture"]] for line in lines)
    assert not list(out.glob(".part-*"))


# --- one run


def test_a_job(tmp_path):
    sizes, told = [], []

    def make(batch):
        sizes.append([(len(task.row.images), content) for task, content in batch])
        return [task.seed for task, _ in batch]

    progress = run(
        tasks(),
        tmp_path / "new/out",
        make=make,
        on_progress=lambda now: told.append((now.made, len(now.invalid), now.total)),
    )
    check_whole(tmp_path / "new/out", tasks())
    assert (progress.total, progress.before, progress.made, progress.invalid, progress.code) == (20, 0, 20, [], 0)
    assert told == [(4, 0, 20), (8, 0, 20), (12, 0, 20), (16, 0, 20), (20, 0, 20)]
    assert all(len({shape_key for shape_key, _ in batch}) == 1 for batch in sizes)
    assert sorted(index for batch in sizes for _, index in batch) == sorted([*range(10)] * 2)
    names = {path.name for path in (tmp_path / "new/out").iterdir()} - {task.image_name for task in tasks()}
    assert names == {"job.json", "job.jsonl", "lock"}
    assert json.loads((tmp_path / "new/out/job.json").read_text()) == fake_job.SETTINGS
    line = next(line for line in objects(tmp_path / "new/out/job.jsonl") if line["picture"] == "row3-1.png")
    seed = next(task.seed for task in tasks() if task.image_name == "row3-1.png")
    expected = {"name": "row3", "prompt": "a fox, number 3", "negative_prompt": "", "images": ["images/3.png"]}
    assert line == {"picture": "row3-1.png", **expected, "seed": seed, "scale": 0.5}


def test_what_is_done_is_left_alone(tmp_path):
    run(tasks(6), tmp_path)
    progress = run(tasks(6), tmp_path, make=pytest.fail)
    assert (progress.total, progress.before, progress.made, progress.code) == (12, 12, 0, 0)
    progress = run(tasks(9), tmp_path)  # more rows than before
    assert (progress.total, progress.before, progress.made) == (18, 12, 6)
    check_whole(tmp_path, tasks(9))


def test_a_load_serves_all_images_of_a_row_and_no_more_are_loaded_than_needed(tmp_path):
    loaded, made = [], []

    def make(batch):
        made.extend(batch)
        assert len(loaded) * 2 <= len(made) + 2 * (3 * fake_job.BATCH + 1)
        return [task.seed for task, _ in batch]

    run(tasks(60), tmp_path, load=lambda row: loaded.append(row.index), make=make)
    assert sorted(loaded) == [*range(60)]


def test_bad_rows_are_reported_and_replaced(tmp_path):
    def load(row: BatchRow) -> int:
        if row.index in (1, 4, 5):
            raise InputError(f"'{row.name}\udcff.png' is damaged")
        return row.index

    sizes = []

    def make(batch):
        sizes.append(len(batch))
        return [task.seed for task, _ in batch]

    found = [InvalidRow(400, "no text"), InvalidRow(1, "no image")]
    planned = [task for task in tasks(12) if task.row.index not in (1, 4, 5)]
    progress = run(tasks(12), tmp_path, load=load, make=make, invalid=found)
    check_whole(tmp_path, planned)
    assert (len(progress.invalid), progress.made, progress.total, progress.code) == (5, 18, 24, 0)
    assert sorted(sizes) == [2, 4, 4, 4, 4]  # 8 with an image prompt, 10 without one
    bad_rows = objects(tmp_path / "bad_rows.jsonl")
    assert [row["line"] for row in bad_rows] == [1, 3, 6, 7, 400]
    assert bad_rows[1]["reason"] == "'row1?.png' is damaged"
    run(tasks(12), tmp_path)  # repaired
    check_whole(tmp_path, tasks(12))
    assert not (tmp_path / "bad_rows.jsonl").exists()


def test_rows_are_refused_and_images_written_in_the_words_of_the_command_line(tmp_path):
    def load(row: BatchRow) -> int:
        raise InputError(f"{argument('fit', 'tile')}: 9 tiles")

    with errors_name_options({"fit": "--reference-resize"}):
        progress = run(tasks(1), tmp_path, load=load)
        said: list[str] = []
        run(tasks(2), tmp_path, encode=lambda task, seed: said.append(argument("fit")) or png(seed))
    assert [row.reason for row in progress.invalid] == ["--reference-resize tile: 9 tiles"]
    assert said == ["--reference-resize"] * 4


def test_a_image_that_is_none_costs_itself_alone(tmp_path):
    def make(batch):
        if any(task.image_name == "row3-1.png" for task, _ in batch):
            raise NonFiniteImageError("the image is not finite")
        return [task.seed for task, _ in batch]

    progress = run(tasks(), tmp_path / "out", make=make)
    check_whole(tmp_path / "out", [task for task in tasks() if task.image_name != "row3-1.png"])
    assert (progress.made, progress.invalid) == (19, [InvalidRow(5, "the image is not finite")])


def test_a_job_that_made_nothing_may_be_begun_again(tmp_path):
    def make(batch):
        raise InputError("height=100 is not a multiple of 8")

    with pytest.raises(InputError, match="height=100"):
        run(tasks(), tmp_path / "out", make=make, settings={"height": 100})
    run(tasks(), tmp_path / "out", settings={"height": 104})
    check_whole(tmp_path / "out", tasks())
    with pytest.raises(InputError, match="height: 104 -> 112"):
        run(tasks(), tmp_path / "out", settings={"height": 112})


def test_another_process_may_not_change_the_settings(tmp_path):
    """Also where it has made nothing itself."""
    shards = [tasks(shard=(process, 2)) for process in range(2)]
    run(shards[0], tmp_path / "out", shard=(0, 2))
    with pytest.raises(InputError, match="other settings"):
        run(shards[1], tmp_path / "out", shard=(1, 2), settings={"steps": 21})
    run(shards[1], tmp_path / "out", shard=(1, 2))
    check_whole(tmp_path / "out", tasks(), ("job.jsonl", "job-1.jsonl"))


def test_a_failure_keeps_what_was_made(tmp_path):
    def make(batch):
        if any(task.row.index == 7 for task, _ in batch):
            raise InputError("the device is gone")
        return [task.seed for task, _ in batch]

    with pytest.raises(InputError, match="the device is gone"):
        run(tasks(), tmp_path, make=make)
    assert 0 < len(list(tmp_path.glob("*.png"))) < 20
    with pytest.raises(OSError, match="no more room"):
        run(tasks(), tmp_path, encode=lambda task, seed: (_ for _ in ()).throw(OSError("no more room")))
    run(tasks(), tmp_path)
    check_whole(tmp_path, tasks())


# --- what is refused


def test_other_settings_are_refused(tmp_path):
    run(tasks(), tmp_path)
    other = {"steps": 30, "sha256": {"unet": {"unet.safetensors": "cd34"}}}
    with pytest.raises(InputError) as caught:
        run(tasks(), tmp_path, settings=other)
    assert str(caught.value) == (
        f"{tmp_path} holds a job that was started with other settings (steps: 20 -> 30; sha256.unet.unet.safetensors: "
        '"ab12" -> "cd34"); use those settings, or choose another --out'
    )
    for content in ("[1", "[1]", "[" * 100_000, '{"a": ' * 600 + "1" + "}" * 600, '{"a": "\xff"}'):
        (tmp_path / "job.json").write_text(content, encoding="latin-1")
        with pytest.raises(InputError, match="job.json is damaged; choose another --out"):
            run(tasks(), tmp_path)


def test_settings_of_the_model_that_have_changed_are_refused(tmp_path):
    """Its weights may be the same; jobs of older releases do not know them."""
    run(tasks(), tmp_path)
    settings = fake_job.SETTINGS | {"configurations": {"unet": "12", "scheduler": "34"}}
    assert run(tasks(), tmp_path, settings=settings).before == 20
    run(tasks(), tmp_path / "new", settings=settings)
    settings = fake_job.SETTINGS | {"configurations": {"unet": "12", "scheduler": "56"}}
    with pytest.raises(InputError, match=r'\(configurations.scheduler: "34" -> "56"\)'):
        run(tasks(), tmp_path / "new", settings=settings)


def test_rows_that_have_changed_are_refused(tmp_path):
    run(tasks(), tmp_path)
    planned = fake_job.plan_tasks(fake_job.rows(10), num_images=2, seed=7, scale=0.75)
    with pytest.raises(InputError, match=r"20 images there were made from other rows, row0-0.png .*scale: 0.5 -> 0.75"):
        run(planned, tmp_path)
    for path in tmp_path.glob("*.png"):
        path.unlink()
    run(planned, tmp_path)
    assert {line["scale"] for line in objects(tmp_path / "job.jsonl")} == {0.75}
    assert len(objects(tmp_path / "job.jsonl")) == 20


def test_image_prompts_may_have_moved(tmp_path):
    run(tasks(), tmp_path)
    manifest = tmp_path / "job.jsonl"
    manifest.write_text(manifest.read_text().replace("images/", "/somewhere/else/"))
    assert run(tasks(), tmp_path).before == 20
    manifest.write_text(manifest.read_text().replace("/0.png", "/1.png"))
    with pytest.raises(InputError, match="2 images there were made from other rows, row0-0.png"):
        run(tasks(), tmp_path)


def with_images(folder: Path, row: BatchRow) -> BatchRow:
    """The row with a file, and another that all rows share, in place of image prompts that nobody reads."""
    return dataclasses.replace(row, images=(folder / f"{row.name}.jpg", folder / "shared.jpg"))


@pytest.fixture
def references(tmp_path):
    """Works of 3 rows x 2 with image prompts."""
    rows = [with_images(tmp_path, row) for row in fake_job.rows(3)]
    for path in {path for row in rows for path in row.images}:
        path.write_bytes(path.name.encode())
    return fake_job.plan_tasks(rows, num_images=2, seed=7, scale=0.5)


def test_a_replaced_image_prompt_is_refused(tmp_path, references):
    """After a kill and after the end; also one of the same size and time."""
    out, image = tmp_path / "out", tmp_path / "row1.jpg"
    run(references, out)
    for name in ("row0-1.png", "row2-0.png"):  # not made yet
        (out / name).unlink()
    before = image.stat()
    image.write_bytes(b"ROW1.jpg")
    os.utime(image, ns=(before.st_atime_ns, before.st_mtime_ns))
    with pytest.raises(InputError) as caught:
        run(references, out, make=pytest.fail)
    assert str(caught.value) == (
        f"{out}: 2 images there were made from other rows, row1-0.png for one (image row1.jpg has been replaced by "
        "another); remove these images to have them made again, or choose another --out"
    )
    for image in ("row1-0.png", "row1-1.png"):
        (out / image).unlink()
    assert run(references, out).made == 4
    (tmp_path / "shared.jpg").write_bytes(b"another")
    with pytest.raises(InputError, match=r"6 images there .*image shared.jpg has been replaced by another"):
        run(references, out, make=pytest.fail)


@pytest.fixture
def read(monkeypatch):
    """The names of image prompts that are read for their digest; files of any age count as settled."""
    names: list[str] = []

    def digest(path: Path) -> str:
        names.append(path.name)
        return sha256(path)

    monkeypatch.setattr("ipadapter_jax.batch.reference_digests.sha256", digest)
    monkeypatch.setattr("ipadapter_jax.batch.reference_digests._SETTLED_NS", -1)
    return names


def test_image_prompts_that_have_not_changed_are_not_read_again(tmp_path, references, read):
    out, image = tmp_path / "out", tmp_path / "row1.jpg"
    run(references, out)
    assert {*read} == {"row0.jpg", "row1.jpg", "row2.jpg", "shared.jpg"}
    read.clear()
    assert run(references, out, make=pytest.fail).before == 6 and read == []
    time.sleep(0.05)  # beyond the grain of a file system's clock
    os.utime(image)  # copied by the same content, say
    assert run(references, out, make=pytest.fail).before == 6 and read == ["row1.jpg"]
    before = image.stat()
    time.sleep(0.05)
    image.write_bytes(b"ROW1.jpg")
    os.utime(image, ns=(before.st_atime_ns, before.st_mtime_ns))
    with pytest.raises(InputError, match=r"2 images there .*\(image row1.jpg has been replaced"):
        run(references, out, make=pytest.fail)


def test_another_file_of_the_same_size_and_time_is_noticed(tmp_path, references, read):
    out, image = tmp_path / "out", tmp_path / "row1.jpg"
    run(references, out)
    before = image.stat()
    (tmp_path / "new").write_bytes(b"ROW1.jpg")
    os.utime(tmp_path / "new", ns=(before.st_atime_ns, before.st_mtime_ns))
    (tmp_path / "new").rename(image)
    with pytest.raises(InputError, match=r"2 images there .*\(image row1.jpg has been replaced"):
        run(references, out, make=pytest.fail)


def test_a_file_that_has_just_changed_is_read_again(tmp_path, references):
    """Another change may have the same time."""
    run(references, tmp_path / "out")
    assert all(line["images_state"] == [None, None] for line in objects(tmp_path / "out/job.jsonl"))


def test_a_line_that_was_damaged_by_hand_is_no_state(tmp_path, references, read):
    out = tmp_path / "out"
    run(references, out)
    lines = objects(out / "job.jsonl")
    for states in (None, [1], [[1, 2], "x"], [["a", None, 3, 4], {}]):
        read.clear()
        (out / "job.jsonl").write_text("".join(json.dumps(line | {"images_state": states}) + "\n" for line in lines))
        assert run(references, out, make=pytest.fail).before == 6
        assert {*read} == {"row0.jpg", "row1.jpg", "row2.jpg", "shared.jpg"}


def test_image_prompts_are_looked_at_when_they_are_read(tmp_path, references):
    """What replaces one while its image is being made is another image at the next start."""

    def make(batch):
        (tmp_path / "row0.jpg").write_bytes(b"too late")
        return [task.seed for task, _ in batch]

    run(references, tmp_path / "out", make=make, batch_size=6)
    with pytest.raises(InputError, match=r"2 images there .*row0-0.png for one \(image row0.jpg has been replaced"):
        run(references, tmp_path / "out")


def test_jobs_of_older_releases_go_on(tmp_path, references):
    """Their lines do not say what the image prompts held."""
    out = tmp_path / "out"
    run(references, out)
    lines = [{k: v for k, v in line.items() if k != "images_sha256"} for line in objects(out / "job.jsonl")]
    (out / "job.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (tmp_path / "shared.jpg").write_bytes(b"another")
    assert run(references, out, make=pytest.fail).before == 6


def test_no_image_without_its_line(tmp_path, references):
    """A kill may come at any moment, and the line alone says what an image prompt held."""

    def encode(task, seed):
        assert task.image_name in {line["picture"] for line in objects(tmp_path / "out/job.jsonl")}
        return png(seed)

    assert run(references, tmp_path / "out", encode=encode).made == 6
    assert all(len(line["images_sha256"]) == 2 for line in objects(tmp_path / "out/job.jsonl"))


def test_a_folder_of_something_else_is_refused(tmp_path):
    (tmp_path / "row3-1.png").write_bytes(b"mine")
    with pytest.raises(InputError, match="holds row3-1.png, which no job has made there; choose another --out"):
        run(tasks(), tmp_path)
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(InputError, match="cannot write there"):
        run(tasks(), tmp_path / "file")


def test_a_folder_in_use_is_refused(tmp_path):
    with file_lock(tmp_path / "lock"), pytest.raises(InputError, match=r"is in use by process \d+ on "):
        run(tasks(), tmp_path)


@pytest.mark.parametrize(
    ("working", "another"), [((1, 2), (0, 1)), ((0, 2), (0, 1)), ((0, 1), (1, 2)), ((2, 3), (0, 2))]
)
def test_processes_that_split_the_work_otherwise_are_refused(tmp_path, working, another):
    """They would make images twice."""

    def make(batch):
        with pytest.raises(InputError, match=rf"is in use by process {os.getpid()} on .*, with another number of"):
            run(tasks(shard=another), tmp_path, shard=another)
        with pytest.raises(InputError, match=rf"is in use by process {os.getpid()} on .*; wait until that run ends"):
            run(tasks(shard=working), tmp_path, shard=working)
        return [task.seed for task, _ in batch]

    run(tasks(shard=working), tmp_path, shard=working, make=make)
    run(tasks(shard=another), tmp_path, shard=another)  # when the first one is through


def test_processes_of_one_job_work_together(tmp_path):
    def make(batch):
        run(tasks(shard=(0, 2)), tmp_path, shard=(0, 2))
        return [task.seed for task, _ in batch]

    run(tasks(shard=(1, 2)), tmp_path, shard=(1, 2), make=make)
    check_whole(tmp_path, tasks(), ("job.jsonl", "job-1.jsonl"))


# --- what a kill leaves


def test_what_a_kill_leaves_is_put_right(tmp_path):
    run(tasks(), tmp_path)
    manifest = tmp_path / "job.jsonl"
    lines = manifest.read_text().splitlines(keepends=True)
    (tmp_path / json.loads(lines[0])["picture"]).unlink()  # its line stays
    manifest.write_text("".join([*lines[:5], lines[3], *lines[6:-1], lines[-1][:20]]))
    (tmp_path / f".part-{tasks()[0].image_name}-abc_1234").write_bytes(b"\x89PNG")
    (tmp_path / ".part-job.jsonl-abc_1234").write_bytes(b"")
    assert run(tasks(), tmp_path).made == 1
    check_whole(tmp_path, tasks())


def start(out: Path, log: Path, seconds: float) -> subprocess.Popen:
    return subprocess.Popen([sys.executable, str(PROGRAM), str(out), str(log), str(seconds)])


def logged(log: Path) -> list[str]:
    return log.read_text().splitlines() if log.exists() else []


def wait_for_lines(log: Path, count: int, process: subprocess.Popen) -> None:
    deadline = time.monotonic() + 60
    while len(logged(log)) < count and process.poll() is None:
        assert time.monotonic() < deadline
        time.sleep(0.002)


def test_killed_at_any_moment_a_job_ends_as_if_nothing_had_happened(tmp_path):
    dice, out, log, kills = random.Random(0), tmp_path / "out", tmp_path / "log", 0
    for _ in range(6):
        before, done = len(logged(log)), {path.name for path in out.glob("*.png")}
        process = start(out, log, 0.02)
        wait_for_lines(log, before + dice.randrange(1, 16), process)
        time.sleep(dice.random() * 0.03)
        kills += process.poll() is None
        process.kill()
        process.wait()
        assert not done & set(logged(log)[before:])  # what is there is never made again
    assert kills >= 4
    assert start(out, log, 0).wait(timeout=60) == 0
    check_whole(out, tasks(40))
    assert len(logged(log)) <= 80 + kills * IN_FLIGHT
    run(tasks(40), tmp_path / "at once")
    lines, expected = objects(out / "job.jsonl"), objects(tmp_path / "at once/job.jsonl")
    assert sorted(lines, key=str) == sorted(expected, key=str)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_told_to_stop(tmp_path, number):
    out, log = tmp_path / "out", tmp_path / "log"
    process = start(out, log, 0.05)
    wait_for_lines(log, 9, process)
    process.send_signal(number)
    assert process.wait(timeout=60) == 75
    made = logged(log)
    assert 9 <= len(made) < 80
    check_whole(out, [task for task in tasks(40) if task.image_name in made])
    assert start(out, log, 0).wait(timeout=60) == 0
    check_whole(out, tasks(40))
    assert max(Counter(logged(log)).values()) == 1


def test_a_stop_during_the_last_batch_is_no_stop(tmp_path):
    def make(batch):
        signal.raise_signal(signal.SIGTERM)
        return [task.seed for task, _ in batch]

    assert run(tasks(4, 1)[1:3], tmp_path / "one", make=make).code == 0
    assert run(tasks(8, 1), tmp_path / "two", make=make).code == 75


# --- several processes


def test_processes_share_a_folder(tmp_path):
    invalid = [InvalidRow(9, "no image")]
    for process in range(3):
        part = tasks(shard=(process, 3))
        theirs = tmp_path / f".part-{tasks(shard=((process + 1) % 3, 3))[0].image_name}-abc_1234"
        theirs.write_bytes(b"")  # another process is at it
        assert run(part, tmp_path, shard=(process, 3), invalid=invalid).made == len(part)
        assert theirs.exists()
        theirs.unlink()
    check_whole(tmp_path, tasks(), ("job.jsonl", "job-1.jsonl", "job-2.jsonl"))
    assert objects(tmp_path / "bad_rows.jsonl") == [{"line": 9, "reason": "no image"}]
    assert not (tmp_path / "bad_rows-1.jsonl").exists()


def test_another_number_of_processes_goes_on(tmp_path):
    run(tasks(6), tmp_path)
    for process in range(2):
        run(tasks(shard=(process, 2)), tmp_path, shard=(process, 2))
    check_whole(tmp_path, tasks(), ("job.jsonl", "job-1.jsonl"))
    assert run(tasks(), tmp_path, make=pytest.fail).before == 20
    check_whole(tmp_path, tasks(), ("job.jsonl", "job-1.jsonl"))
