"""Two hosts for real: two network namespaces joined by a veth pair, with a torchrun in each and a link that fails."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from running import RECIPE, miniglm
from small_runs import losses, near, reached
from together import torchrun, wait_for

STEPS = 300
CUT = 3.0
"""Seconds without a link: many steps long, and shorter than what rendezvous (15 s) and TCP put up with."""


def ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True, text=True)


@contextlib.contextmanager
def two_hosts() -> Iterator[tuple[tuple[str, str, str], tuple[str, str, str]]]:
    """Of each host: its namespace, its interface and its address."""
    hosts = [(f"miniglm{os.getpid()}{x}", f"mg{os.getpid()}{x}", f"10.213.77.{n}") for n, x in ((1, "a"), (2, "b"))]
    try:
        for name, _, _ in hosts:
            ip("netns", "add", name)
        ip("link", "add", hosts[0][1], "netns", hosts[0][0], "type", "veth", "peer", hosts[1][1], "netns", hosts[1][0])
        for name, interface, address in hosts:
            ip("-n", name, "address", "add", f"{address}/30", "dev", interface)
            for each in ("lo", interface):
                ip("-n", name, "link", "set", each, "up")
        yield hosts[0], hosts[1]
    finally:  # with a namespace goes its end of the link, and with that the other
        for name, _, _ in hosts:
            subprocess.run(["ip", "netns", "del", name], capture_output=True, check=False)


def why_not() -> str | None:
    """What stands against network namespaces here."""
    if shutil.which("ip") is None:
        return "no ip command (iproute2)"
    try:
        with two_hosts():
            return None
    except subprocess.CalledProcessError as error:
        return f"ip netns: {error.stderr.strip()}"


@pytest.mark.skipif(bool(reason := why_not()), reason=f"two hosts cannot be made here: {reason}")
def test_a_link_that_fails_for_a_while_changes_nothing(material: Path, tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.toml"
    recipe.write_text(RECIPE.replace("steps = 12", f"steps = {STEPS}", 1).replace("every = 6", f"every = {STEPS}", 1))
    command: list[str | Path] = ["pretrain", "--recipe", recipe, "--book", material / "书.txt"]
    done = miniglm(*command, "--out", tmp_path / "one", OMP_NUM_THREADS="1")
    assert done.returncode == 0, done.stderr
    out = tmp_path / "two"
    with two_hosts() as hosts, contextlib.ExitStack() as stack:
        started: list[subprocess.Popen[str]] = []
        for name, interface, address in hosts:
            options = (
                *("--nnodes=2", "--rdzv-backend=c10d", "--rdzv-id=test", f"--local-addr={address}"),
                *(f"--rdzv-endpoint={hosts[0][2]}:29400", f"--rdzv-conf=is_host={int(not started)}"),
            )
            made = torchrun(1, *command, "--out", out, options=options, within=name, GLOO_SOCKET_IFNAME=interface)
            started.append(stack.enter_context(made))
        metrics = out / "pretrain" / "metrics.jsonl"
        wait_for(lambda: reached(metrics, 20), started[0], 120)
        ip("-n", hosts[0][0], "link", "set", hosts[0][1], "down")
        time.sleep(0.5)  # what is under way arrives or does not
        at_cut = len(losses(out / "pretrain"))
        time.sleep(CUT)
        after = len(losses(out / "pretrain"))
        assert after <= at_cut + 1 < STEPS  # nobody trains on alone
        ip("-n", hosts[0][0], "link", "set", hosts[0][1], "up")
        outputs = [each.communicate(timeout=150)[0] for each in started]
        assert [each.returncode for each in started] == [0, 0], outputs
    assert len(losses(out / "pretrain")) == STEPS
    assert losses(out / "pretrain") == near(losses(tmp_path / "one" / "pretrain"))
    print(f"link down at step {at_cut}, still step {after} after {CUT:.0f} s, link up, {STEPS} steps done")
    print("\n".join(outputs))
