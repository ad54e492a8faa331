"""The endpoint engine as tests ask it: a small image, quick retries, every reply by its image and question."""

from __future__ import annotations

import copy
import io

from PIL import Image
from stand_in import StandIn

from sonovqa.endpoint import Endpoint
from sonovqa.engines import ImageRequest


def picture(mode: str = "RGB", format_: str = "PNG", colour=0, **options) -> bytes:
    stream = io.BytesIO()
    Image.new(mode, (32, 24), colour).save(stream, format_, **options)
    return stream.getvalue()


def engine(server: StandIn, **options) -> Endpoint:
    return Endpoint(server.url, **{"model": "run", "timeout": 60.0, "retries": 3, "backoff": 0.01, **options})


class Hasty(Endpoint):
    """An endpoint that is left so many seconds for some prompts and ten minutes for every other: those are in no hurry."""

    def __init__(self, url: str, model: str, seconds: dict[str, float], **options):
        super().__init__(url, model, timeout=600.0, **options)
        self.seconds = seconds

    async def _tried(self, client, request: dict, read) -> tuple:
        own = copy.copy(self)
        own.timeout = self.seconds.get(request["messages"][-1]["content"][-1]["text"], self.timeout)
        return await Endpoint._tried(own, client, request, read)


def ask(engine_: Endpoint, *prompts: str, image: bytes | None = None, images: int = 1) -> dict:
    data = picture() if image is None else image
    pairs = tuple((f"Q{i}", prompt) for i, prompt in enumerate(prompts, 1))
    requests = (ImageRequest(f"a/{n}.png", data, None, pairs) for n in range(images))
    return {(reply.image_id, reply.question_id): reply for reply in engine_.answer(requests, 20)}


def only(replies: dict):
    assert len(replies) == 1
    return next(iter(replies.values()))
