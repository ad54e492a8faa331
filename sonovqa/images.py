"""Image files: finding them under a root whatever way their names were typed, and checking that they can be trained on."""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import multiprocessing
import os
import re
import signal
import unicodedata
import warnings
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass
from pathlib import Path

from sonovqa.cli import UserError

FORMATS = ("PNG", "JPEG", "BMP", "TIFF", "WEBP", "GIF")
SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff", ".webp", ".gif")
LARGEST_FILE = 100 << 20  # bytes
LARGEST_SIDE, SMALLEST_SIDE = 10_000, 16  # pixels; a model sees about 512x512 and patches of 14 or 16
SLIMMEST = 200  # times as long as wide: Qwen-VL's processor refuses slimmer ones
LARGEST_AREA = 64_000_000  # pixels: 200 MB decoded; Pillow itself only warns at 89 million
HASH_SIDE = 16  # a hash of 16 x 16 bits
POOL_FROM = 64  # images; below this a pool starts slower than it works


class NotFoundError(Exception):
    """No image for a row of the sheet; the message is the reason under which the row is listed."""


@dataclass(frozen=True)
class Checked:
    """What one decoding of an image file found out.

    Attributes:
        size, mtime_ns: of the file, so that a later run knows whether it changed.
        sha256: of the file's bytes.
        phash: perceptual hash, 256 bits in hex, of the picture as it is shown (EXIF rotation applied).
        width, height: pixels as shown.
        problem: why the image cannot be used, or "".
    """

    size: int = 0
    mtime_ns: int = 0
    sha256: str = ""
    phash: str = ""
    width: int = 0
    height: int = 0
    problem: str = ""


class ImageFolder:
    """Finds ``<folder>/<file>`` under a root: as written, else in another unicode form, case, or with spaces for
    underscores, else by the name without an extension where the sheet gives none.

    Raises:
        UserError: if ``root`` is not a folder.
    """

    def __init__(self, root: Path):
        if not root.is_dir():
            raise UserError(f"no such image folder; {root}; a folder with one folder of images a category; mend --images")
        self.root = root
        self._resolved = root.resolve()
        self._listings: dict[Path, tuple[dict[str, list[str]], dict[str, list[str]]]] = {}

    def find(self, folder: str, name: str) -> tuple[str, Path]:
        """Return the image's id (its path below the root, ``/`` between parts, NFC) and its path.

        Raises:
            NotFoundError: it is not there, is ambiguous, or lies outside the root.
        """
        parts = [self._parts(folder), self._parts(name)]
        if not parts[0]:
            raise NotFoundError("no such image folder")
        here, names = self.root, []
        for depth, part in enumerate(parts[0] + parts[1], 1):
            found = self._lookup(here, part, last=depth == len(parts[0] + parts[1]))
            names.append(found)
            here = here / found
        self._check_inside(here)
        return unicodedata.normalize("NFC", "/".join(names)), here

    @staticmethod
    def _parts(text: str) -> list[str]:
        parts = re.split(r"[/\\]", text)
        if re.match(r"[/\\]|[A-Za-z]:[/\\]", text) or ".." in parts:
            raise NotFoundError("the path leaves the image folder")
        return [part for part in parts if part.strip() not in ("", ".")]

    def _check_inside(self, path: Path) -> None:
        try:
            real = path.resolve(strict=True)
            regular = real.is_file()
        except (OSError, RuntimeError):  # RuntimeError: a loop of symbolic links
            raise NotFoundError("the image file cannot be read") from None
        if not real.is_relative_to(self._resolved):
            raise NotFoundError("the path leaves the image folder")
        if not regular:
            raise NotFoundError("the image is not a file")

    def _lookup(self, folder: Path, name: str, last: bool) -> str:
        by_name, by_stem = self._listing(folder)
        candidates = by_name.get(_fold(name), [])
        if not candidates and last and not name.casefold().endswith(SUFFIXES):
            candidates = by_stem.get(_fold(name), [])
        same = [c for c in candidates if unicodedata.normalize("NFC", c) == unicodedata.normalize("NFC", name)]
        candidates = same or candidates  # two files whose names only differ in unicode form would share one image_id
        if len(candidates) > 1:
            raise NotFoundError("several image files match the name")
        if not candidates:
            raise NotFoundError("no such image file" if last else "no such image folder")
        return candidates[0]

    def _listing(self, folder: Path) -> tuple[dict[str, list[str]], dict[str, list[str]]]:
        if folder not in self._listings:
            by_name: dict[str, list[str]] = {}
            by_stem: dict[str, list[str]] = {}
            with contextlib.suppress(OSError):  # not a folder, or not ours to read: nothing is found in it
                for name in sorted(os.listdir(folder)):
                    by_name.setdefault(_fold(name), []).append(name)
                    if name.casefold().endswith(SUFFIXES):
                        by_stem.setdefault(_fold(name.rpartition(".")[0]), []).append(name)
            self._listings[folder] = by_name, by_stem
        return self._listings[folder]


def _fold(name: str) -> str:
    """One form for all ways to type a name. Source: Unicode Standard Annex 15, form NFKC, for accents typed apart."""
    return re.sub(r"[\s_]+", "_", unicodedata.normalize("NFKC", name).strip()).casefold()


def check_image(path: Path) -> Checked:
    """Read and decode one image file, once. Never raises for a bad file: ``problem`` says what is wrong with it."""
    try:
        status = os.stat(path)
        if status.st_size == 0 or status.st_size > LARGEST_FILE:
            what = "is empty" if status.st_size == 0 else f"is larger than {LARGEST_FILE >> 20} MB"
            return Checked(status.st_size, status.st_mtime_ns, problem=f"the image file {what}")
        data = Path(path).read_bytes()
    except OSError as fault:
        return Checked(problem=f"the image file cannot be read: {fault.strerror}")
    return check_bytes(data, status.st_mtime_ns)


def check_bytes(data: bytes, mtime_ns: int = 0) -> Checked:
    """The same for an image file's bytes: its header is read first, and nothing larger than the limits above is decoded."""
    width, height, phash, problem = _decode(data)
    return Checked(len(data), mtime_ns, hashlib.sha256(data).hexdigest(), phash, width, height, problem)


def _decode(data: bytes) -> tuple[int, int, str, str]:
    """Width, height (as shown), perceptual hash and problem of an encoded image."""
    from PIL import Image, ImageOps, UnidentifiedImageError

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of large images and odd tags: the limits above decide
            with Image.open(io.BytesIO(data), formats=FORMATS) as image:
                width, height = image.size
                problem = _header_problem(image)
                if not problem:
                    image.draft("L", (8 * HASH_SIDE, 8 * HASH_SIDE))  # a JPEG is still read to its end, at a smaller scale
                    image.load()
                    problem = _transparency_problem(image)
                if problem:
                    return width, height, "", problem
                return *_shown_size(image), perceptual_hash(ImageOps.exif_transpose(image)), ""
    except UnidentifiedImageError:
        return 0, 0, "", f"not an image that can be read ({', '.join(FORMATS)})"
    except Image.DecompressionBombError:
        return 0, 0, "", f"the image is larger than {LARGEST_AREA // 10**6} megapixels"
    except Exception as fault:  # hostile bytes make Pillow's decoders raise almost any type: each is listed, none is lost
        broken = f"the image is broken ({type(fault).__name__})"
        return 0, 0, "", "the image is truncated" if "truncated" in str(fault) else broken


def size_of(data: bytes) -> tuple[int, int]:
    """``(width, height)`` in pixels of an image file as it is shown (EXIF rotation applied), by its head: nothing is decoded."""
    from PIL import Image

    with Image.open(io.BytesIO(data)) as image:
        return _shown_size(image)


def most_pixels(paths: Iterable[Path]) -> int | None:
    """Pixels of the largest of some image files, by their heads; ``None`` where none can be read. What is too large to be used
    does not count."""
    from PIL import Image

    found = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of large images and odd tags: the limits above decide
        for path in paths:
            with contextlib.suppress(Exception), Image.open(path, formats=FORMATS) as image:  # as in `_decode`
                found += [] if _header_problem(image) else [image.width * image.height]
    return max(found, default=None)


def _shown_size(image) -> tuple[int, int]:
    turned = image.getexif().get(0x0112, 1) in (5, 6, 7, 8)  # orientations that turn by 90 degrees
    return image.size[::-1] if turned else image.size


def _header_problem(image) -> str:
    """What is wrong with an image before a pixel of it is decoded, or ""."""
    width, height = image.size
    if width * height > LARGEST_AREA:
        return f"the image is larger than {LARGEST_AREA // 10**6} megapixels"
    if max(width, height) > LARGEST_SIDE:
        return f"the image is longer than {LARGEST_SIDE} pixels on a side"
    if min(width, height) < SMALLEST_SIDE:
        return f"the image is smaller than {SMALLEST_SIDE} pixels on a side"
    if max(width, height) > SLIMMEST * min(width, height):
        return f"the image is more than {SLIMMEST} times as long as it is wide"
    if image.mode.startswith(("I", "F")):  # Pillow and vLLM clip these to white; how to scale them is not ours to guess
        return "the image has more than 8 bits a channel: save it with 8"
    if image.format != "MPO" and getattr(image, "is_animated", False):  # MPO: a photograph with a preview beside it
        return "the image is animated or has several pages"
    return ""


def _transparency_problem(image) -> str:
    """Trainers drop the alpha channel and servers paint it white, so a see-through pixel would differ between them."""
    if image.mode not in ("RGBA", "LA", "PA", "RGBa", "La") and "transparency" not in image.info:
        return ""
    opaque = image.convert("RGBA").getchannel("A").getextrema()[0] == 255
    return "" if opaque else "the image has transparent pixels: save it without"


def perceptual_hash(image) -> str:
    """Perceptual hash of a picture, 256 bits in hex.

    On HC18's 492 images the frames of one subject that look alike are at most 40 bits apart, those of two subjects at
    least 58 (at 64 bits the two overlap).

    Source: ImageHash's ``phash`` (signs of the low frequencies of a cosine transform against their median), on a picture
    first halved to about 128 pixels on its short side, which costs a tenth of a full-size filter.
    """
    import imagehash

    grey = image.convert("L")
    factor = max(1, min(grey.size) // (8 * HASH_SIDE))
    return str(imagehash.phash(grey.reduce(factor), hash_size=HASH_SIDE))


def check_images(
    paths: list[Path], journal: Path, workers: int = 0, advance: Callable[[int], None] = lambda count: None
) -> list[Checked]:
    """Check image files in worker processes, one decoding each, going on from an interrupted run's journal.

    Args:
        paths: image files.
        journal: JSON lines of what is checked so far, appended to as it is found; a line counts only while the file's
            size and time of change are the same. The caller removes it when its own output is complete.
        workers: processes; 0 = one a core.
        advance: told how many more are done.

    Returns:
        One `Checked` a path, in order.

    Raises:
        UserError: a worker process died (as a rule: out of memory).
    """
    done = _read_journal(journal)
    known = {}
    for path in paths:
        if (found := done.get(str(path))) is not None and _unchanged(path, found):
            known[path] = found
    advance(len(known))
    missing = [path for path in dict.fromkeys(paths) if path not in known]
    journal.parent.mkdir(parents=True, exist_ok=True)
    with open(journal, "a", buffering=1, encoding="utf-8") as stream:  # by lines: a killed run keeps them
        if journal.stat().st_size:
            stream.write("\n")  # ends a line that a killed run left half written
        for path, checked in zip(missing, _checks(missing, workers or os.cpu_count() or 1), strict=True):
            known[path] = checked
            stream.write(json.dumps({"path": str(path), **asdict(checked)}) + "\n")
            advance(1)
    return [known[path] for path in paths]


def _checks(paths: list[Path], workers: int) -> Iterator[Checked]:
    if len(paths) < POOL_FROM or workers == 1:
        yield from map(check_image, paths)
        return
    context = multiprocessing.get_context("forkserver")  # a fork of a process with threads may hang
    with ProcessPoolExecutor(workers, mp_context=context, initializer=_ignore_interrupt) as pool:
        try:
            yield from pool.map(check_image, paths, chunksize=16)
        except BrokenProcessPool:
            raise UserError(
                "a process that checks images died, as a rule for want of memory; "
                f"{workers} processes; 1 or more; use fewer with --workers"
            ) from None
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


def _ignore_interrupt() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole process group: the parent ends the pool


def _read_journal(journal: Path) -> dict[str, Checked]:
    done = {}
    if journal.is_file():
        for line in journal.read_text(encoding="utf-8", errors="replace").splitlines():
            with contextlib.suppress(ValueError, KeyError, TypeError):  # a half-written line: check that image again
                entry = json.loads(line)
                path = entry.pop("path")
                done[path] = Checked(**entry)
    return done


def _unchanged(path: Path, found: Checked) -> bool:
    try:
        status = os.stat(path)
    except OSError:
        return False
    return (status.st_size, status.st_mtime_ns) == (found.size, found.mtime_ns)
