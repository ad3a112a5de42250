"""Imports of the package point one way, see docs/architecture.md."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[2] / "pipeline"

LAYERS = (
    {"errors"},
    {"kernels", "machine", "exchange", "layout", "logs", "progress"},
    {"networks", "stores"},
    {"batch"},
    {"models", "slides", "staintools_backend"},
    {"census", "prediction", "pictures", "evaluation"},
    {"report"},
    {"training"},
    {"tissue", "stain", "export"},  # stages that others take a function from
    {"tiles", "inference", "instances", "measure", "label_export", "summary"},
    {"classify", "regions", "cohort"},
    {"demo", "doctor", "status", "testing"},
    {"cli"},
    {"__main__"},
)
"""Modules and folders of the package from the bottom up. Each imports only from those below it."""

UPWARD = {
    ("batch.settings", "models.package"),  # the check of a model package before a run, imported when it is needed
    ("batch.warm", "cli"),  # the server runs the stages' commands
}


def imports(path: Path) -> Iterator[str]:
    """Modules of the package that a file imports, anywhere in it."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("pipeline."):
            yield node.module.removeprefix("pipeline.")
        elif isinstance(node, ast.ImportFrom) and node.module == "pipeline":
            yield from (alias.name for alias in node.names if not alias.name.startswith("__"))
        elif isinstance(node, ast.Import):
            yield from (a.name.removeprefix("pipeline.") for a in node.names if a.name.startswith("pipeline."))


def name_of(path: Path) -> str:
    return ".".join(path.relative_to(PACKAGE).with_suffix("").parts)


MODULES = {name_of(path): path for path in sorted(PACKAGE.rglob("*.py")) if path.name != "__init__.py"}


def layer(module: str) -> int:
    top = module.split(".")[0]
    return next(index for index, names in enumerate(LAYERS) if top in names)


def test_all_modules_have_a_layer() -> None:
    assert {name.split(".")[0] for name in MODULES} == set().union(*LAYERS)


@pytest.mark.parametrize("module", MODULES)
def test_imports_point_down(module: str) -> None:
    for imported in imports(MODULES[module]):
        same = imported.split(".")[0] == module.split(".")[0]
        assert same or layer(imported) < layer(module) or (module, imported) in UPWARD, imported


@pytest.mark.parametrize("package", sorted(path.parent.name for path in PACKAGE.glob("*/__init__.py")))
def test_packages_import_nothing_themselves(package: str) -> None:
    # So that a module is imported without its neighbours: the checks before a run import neither NumPy nor torch.
    assert not list(imports(PACKAGE / package / "__init__.py"))


def test_kernels_use_no_files() -> None:
    for module in (name for name in MODULES if name.startswith("kernels.")):
        tree = ast.parse(MODULES[module].read_text(encoding="utf-8"))
        used = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
        assert not used & {"open", "Path"}, module
