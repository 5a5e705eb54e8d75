"""The bill of materials has what the lock has, and is the same for the same sources."""

import json
import os
import re
import runpy
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.tier("gate")

ROOT = Path(__file__).parents[2]
DIGEST = "sha256:" + "0123456789abcdef" * 4
BASE = f"registry.example:5000/mirror/python:3.13@{DIGEST}"


def sbom(*arguments: str, seed: str = "0") -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "scripts/sbom"), *arguments]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONHASHSEED": seed}
    return subprocess.run(command, capture_output=True, text=True, env=environment, check=False)


def bill(*arguments: str) -> dict[str, Any]:
    made = sbom(*arguments)
    assert made.returncode == 0, made.stderr
    return dict(json.loads(made.stdout))


def locked() -> dict[str, str]:
    """What the lock pins for Linux, and the version."""
    pins = re.findall(r"^(\S+)==(\S+)(.*)$", (ROOT / "requirements-runtime.lock").read_text(), re.MULTILINE)
    return {name: version for name, version, marker in pins if "win32" not in marker}


@pytest.mark.parametrize("kind", ["wheel", "image"])
def test_the_same_sources_give_the_same_text(kind: str) -> None:
    first, second = (sbom(kind, seed=seed).stdout for seed in ("1", "2"))
    assert first == second
    assert not {"serialNumber", "timestamp"} & {*json.loads(first), *json.loads(first)["metadata"]}


@pytest.mark.parametrize("kind", ["wheel", "image"])
def test_every_locked_package_is_listed_with_the_hashes_of_its_files(kind: str) -> None:
    libraries = {one["name"]: one for one in bill(kind)["components"] if one["type"] == "library"}
    assert {name: one["version"] for name, one in libraries.items()} == locked()
    listed = [one["content"] for library in libraries.values() for one in library["externalReferences"][0]["hashes"]]
    text = (ROOT / "requirements-runtime.lock").read_text()
    assert set(listed) < set(re.findall(r"sha256:([0-9a-f]{64})", text))
    assert all(library["externalReferences"][0]["hashes"] for library in libraries.values())


@pytest.mark.parametrize("kind", ["wheel", "image"])
def test_the_program_needs_what_pyproject_says_and_everything_is_needed_by_something(kind: str) -> None:
    made = bill(kind)
    references = {one["bom-ref"] for one in [made["metadata"]["component"], *made["components"]]}
    needs = {one["ref"]: set(one["dependsOn"]) for one in made["dependencies"]}
    everything = {one for some in needs.values() for one in some}
    assert everything <= references
    assert references - everything == {made["metadata"]["component"]["bom-ref"]}
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    direct = {re.match(r"[\w-]+", one)[0] for one in project["dependencies"]}  # type: ignore[index]
    (program,) = [reference for reference in references if reference.startswith("pkg:pypi/migproxy@")]
    assert {re.split("[/@]", one)[1] for one in needs[program]} == direct


def test_the_image_stands_on_the_base_that_is_named() -> None:
    (base,) = [one for one in bill("image", BASE)["components"] if one["type"] == "container"]
    assert base["version"] == DIGEST
    assert base["name"] == "registry.example:5000/mirror/python"
    assert base["purl"].startswith(f"pkg:oci/python@{DIGEST.replace(':', '%3A')}?")
    assert not sbom("image", BASE).stderr


def test_a_base_without_a_digest_is_told() -> None:
    assert "python:3.13.7-slim-trixie is a tag" in sbom("image").stderr


def test_a_lock_that_is_not_understood_is_refused() -> None:
    read = runpy.run_path(str(ROOT / "scripts/sbom"))["locked"]
    with pytest.raises(ValueError, match="line that is not understood: 'git"):
        read("six==1.17.0\ngit+https://example.org/evil\n")


@pytest.mark.parametrize(("base", "warned"), [("python:3.13.7-slim-trixie", True), (BASE, False)])
def test_the_images_build_warns_of_a_base_that_is_a_tag(base: str, warned: bool) -> None:
    (check,) = re.findall(r"^RUN (case .*)$", (ROOT / "Containerfile").read_text(), re.MULTILINE)
    ran = subprocess.run(["sh", "-ec", check], env={"BASE": base}, capture_output=True, text=True, check=True)
    assert ("WARNING" in ran.stderr) is warned
