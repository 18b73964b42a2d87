"""The protocol against another of our programs: `miniglm serve` with a trained model. Its answers are no facts; what
counts is that every passage is asked, understood as a completion and accounted for."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from socket import create_server

import pytest
from scripted_endpoint import passage_text

from miniglm.corpus import load_books
from miniglm.qa.endpoint import Endpoint
from miniglm.qa.synthesis import Settings, Synthesis, read_seeds, rejected_file, work_folder

pytest.importorskip("miniglm.serving.server")


@pytest.fixture
def served(finished: Path, tmp_path: Path) -> Iterator[str]:
    """The base URL of a server with the small model."""
    with closing(create_server(("127.0.0.1", 0))) as free:
        port = free.getsockname()[1]
    with (tmp_path / "server.log").open("wb") as log:
        command = [sys.executable, "-m", "miniglm", "serve", str(finished), "--port", str(port)]
        process = subprocess.Popen(command, stdout=log, stderr=log, env=os.environ | {"PYTHONUTF8": "1"})
        try:
            while True:
                assert process.poll() is None, (tmp_path / "server.log").read_text("utf-8")
                try:
                    with urllib.request.urlopen(f"http://127.0.0.1:{port}/v1/models") as reply:
                        assert json.load(reply)["data"]
                    break
                except OSError:
                    time.sleep(0.1)
            yield f"http://127.0.0.1:{port}/v1"
        finally:
            process.terminate()
            process.wait()


def test_every_passage_is_asked_and_accounted_for(served: str, tmp_path: Path) -> None:
    with urllib.request.urlopen(f"{served}/models") as reply:
        model = json.load(reply)["data"][0]["id"]
    (tmp_path / "b.txt").write_text("\n".join(passage_text(n) for n in range(3)), "utf-8")
    out = tmp_path / "set.jsonl"
    # The small model's context holds no example of a request: what does not fit, the server refuses or cuts.
    made = Synthesis(load_books([str(tmp_path / "b.txt")]), read_seeds(None)[:1], Settings(model, 120, 1, 1), out)

    async def go() -> str:
        endpoint = Endpoint(served, model, "", structure="json_schema", tries=2, first_wait=0.1)
        try:
            return await made.run(endpoint, at_once=2)
        finally:
            await endpoint.close()

    assert asyncio.run(go()) == ""
    records = [json.loads(line) for line in (work_folder(out) / "journal.jsonl").read_text("utf-8").splitlines()]
    assert len(records) + made.progress.failed == 3
    rejected = [json.loads(line) for line in rejected_file(out).read_text("utf-8").splitlines()]
    assert all(row["reason"] for row in rejected)
    if records:
        assert all(record["prompt_tokens"] > 0 for record in records)
    else:
        assert all("HTTP 400" in reason or "HTTP 422" in reason for reason in made.progress.failures)
