"""The documentation names only tests that exist and links only to files that exist."""

import ast
import inspect
import re
from pathlib import Path

import pytest

import lightning_qat_osc

ROOT = Path(__file__).parent.parent
TESTS = ROOT / "tests"
COMPATIBILITY = ROOT / "docs" / "compatibility.md"
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]

TEST = re.compile(r"([\w/]+\.py)::(\w+)")
LINK = re.compile(r"\]\(([^)\s]+)\)")


def names_in(file: str) -> set[str]:
    path = TESTS / file
    if not path.exists():
        return set()
    return {node.name for node in ast.parse(path.read_text()).body if isinstance(node, ast.FunctionDef)}


def missing_tests(text: str) -> list[str]:
    return [f"{file}::{name}" for file, name in TEST.findall(text) if name not in names_in(file)]


def rows_without_a_test(text: str) -> list[str]:
    """Return the rows of tables, without header and separator, whose last cell names no test."""
    lines = text.splitlines()
    rows = [line for i, line in enumerate(lines) if line.startswith("|") and "|---" not in "".join(lines[i : i + 2])]
    return [row for row in rows if not TEST.search(row.rstrip("| ").rpartition("|")[2])]


def broken_links(text: str, folder: Path) -> list[str]:
    targets = [link.partition("#")[0] for link in LINK.findall(text) if "://" not in link]
    return [target for target in targets if target and not (folder / target).exists()]


@pytest.mark.parametrize("path", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_tests_and_files_are_there(path):
    text = path.read_text()
    assert missing_tests(text) == []
    assert broken_links(text, path.parent) == []


def test_every_row_of_the_compatibility_table_names_its_test():
    text = COMPATIBILITY.read_text()
    assert len(TEST.findall(text)) > 100
    assert rows_without_a_test(text) == []


MADE_UP = """
| what | | test |
|---|---|---|
| here | works | `test_docs.py::test_what_is_not_there_is_found` |
| `test_docs.py::test_what_is_not_there_is_found` | works | by hand |
| there | works | `test_docs.py::test_nothing`, `integration/test_docs.py::test_what_is_not_there_is_found` |

[a](architecture.md#state), [b](architektur.md), [c](https://example.org/d.md), [e](#here), ![f](images/none.png)
"""


def test_what_is_not_there_is_found():
    assert missing_tests(MADE_UP) == [
        "test_docs.py::test_nothing",
        "integration/test_docs.py::test_what_is_not_there_is_found",
    ]
    assert [row.split()[-2] for row in rows_without_a_test(MADE_UP)] == ["hand"]
    assert broken_links(MADE_UP, ROOT / "docs") == ["architektur.md", "images/none.png"]


def documented_defaults(card: str) -> dict[str, object]:
    """Return the default of each argument in the table below "## Arguments"."""
    section = card.partition("## Arguments\n")[2].partition("\n## ")[0]
    return {name: ast.literal_eval(value) for name, value in re.findall(r"^\| `(\w+)` \| `(.+?)` \|", section, re.M)}


@pytest.mark.parametrize(
    "callback",
    [
        lightning_qat_osc.BatchNormReestimation,
        lightning_qat_osc.IterativeFreezing,
        lightning_qat_osc.ModelExport,
        lightning_qat_osc.OscillationDampening,
        lightning_qat_osc.OscillationTracking,
        lightning_qat_osc.QuantizationAwareTraining,
    ],
)
def test_a_callbacks_page_has_its_arguments_and_their_defaults(callback):
    page = re.sub(r"(?<!^)(?=[A-Z])", "_", callback.__name__).lower()
    parameters = inspect.signature(callback).parameters.values()
    assert documented_defaults((ROOT / "docs" / "callbacks" / f"{page}.md").read_text()) == {
        p.name: p.default for p in parameters
    }
