"""What a model finds likely agrees with transformers, and with the reference's formula where that does not underflow."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch

from miniglm.checkpoint import load_model
from miniglm.conversation import encode_reference, prompt_of
from miniglm.evaluation.evaluate import Settings, Subject, reference_nats, self_perplexities
from miniglm.evaluation.measure import sequence_nats
from miniglm.evaluation.scores import ratio_interval
from miniglm.qa.formats import Example, read_examples


@pytest.fixture(scope="module")
def subject(finished: Path) -> Subject:
    model, tokenizer = load_model(finished / "model")
    return Subject("finished", finished / "model", model, tokenizer)


@pytest.fixture(scope="module")
def examples(finished: Path) -> list[Example]:
    return list(read_examples(finished / "qa" / "train.jsonl").examples[:40])


def test_reference_answers_are_as_likely_as_transformers_says(
    subject: Subject, examples: list[Example], finished: Path
) -> None:
    transformers = pytest.importorskip("transformers")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(finished / "model", dtype=torch.float32).eval()
    found = reference_nats(subject.model, subject.tokenizer, examples)
    context = subject.model.config.max_position_embeddings
    for example, (nats, tokens) in zip(examples, found, strict=True):
        ids, first = encode_reference(subject.tokenizer, example, context)
        with torch.no_grad():
            likely = theirs(torch.tensor([ids])).logits[0, :-1].log_softmax(-1)
        expected = -likely[torch.arange(len(ids) - 1), torch.tensor(ids[1:])][first - 1 :].sum()
        assert nats == pytest.approx(float(expected), rel=1e-4) and tokens == len(ids) - first
        said = subject.tokenizer.decode(ids[first:])
        # One that is longer than the context lost its end.
        whole = len(ids) <= context
        assert said == example.answer and ids[-1] == subject.tokenizer.end_of_text if whole else said in example.answer


def test_lengths_and_batches_do_not_matter(subject: Subject, examples: list[Example]) -> None:
    pairs = [encode_reference(subject.tokenizer, e, 96) for e in examples]
    together = sequence_nats(subject.model, pairs, rows=16)
    assert together == pytest.approx([sequence_nats(subject.model, [pair])[0] for pair in pairs], rel=1e-4)
    ids, first = pairs[0]
    # Cut in two, the parts add up; nothing to score is 0.
    assert sequence_nats(subject.model, [(ids, first)])[0] == pytest.approx(
        sequence_nats(subject.model, [(ids[: first + 2], first)])[0]
        + sequence_nats(subject.model, [(ids, first + 2)])[0],
        rel=1e-4,
    )
    assert sequence_nats(subject.model, [(ids, len(ids))]) == [0.0]


def test_self_perplexity_is_the_reference_formula_without_its_underflow(
    subject: Subject, examples: list[Example]
) -> None:
    """exp(-log(prod p) / m) as in the reference, where the product is still a number."""
    sampling = Settings(temperature=0.8, top_k=100, seed=7)
    answers, values = self_perplexities(subject, examples[:8], sampling)
    from miniglm.generation import Engine
    from miniglm.sampling import SamplingSettings

    engine, tokenizer = Engine(subject.model), subject.tokenizer
    for number, (example, answer, value) in enumerate(zip(examples, answers, values, strict=False)):
        prompt = prompt_of(tokenizer, example, engine.context, engine.context // 2)
        settings = SamplingSettings(
            max_new_tokens=engine.context // 2, temperature=0.8, top_k=100, seed=7 + number, stop_ids=tokenizer.stop_ids
        )
        ids = engine.generate([prompt], settings)[0].ids
        assert tokenizer.decode(ids).strip() == answer
        product = 1.0
        for at in range(len(ids)):
            with torch.no_grad():
                logits = subject.model.logits(subject.model(torch.tensor([prompt + ids[:at]])))[0, -1].double() / 0.8
            logits[logits < logits.topk(100).values[-1]] = -math.inf
            product *= float(logits.softmax(-1)[ids[at]])
        assert value == pytest.approx(math.exp(-math.log(product) / len(ids)), rel=1e-3)


def test_a_ratio_is_of_sums_and_its_interval_holds_it() -> None:
    found = ratio_interval([1.0, 30.0], [1.0, 10.0], transform=math.exp)
    assert found.mean == pytest.approx(math.exp(31 / 11)) and found.low <= found.mean <= found.high
    assert found.low == pytest.approx(math.exp(1.0)) and found.high == pytest.approx(math.exp(3.0))
    with pytest.raises(ValueError):
        ratio_interval([1.0], [0.0])


def test_the_journal_holds_what_json_can(subject: Subject, examples: list[Example]) -> None:
    found = reference_nats(subject.model, subject.tokenizer, examples[:3])
    assert json.loads(json.dumps(found)) == [list(pair) for pair in found]
