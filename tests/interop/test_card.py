"""The model card of a real run, read by the Hub's own library."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from running import fails

from miniglm.interop.card import _metadata, write_card
from miniglm.recipe import load_recipe

hub = pytest.importorskip("huggingface_hub")


@pytest.fixture(scope="module")
def run(finished: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    copy = tmp_path_factory.mktemp("card") / "三国小模型"
    shutil.copytree(finished, copy)
    write_card(copy)
    return copy


def test_the_hub_reads_the_metadata_and_the_scores_are_the_reports(run: Path) -> None:
    card = hub.ModelCard.load(run / "model" / "README.md")
    assert card.data.language == ["zh"] and card.data.library_name == "transformers"
    assert card.data.pipeline_tag == "text-generation"
    assert card.data.license == "other"  # the run's book is not ours to license
    report = json.loads((run / "report" / "report.json").read_text("utf-8"))
    expected = {
        (part["name"], score, round(part["scores"][score]["mean"], 4))
        for part in report["splits"]
        for score in ("key_accuracy", "rouge_l")
        if score in part["scores"]
    }
    found = {(r.dataset_type, r.metric_type, r.metric_value) for r in card.data.eval_results}
    assert expected and found == expected


def test_it_says_recipe_data_scores_and_limits_and_no_path_of_this_machine(run: Path, material: Path) -> None:
    text = (run / "model" / "README.md").read_text("utf-8")
    report = json.loads((run / "report" / "report.json").read_text("utf-8"))
    for part in report["splits"]:
        found = part["scores"]["rouge_l"]
        assert f"{found['mean'] * 100:.1f}%（{found['low'] * 100:.1f}–{found['high'] * 100:.1f}）" in text
    for word in ("## 数据", "《书》", "qa.jsonl", "## 局限", "## 许可", "## 配方"):
        assert word in text, word
    assert str(material) not in text and str(run.parent) not in text
    recipe = run / "again.toml"
    recipe.write_text(text.split("```toml\n")[1].split("```")[0], "utf-8")
    assert load_recipe(recipe).model == load_recipe(run / "recipe.toml").model


def test_the_folder_is_what_the_hub_and_modelscope_expect(run: Path) -> None:
    files = {p.name for p in (run / "model").iterdir()}
    assert {"config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "README.md"} <= files
    assert not {name for name in files if name.endswith((".bin", ".pt", ".pkl"))}
    about = json.loads((run / "model" / "configuration.json").read_text("utf-8"))
    assert about["framework"] == "pytorch" and about["task"] == "text-generation"


def test_modelscopes_library_takes_it_for_a_model(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pushing = pytest.importorskip("modelscope.hub.push_to_hub")
    pushed: list[str] = []

    def push(repo: str, folder: str, *rest: object) -> bool:
        pushed.append(folder)
        return True

    monkeypatch.setattr(pushing, "_api_push_to_hub", push)
    assert pushing.push_to_hub("someone/sanguo", str(run / "model"), token="none")  # looks at the folder first
    with pytest.raises(AssertionError):
        pushing.push_to_hub("someone/sanguo", str(run / "corpus"), token="none")
    assert pushed == [str(run / "model")]


def test_written_again_it_is_the_same_and_a_users_own_is_kept(run: Path) -> None:
    card = run / "model" / "README.md"
    text = card.read_text("utf-8")
    write_card(run / "model")  # a model folder alone: less is known
    assert "没有记录" in card.read_text("utf-8")
    write_card(run)
    assert card.read_text("utf-8") == text
    card.write_text("# mine\n", "utf-8")
    fails("card", run, words=("README.md", "不会覆盖"))
    assert card.read_text("utf-8") == "# mine\n"
    card.write_text(text, "utf-8")


def test_the_default_material_is_free() -> None:
    assert 'license: "apache-2.0"' in _metadata("x", load_recipe(None), None)
