"""The verb `export` on a real run."""

from __future__ import annotations

from pathlib import Path

import pytest
from running import miniglm

from miniglm.errors import MiniGLMError
from miniglm.interop.export import export_model


def test_files_lie_where_they_are_said_to(finished: Path, tmp_path: Path) -> None:
    done = miniglm("export", finished, "--format", "gguf", "--type", "q8_0", "--out", tmp_path / "a" / "m.gguf")
    assert done.returncode == 0, done.stderr
    assert sorted(p.name for p in (tmp_path / "a").iterdir()) == ["m.Modelfile", "m.gguf"]
    assert "m.gguf" in done.stderr and "MB" in done.stderr


@pytest.mark.parametrize(
    ("format", "type", "words"),
    [("gguf", "q5_1", "q5_1.*q8_0"), ("onnx", "q8_0", "q8_0.*int8"), ("tflite", "f32", "tflite.*onnx")],
)
def test_what_is_not_known_is_named_beside_what_is(finished: Path, format: str, type: str, words: str) -> None:
    with pytest.raises(MiniGLMError, match=words):
        export_model(finished, format, type, None)
    assert not (finished / "export").exists()


def test_a_folder_is_no_place_for_a_file(finished: Path, tmp_path: Path) -> None:
    with pytest.raises(MiniGLMError, match="目录"):
        export_model(finished, "gguf", "f32", tmp_path)
    with pytest.raises(MiniGLMError, match="没有训练好的模型"):
        export_model(tmp_path, "gguf", "f32", None)
