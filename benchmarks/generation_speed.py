"""Generation of one long text beside the reference's loop, transformers' `generate` and llama.cpp, on the same weights.

    python benchmarks/generation_speed.py [--model default|reference] [--tokens 1500] [--gguf FILE] [--rounds 5]

The reference's loop runs the whole window again for every token; --reference-tokens of it are timed once its window is
full, where each costs the same. --gguf is the same model's float32 export, for llama.cpp through xllamacpp.
Random weights: speed does not depend on them, and no sequence ends early.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from side_by_side import alternate, median_ratio, parser, report
from training_speed import MODELS

from miniglm.generation import Engine, SamplingSettings
from miniglm.model import GLM

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


def llama_cpp(gguf: Path, count: int) -> Callable[[], object]:
    """llama.cpp on the exported weights, as many threads as torch has."""
    import json

    import xllamacpp  # type: ignore[import-untyped]

    settings = xllamacpp.CommonParams()
    settings.model.path = str(gguf)
    settings.n_ctx = count + 2 * len(PROMPT)
    settings.cpuparams.n_threads = torch.get_num_threads()
    server = xllamacpp.Server(settings)
    request = {"prompt": PROMPT, "n_predict": count, "temperature": 0, "ignore_eos": True, "cache_prompt": False}
    return lambda: server.handle_completions(json.dumps(request))


def main() -> None:
    options: argparse.ArgumentParser = parser(__doc__)
    options.add_argument("--model", choices=MODELS, default="default")
    options.add_argument("--tokens", type=int, default=1500)
    options.add_argument("--reference-tokens", type=int, default=20)
    options.add_argument("--batch", type=int, default=32)
    options.add_argument("--gguf", type=Path)
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
    if given.gguf is not None:
        llama = llama_cpp(given.gguf, given.tokens)
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
