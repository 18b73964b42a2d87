"""The engine's thread: many requests at once give what each gives alone, and none holds up another."""

from __future__ import annotations

import asyncio
import random
import threading
import time
from collections.abc import Iterator

import pytest
import torch

from miniglm.generation import Engine, Generation, SamplingSettings
from miniglm.model import GLM, ModelConfig
from miniglm.serving.settings import Limits
from miniglm.serving.worker import QueueFull, ShuttingDown, Worker

VOCABULARY = 61


@pytest.fixture(scope="module")
def model() -> GLM:
    made = GLM(ModelConfig(VOCABULARY, 32, 48, 2, 2, 1, 16, 64)).initialize(3).eval()
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.3)
    return made


@pytest.fixture
def worker(model: GLM) -> Iterator[Worker]:
    made = Worker(model, Limits(slots=4, queue=8))
    yield made
    made.close(0.0)


def jobs(count: int) -> list[tuple[list[int], SamplingSettings]]:
    rng = random.Random(0)
    return [
        (
            [rng.randrange(VOCABULARY) for _ in range(rng.randrange(1, 80))],
            SamplingSettings(
                max_new_tokens=rng.randrange(1, 40), temperature=rng.choice([0.0, 0.9]), seed=i, top_k=20, top_p=0.9
            ),
        )
        for i in range(count)
    ]


ENDLESS = SamplingSettings(max_new_tokens=10**6)


def test_many_at_once_give_what_each_gives_alone(model: GLM, worker: Worker) -> None:
    """Four slots, twelve requests from threads and from an event loop, of different lengths and settings."""
    given = jobs(12)

    async def ask() -> list[Generation]:
        async def one(prompt: list[int], settings: SamplingSettings) -> Generation:
            request = worker.submit(prompt, settings)
            ids = [token.id async for token in request]
            assert request.finish_reason is not None
            return Generation(ids, request.finish_reason)

        return list(await asyncio.gather(*(one(*job) for job in given)))

    alone = [Engine(model).generate([prompt], settings)[0] for prompt, settings in given]
    assert asyncio.run(ask()) == alone
    requests = [worker.submit(*job) for job in given]
    assert [[token.id for token in request] for request in requests] == [g.ids for g in alone]
    assert worker.tokens == 2 * sum(len(g.ids) for g in alone)


def test_log_probabilities_are_the_models_own(model: GLM, worker: Worker) -> None:
    settings = SamplingSettings(max_new_tokens=5, temperature=1.5, top_k=9, seed=2)
    tokens = list(worker.submit([1, 2, 3], settings, logprobs=4))
    ids = [1, 2, 3]
    for token in tokens:
        with torch.inference_mode():
            expected = model.logits(model(torch.tensor([ids])))[0, -1].log_softmax(-1)
        assert token.logprob == pytest.approx(float(expected[token.id]), abs=1e-3)
        best = expected.topk(4)
        assert [i for i, _ in token.top] == best.indices.tolist()
        assert [p for _, p in token.top] == pytest.approx(best.values.tolist(), abs=1e-3)
        ids.append(token.id)
    assert all(token.logprob is None and token.top == () for token in worker.submit([1], settings))


def test_a_full_queue_refuses_and_then_goes_on_first_come_first_served(worker: Worker) -> None:
    running = [worker.submit([1], ENDLESS) for _ in range(4)]
    for request in running:
        next(iter_tokens(request))
    order: list[int] = []
    waiting = [worker.submit([1], SamplingSettings(max_new_tokens=3)) for _ in range(8)]
    with pytest.raises(QueueFull):
        worker.submit([1], ENDLESS)
    assert (worker.running, worker.waiting) == (4, 8)

    def read(number: int) -> None:
        list(waiting[number])
        order.append(number)

    threads = [threading.Thread(target=read, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for request in running[1:]:
        request.cancel()
    for thread in threads:
        thread.join()
    assert sorted(order) == list(range(8))
    assert running[0].finish_reason is None
    running[0].cancel()


def iter_tokens(request: object) -> Iterator[object]:
    """One look at a request that goes on: the iterator is kept, or its end would cancel the request."""
    KEPT.append(iter(request))  # type: ignore[call-overload]
    return KEPT[-1]


KEPT: list[Iterator[object]] = []


def test_a_request_whose_reader_has_gone_is_dropped_at_the_next_step(worker: Worker) -> None:
    async def leave() -> None:
        request = worker.submit([1], ENDLESS)
        stream = request.batches()
        await anext(stream)
        with worker._change:  # the engine may be in the middle of a step, but cannot begin another
            before = worker.tokens
            request.cancel()
        await stream.aclose()  # type: ignore[attr-defined]
        while request.finish_reason is None:
            await asyncio.sleep(0)
        assert request.finish_reason == "cancelled"
        assert worker.running == 0
        assert worker.tokens - before <= 1

    async def only_leave() -> None:
        request = worker.submit([1], ENDLESS)
        stream = request.batches()
        await anext(stream)
        await stream.aclose()  # type: ignore[attr-defined]
        while request.finish_reason is None:
            await asyncio.sleep(0)
        assert request.finish_reason == "cancelled"

    asyncio.run(leave())
    asyncio.run(only_leave())
    assert len(list(worker.submit([1], SamplingSettings(max_new_tokens=3)))) == 3


def test_a_failure_in_the_engine_reaches_its_requests_and_the_next_is_served(worker: Worker) -> None:
    with pytest.raises(RuntimeError, match="generation failed"):
        list(worker.submit([VOCABULARY + 5], SamplingSettings()))  # no such token
    assert len(list(worker.submit([1], SamplingSettings(max_new_tokens=3)))) == 3


def test_closing_finishes_what_runs_and_drops_it_after_the_time(model: GLM) -> None:
    worker = Worker(model, Limits(slots=2, queue=2))
    short, endless = worker.submit([1], SamplingSettings(max_new_tokens=30)), worker.submit([2], ENDLESS)
    begun = time.monotonic()
    closing = threading.Thread(target=worker.close, args=(1.0,))
    closing.start()
    assert len(list(short)) == 30
    assert list(endless)
    closing.join()
    assert time.monotonic() - begun >= 1.0
    assert (short.finish_reason, endless.finish_reason) == ("length", "cancelled")
    with pytest.raises(ShuttingDown):
        worker.submit([1], ENDLESS)
    assert not worker._thread.is_alive()
