"""README and docs: every link leads somewhere, the README is short, and what it shows runs as it stands there."""

from __future__ import annotations

import random
import re
import shlex
from pathlib import Path

import pytest

from speeder.cli.main import main

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").glob("*.md"))]
LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
CODE = re.compile(r"^```.*?^```", re.MULTILINE | re.DOTALL)


def anchors(page: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ +(.+)$", CODE.sub("", page.read_text()), re.MULTILINE)
    plain = [re.sub(r"[^\w\- ]", "", heading.strip().lower()) for heading in headings]
    return {heading.replace(" ", "-") for heading in plain}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    for link in LINK.findall(CODE.sub("", page.read_text())):
        if link.startswith(("http://", "https://")):
            continue
        name, _, anchor = link.partition("#")
        target = (page.parent / name).resolve() if name else page
        assert target.exists(), f"{page.name}: {link}: no such file"
        assert target.is_relative_to(ROOT), f"{page.name}: {link}: outside the repository"
        if anchor:
            assert anchor in anchors(target), f"{page.name}: {link}: no such heading"


def test_every_page_can_be_reached_from_the_readme():
    seen, todo = set(), [ROOT / "README.md"]
    while todo:
        page = todo.pop()
        seen.add(page)
        for link in LINK.findall(page.read_text()):
            target = (page.parent / link.partition("#")[0]).resolve()
            if target.suffix == ".md" and target.exists() and target not in seen:
                todo.append(target)
    assert set((ROOT / "docs").glob("*.md")) <= seen


def test_the_readme_is_short():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 120


def readme_blocks(language: str = "") -> list[str]:
    """The code blocks of the README in a language."""
    return re.findall(
        rf"^```{language}\n(.*?)^```", (ROOT / "README.md").read_text(), re.DOTALL | re.MULTILINE
    )


def write_shop(folder: Path) -> None:
    """A small shop in the two files that the README describes, with the user that its command names."""
    folder.mkdir()
    items = [f"SKU-{number}" for number in range(33)]
    titles = [
        f"{random.choice(('Red', 'Blue', 'Old'))} {random.choice(('kettle', 'lamp', 'chair'))} {i}"
        for i in items
    ]
    rows = [f"{item},{title}" for item, title in zip(items, titles, strict=True)]
    (folder / "items.csv").write_text("\n".join(["item,title", *rows]) + "\n")
    events = ["user,item,timestamp"]
    for user in ["anna", *(f"u{number}" for number in range(40))]:
        for time, item in enumerate(random.sample(items, random.randint(4, 9))):
            events.append(f"{user},{item},{1_700_000_000 + 86_400 * time}")
    (folder / "interactions.csv").write_text("\n".join(events) + "\n")


@pytest.mark.slow
def test_the_readmes_shop_goes_from_tables_to_recommendations(
    tmp_path, monkeypatch, capsys, smollm2_folder, minilm_folder
):
    monkeypatch.chdir(tmp_path)
    write_shop(tmp_path / "shop")
    (block,) = (block for block in readme_blocks() if "speeder prepare" in block)
    commands = [
        shlex.split(line, comments=True) for line in block.splitlines() if line.startswith("speeder ")
    ]
    assert [command[1] for command in commands] == ["prepare", "train", "evaluate", "recommend", "serve"]
    for command in commands[:-1]:  # the server would not come back
        assert main(command[1:]) == 0, capsys.readouterr().err
    assert len(re.findall(r"(Red|Blue|Old) (kettle|lamp|chair) ", capsys.readouterr().out)) >= 5
    (example,) = (block for block in readme_blocks("python") if "PreparedData" in block)
    exec(example, {})
    assert len(capsys.readouterr().out.splitlines()) >= 6  # NDCG@10, and five items


def test_the_readmes_kernel_example_runs():
    (example,) = (block for block in readme_blocks("python") if "speeder_kernels" in block)
    names: dict = {}
    exec(example, names)
    assert names["bias"].grad.abs().sum() > 0
