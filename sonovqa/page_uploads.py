"""Images that the page holds for its users: counted before they are decoded, in memory only, named by the page itself."""

from __future__ import annotations

import asyncio
import functools
import io
import secrets
from collections import OrderedDict
from dataclasses import dataclass

from sonovqa import chat, images
from sonovqa.page_guard import Refusal

DECODERS = 2  # images decoded at a time: each may take 200 MB (`images.LARGEST_AREA`)
#: The formats of `images.FORMATS` and the endings that marked images are kept under.
SUFFIXES = {"PNG": ".png", "JPEG": ".jpg", "BMP": ".bmp", "TIFF": ".tif", "WEBP": ".webp", "GIF": ".gif", "MPO": ".jpg"}


@dataclass(frozen=True)
class Upload:
    """An image that can be asked about.

    Attributes:
        data: the file's bytes as they came; what is kept with marks.
        seen, mime: the bytes that the endpoint gets, and that the page shows.
        suffix: of a file with ``data``.
        sha256: of ``data``.
        width, height: pixels as shown.
    """

    data: bytes
    seen: bytes
    mime: str
    suffix: str
    sha256: str
    width: int
    height: int

    @functools.cached_property
    def url(self) -> str:
        """``seen`` as a data URL, made at the first question: all questions about the image, of all readers, share it."""
        return chat.data_url(self.seen, self.mime)

    @property
    def size(self) -> int:
        """Bytes held, once it was asked about."""
        return len(self.data) + (0 if self.seen is self.data else len(self.seen)) + -(-len(self.seen) // 3) * 4


class Shelf:
    """Holds the latest images by random names until they outgrow ``room`` bytes; what was used longest ago goes first.

    A name that is no longer held is no fault: the browser has the file and sends it again.
    """

    def __init__(self, room: int):
        self.room, self.held = room, OrderedDict[str, Upload]()
        self.decoders = asyncio.Semaphore(DECODERS)

    async def add(self, data: bytes) -> tuple[str, Upload]:
        """Check an image file and hold it.

        Returns:
            Its name and what is held.

        Raises:
            Refusal: if it is no image that a model was or could be trained on (`images.check_bytes`).
        """
        async with self.decoders:
            upload = await asyncio.to_thread(read, data)
        name = secrets.token_urlsafe(16)
        self.held[name] = upload
        while len(self.held) > 1 and sum(each.size for each in self.held.values()) > self.room:
            self.held.popitem(last=False)
        return name, upload

    def get(self, name: str) -> Upload:
        """The image of a name. Raises `Refusal` (410) if it is not held."""
        if name not in self.held:
            raise Refusal(410, "The page no longer holds this image; it is sent again.")
        self.held.move_to_end(name)
        return self.held[name]


def read(data: bytes) -> Upload:
    """Check an image file's bytes and make what the endpoint is to see of them. Raises `Refusal` with what is wrong."""
    from PIL import Image

    from sonovqa.endpoint import LARGEST_URL, encoded_as_seen, is_sendable

    if not data:
        raise Refusal(422, "The file is empty. Choose an image.")
    checked = images.check_bytes(data)
    if checked.problem:
        raise Refusal(422, f"This file cannot be used: {checked.problem}.")
    with Image.open(io.BytesIO(data), formats=images.FORMATS) as image:
        suffix = SUFFIXES[image.format]
    seen, mime = encoded_as_seen(data)
    if not is_sendable(seen):
        sizes = f"{len(seen) / 1e6:.0f} MB as it is sent, at most {LARGEST_URL * 0.75 / 1e6:.0f} MB can be"
        raise Refusal(422, f"This image is too large for the model's server: {sizes}. Save it smaller, or crop it.")
    return Upload(data, seen, mime, suffix, checked.sha256, checked.width, checked.height)
