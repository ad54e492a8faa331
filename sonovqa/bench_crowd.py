"""One level of load: so many users of an endpoint at once, in one or several client processes."""

from __future__ import annotations

import itertools
import multiprocessing
import random
import secrets
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from sonovqa import asking, bench_caches, bench_images, bench_streaming, bench_timing
from sonovqa.bench_streaming import Asked, Users
from sonovqa.cli import UserError

START_SECONDS = 600  # until all client processes have drawn their images
PARTING_SECONDS = 5
DIED = "a client process died; see above; fewer --users, or --clients 1, show why"
BY_QUESTION, BY_IMAGE = MIXES = ("questions", "images")


@dataclass(frozen=True)
class Level:
    """What is asked of which endpoint by how many users.

    Attributes:
        endpoint: named arguments of `bench_streaming.Users`.
        images: arguments of `bench_images.make`.
        order: one of `bench_streaming.ORDERS`.
        mix: one of `MIXES`, see `mixed`.
        users: at once, over all clients.
        requests: in all.
        clients: processes that the users are spread over: one of them cannot keep up with a fast server.
        new_tokens: an answer's limit.
        salt: the same for all clients, see `bench_caches.Fresh`; another for every level.
    """

    endpoint: dict
    images: dict
    order: str
    mix: str
    users: int
    requests: int
    clients: int
    new_tokens: int
    salt: str = field(default_factory=lambda: secrets.token_hex(8))

    def client(self) -> Users:
        """A client of the endpoint."""
        return Users(**self.endpoint, salt=self.salt)

    def conversations(self, part: int) -> list[list[dict]]:
        """What the clients ask, every ``clients``-th of it from number ``part`` on."""
        told = bench_streaming.messages_of(bench_images.make(**self.images), self.order)
        return list(itertools.islice(mixed(told, self.mix, self.images["seed"]), part, self.requests, self.clients))


def mixed(conversations: list[list[dict]], mix: str, seed: int) -> Iterator[list[dict]]:
    """Conversations without end, in a random order, each once before any comes again.

    Args:
        mix: `BY_QUESTION` draws single ones, `BY_IMAGE` images, whose questions follow one another.
    """
    draw = random.Random(seed)
    size = 1 if mix == BY_QUESTION else len(bench_images.PROMPTS)
    groups = [conversations[i : i + size] for i in range(0, len(conversations), size)]
    while True:
        for group in draw.sample(groups, len(groups)):
            yield from group


def measure(level: Level) -> dict:
    """A level's figures, after a warm-up with another image. No level finds another's images in vLLM's caches.

    Raises:
        UserError: if a client process ends before its users have asked everything.
    """
    client, told = level.client(), []
    warm = bench_images.warm_up(bench_images.make(**level.images), 1)
    few = min(level.users, len(bench_images.PROMPTS))
    client.ask(iter(bench_streaming.messages_of(warm, level.order)), few, level.new_tokens, lambda one: None)
    before = bench_caches.counters(client.base_url, client.key_names)
    with asking.progress() as bar:
        task = bar.add_task(f"{level.users} users", total=level.requests, failed="")

        def heard(one: Asked) -> None:
            told.append(one)
            bar.update(task, advance=1, **({"failed": f"[red]{one.error}[/]"} if one.error else {}))

        wall, busy = (_here if level.clients == 1 else _apart)(level, heard)
    rates = bench_caches.hit_rates(before, bench_caches.counters(client.base_url, client.key_names))
    return figures(told, wall) | {"client_cpu": round(busy / wall, 3), "cache_hits": rates}


def _here(level: Level, heard: Callable[[Asked], None]) -> tuple[float, float]:
    """Ask from this process; gives its wall and CPU seconds."""
    client, asked = level.client(), level.conversations(0)
    started, cpu = time.perf_counter(), time.process_time()
    client.ask(iter(asked), level.users, level.new_tokens, heard)
    return time.perf_counter() - started, time.process_time() - cpu


def _apart(level: Level, heard: Callable[[Asked], None]) -> tuple[float, float]:
    """Ask from processes of their own, started together; gives the wall seconds and the busiest one's CPU seconds."""
    spawn = multiprocessing.get_context("spawn")
    ready, told = spawn.Barrier(level.clients + 1), spawn.Queue()
    clients = [spawn.Process(target=_client, args=(level, n, ready, told), daemon=True) for n in range(level.clients)]
    for client in clients:
        client.start()
    try:
        ready.wait(START_SECONDS)
    except threading.BrokenBarrierError:
        for client in clients:
            client.join(PARTING_SECONDS)  # it may still be saying why
            client.terminate()
        raise UserError(DIED) from None
    started, busy, open_ = time.perf_counter(), 0.0, level.clients
    while open_:
        one = _next(told, clients)
        if isinstance(one, Asked):
            heard(one)
        else:
            busy, open_ = max(busy, one), open_ - 1
    wall = time.perf_counter() - started
    for client in clients:
        client.join()
    return wall, busy


def _next(told, clients: list):
    """What a client says next. Raises `UserError` if one died, which then never says that it is done."""
    import queue

    while True:
        try:
            return told.get(timeout=1.0)
        except queue.Empty:
            if any(client.exitcode for client in clients):
                raise UserError(DIED) from None


def _client(level: Level, part: int, ready, told) -> None:
    """A client process: its share of users and requests; what it heard, and last its CPU seconds."""
    try:
        client, asked = level.client(), level.conversations(part)
        users = len(range(part, level.users, level.clients))
        import openai  # noqa: F401 - before the clock
    except BaseException:
        ready.abort()  # nobody else waits for this one
        raise
    try:
        ready.wait(START_SECONDS)
    except threading.BrokenBarrierError:  # of another client, which says why
        return
    cpu = time.process_time()
    client.ask(iter(asked), users, level.new_tokens, told.put)
    told.put(time.process_time() - cpu)


def figures(told: list[Asked], wall: float) -> dict:
    """What a level comes to: rates over the wall time, waits of answered requests in seconds, faults by kind."""
    good = [one for one in told if one.error is None]
    tokens = sum(one.tokens for one in good)
    return {
        "wall_seconds": round(wall, 6),
        "requests": len(told),
        "answered": len(good),
        "answers_per_second": round(len(good) / wall, 3),
        "tokens_per_second": round(tokens / wall, 2) if tokens else None,  # not every server counts them
        "seconds": bench_timing.spread([one.seconds for one in good]),
        "first_token": bench_timing.spread([one.first_token for one in good if one.first_token is not None]),
        "errors": bench_streaming.count([one.error for one in told if one.error is not None]),
        "retries": bench_streaming.count([kind for one in told for kind in one.retried]),
    }
