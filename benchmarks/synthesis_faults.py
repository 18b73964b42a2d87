"""Synthesis under faults: rows in, rows out, nothing lost, with the process killed and resumed on the way.

A scripted server answers 1,000 passages of two facts with two questions each. A tenth of the passages meet a fault
first: malformed JSON, 429 with and without Retry-After, 500, a connection cut in the middle, a hang, a page of HTML,
half a JSON. `miniglm qa synthesize` runs in a process of its own, is killed (SIGKILL) three times and run again.

    python benchmarks/synthesis_faults.py [--passages 1000] [--faults 0.1] [--kills 3] [--out FILE.json]
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tests"))

from scripted_endpoint import GOOD, ScriptedEndpoint, facts_of, passage_text  # noqa: E402

FAULTS = ("malformed", "429", "429 after 1", "500", "cut", "hang", "html", "half")
"""All but the last pass when the passage is asked again; of half a JSON the first fact is kept."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--passages", type=int, default=1000)
    parser.add_argument("--faults", type=float, default=0.1, help="share of the passages that meet a fault")
    parser.add_argument("--kills", type=int, default=3)
    parser.add_argument("--out", type=Path, help="JSON file for the figures")
    given = parser.parse_args()
    every = round(1 / given.faults) if given.faults else given.passages + 1
    faulty = {passage_text(n): FAULTS[n // every % len(FAULTS)] for n in range(0, given.passages, every)}

    def script(passage: str, before: int) -> str:
        fault = faulty.get(passage, GOOD)
        return fault if before == 0 or fault == "half" else GOOD

    with tempfile.TemporaryDirectory() as name, ScriptedEndpoint(script, delay=0.02) as server:
        folder = Path(name)
        (folder / "book.txt").write_text("\n".join(passage_text(n) for n in range(given.passages)), "utf-8")
        found = run(server, folder, given.passages, given.kills)
        found |= {"passages": given.passages, "passages_with_a_fault": len(faulty), "kills": given.kills}
        found |= compare(folder / "set.jsonl", given.passages, faulty)
        found["requests"] = sum(server.asked.values())
        found["passages_answered_more_than_once"] = sum(n > 1 for n in server.answered.values())
    text = json.dumps(found, ensure_ascii=False, indent=2)
    print(text)
    if given.out is not None:
        given.out.write_text(text + "\n", "utf-8")
    sys.exit(0 if found["lost"] == found["doubled"] == found["unexpected"] == 0 else 1)


def run(server: ScriptedEndpoint, folder: Path, passages: int, kills: int) -> dict[str, Any]:
    """Runs the program to the end, killing it `kills` times at even distances."""
    command = [
        *(sys.executable, "-m", "miniglm", "qa", "synthesize", str(folder / "book.txt")),
        *("--out", str(folder / "set.jsonl"), "--base-url", server.base_url, "--model", "scripted", "--yes"),
        *("--passage", "120", "--facts", "2", "--phrasings", "2", "--at-once", "16", "--timeout", "3"),
    ]
    journal = folder / "set.synthesis" / "journal.jsonl"
    environment = os.environ | {"PYTHONUTF8": "1", "PYTHONPATH": str(ROOT / "src")}
    begun, done_when_killed = time.monotonic(), []
    for kill in range(kills + 1):
        process = subprocess.Popen(
            command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
        )
        if kill < kills:
            while lines(journal) < passages * (kill + 1) // (kills + 1):
                if process.poll() is not None:
                    sys.exit(f"ended early: {process.communicate()[1]}")
                time.sleep(0.01)
            process.kill()
        error = process.communicate()[1]
        if kill < kills:
            done_when_killed.append(lines(journal))
        elif process.returncode:
            sys.exit(f"failed: {error}")
    return {"seconds": round(time.monotonic() - begun, 1), "passages_done_at_each_kill": done_when_killed}


def lines(path: Path) -> int:
    return path.read_bytes().count(b"\n") if path.exists() else 0


def compare(out: Path, passages: int, faulty: dict[str, str]) -> dict[str, Any]:
    """Rows that were to come out against those that did."""
    expected: Counter[str] = Counter()
    for number in range(passages):
        facts = facts_of(passage_text(number))
        for fact in facts[:1] if faulty.get(passage_text(number)) == "half" else facts:
            expected.update(fact["questions"])
    found = Counter(json.loads(line)["question"] for line in out.read_text("utf-8").splitlines())
    rejected = out.with_name("set.rejected.jsonl").read_text("utf-8").splitlines()
    return {
        "rows_in": sum(expected.values()),
        "rows_out": sum(found.values()),
        "lost": sum((expected - found).values()),
        "doubled": sum(n - 1 for n in found.values() if n > 1),
        "unexpected": sum(q not in expected for q in found),
        "rejected": Counter(json.loads(line)["reason"] for line in rejected),
    }


if __name__ == "__main__":
    main()
