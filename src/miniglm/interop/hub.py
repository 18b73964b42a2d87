"""Where a model to start from lies: a folder, or a name on the Hugging Face Hub or on ModelScope, which is fetched."""

from __future__ import annotations

import re
from pathlib import Path

from miniglm.errors import MiniGLMError

MODELSCOPE = "modelscope:"
WANTED = ["*.json", "*.safetensors", "*.jinja"]
"""All that a model folder needs; never a pickle or code."""


def find_model_to_start_from(spec: str) -> Path:
    """The folder that `spec` means: a folder, OWNER/NAME on the Hub, or modelscope:OWNER/NAME.

    Raises:
        MiniGLMError: there is none, or it cannot be fetched; the text says what to do.
    """
    if Path(spec).expanduser().is_dir():
        return Path(spec).expanduser().resolve()
    name = spec.removeprefix(MODELSCOPE)
    if not re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", name):
        raise MiniGLMError(
            "没有这个模型目录",
            path=spec,
            fix=f"--init 应为目录、Hub 上的名字（如 zai-org/glm-edge-1.5b-chat）或 {MODELSCOPE}名字",
        )
    by_hand = "或者在能联网的机器上下载后拷来，写 --init 目录"
    try:
        if spec.startswith(MODELSCOPE):
            library, hint = "modelscope", f"检查网络和名字，{by_hand}"
            import modelscope

            return Path(modelscope.snapshot_download(name, allow_patterns=WANTED))
        library, hint = (
            "huggingface_hub",
            f"检查网络和名字，连不上时设镜像 HF_ENDPOINT，或用 {MODELSCOPE}{name}，{by_hand}",
        )
        import huggingface_hub

        return Path(huggingface_hub.snapshot_download(name, allow_patterns=WANTED))
    except ImportError:
        raise MiniGLMError(
            f"{spec} 不是本机的目录，下载它需要 {library}，而它没有安装", fix=f"pip install {library}，{by_hand}"
        ) from None
    except Exception as error:  # each library raises the errors of its own network stack
        reason = str(error).strip().split("\n")[0][:200]
        raise MiniGLMError(f"下载不了模型 {spec}（{type(error).__name__}：{reason}）", fix=hint) from None
