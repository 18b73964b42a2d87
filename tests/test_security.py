"""Nothing a user opens can run code, reach beyond its folder or ask for all of the memory."""

from __future__ import annotations

import ast
import json
import shutil
import struct
from pathlib import Path

import pytest
from running import ROOT

from miniglm.checkpoint import load_model
from miniglm.errors import MiniGLMError
from miniglm.weights import read_safetensors

SOURCES = sorted((ROOT / "src").rglob("*.py"))
FORBIDDEN_MODULES = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "marshal", "pty", "commands"}
FORBIDDEN_CALLS = {"eval", "exec", "compile", "__import__", "os.system", "os.popen", "subprocess.getoutput"}


def dotted(node: ast.expr) -> str:
    """`a.b.c` of an expression, as far as it is one."""
    if isinstance(node, ast.Attribute):
        return f"{dotted(node.value)}.{node.attr}"
    return node.id if isinstance(node, ast.Name) else "?"


def faults(source: str) -> list[str]:
    """What no source file may hold: code made from data, pickles, shells, archives unpacked onto the disk."""
    found = []
    for node in ast.walk(ast.parse(source)):
        line = getattr(node, "lineno", 0)
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = [alias.name for alias in node.names] + [getattr(node, "module", None) or ""]
            found += [f"{line}: {name}" for name in names if name.split(".")[0] in FORBIDDEN_MODULES]
        if not isinstance(node, ast.Call):
            continue
        name, named = dotted(node.func), {key.arg: key.value for key in node.keywords}
        if name in FORBIDDEN_CALLS or name.endswith((".extractall", ".extract", ".unpack_archive")):
            found.append(f"{line}: {name}")
        if "shell" in named and not (isinstance(named["shell"], ast.Constant) and named["shell"].value is False):
            found.append(f"{line}: shell")
        if name == "torch.load" and not getattr(named.get("weights_only"), "value", False):
            found.append(f"{line}: torch.load without weights_only")
        if name in ("np.load", "numpy.load") and getattr(named.get("allow_pickle"), "value", None) is not False:
            found.append(f"{line}: np.load without allow_pickle=False")
        if name in ("yaml.load", "yaml.unsafe_load"):
            found.append(f"{line}: {name}")
    return found


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT / "src")))
def test_no_source_file_runs_what_it_reads(path: Path) -> None:
    assert faults(path.read_text("utf-8")) == []


def test_the_check_finds_what_it_looks_for() -> None:
    bad = (
        "import pickle\nfrom pickle import load\nimport joblib.numpy_pickle\neval('1')\nos.system('ls')\n"
        "subprocess.run('x', shell=True)\nsubprocess.run('x', shell=flag)\ntorch.load(f)\ntorch.load(f, weights_only=False)\n"
        "np.load(f)\nnp.load(f, allow_pickle=True)\narchive.extractall()\nyaml.load(f)\n"
    )
    assert [fault.split(":")[0] for fault in faults(bad)] == [str(n) for n in range(1, 14)]
    assert faults("re.compile('a')\nmodel.eval()\ntorch.load(f, weights_only=True)\nsubprocess.run(['x'])\n") == []


def tensor(offsets: list[object], shape: list[object] | None = None, dtype: str = "F32") -> dict[str, object]:
    return {"dtype": dtype, "shape": shape or [2], "data_offsets": offsets}


@pytest.mark.parametrize(
    "header",
    [
        {"a": tensor([0, 8]), "b": tensor([0, 8])},  # two on the same bytes
        {"a": tensor([0, 8]), "b": tensor([4, 16], [3])},  # overlapping
        {"a": tensor([8, 16])},  # a hole, in which anything may hide
        {"a": tensor([-8, 16], [6])},
        {"a": tensor([16, 8], [-2])},
        {"a": tensor([0, 16], [2**63, 2])},
        {"a": tensor([0, 16], [2**32, 2**32])},  # the product overflows to 0
        {"a": tensor([0, 16], [-2, -2])},
        {"a": tensor([0, 2**70])},
        {"a": tensor([0, 16], [4], "PICKLE")},
        {"a": tensor([0.0, 16.0], [4])},
        {"a": tensor(["0", "16"], [4])},
        {"__metadata__": {"sha256": "0" * 64}, "a": tensor([0, 16], [4])},
        {"__metadata__": {"sha256": 5}, "a": tensor([0, 16], [4])},
        {"__metadata__": [1], "a": tensor([0, 16], [4])},
    ],
)
def test_hostile_safetensors_headers_are_refused(tmp_path: Path, header: dict[str, object]) -> None:
    path = tmp_path / "x.safetensors"
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    path.write_bytes(struct.pack("<Q", len(text)) + text + bytes(16))
    with pytest.raises(MiniGLMError, match=r"x\.safetensors"):
        read_safetensors(path)


@pytest.mark.parametrize(
    "change",
    [
        {"hidden_size": 2**24, "intermediate_size": 2**24},
        {"vocab_size": 2**24},
        {"num_hidden_layers": 2**24},
        {"num_attention_heads": 2**24, "num_key_value_heads": 2**24, "head_dim": 2**24},
        {"max_position_embeddings": 10**12},
        {"max_position_embeddings": -1},
        {"head_dim": -16},
        {"num_key_value_heads": 0.5},
        {"num_attention_heads": True, "num_key_value_heads": 3},
        {"vocab_size": "700"},
        {"rope_theta": "x", "rope_parameters": None},
        {"rope_parameters": [1]},
        {"partial_rotary_factor": 1e308, "rope_parameters": None},
        {"rms_norm_eps": None},
        {"model_type": "glm4_moe"},
        {"auto_map": {"AutoModel": "evil.Model"}, "model_type": "evil"},
    ],
)
def test_hostile_configurations_are_refused_before_memory_is_asked_for(
    finished: Path, tmp_path: Path, change: dict[str, object]
) -> None:
    folder = tmp_path / "model"
    shutil.copytree(finished / "model", folder)
    config = json.loads((folder / "config.json").read_text("utf-8"))
    (folder / "config.json").write_text(json.dumps(config | change), "utf-8")
    with pytest.raises(MiniGLMError) as refused:
        load_model(folder)
    assert str(folder) in str(refused.value)
