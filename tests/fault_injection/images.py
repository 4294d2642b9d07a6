"""Images as the web has them, some of them none, among those of a data set."""

import dataclasses
import io
import json
import struct
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image

from ipadapter_jax.train.config import Train
from ipadapter_jax.train.metrics_log import SkippedRecordLog
from tests.fault_injection.runs import changed, hold, logged, outcome, prepare, refusal, run_here


def _image() -> Image.Image:
    colours = np.random.default_rng(1).integers(0, 256, (6, 6, 3), np.uint8)
    return Image.fromarray(colours).resize((48, 40), Image.Resampling.BICUBIC)


def _saved(image: Image.Image, kind: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def _chunk(name: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))


def _corrupt() -> bytes:
    content = _saved(_image(), "PNG")
    middle = len(content) // 2
    return content[:middle] + bytes(b ^ 0xFF for b in content[middle : middle + 64]) + content[middle + 64 :]


def _bomb() -> bytes:
    """A PNG of 900 megapixels in a few hundred bytes."""
    header = struct.pack(">IIBBBBB", 30_000, 30_000, 8, 0, 0, 0, 0)
    pixels = zlib.compress(bytes(1 << 16))
    return b"\x89PNG\r\n\x1a\n" + _chunk(b"IHDR", header) + _chunk(b"IDAT", pixels) + _chunk(b"IEND", b"")


def _rotated() -> bytes:
    exif = Image.Exif()
    exif[0x0112] = 6  # orientation: a quarter turn
    return _saved(_image(), "JPEG", exif=exif)


def _animated() -> bytes:
    frames = [_image().rotate(angle) for angle in (0, 90, 180)]
    return _saved(frames[0], "GIF", save_all=True, append_images=frames[1:])


def _wide() -> bytes:
    return _saved(Image.fromarray(np.arange(40 * 48, dtype=np.uint16).reshape(40, 48) * 34), "PNG")


def _palette() -> bytes:
    return _saved(_image().quantize(16), "PNG", transparency=bytes(range(0, 256, 16)))


UNUSABLE: dict[str, Callable[[], bytes]] = {
    "corrupt": _corrupt,
    "truncated": lambda: _saved(_image(), "JPEG")[:-200],
    "bomb": _bomb,
    "empty": lambda: b"",
    "page": lambda: b"<!DOCTYPE html><html><body>404 not found</body></html>",
}
ODD: dict[str, Callable[[], bytes]] = {
    "cmyk": lambda: _saved(_image().convert("CMYK"), "JPEG"),
    "sixteen-bit": _wide,
    "palette-alpha": _palette,
    "rotated": _rotated,
    "pixel": lambda: _saved(_image().resize((1, 1)), "PNG"),
    "animated": _animated,
}


@dataclasses.dataclass(frozen=True)
class Images:
    """Corrupt, truncated and empty files, bombs and web pages named .jpg in 5 % and in 50 % of a data set, the rest of
    CMYK, 16 bits, palettes with alpha, EXIF rotation, 1 pixel, animations.

    The run ends, the unusable ones and no others are replaced, counted and listed by their keys, a run that goes on is
    equal to the bit, and one with more of them than is allowed stops with advice."""

    records: int = 120
    percents: tuple[int, ...] = (5, 50)
    """Shares of unusable ones, in percent."""

    def __call__(self, work: Path) -> str:
        config, told = prepare(work, steps=0, save_every=10**6), []
        for percent in self.percents:
            data = work / f"images-{percent}"
            unusable = self._write(data, percent)
            steps = -(-self.records // config.data.batch_size)  # all are read
            own = changed(
                config,
                data__path=str(data),
                data__max_unreadable_fraction=1.0,
                steps=steps,
                out=str(work / f"{percent}"),
            )
            run_here(own)
            self._check_list(own, unusable)
            again = changed(own, out=str(work / f"{percent}-again"))
            run_here(changed(again, steps=steps // 2))
            run_here(again)
            hold(logged(Path(again.out)) == logged(Path(own.out)), f"{percent} %: other losses after going on")
            hold(outcome(Path(again.out)) == outcome(Path(own.out)), f"{percent} %: other weights after going on")
            self._check_list(again, unusable)
            told.append(f"{len(unusable)} of {self.records}")
        strict = changed(own, data__max_unreadable_fraction=0.1, steps=10**6, out=str(work / "strict"))
        said = refusal(lambda: run_here(strict))
        hold(
            "records cannot be used" in said and "data.max_unreadable_fraction" in said and "skipped.jsonl" in said,
            said,
        )
        seen = strict.data.batch_size * (max(logged(Path(strict.out))) + 3)  # steps in flight
        hold(seen <= SkippedRecordLog.ENOUGH + 3 * strict.data.batch_size, f"it stopped only after {seen} records")
        return (
            f"{' and '.join(told)} images unusable ({', '.join(UNUSABLE)}): exactly these replaced, counted, listed; "
            f"{len(ODD)} odd kinds read; going on equal to the bit; {percent} % where 10 % is allowed stops with advice"
        )

    def _write(self, folder: Path, percent: int) -> set[str]:
        """Returns the names of the unusable ones."""
        folder.mkdir()
        count, unusable = self.records * percent // 100, set()
        bad, odd = list(UNUSABLE.items()), list(ODD.items())
        for number in range(self.records):
            is_bad = (number + 1) * count // self.records > number * count // self.records  # spread evenly
            kind, make = bad[len(unusable) % len(bad)] if is_bad else odd[number % len(odd)]
            name = f"{number:03}-{kind}.jpg"  # whatever is inside
            (folder / name).write_bytes(make())
            (folder / name).with_suffix(".txt").write_text(f"image {number}")
            unusable |= {name} if is_bad else set()
        return unusable

    def _check_list(self, config: Train, unusable: set[str]) -> None:
        out = Path(config.out)
        listed = [json.loads(line)["key"] for line in (out / "skipped.jsonl").read_text().splitlines()]
        hold(sorted(listed) == sorted(unusable), f"listed: {sorted(listed)}; unusable: {sorted(unusable)}")
        bad = logged(out, "bad_records")
        hold(bad[max(bad)] >= 1, "the log counts none")
