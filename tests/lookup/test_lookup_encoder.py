"""The encoder learns which words belong together, and is read back as it was written."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from miniglm.errors import MiniGLMError
from miniglm.lookup.encoder import SORTED, Encoder, build_vocabulary
from miniglm.lookup.text import grams, plain
from miniglm.lookup.training import Batch, train_encoder

SAME = [("玄德", "刘备"), ("孔明", "诸葛"), ("云长", "关羽"), ("翼德", "张飞"), ("孟德", "曹操"), ("子龙", "赵云")]


@pytest.fixture(scope="module")
def encoder() -> Encoder:
    texts = [word for pair in SAME for word in pair]
    vocabulary = build_vocabulary(map(plain, texts * 2))
    bags = {text: vocabulary.bag(plain(text)) for text in texts}

    def batch(current: Callable[[], Encoder], share: float) -> Batch:
        return [bags[left] for left, _ in SAME], [bags[right] for _, right in SAME]

    return train_encoder(vocabulary, batch, seconds=1000, seed=1, most_steps=60)


def test_learns_names_of_one_person(encoder: Encoder) -> None:
    likeness = encoder.texts([left for left, _ in SAME]) @ encoder.texts([right for _, right in SAME]).T
    assert likeness.argmax(axis=1).tolist() == list(range(len(SAME)))


def test_unknown_text_is_like_nothing(encoder: Encoder) -> None:
    assert not encoder.texts(["xyz", ""]).any()
    assert np.allclose(np.linalg.norm(encoder.texts(["玄德"]), axis=1), 1)


def test_parts_of_a_text_are_as_each_by_itself(encoder: Encoder) -> None:
    text = plain("玄德孔明x刘备云长关羽")
    starts, ends = np.array([0, 1, 4, 3, 5]), np.array([4, 6, 5, 3, len(text)])
    each = encoder.bags([encoder.vocabulary.bag(text[start:end]) for start, end in zip(starts, ends, strict=True)])
    numbers = encoder.vocabulary.numbers(grams(text))
    assert np.allclose(encoder.parts(numbers, starts, ends), each, atol=1e-6)
    assert np.array_equal(encoder.parts(numbers, starts[:0], ends[:0]), each[:0])
    for unknown, end in (("", 0), ("xyz", 3)):
        numbers = encoder.vocabulary.numbers(grams(plain(unknown)))
        assert not encoder.parts(numbers, np.array([0]), np.array([end])).any()


def test_many_numbers_are_those_of_few(encoder: Encoder) -> None:
    every = grams(plain("玄德孔明关张" * 500))
    assert len(every) > SORTED
    each = np.concatenate([encoder.vocabulary.numbers(every[n : n + 100]) for n in range(0, len(every), 100)])
    assert np.array_equal(encoder.vocabulary.numbers(every), each)


def test_joined_ones_compare_as_the_mean_of_theirs(encoder: Encoder) -> None:
    turned = Encoder(encoder.vocabulary, encoder.vectors[:, ::-1] * np.float32(-1))
    other = Encoder(encoder.vocabulary, np.random.default_rng(0).normal(size=encoder.vectors.shape).astype(np.float32))
    texts = ["玄德", "孔明云长", "曹操刘备"]

    def cosines(one: Encoder) -> NDArray[np.float32]:
        vectors = one.texts(texts)
        found: NDArray[np.float32] = vectors @ vectors.T
        return found

    assert np.allclose(cosines(Encoder.joined([encoder, turned])), cosines(encoder), atol=1e-5)
    assert Encoder.joined([encoder, other]).vectors.shape[1] == 2 * encoder.vectors.shape[1]
    assert not np.allclose(cosines(Encoder.joined([encoder, other])), cosines(encoder), atol=1e-2)


def test_read_back(encoder: Encoder, tmp_path: Path) -> None:
    encoder.save(tmp_path)
    again = Encoder.load(tmp_path)
    assert np.allclose(again.texts(["玄德"]), encoder.texts(["玄德"]), atol=1e-2)
    assert [path.name for path in tmp_path.iterdir()] == ["encoder.safetensors"]


def test_damaged_file_is_named(encoder: Encoder, tmp_path: Path) -> None:
    encoder.save(tmp_path)
    file = tmp_path / "encoder.safetensors"
    file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(MiniGLMError, match=r"encoder\.safetensors.*miniglm index"):
        Encoder.load(tmp_path)
