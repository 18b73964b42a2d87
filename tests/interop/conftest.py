"""A small model that was really taught questions, and the texts that every program must read as we do.

With MINIGLM_TEST_MODEL=RUN/model the same tests run on that model instead (docs/interop.md has what they found).
"""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest
from interop.texts import ANSWERS, LINES, ROOM, prompts_of
from running import ROOT

from miniglm.checkpoint import load_model, save_model
from miniglm.config import ModelConfig
from miniglm.corpus import catalog
from miniglm.dataset import Batches, PairRows, read_pairs, write_pairs
from miniglm.generation import Engine
from miniglm.model import GLM
from miniglm.qa.formats import Example, read_examples
from miniglm.qa.questions import normalize_question
from miniglm.sampling import Generation, SamplingSettings
from miniglm.tokenizer import Tokenizer, train_tokenizer
from miniglm.training import Stage, train


@pytest.fixture(scope="session")
def lines() -> list[str]:
    """10,000 lines of the novel: its sentences."""
    text = catalog.fetch(catalog.CATALOG[0]).read_text("utf-8")
    found = [line for line in re.split(r"(?<=[。！？])|\n", text) if line.strip()]
    assert len(found) >= LINES
    return found[:LINES]


@pytest.fixture(scope="session")
def questions() -> list[Example]:
    """200 questions; the model below was taught every second one."""
    found = read_examples(ROOT / "data/sanguo/train.jsonl").examples
    return [found[i] for i in range(0, 2 * ANSWERS, 2)]


@pytest.fixture(scope="session")
def taught(questions: list[Example], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model folder: two layers, grouped-query attention, half a minute's worth of learning questions by heart."""
    if given := os.environ.get("MINIGLM_TEST_MODEL"):
        return Path(given)
    folder = tmp_path_factory.mktemp("taught")
    some = questions[::2]
    texts = [part for e in questions for part in (e.question, e.answer)]
    tokenizer = train_tokenizer(texts, vocab_size=1024, corpus_characters=sum(map(len, texts)))
    encoded = [tokenizer.encode_training_example([(normalize_question(e.question), e.answer)]) for e in some]
    write_pairs(folder / "pairs.npz", encoded)
    rows = PairRows(read_pairs(folder / "pairs.npz"), 128, 1, tokenizer.end_of_text)
    model = GLM(ModelConfig(tokenizer.vocab_size, 64, 192, 2, 2, 1, 32, 128)).initialize(1)
    train(
        model,
        Batches(None, rows, 8),
        Stage("finetune", rows=8, steps=150, evaluate_every=150),
        folder / "training",
        evaluate=lambda: {"score": 0.0},
        save_best=lambda best: None,
    )
    save_model(folder / "model", model, tokenizer)
    return folder / "model"


@pytest.fixture(scope="session")
def ours(taught: Path) -> tuple[GLM, Tokenizer]:
    return load_model(taught)


@pytest.fixture(scope="session")
def answers(ours: tuple[GLM, Tokenizer], questions: list[Example]) -> list[Generation]:
    """What our own engine answers, greedily."""
    model, tokenizer = ours
    settings = SamplingSettings(max_new_tokens=ROOM, stop_ids=tokenizer.stop_ids)
    made = Engine(model).generate(prompts_of(tokenizer, questions), settings)
    stopped = sum(g.finish_reason == "stop" for g in made)
    assert stopped > ANSWERS * 0.8 and len({tuple(g.ids) for g in made}) > ANSWERS / 4  # a model worth comparing
    return made
