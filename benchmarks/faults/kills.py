"""Kills runs with SIGKILL at random moments and counts what was lost: nothing, or this exits with 1.

    python benchmarks/faults/kills.py [--kills 200] [--seed 0] [--json kills.json]

Each round takes a folder at the start of a stage, kills the stage's verb several times, each time at a random moment or
right when a file is being written, and lets it end at last. After every kill: each model folder there is loads and is a
model that an undisturbed run saved too; each saved state is one that an undisturbed run was in; every other file is
whole; and what the killed process left half written is gone once the next one has the folder. In the end losses, model
and answers are the undisturbed run's. `qa synthesize` is killed too, while a scripted endpoint answers it: what it had
accepted stays accepted, and in the end every row is there once. Prints a table and writes JSON. Processes are forked from one that has torch
loaded, where the system can fork, so that the kills fall into the work and not into imports.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import multiprocessing
import os
import random
import shutil
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path.insert(0, str(ROOT / "tests"))

from running import RECIPE as SMALL  # noqa: E402
from scripted_endpoint import ScriptedEndpoint, facts_of, passage_text  # noqa: E402

RECIPE = SMALL.replace("evaluate_every = 6", "evaluate_every = 3")
"""Validated often, so that there are many states and models to be killed between."""
SCENARIOS = {
    "pretrain": ("tokenized", ["pretrain"]),
    "finetune": ("pretrained", ["finetune"]),
    "evaluate": ("finished", ["evaluate", "--resume"]),
    "demo": (None, ["demo", "--no-chat"]),
}
"""Which saved folder a round begins with (None: with nothing), and the verb that is killed."""
SYNTHESIS = "synthesis"
"""The scenario beside those: not a stage of a run."""
PASSAGES = 120
"""Of the book that questions are made for."""
KILLS_A_ROUND = 8
"""Then the verb may end, and the round is compared with the undisturbed run."""


def make_material(folder: Path) -> None:
    """A book of the shipped set's answers and questions about it."""
    rows = [json.loads(line) for line in (ROOT / "data/sanguo/train.jsonl").read_text("utf-8").splitlines()]
    lines = [f"第{row['chapter']}回 测试\n{row['answer']}" for row in rows[:400:2]]
    (folder / "书.txt").write_text("\n".join(lines), "utf-8")
    (folder / "qa.jsonl").write_text("".join(json.dumps(r, ensure_ascii=False) + "\n" for r in rows[:60]), "utf-8")
    (folder / "recipe.toml").write_text(RECIPE, "utf-8")
    (folder / "客店.txt").write_text("\n".join(passage_text(n) for n in range(PASSAGES)), "utf-8")


def arguments(verb: list[str], material: Path, run: Path) -> list[str]:
    """The command line of a verb on a run folder."""
    if verb[0] == "evaluate":
        return [*verb, str(run)]
    given = ["--book", str(material / "书.txt"), "--qa", str(material / "qa.jsonl")]
    return [*verb, "--recipe", str(material / "recipe.toml"), *given, "--out", str(run)]


def work(command: list[str], log: Path | None) -> None:
    """In a process of its own: the command line; `log` notes each model and state that is saved."""
    sys.stdout = sys.stderr = Path(os.devnull).open("w", encoding="utf-8")  # noqa: SIM115
    sys.argv = ["miniglm", *command]
    from miniglm import cli, pipeline
    from miniglm.distributed import engine

    if log is not None:
        _note_calls(pipeline, "save_model", lambda folder, *_: f"model {model_mark(folder)}", log)
        _note_calls(engine, "save_state", lambda path, *_: f"state {state_mark(path)}", log)
    cli.main()


def _note_calls(module: Any, name: str, mark: Callable[..., str], log: Path) -> None:
    plain = getattr(module, name)

    def noted(*given: Any, **named: Any) -> None:
        plain(*given, **named)
        with log.open("a", encoding="utf-8") as file:
            file.write(mark(*given) + "\n")

    setattr(module, name, noted)


def model_mark(folder: Path) -> str:
    """What tells the weights of a model folder from others; the folder must load."""
    from miniglm.checkpoint import load_model

    model, _ = load_model(folder)
    found = hashlib.sha256()
    for name, tensor in model.state_dict().items():
        found.update(name.encode() + tensor.numpy().tobytes())
    return found.hexdigest()[:16]


def state_mark(path: Path) -> str:
    """What tells a saved state from others, but for the time it took; it must load."""
    from miniglm.checkpoint import load_state

    tensors, meta = load_state(path)
    found = hashlib.sha256()
    for name in sorted(tensors):
        found.update(name.encode() + tensors[name].numpy().tobytes())
    return f"{path.parent.name} {meta['step']} {found.hexdigest()[:16]}"


def broken_files(run: Path) -> list[str]:
    """Files that are not whole. The two that are appended to may end in half a line, which the next start drops."""
    import numpy as np

    from miniglm.files import TEMPORARY, unsealed

    found = []
    for path in sorted(run.rglob("*")):
        if path.is_dir() or path.name.startswith(TEMPORARY):
            continue
        try:
            if path.suffix == ".json":
                unsealed(json.loads(path.read_text("utf-8")))
            elif path.suffix == ".jsonl":
                lines = path.read_bytes().split(b"\n")
                growing = path.name in ("metrics.jsonl", "progress.jsonl", "journal.jsonl")
                for line in lines[:-1] if growing else lines:
                    json.loads(line or b"{}")
            elif path.suffix in (".npy", ".npz"):
                np.load(path, allow_pickle=False)
            elif path.suffix == ".png" and not path.read_bytes().endswith(b"IEND\xaeB`\x82"):
                raise ValueError("cut short")
        except Exception as error:  # whatever it is, it is a finding
            found.append(f"{path.relative_to(run)}: {error}")
    return found


def _lines(path: Path) -> int:
    return path.read_bytes().count(b"\n") if path.exists() else 0


@dataclass
class Undisturbed:
    """What an undisturbed run did."""

    marks: set[str]
    losses: dict[str, list[float]]
    model: str
    answers: Any
    seconds: dict[str, float]


@dataclass
class Tally:
    """Counts of one scenario."""

    kills: int = 0
    writing: int = 0
    rounds: int = 0
    leftovers: int = 0
    lost: list[str] = field(default_factory=list)

    def note_end(
        self, name: str, folder: Path, holder: Path, process: Any, left: set[Path], last: bool
    ) -> tuple[bool, set[Path]]:
        """Counts how a process ended that worked on `folder`.

        Args:
            holder: the file in which it notes that the folder is its own.
            left: temporary files that stood there when it began.
            last: nobody killed it.

        Returns:
            Whether it came to its end, and the temporary files that it left.
        """
        from miniglm.files import TEMPORARY

        ended = process.exitcode == 0
        if last and not ended:
            self.lost.append(f"{name}: did not resume, exit code {process.exitcode}")
        if holder.exists() and json.loads(holder.read_text("utf-8"))["pid"] == process.pid:
            self.lost += [f"{name}: still there at the next start: {path.name}" for path in left if path.exists()]
        left = set(folder.rglob(f"{TEMPORARY}*"))
        if not ended and not last:
            self.kills += 1
            self.writing += bool(left)
            self.leftovers += len(left)
        return ended, left


def losses_of(run: Path) -> dict[str, list[float]]:
    """Stage to the loss of each step."""
    found = {}
    for stage in ("pretrain", "finetune"):
        path = run / stage / "metrics.jsonl"
        if path.exists():
            found[stage] = [json.loads(line)["loss"] for line in path.read_text("utf-8").splitlines()]
    return found


def answers_of(run: Path) -> Any:
    """All that was answered in the report, if there is one."""
    path = run / "report" / "report.json"
    if not path.exists():
        return None
    return [[row["answers"] for row in split["rows"]] for split in json.loads(path.read_text("utf-8"))["splits"]]


class Bench:
    """The folders of one call of this script."""

    def __init__(self, scratch: Path, seed: int) -> None:
        self.scratch, self.random = scratch, random.Random(seed)
        method = "forkserver" if "forkserver" in multiprocessing.get_all_start_methods() else "spawn"
        self.context: Any = multiprocessing.get_context(method)  # typeshed's contexts have no common base with Process
        if method == "forkserver":
            self.context.set_forkserver_preload(
                [
                    *("miniglm.cli", "miniglm.pipeline", "miniglm.evaluation.pictures", "matplotlib.pyplot"),
                    *("miniglm.qa.synthesis", "openai", "tenacity", "rapidfuzz.process"),
                ]
            )
        self.material = scratch / "material"
        self.material.mkdir(parents=True)
        make_material(self.material)

    def start(self, verb: list[str], run: Path, log: Path | None = None) -> Any:
        return self.started(arguments(verb, self.material, run), log)

    def started(self, command: list[str], log: Path | None = None) -> Any:
        process = self.context.Process(target=work, args=(command, log))
        process.start()
        return process

    def whole(self, verb: list[str], run: Path, log: Path | None = None) -> float:
        """Runs a verb to its end; seconds taken."""
        begun = time.monotonic()
        process = self.start(verb, run, log)
        process.join()
        if process.exitcode != 0:
            raise SystemExit(f"miniglm {' '.join(verb)} ended with {process.exitcode}")
        return time.monotonic() - begun

    def undisturbed(self) -> Undisturbed:
        """One run without kills, which leaves the folders that rounds begin with."""
        run, log = self.scratch / "undisturbed", self.scratch / "log"
        seconds = {}
        self.whole(["tokenize"], run)
        for before, verb in (("tokenized", "pretrain"), ("pretrained", "finetune"), ("finished", "evaluate")):
            shutil.copytree(run, self.scratch / before)
            seconds[verb] = self.whole(SCENARIOS[verb][1], run, log)
        seconds["demo"] = sum(seconds.values())
        marks = set(log.read_text("utf-8").splitlines())
        return Undisturbed(marks, losses_of(run), model_mark(run / "model"), answers_of(run), seconds)

    def round(self, name: str, kills: int, known: Undisturbed, tally: Tally) -> None:
        """Kills one run up to `kills` times and compares its end with the undisturbed run."""
        from miniglm.files import TEMPORARY
        from miniglm.locking import HOLDER, REPORT

        before, verb = SCENARIOS[name]
        run = self.scratch / "round"
        shutil.rmtree(run, ignore_errors=True)
        if before is not None:
            shutil.copytree(self.scratch / before, run)
        left: set[Path] = set()
        for number in range(kills + 1):
            process = self.start(verb, run)
            last = number == kills
            if not last:
                moment = self.random.uniform(0, 0.8 * known.seconds[name])  # machines have their moods
                process.join(moment)
                if self.random.random() < 0.5:  # right in a write
                    until = time.monotonic() + known.seconds[name]
                    while process.is_alive() and time.monotonic() < until and not any(run.rglob(f"{TEMPORARY}*")):
                        pass
                process.kill()
            process.join()
            holder = run / (f"{REPORT}.lock.json" if name == "evaluate" else HOLDER)
            ended, left = tally.note_end(name, run, holder, process, left, last)
            self.check(name, run, known, tally)
            if ended:
                break
        tally.rounds += 1
        if left:
            tally.lost.append(f"{name}: temporary files after an end: {sorted(path.name for path in left)}")
        found = losses_of(run)
        tally.lost += [f"{name}: other losses in {s}" for s in found if found[s] != known.losses[s]]
        if name != "pretrain" and model_mark(run / "model") != known.model:
            tally.lost.append(f"{name}: another model")
        if name in ("evaluate", "demo") and answers_of(run) != known.answers:
            tally.lost.append(f"{name}: other answers")

    def synthesis_round(self, kills: int, tally: Tally) -> None:
        """Kills one synthesis up to `kills` times, then lets it end."""
        from miniglm.files import TEMPORARY

        place = self.scratch / "round"
        shutil.rmtree(place, ignore_errors=True)
        place.mkdir()
        out, journal = place / "set.jsonl", place / "set.synthesis" / "journal.jsonl"
        holder = place / "set.synthesis" / "synthesis.lock.json"
        accepted: dict[str, Any] = {}
        left: set[Path] = set()
        with ScriptedEndpoint(delay=0.05) as server:
            command = [
                *("qa", "synthesize", str(self.material / "客店.txt"), "--out", str(out)),
                *("--model", "scripted", "--yes"),
                *("--base-url", server.base_url, "--passage", "120", "--facts", "2", "--phrasings", "2"),
            ]
            for number in range(kills + 1):
                done, last = len(accepted), number == kills
                process = self.started(command)
                if not last:
                    # At a random passage, or right when the set itself is being written at the end.
                    wanted = self.random.randint(done, PASSAGES)
                    writing = self.random.random() < 0.25
                    while process.is_alive() and (
                        not any(place.rglob(f"{TEMPORARY}*")) if writing else _lines(journal) < wanted
                    ):
                        pass
                    time.sleep(0 if writing else self.random.uniform(0, 0.02))
                    process.kill()
                process.join()
                ended, left = tally.note_end(SYNTHESIS, place, holder, process, left, last)
                tally.lost += [f"{SYNTHESIS}: {broken}" for broken in broken_files(place)]
                records = (
                    [json.loads(line) for line in journal.read_bytes().split(b"\n")[:-1]] if journal.exists() else []
                )
                now = {record["passage"]: record["rows"] for record in records}
                if len(now) < len(records):
                    tally.lost.append(f"{SYNTHESIS}: a passage is in the journal twice")
                tally.lost += [f"{SYNTHESIS}: passage {p} lost" for p in accepted if now.get(p) != accepted[p]]
                accepted = now
                if ended:
                    break
        tally.rounds += 1
        if left:
            tally.lost.append(f"{SYNTHESIS}: temporary files after an end: {sorted(path.name for path in left)}")
        wanted_rows = Counter(q for n in range(PASSAGES) for f in facts_of(passage_text(n)) for q in f["questions"])
        found = Counter(json.loads(line)["question"] for line in out.read_text("utf-8").splitlines())
        if found != wanted_rows:
            tally.lost.append(
                f"{SYNTHESIS}: {(wanted_rows - found).total()} lost, {(found - wanted_rows).total()} doubled"
            )

    def check(self, name: str, run: Path, known: Undisturbed, tally: Tally) -> None:
        """What must hold after every kill."""
        from miniglm.errors import MiniGLMError

        marks = []
        try:
            marks += [f"model {model_mark(path.parent)}" for path in run.rglob("model.safetensors")]
            marks += [f"state {state_mark(path)}" for path in run.rglob("state*.safetensors")]
        except MiniGLMError as error:
            tally.lost.append(f"{name}: {error}")
        tally.lost += [f"{name}: never reached: {mark}" for mark in marks if mark not in known.marks]
        tally.lost += [f"{name}: {broken}" for broken in broken_files(run)]


def kill_runs(scratch: Path, kills: int, seed: int, say: Callable[[str], None]) -> dict[str, Any]:
    """`kills` kills, spread over the scenarios; what was counted."""
    bench = Bench(scratch, seed)
    known = bench.undisturbed()
    say("undisturbed: " + ", ".join(f"{name} {seconds:.1f} s" for name, seconds in known.seconds.items()))
    tallies = {name: Tally() for name in (SYNTHESIS, *SCENARIOS)}
    for number, (name, tally) in enumerate(tallies.items()):
        wanted = (kills + number) // len(tallies)
        while tally.kills < wanted:
            at_once = min(KILLS_A_ROUND, wanted - tally.kills)
            if name == SYNTHESIS:
                bench.synthesis_round(at_once, tally)
            else:
                bench.round(name, at_once, known, tally)
            say(f"{name}: {tally.kills} kills, {len(tally.lost)} lost")
    return {name: vars(tally) for name, tally in tallies.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, default=Path(__file__).with_suffix(".json"))
    given = parser.parse_args()
    begun = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="miniglm-kills-") as folder:
        found = kill_runs(Path(folder), given.kills, given.seed, lambda line: print(line, flush=True))
    totals: Counter[str] = Counter()
    for tally in found.values():
        totals.update({key: value for key, value in tally.items() if key != "lost"})
        totals["lost"] += len(tally["lost"])
    print(f"\n{'':10}{'kills':>8}{'in a write':>12}{'left half':>11}{'rounds':>8}{'lost':>6}")
    for name, tally in found.items():
        row = tally | {"lost": len(tally["lost"])}
        print(f"{name:10}{row['kills']:8}{row['writing']:12}{row['leftovers']:11}{row['rounds']:8}{row['lost']:6}")
    print(
        f"{'all':10}{totals['kills']:8}{totals['writing']:12}{totals['leftovers']:11}{totals['rounds']:8}"
        f"{totals['lost']:6}   ({time.monotonic() - begun:.0f} s)"
    )
    for tally in found.values():
        for line in tally["lost"]:
            print("LOST", line)
    report = {"seed": given.seed, "kills": totals["kills"], "lost": totals["lost"], "scenarios": found}
    given.json.write_text(json.dumps(report, ensure_ascii=False, indent=2) + "\n", "utf-8")
    sys.exit(1 if totals["lost"] else 0)


if __name__ == "__main__":
    main()
