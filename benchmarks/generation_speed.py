"""Generation of one long text beside the reference's loop, transformers' `generate` and llama.cpp, on the same weights.

    python benchmarks/generation_speed.py [--model default|reference] [--tokens 1500] [--rounds 5] [--no-llama-cpp]

The reference's loop runs the whole window again for every token; --reference-tokens of it are timed once its window is
full, where each costs the same. llama.cpp runs through xllamacpp on a float32 GGUF of the same model, written for the
occasion, with its own defaults and as many threads as torch.
Random weights: speed does not depend on them, and no sequence ends early.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
import urllib.request
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # as the command line has it; before numpy is loaded

import torch
from side_by_side import alternate, median_ratio, parser, report
from training_speed import MODELS

from miniglm.generation import Engine
from miniglm.interop.to_gguf import export_gguf
from miniglm.model import GLM
from miniglm.sampling import SamplingSettings
from miniglm.tokenizer import train_tokenizer

PROMPT = list(range(20, 32))


def speed(tokens: int, work: Callable[[], object]) -> float:
    """Tokens a second."""
    begun = time.perf_counter()
    work()
    return tokens / (time.perf_counter() - begun)


@torch.inference_mode()
def whole_context(model: GLM, context: int, count: int) -> None:
    """The reference's loop with a full window."""
    ids = torch.tensor([(PROMPT * context)[:context]])
    for _ in range(count):
        logits = model.logits(model(ids[:, -context:]))[:, -1]
        ids = torch.cat((ids, logits.argmax(-1, keepdim=True)), dim=1)


def transformers_generate(model: GLM, count: int) -> Callable[[], object]:
    """`generate` with its cache."""
    from transformers import GlmConfig, GlmForCausalLM

    theirs = GlmForCausalLM(GlmConfig(**(model.config.to_hf() | {"pad_token_id": 0, "eos_token_id": None}))).eval()  # type: ignore[no-untyped-call]
    theirs.load_state_dict(model.state_dict())
    ids = torch.tensor([PROMPT])
    return lambda: theirs.generate(ids, max_new_tokens=count, do_sample=False, use_cache=True, eos_token_id=None)


def llama_cpp(model: GLM, folder: Path, count: int) -> Callable[[], object]:
    """llama.cpp on the exported weights, as many threads as torch has."""
    import xllamacpp  # type: ignore[import-untyped]

    tokenizer = train_tokenizer(["曹操字孟德"], vocab_size=None, corpus_characters=5)  # the other rows are unused
    export_gguf(model, tokenizer, folder / "f32.gguf", type="f32", name="random")
    settings = xllamacpp.CommonParams()
    settings.model.path = str(folder / "f32.gguf")
    settings.n_ctx = count + 2 * len(PROMPT)
    settings.cpuparams.n_threads = settings.cpuparams_batch.n_threads = torch.get_num_threads()
    settings.n_parallel = 1
    settings.fit_params = False
    settings.port = settings.verbosity = 0
    server = xllamacpp.Server(settings)
    asked = {"prompt": PROMPT, "n_predict": count, "temperature": 0, "ignore_eos": True, "cache_prompt": False}
    body, headers = json.dumps(asked).encode(), {"Content-Type": "application/json"}

    def generate() -> None:
        request = urllib.request.Request(server.listening_address + "/completion", body, headers)
        with urllib.request.urlopen(request) as reply:
            made = json.load(reply)["tokens_predicted"]
        if made != count:
            raise SystemExit(f"llama.cpp made {made} tokens, not {count}")

    return generate


def main() -> None:
    options: argparse.ArgumentParser = parser(__doc__)
    options.add_argument("--model", choices=MODELS, default="default")
    options.add_argument("--tokens", type=int, default=1500)
    options.add_argument("--reference-tokens", type=int, default=20)
    options.add_argument("--batch", type=int, default=32)
    options.add_argument("--no-llama-cpp", action="store_true")
    given = options.parse_args()
    window = MODELS[given.model].max_position_embeddings
    # Room for the whole text: a window that moves would measure prefills instead.
    model = GLM(replace(MODELS[given.model], max_position_embeddings=given.tokens + len(PROMPT))).initialize(0).eval()
    engine = Engine(model)
    settings = SamplingSettings(max_new_tokens=given.tokens, temperature=0.0)
    fewer = SamplingSettings(max_new_tokens=max(1, given.tokens // 5), temperature=0.0)
    theirs = transformers_generate(model, given.tokens)
    subjects: dict[str, Callable[[], float]] = {
        "miniGLM": lambda: speed(given.tokens, lambda: engine.generate([PROMPT], settings)),
        f"miniGLM, {given.batch} at once": lambda: speed(
            given.batch * fewer.max_new_tokens, lambda: engine.generate([PROMPT] * given.batch, fewer)
        ),
        "the reference's loop": lambda: speed(
            given.reference_tokens, lambda: whole_context(model, window, given.reference_tokens)
        ),
        "transformers generate": lambda: speed(given.tokens, theirs),
    }
    with tempfile.TemporaryDirectory() as folder:
        if not given.no_llama_cpp:
            llama = llama_cpp(model, Path(folder), given.tokens)
            subjects["llama.cpp"] = lambda: speed(given.tokens, llama)
        found = alternate(subjects, given.rounds)
    rows = [
        {
            "": name,
            "tokens/s": statistics.median(speeds),
            "miniGLM is × as fast": median_ratio(found["miniGLM"], speeds),
        }
        for name, speeds in found.items()
    ]
    report(f"generation_speed_{given.model}", f"{given.tokens} tokens, {given.model} model", rows, given, rounds=found)


if __name__ == "__main__":
    main()
