"""Pages of the documentation name files that exist, and the README is short and has its test command."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGES = [*(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")), *sorted(ROOT.glob("docs/*.md"))]
FILE = re.compile(r"`((?:apb|burst|launch|bench|tests|docs|conf)/[a-z0-9_./*-]+)`")  # no capitals: NAME is to be chosen
LINK = re.compile(r"\]\(([^)#:]+)\)")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_files_that_a_page_names_exist(page: Path) -> None:
    text = page.read_text()
    missing = {name for name in FILE.findall(text) if not list(ROOT.glob(name.rstrip("/")))}
    missing |= {link for link in LINK.findall(text) if not (page.parent / link).exists()}
    assert not missing


def test_the_readme_is_short_and_names_the_test_command() -> None:
    lines = (ROOT / "README.md").read_text().splitlines()
    assert len(lines) < 130
    marker = lines.index("<!-- test-command -->")  # .ci/run reads the block after it
    assert lines[marker + 1] == "```bash" and "pytest" in lines[marker + 2] and lines[marker + 3] == "```"


def test_versions_of_the_pages_are_those_of_the_package() -> None:
    text = (ROOT / "pyproject.toml").read_text()
    assert '"torch>=2.11,<2.15"' in text and '"transformers>=5.17,<6"' in text
    contributing = (ROOT / "CONTRIBUTING.md").read_text()
    assert "| torch | 2.11 to 2.14 |" in contributing and "| transformers | 5.17 to 5.x |" in contributing
