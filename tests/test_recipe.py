"""Recipes: defaults, files, overrides, paths, and what is said about a fault."""

from __future__ import annotations

import tomllib
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from miniglm.config import ModelConfig
from miniglm.errors import MiniGLMError
from miniglm.recipe import Recipe, default_qa, find_recipe, load_recipe, shipped


def write(folder: Path, text: str) -> Path:
    path = folder / "r.toml"
    path.write_text(text, encoding="utf-8")
    return path


def test_default_recipe_file_says_what_the_defaults_are() -> None:
    assert load_recipe(shipped("recipes", "sanguo.toml")) == load_recipe(None)


def test_every_commented_setting_of_the_default_recipe_is_valid(tmp_path: Path) -> None:
    lines = shipped("recipes", "sanguo.toml").read_text(encoding="utf-8").splitlines()
    settings = [line.removeprefix("# ") if line.startswith("# ") and " = " in line else line for line in lines]
    recipe = load_recipe(write(tmp_path, "\n".join(settings)))
    assert recipe.model.hidden_size == 256 and recipe.finetune.text_share == 0.125


@pytest.mark.parametrize("name", ["tiny", "reference"])
def test_shipped_recipes_give_whole_models_and_an_end(name: str) -> None:
    recipe = load_recipe(name)
    config = ModelConfig(vocab_size=1024, **recipe.model.sizes())
    assert config.max_position_embeddings == recipe.model.context
    assert recipe.run.minutes is None and recipe.pretrain.steps and recipe.finetune.steps


def test_reference_recipe_has_the_reference_rates() -> None:
    recipe = load_recipe("reference")
    for stage, rate, end in ((recipe.pretrain, 3e-4, 1e-4), (recipe.finetune, 1e-3, 1e-3)):
        assert stage.optimizer == "adamw" and (stage.beta1, stage.beta2) == (0.9, 0.99)
        assert stage.adam_lr == rate and rate * (stage.final_lr or 0) == pytest.approx(end, rel=1e-3)
        assert (stage.warmup or 0) * (stage.steps or 0) == pytest.approx(100)


@pytest.mark.parametrize("name", ["sanguo", "tiny", "reference"])
def test_to_toml_reads_back_equal(name: str, tmp_path: Path) -> None:
    recipe = load_recipe(name, {"run.seed": 7})
    assert load_recipe(write(tmp_path, recipe.to_toml())) == recipe


@given(st.text(st.characters(exclude_categories=["Cs"]), min_size=1), st.floats(1e-300, 1e300))
def test_to_toml_keeps_every_text_and_number(text: str, number: float) -> None:
    recipe = Recipe.model_validate({"corpus": {"books": [text]}, "pretrain": {"adam_lr": number}})
    data = tomllib.loads(recipe.to_toml())
    assert data["corpus"]["books"] == [text] and data["pretrain"]["adam_lr"] == number


def test_saved_recipe_does_not_name_the_place_of_installation() -> None:
    assert str(shipped("data")) not in load_recipe(None).to_toml()


def test_flags_win_over_the_file_and_none_is_no_flag(tmp_path: Path) -> None:
    path = write(tmp_path, "[run]\nminutes = 3\nseed = 5")
    recipe = load_recipe(path, {"run.minutes": 4.0, "run.seed": None})
    assert (recipe.run.minutes, recipe.run.seed) == (4.0, 5)


def test_paths_are_found_beside_the_recipe_and_names_are_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    here, there = tmp_path / "here", tmp_path / "there"
    for folder in (here, there):
        folder.mkdir()
        (folder / "a.txt").touch()
    (here / "b.txt").touch()
    (there / "sanguo").mkdir()
    monkeypatch.chdir(here)
    books = ["a.txt", "b.txt", "sanguo", "https://example.org/a.txt", "no.txt"]
    recipe = load_recipe(write(there, f"[corpus]\nbooks = {books}\n[qa]\ntrain = ['sanguo', 'a.txt']"))
    assert recipe.corpus.books == [
        str((there / "a.txt").resolve()),
        str((here / "b.txt").resolve()),
        "sanguo",
        "https://example.org/a.txt",
        "no.txt",
    ]
    assert recipe.qa.train == [default_qa()["train"], str((there / "a.txt").resolve())]
    assert load_recipe(None, {"corpus.books": ["a.txt"]}).corpus.books == [str((here / "a.txt").resolve())]


def test_own_books_do_not_get_the_questions_about_sanguo(tmp_path: Path) -> None:
    own = load_recipe(write(tmp_path, "[corpus]\nbooks = ['my.txt']"))
    assert own.qa.train == own.qa.validation == []
    instead = load_recipe(None, {"corpus.books": ["my.txt"]})  # --book: the default novel from a file
    assert instead.qa.train == [default_qa()["train"]]


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("[run]\nminutes = 0", ["run.minutes = 0，", "大于 0"]),
        ("[run]\nminutes = '10'", ['run.minutes = "10"', "应为数"]),
        ("[run]\nminutes = nan", ["run.minutes", "nan"]),
        ("[run]\ndevice = 'gpu'", ['run.device = "gpu"', "'auto'、'cpu'、'cuda'、'mps'"]),
        ("[run]\nminuts = 5", ["run.minuts", "是否想写 minutes"]),
        ("[runn]\n", ["runn", "是否想写 run"]),
        ("run = 5", ["run = 5", "一节"]),
        ("qa = 5\ncorpus.books = ['a']", ["qa = 5", "一节"]),
        ("[corpus]\nbooks = []", ["corpus.books = []", "至少 1 项"]),
        ("[corpus]\nbooks = 'a.txt'", ['corpus.books = "a.txt"', "列表"]),
        ("[corpus]\nbooks = ['a', 3]", ["corpus.books[1] = 3", "字符串"]),
        ("[corpus]\nencoding = 'gbq'", ['corpus.encoding = "gbq"', "gb18030"]),
        ("[corpus]\nvalidation_every = 1", ["corpus.validation_every = 1", "不小于 2"]),
        ("[tokenizer]\nkind = 'gpt2'\nvocab_size = 999", ["[tokenizer]", "gpt2", "vocab_size"]),
        ("[model]\nhidden_size = 1.5", ["model.hidden_size = 1.5", "整数"]),
        ("[model]\nnum_attention_heads = 4\nnum_key_value_heads = 3", ["num_key_value_heads = 3", "倍数"]),
        ("[pretrain]\nsteps = 5\nminutes = 1", ["[pretrain]", "只能给一个"]),
        ("[finetune]\nrows = 2\nmicro_rows = 4", ["[finetune]", "micro_rows = 4"]),
        ("[finetune]\ntext_share = 1.0", ["finetune.text_share = 1.0", "小于 1"]),
        ("[pretrain]\ntext_share = 0.5", ["pretrain.text_share"]),
        ("[run]\nminutes = 'none'", ["pretrain.steps"]),
        ("[run]\nseed = -1\ndevice = 3", ["run.seed = -1", "run.device = 3"]),
        ("[run]\nseed = = 1", ["第 2 行", "TOML"]),
    ],
)
def test_a_fault_names_file_key_found_and_expected(text: str, parts: list[str], tmp_path: Path) -> None:
    path = write(tmp_path, text)
    with pytest.raises(MiniGLMError) as caught:
        load_recipe(path)
    message = str(caught.value)
    assert message.startswith(str(path)) and "\n" not in message
    assert all(part in message for part in parts), message


def test_a_fault_of_a_flag_names_the_command_line(tmp_path: Path) -> None:
    with pytest.raises(MiniGLMError, match=r"^命令行：run\.minutes = 0\.0，应为大于 0"):
        load_recipe(write(tmp_path, "[run]\nseed = 1"), {"run.minutes": 0.0})


def test_files_that_are_no_recipe(tmp_path: Path) -> None:
    with pytest.raises(MiniGLMError, match="reference、sanguo、tiny"):
        find_recipe(tmp_path / "no.toml")
    path = tmp_path / "gbk.toml"
    path.write_bytes("# 配方".encode("gb18030"))
    with pytest.raises(MiniGLMError, match="UTF-8"):
        load_recipe(path)
    path.write_bytes(b"\xef\xbb\xbf[run]\nseed = 3\r\n")
    assert load_recipe(path).run.seed == 3


def test_a_tokenizer_can_be_named_in_one_word(tmp_path: Path) -> None:
    assert load_recipe(write(tmp_path, 'tokenizer = "gpt2"')).tokenizer.kind == "gpt2"
