"""The engine's process: many requests at once give what each gives alone, none holds up another, and whatever becomes
of the process, who waits hears of it."""

from __future__ import annotations

import asyncio
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import psutil
import pytest
import torch
from served import slow, until

from miniglm.config import ModelConfig
from miniglm.errors import MiniGLMError
from miniglm.generation import Engine
from miniglm.model import GLM
from miniglm.sampling import Generation, SamplingSettings
from miniglm.serving.settings import Limits
from miniglm.serving.worker import QueueFull, ShuttingDown, Worker

VOCABULARY = 61


def make_model() -> GLM:
    """A random one, the same in every process."""
    made = GLM(ModelConfig(VOCABULARY, 32, 48, 2, 2, 1, 16, 64)).initialize(3).eval()
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.3)
    return made


@pytest.fixture(scope="module")
def model() -> GLM:
    return make_model()


@pytest.fixture(scope="module")
def worker() -> Iterator[Worker]:
    made = Worker(make_model, Limits(slots=4, queue=8))
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
    made = worker.tokens
    assert asyncio.run(ask()) == alone
    requests = [worker.submit(*job) for job in given]
    assert [[token.id for token in request] for request in requests] == [g.ids for g in alone]
    assert worker.tokens - made == 2 * sum(len(g.ids) for g in alone)


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


def test_a_request_whose_reader_has_gone_is_dropped(worker: Worker) -> None:
    async def leave(first: bool) -> None:
        request = worker.submit([1], ENDLESS)
        stream = request.batches()
        await anext(stream)
        if first:
            request.cancel()
        await stream.aclose()  # type: ignore[attr-defined]
        while request.finish_reason is None:
            await asyncio.sleep(0)
        assert request.finish_reason == "cancelled"
        assert worker.running == 0

    asyncio.run(leave(True))
    asyncio.run(leave(False))
    assert len(list(worker.submit([1], SamplingSettings(max_new_tokens=3)))) == 3


def test_it_is_dropped_at_the_next_step(tmp_path: Path) -> None:
    worker = Worker(partial(slow, make_model, tmp_path / "steps"))
    request = worker.submit([1], ENDLESS)
    next(iter_tokens(request))
    before = worker.tokens
    request.cancel()
    until(lambda: request.finish_reason is not None, "it ends")
    assert request.finish_reason == "cancelled"
    assert worker.tokens - before <= 1  # the engine may be in the middle of a step
    worker.close(0.0)


def test_a_failure_in_the_engine_reaches_its_requests_and_the_next_is_served(worker: Worker) -> None:
    with pytest.raises(RuntimeError, match="generation failed"):
        list(worker.submit([VOCABULARY + 5], SamplingSettings()))  # no such token
    assert len(list(worker.submit([1], SamplingSettings(max_new_tokens=3)))) == 3


def test_closing_finishes_what_runs_and_drops_it_after_the_time() -> None:
    worker = Worker(make_model, Limits(slots=2, queue=2))
    worker.ready()
    join, asking = worker._process.join, []
    worker._process.join = lambda *args: (asking.append(threading.current_thread()), join(*args))  # type: ignore
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
    assert not worker._thread.is_alive() and worker._process.exitcode == 0
    assert asking == [worker._thread]  # of two threads that wait for a forked process, one is told that it failed


def test_a_process_that_dies_fails_its_requests_and_another_one_follows() -> None:
    worker = Worker(make_model, Limits(slots=2, queue=2))
    requests = [worker.submit([1], ENDLESS) for _ in range(3)]  # one of them waits
    next(iter_tokens(requests[0]))
    dead = worker._process
    dead.kill()
    for request in requests:
        with pytest.raises(RuntimeError, match="exit code"):
            list(request)
    assert (worker.running, worker.waiting) == (0, 0)
    until(lambda: worker._process is not dead, "another one begins")
    assert len(list(worker.submit([1], SamplingSettings(max_new_tokens=3)))) == 3
    worker.close(0.0)


def damaged() -> GLM:
    raise MiniGLMError("文件不完整", path="model.safetensors", fix="重新复制")


def killed() -> GLM:
    os._exit(9)


def test_a_model_that_cannot_be_loaded_is_said_in_one_line() -> None:
    for load, words in ((damaged, ("model.safetensors", "文件不完整", "重新复制")), (killed, ("内存",))):
        worker = Worker(load)
        request = worker.submit([1], ENDLESS)  # it may be asked before it is known
        with pytest.raises(MiniGLMError) as caught:
            worker.ready()
        assert all(word in str(caught.value) for word in words)
        with pytest.raises(RuntimeError):
            list(request)
        with pytest.raises(ShuttingDown):
            worker.submit([1], ENDLESS)
        worker.close(0.0)


def while_it_is_there(file: Path) -> GLM:
    if not file.exists():
        raise MiniGLMError("没有这个文件", path=file)
    return make_model()


def test_a_model_that_is_gone_when_the_process_dies_is_said_in_the_log(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    file = tmp_path / "weights"
    file.touch()
    worker = Worker(partial(while_it_is_there, file))
    worker.ready()
    file.unlink()
    worker._process.kill()
    until(lambda: worker._closing, "it gives up")
    with pytest.raises(ShuttingDown):
        worker.submit([1], ENDLESS)
    assert str(file) in caplog.text
    worker.close(0.0)


OWNER = """
import sys
sys.path[:0] = sys.argv[1:]
from test_serving_worker import ENDLESS, make_model
from miniglm.serving.worker import Worker

if __name__ == "__main__":
    worker = Worker(make_model)
    request = worker.submit([1], ENDLESS)
    next(tokens := iter(request))
    print(worker._process.pid, flush=True)
    for _ in tokens:
        pass
"""


@pytest.mark.skipif(sys.platform == "win32", reason="signals of POSIX")
def test_the_process_ends_with_its_owner_and_by_no_signal_of_its_own(tmp_path: Path) -> None:
    (tmp_path / "owner.py").write_text(OWNER, "utf-8")
    command = [sys.executable, str(tmp_path / "owner.py"), str(Path(__file__).parent), *sys.path]
    owner = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert owner.stdout is not None
    engine = psutil.Process(int(owner.stdout.readline()))
    for number in (signal.SIGINT, signal.SIGTERM):
        engine.send_signal(number)
    time.sleep(0.3)
    assert engine.is_running() and engine.status() != psutil.STATUS_ZOMBIE
    owner.kill()
    _, errors = owner.communicate()
    until(lambda: not engine.is_running() or engine.status() == psutil.STATUS_ZOMBIE, "it ends without its owner")
    assert errors == ""
