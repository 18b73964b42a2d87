"""Looks up requirements.lock for known vulnerabilities (pip-audit) and writes its bill of materials (CycloneDX).

    python tools/audit.py FOLDER

FOLDER has the environment of the two tools, made by the caller (`.ci/run`); sbom.cdx.json is written into it. Exits with
1 where a package has a known vulnerability. Where the database cannot be reached, one line says so, and that is no fault
of the change under test.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

LOCK = Path(__file__).resolve().parent.parent / "requirements.lock"


def audited(tools: Path, requirements: Path, out: Path) -> list[dict[str, Any]] | None:
    """What pip-audit finds of each package that its database knows, or None where it cannot be reached."""
    command = [str(tools / "pip-audit"), "-r", str(requirements), "--no-deps", "--disable-pip"]
    command += ["--progress-spinner", "off", "-f", "json", "-o", str(out)]
    subprocess.run(command, capture_output=True, check=False)
    if not out.exists():
        return None
    found = [entry for entry in json.loads(out.read_text("utf-8"))["dependencies"] if "skip_reason" not in entry]
    return found or None


def main() -> None:
    folder = Path(sys.argv[1])
    tools = folder / ("Scripts" if sys.platform == "win32" else "bin")
    bill = folder / "sbom.cdx.json"
    subprocess.run([str(tools / "cyclonedx-py"), "requirements", str(LOCK), "-o", str(bill)], check=True)
    print(f"bill of materials: {len(json.loads(bill.read_text('utf-8'))['components'])} components")
    probe = folder / "one.txt"  # one package first, before a database that does not answer is asked for all of them
    probe.write_text(
        next(line for line in LOCK.read_text("utf-8").splitlines() if line.startswith("pillow==")), "utf-8"
    )
    found = audited(tools, probe, folder / "one.json") and audited(tools, LOCK, folder / "audit.json")
    if found is None:
        print("vulnerabilities: the database cannot be reached from here, nothing was looked up")
        return
    known = [f"{e['name']} {e['version']}: {v['id']}" for e in found for v in e["vulns"]]
    print(f"vulnerabilities: {len(known)} in {len(found)} packages", *known, sep="\n  ")
    sys.exit(1 if known else 0)


if __name__ == "__main__":
    main()
