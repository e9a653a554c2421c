"""The conda environments, pyproject.toml and constraints.txt speak of the same versions."""

from __future__ import annotations

import ast
import re
import sys
import tomllib

import pytest
import yaml

from morphome.steps import PACKAGE, STEPS, _closure

CONDA_TO_PYPI = {"pytorch": "torch"}
IMPORT_TO_CONDA = {
    "torch": "pytorch", "PIL": "pillow", "skimage": "scikit-image", "sksurv": "scikit-survival",
    "yaml": "pyyaml", "sklearn": "scikit-learn",
}  # fmt: skip
#: Environment of each step, as the rules name it.
ENVIRONMENT = {"simulate": "slides", "tile": "slides", "weights": "slides", "encode": "slides", "report": "report"}
ONLY_CONDA = {"openslide"}  # the C library, which comes inside the wheel openslide-bin on PyPI


def environment(repository, name):
    return yaml.safe_load((repository / "envs" / f"{name}.yaml").read_text())


def pins(repository):
    found = {}
    for line in (repository / "constraints.txt").read_text().splitlines():
        if match := re.fullmatch(r"([A-Za-z0-9_.-]+)==([\w.]+)", line.strip()):
            found[match[1].lower()] = match[2]
    return found


def names(repository):
    return sorted(path.stem for path in (repository / "envs").glob("*.yaml"))


def test_every_environment_pins_what_was_tried(repository):
    tried = pins(repository)
    for name in names(repository):
        content = environment(repository, name)
        assert set(content) == {"channels", "dependencies"}
        assert content["channels"] == ["conda-forge", "nodefaults"]
        for spec in content["dependencies"]:
            package, version = spec.split("=")
            if package == "python":
                assert version == "3.11"
            elif package not in ONLY_CONDA:
                assert f"{tried[CONDA_TO_PYPI.get(package, package)]}.".startswith(f"{version}."), spec


def test_every_declared_dependency_is_pinned(repository):
    project = tomllib.loads((repository / "pyproject.toml").read_text())["project"]
    declared = project["dependencies"] + project["optional-dependencies"]["dev"]
    tried = pins(repository)
    for spec in declared:
        name, floor = re.match(r"([A-Za-z0-9_-]+)>=([\d.]+)", spec).groups()
        assert name.lower() in tried, name
        assert [int(x) for x in tried[name.lower()].split(".")[:2]] >= [int(x) for x in floor.split(".")[:2]]


def test_every_environment_is_used_and_every_used_one_exists(repository):
    used = set()
    for path in (repository / "workflow" / "rules").glob("*.smk"):
        used |= set(re.findall(r'"\.\./\.\./envs/(\w+)\.yaml"', path.read_text()))
    assert used == set(names(repository))


@pytest.mark.parametrize("step", STEPS)
def test_the_environment_of_a_step_has_what_its_code_imports(repository, step):
    files = {path for path in _closure(STEPS[step].module) if path.suffix == ".py"}
    files |= {PACKAGE / name for name in ("cli.py", "config.py", "steps.py", "paths.py", "workflow.py")}
    wanted = set()
    for path in files:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                wanted |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module:
                wanted.add(node.module.split(".")[0])
    third_party = wanted - set(sys.stdlib_module_names) - {"morphome", "__future__"}
    declared = {s.split("=")[0] for s in environment(repository, ENVIRONMENT.get(step, "models"))["dependencies"]}
    missing = {IMPORT_TO_CONDA.get(name, name) for name in third_party} - declared
    assert not missing, f"envs/{ENVIRONMENT.get(step, 'models')}.yaml lacks {missing} for {step}"
