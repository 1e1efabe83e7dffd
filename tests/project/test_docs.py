"""Every code block of README and docs does what it says, every quoted message exists, and every link leads somewhere.

What each kind of block has to stand: Python runs, on two ranks, in the order of its page; JSON and YAML are read by
what they are for; of a shell block, every command is looked at, and one that no rule knows fails the test.
"""

from __future__ import annotations

import json
import pkgutil
import re
import shlex

import pytest
import yaml

import ds_moelora
from ds_moelora.monitoring import TAGS
from launch.demo.defaults import DEFAULTS
from tests.support import doc_blocks
from tests.support.doc_blocks import PAGES, ROOT, blocks
from tests.support.ranks import run_on_ranks

BY_PAGE = {str(page.relative_to(ROOT)): blocks(page) for page in PAGES}
PYTHON = [name for name, found in BY_PAGE.items() if any(block.language == "python" for block in found)]
COMMANDS_SHOWN = [
    pytest.param(command, id=f"{name}:{block.line}:{number}")
    for name, found in BY_PAGE.items()
    for block in found
    if block.language == "bash"
    for number, command in enumerate(doc_blocks.commands(block.text))
]


def of_language(language):
    return [
        pytest.param(block, id=f"{name}:{block.line}")
        for name, found in BY_PAGE.items()
        for block in found
        if block.language == language
    ]


MESSAGE = re.compile(r"^\*\*(.+?)\*\*(?: \(`.*`\))?$", re.M)


def test_every_block_names_its_language():
    unknown = [
        f"{name}:{block.line} ({block.language or 'none'})"
        for name, found in BY_PAGE.items()
        for block in found
        if block.language not in ("python", "json", "yaml", "bash", "text")
    ]
    assert not unknown


@pytest.mark.dist
@pytest.mark.parametrize("page", PYTHON)
def test_python_runs(page, tmp_path):
    sources = [(block.line, block.text) for block in BY_PAGE[page] if block.language == "python"]
    run_on_ranks(2, doc_blocks.execute, page=page, sources=sources, folder=str(tmp_path))


@pytest.mark.parametrize("block", of_language("json"))
def test_json_is_a_config(block):
    text = block.text.strip()
    config = json.loads(text if text.startswith(("{", "[")) else f"{{{text}}}")
    if "optimizer" in config:
        doc_blocks.check_optimizer_block(config["optimizer"], ds_moelora)


@pytest.mark.parametrize("block", of_language("yaml"))
def test_yaml_is_a_recipe(block, tmp_path):
    assert yaml.safe_load(block.text)
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(block.text)
    doc_blocks.parse_launcher(["--config", str(recipe)], DEFAULTS)


@pytest.mark.parametrize("command", COMMANDS_SHOWN)
def test_shell_command_is_one_that_works(command):
    words = [word for word in shlex.split(command, comments=True) if word != "..."]
    while words and re.fullmatch(r"[A-Z_0-9]+=\S*", words[0]):
        words.pop(0)
    checks = [check for matches, check in doc_blocks.RULES if matches(words)]
    assert checks, f"no rule says what {command!r} has to stand"
    checks[0](words)


def test_quoted_messages_exist():
    """A message of the troubleshooting page is a text in the sources, value for value."""
    texts = doc_blocks.messages_in_sources()
    quoted = MESSAGE.findall((ROOT / "docs/troubleshooting.md").read_text())
    assert len(quoted) >= 15
    observed = {"The loss is NaN after a few steps.", "A run hangs at its first step, on CPUs."}
    foreign = {m for m in quoted if m.startswith(("ninja", "Type fp16"))}
    missing = [
        message
        for message in quoted
        if message not in observed | foreign and not any(doc_blocks.squeeze(message) in text for text in texts)
    ]
    assert not missing


def test_links_lead_somewhere():
    broken = []
    for page in PAGES:
        for target in re.findall(r"\]\(([^)#\s]+)(?:#[^)\s]*)?\)", page.read_text()):
            if "://" not in target and not (page.parent / target).exists():
                broken.append(f"{page.relative_to(ROOT)}: {target}")
    assert not broken


def test_pages_agree_on_the_number_of_curves():
    """docs/tensorboard.md has a line for each; it and README say how many."""
    page = (ROOT / "docs/tensorboard.md").read_text()
    assert [tag for tag in TAGS if f"| `{tag}` |" not in page] == []
    assert len(TAGS) == 11
    assert all("eleven curves" in text for text in (page, (ROOT / "README.md").read_text()))


def test_every_page_is_in_the_site():
    listed = set(re.findall(r"[\w/]+\.md", (ROOT / "mkdocs.yml").read_text()))
    pages = {str(path.relative_to(ROOT / "docs")) for path in (ROOT / "docs").rglob("*.md")}
    assert pages <= listed


def test_api_pages_have_all_public_names():
    pages = "".join(page.read_text() for page in (ROOT / "docs/api").glob("*.md"))
    shown = re.findall(r"^::: ([\w.]+)", pages, re.M)
    assert {f"ds_moelora.{name}" for name in ds_moelora.__all__ if name != "__version__"} <= set(shown)
    assert all(pkgutil.resolve_name(name) for name in shown)
