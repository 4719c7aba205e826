"""What the README files promise is there: links lead somewhere, commands parse, keys and defaults are the real ones."""

import re
import shlex
from pathlib import Path

import pytest
import typer

from astro_dist import cli
from astro_dist.config.explanation import commented_defaults
from astro_dist.config.schema import RunConfig
from astro_dist.config.training import TrainConfig

ROOT = Path(__file__).parents[1]
PAGES = sorted(
    path
    for folder in (".", ".github", "configs", "configs/training", "cluster", "astro", "astro_dist", "tests/bench")
    for path in (ROOT / folder).glob("*.md")
)
MOST_WORDS = 40
COMMANDS = typer.main.get_command(cli.app).commands  # type: ignore[attr-defined]


def prose(path):
    """The text of a page without code blocks."""
    return re.sub(r"^```.*?^```", "", path.read_text(), flags=re.DOTALL | re.MULTILINE)


def anchors(path):
    """The anchors that GitHub gives a page's headings."""
    headings = re.findall(r"^#+ (.*)$", prose(path), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def sentences(path):
    """Sentences of a page, table cells and list items each on their own, links without their addresses."""
    text = re.sub(r"\]\([^)]*\)", "]", re.sub(r"<!--.*?-->", "", prose(path), flags=re.DOTALL))
    for part in re.split(r"\n\s*\n|\n(?=[-|#]|\d+\. )|\|", text):
        yield from re.split(r"(?<=[.!?:;])\**\s+", " ".join(part.split()))


def name(path):
    return str(path.relative_to(ROOT))


@pytest.mark.parametrize("path", PAGES, ids=name)
def test_links_lead_somewhere(path):
    for target in re.findall(r"\]\(([^)\s]+)\)", prose(path)):
        if target.startswith("https://"):
            continue
        file, _, anchor = target.partition("#")
        place = (path.parent / file).resolve() if file else path
        assert place.exists(), f"{target} does not exist"
        page = place / "README.md" if place.is_dir() else place
        assert not anchor or anchor in anchors(page), f"{target}: no such heading"


@pytest.mark.parametrize("path", PAGES, ids=name)
def test_sentences_are_short(path):
    assert [text for text in sentences(path) if len(text.split()) > MOST_WORDS] == []


def test_the_readme_is_short():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 180


def commands():
    for path in PAGES:
        joined = path.read_text().replace("\\\n", " ")
        for found in re.findall(rf"astro-dist ((?:{'|'.join(COMMANDS)}) [^`#;|\n]*)", joined):
            yield pytest.param(found.strip(), id=f"{name(path)}: {found.strip()}")


@pytest.mark.parametrize("command", list(commands()))
def test_commands_parse(command):
    word, *arguments = shlex.split(re.sub(r"\[(--[^\]]*)\]", r"\1", command))
    COMMANDS[word].make_context(word, arguments)


def test_functions_of_the_equations_exist():
    table = (ROOT / "astro" / "README.md").read_text().split("## Which equation")[1].split("\n###")[0]
    code = "".join(path.read_text() for path in (ROOT / "astro").rglob("*.py"))
    functions = re.findall(r"`(?:\w*\.)?(\w+)`", table)
    assert "prox" in functions
    assert [f for f in functions if not re.search(rf"def {f}\(|^    {f}: ", code, flags=re.MULTILINE)] == []


@pytest.mark.parametrize(("folder", "schema"), [("configs", RunConfig), ("configs/training", TrainConfig)])
def test_every_key_is_explained_as_the_program_explains_it(folder, schema):
    text = (ROOT / folder / "README.md").read_text().split("## Every key")[1]
    shown = re.search(r"```yaml\n(.*?)```", text, flags=re.DOTALL)
    assert shown is not None
    assert shown[1] == commented_defaults(schema), "paste what `astro-dist config` prints, with --train for a training"
