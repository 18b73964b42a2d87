"""The verb `export`: which form, which type, where to."""

from __future__ import annotations

from pathlib import Path

from miniglm.checkpoint import load_model
from miniglm.config import read_config
from miniglm.errors import MiniGLMError
from miniglm.locate import find_model

FORMATS = {"gguf": ("f32", "f16", "q8_0", "q4_0"), "onnx": ("f32", "int8")}
"""The types of each form."""


def export_model(path: Path, format: str, type: str, out: Path | None) -> list[Path]:
    """Writes the model of a run folder or of a model folder in another program's form; returns the files.

    Args:
        out: default: `export/NAME-TYPE.FORMAT` in `path`.

    Raises:
        MiniGLMError: no such form or type, no model, or one that the form cannot hold.
    """
    if format not in FORMATS:
        raise MiniGLMError(f"--format 是 {format!r}，应为 {'、'.join(FORMATS)} 之一")
    if type not in FORMATS[format]:
        raise MiniGLMError(f"--type 是 {type!r}，{format} 应为 {'、'.join(FORMATS[format])} 之一")
    name = path.resolve().name
    out = out or path / "export" / f"{name}-{type}.{format}"
    if out.is_dir():
        raise MiniGLMError("--out 是一个目录，应为文件", path=out, fix=f"例如 --out {out / f'{name}-{type}.{format}'}")
    folder = find_model(path)
    read_config(folder)  # a converted GPT-2 opens too, but is no GLM
    model, tokenizer = load_model(folder)
    if format == "gguf":
        from miniglm.interop.to_gguf import export_gguf, modelfile_of

        export_gguf(model, tokenizer, out, type=type, name=name)
        return [out, modelfile_of(out)]
    from miniglm.interop.to_onnx import export_onnx

    export_onnx(model, out, type=type)
    return [out]
