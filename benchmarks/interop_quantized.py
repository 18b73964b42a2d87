"""What each exported form of a trained model costs in answers: `python benchmarks/interop_quantized.py RUN`.

Exports every GGUF and ONNX type and asks the validation questions through llama.cpp and onnxruntime. Prints a table and
writes interop_quantized.json beside this file. Perplexity is per token of the validation questions' reference answers
with the token that closes them, as in the report; key accuracy is the share of greedy answers that hold all their keys.

Both are the programs' own, with their usual settings (llama.cpp keeps its cache in float16). llama.cpp tells no
probabilities of a given text, so each token of a reference answer is forced by a bias and its unbiased probability read.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import tempfile
import urllib.request
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from miniglm.checkpoint import load_model
from miniglm.conversation import encode_reference, messages_of, prompt_of
from miniglm.evaluation.evaluate import spread
from miniglm.evaluation.scores import bootstrap_interval
from miniglm.interop.export import FORMATS, export_model
from miniglm.locate import find_model
from miniglm.model import GLM
from miniglm.qa.formats import Example, read_examples
from miniglm.qa.keys import holds_keys
from miniglm.tokenizer import Tokenizer


def perplexity(nats: Sequence[tuple[float, int]]) -> float:
    """Of (-log p, tokens) of each answer."""
    return math.exp(sum(n for n, _ in nats) / sum(tokens for _, tokens in nats))


def of_gguf(file: Path, model: GLM, tokenizer: Tokenizer, examples: Sequence[Example]) -> tuple[float, list[str]]:
    """Perplexity and answers, both llama.cpp's own."""
    import xllamacpp

    parameters = xllamacpp.CommonParams()
    parameters.model.path = str(file)
    parameters.fit_params = False
    parameters.port = 0
    parameters.verbosity = 0
    server = xllamacpp.Server(parameters)

    def ask(where: str, **body: Any) -> Any:
        data = json.dumps(body | {"temperature": 0}).encode()
        request = urllib.request.Request(server.listening_address + where, data, {"Content-Type": "application/json"})
        with urllib.request.urlopen(request) as reply:
            return json.loads(reply.read())

    nats, answers = [], []
    (harmless,) = tokenizer.encode("!")
    context = model.config.max_position_embeddings
    for example in examples:
        ids, first = encode_reference(tokenizer, example, context)
        total = 0.0
        for at in range(first, len(ids)):
            # Nothing is told of a token that ends the answer or is part of a character: another is forced then, and the
            # likeliest are read, or all where it is not among them.
            shown = tokenizer.decode([ids[at]])
            whole = shown != "" and "\ufffd" not in shown
            token = ids[at] if whole else harmless
            told: dict[int, float] = {}
            for count in (1, model.config.vocab_size) if whole else (32, model.config.vocab_size):
                made = ask("/completion", prompt=ids[:at], n_predict=1, n_probs=count, logit_bias=[[token, 1000.0]])
                (read,) = made["completion_probabilities"]
                told = {each["id"]: each["logprob"] for each in [*read["top_logprobs"], read]}
                if ids[at] in told:
                    break
            total -= told[ids[at]]
        nats.append((total, len(ids) - first))
        made = ask("/v1/chat/completions", messages=messages_of(example), max_tokens=context // 2)
        answers.append(made["choices"][0]["message"]["content"])
    return perplexity(nats), answers


def of_onnx(file: Path, model: GLM, tokenizer: Tokenizer, examples: Sequence[Example]) -> tuple[float, list[str]]:
    """Perplexity and answers, both onnxruntime's own."""
    import onnxruntime

    config = model.config
    session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
    names = [i.name for i in session.get_inputs() if i.name.startswith("past")]
    empty = np.zeros((1, config.num_key_value_heads, 0, config.head_dim), np.float32)

    def run(ids: list[int], past: dict[str, Any], seen: int) -> tuple[np.ndarray[Any, Any], dict[str, Any]]:
        positions = np.arange(seen, seen + len(ids))[None]
        feed = {"input_ids": np.array([ids]), "position_ids": positions}
        feed["attention_mask"] = np.ones((1, seen + len(ids)), np.int64)
        logits, *present = session.run(None, feed | past)
        return logits[0], dict(zip(names, present, strict=True))

    nats, answers = [], []
    room = config.max_position_embeddings // 2
    for example in examples:
        ids, first = encode_reference(tokenizer, example, config.max_position_embeddings)
        logits, _ = run(ids[:-1], dict.fromkeys(names, empty), 0)
        likely = torch.from_numpy(logits[first - 1 :]).double().log_softmax(-1)
        nats.append((float(-likely.gather(1, torch.tensor(ids[first:])[:, None]).sum()), len(ids) - first))
        prompt = prompt_of(tokenizer, example, config.max_position_embeddings, room)
        logits, past = run(prompt, dict.fromkeys(names, empty), 0)
        made: list[int] = []
        while len(made) < room and (token := int(logits[-1].argmax())) not in tokenizer.stop_ids:
            made.append(token)
            logits, past = run([token], past, len(prompt) + len(made) - 1)
        answers.append(tokenizer.decode(made).strip())
    return perplexity(nats), answers


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    arguments.add_argument("run", type=Path)
    arguments.add_argument("--limit", type=int, default=200, help="so many validation questions, evenly spread")
    given = arguments.parse_args()
    model, tokenizer = load_model(find_model(given.run))
    examples = spread(read_examples(given.run / "qa" / "validation.jsonl").examples, given.limit)
    rows = []
    print("| form | type | MB | perplexity / token | key accuracy (95 %) |\n| --- | --- | --- | --- | --- |")
    with tempfile.TemporaryDirectory() as folder:
        for form, types in FORMATS.items():
            for kind in types:
                file = export_model(given.run, form, kind, Path(folder) / f"{kind}.{form}")[0]
                measure = of_gguf if form == "gguf" else of_onnx
                found, answers = measure(file, model, tokenizer, examples)
                right = [float(holds_keys(a, e.keys)) for a, e in zip(answers, examples, strict=True) if e.keys]
                share = bootstrap_interval(right)
                rows.append(
                    {
                        "form": form,
                        "type": kind,
                        "bytes": file.stat().st_size,
                        "perplexity": found,
                        "key_accuracy": [share.mean, share.low, share.high],
                        "questions": len(right),
                    }
                )
                accuracy = f"{share.mean:.1%} ({share.low:.1%} – {share.high:.1%})"
                print(f"| {form} | {kind} | {file.stat().st_size / 1e6:.1f} | {found:.4f} | {accuracy} |", flush=True)
    out = Path(__file__).with_suffix(".json")
    out.write_text(json.dumps({"run": given.run.name, "rows": rows}, indent=2) + "\n", "utf-8")
    print(f"{len(examples)} questions; {out}", file=sys.stderr)


if __name__ == "__main__":
    main()
