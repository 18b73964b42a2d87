"""The list of licences covers the lock file, and the lock file what is declared."""

from __future__ import annotations

import re
import runpy
import tomllib

from running import ROOT

TOOL = runpy.run_path(str(ROOT / "tools" / "licences.py"), run_name="licences")


def test_every_locked_package_is_listed_with_a_licence() -> None:
    listed = dict(re.findall(r"^\| (\S+) \| (.+) \|$", TOOL["PAGE"].read_text("utf-8"), re.M))
    names = TOOL["locked"](TOOL["LOCK"].read_text("utf-8"))
    assert len(names) > 100
    assert set(names) == set(listed) - {"包", "---"}
    assert all(re.search(r"[A-Z]{2}|License|Apache", listed[name]) for name in names)


def test_every_declared_dependency_is_locked() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    declared = [*project["dependencies"], *(d for extra in project["optional-dependencies"].values() for d in extra)]
    names = {re.split(r"[\[<>=;~ ]", d)[0].lower() for d in declared} - {"miniglm-chat", "pip"}
    assert names <= set(TOOL["locked"](TOOL["LOCK"].read_text("utf-8")))
