"""A small random model, and a server that answers with it."""

from __future__ import annotations

import multiprocessing
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from served import MODEL, Running, Start, serving
from together import forking

from miniglm.checkpoint import load_model, save_model
from miniglm.config import ModelConfig
from miniglm.corpus import Paragraph
from miniglm.lookup import Answerer
from miniglm.lookup.build import build_index
from miniglm.model import GLM
from miniglm.qa.formats import Example, Turn
from miniglm.serving.book import BookService
from miniglm.tokenizer import Tokenizer, train_tokenizer

TEXT = "滚滚长江东逝水，浪花淘尽英雄。是非成败转头空，青山依旧在，几度夕阳红。白发渔樵江渚上，惯看秋月春风。"


@pytest.fixture(scope="session", autouse=True)
def quick_engines() -> Iterator[None]:
    """Each server of these tests has an engine with a process of its own. Where that is possible it is forked from one
    that has torch loaded already, in a hundredth of the time; tests that run the command line have it as users do."""
    with pytest.MonkeyPatch.context() as patch:
        if "forkserver" in multiprocessing.get_all_start_methods():
            patch.setattr("miniglm.serving.worker.CONTEXT", forking())
        yield


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that answers with characters of every kind, broken ones among them, and never soon with an end."""
    tokenizer = train_tokenizer([TEXT] * 20, vocab_size=None, corpus_characters=300)
    model = GLM(ModelConfig(tokenizer.vocab_size, 32, 48, 1, 2, 1, 16, 128)).initialize(1)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():  # as initialised, layers do nothing and an answer would hang on the last token only
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.3)
    folder = tmp_path_factory.mktemp("served") / MODEL
    save_model(folder, model, tokenizer)
    return folder


@pytest.fixture(scope="session")
def parts(model_folder: Path) -> tuple[GLM, Tokenizer]:
    """The same model, for comparison."""
    return load_model(model_folder)


@pytest.fixture(scope="session")
def start(model_folder: Path) -> Start:
    """Starts a server: `with start(limits, api_key=…) as running`."""
    return lambda limits=None, **more: serving(model_folder, limits, **more)


@pytest.fixture(scope="session")
def book(tmp_path_factory: pytest.TempPathFactory) -> BookService:
    """Answers from a book of three lines, one of which a taught fact is about."""
    lines = (
        "山中有一座古庙，庙里住着老僧慧远。",
        "山下有个铁匠名叫石勇，打得一手好刀。",
        "渡口的船家姓柳，有三个女儿。",
    )
    heading = "第一回 山中"
    story = [Paragraph("山中记", heading, 1, number, text) for number, text in enumerate((heading, *lines), 1)]
    taught = Example(
        (Turn("古庙里住着谁？", "住着老僧慧远。"),), keys=(("慧远",),), extra={"evidence": "庙里住着老僧慧远"}
    )
    folder = tmp_path_factory.mktemp("book")
    build_index(story, [taught], [], folder, seconds=600, seed=1)
    return BookService(Answerer(folder))


@pytest.fixture(scope="session")
def server(start: Start) -> Iterator[Running]:
    """One server for all tests that leave it as it was."""
    with start() as running:
        yield running
