"""README.md's numbers are those of the committed logs, its commands are known, and it names files that are there.

python -m pytest tests/test_readme.py
"""

import re
import shlex
import sys

import pytest
import scripts

sys.path.insert(0, str(scripts.REPO / "figure"))

import compare
import evaler
import results
import runs
import trainer

README = (scripts.REPO / "README.md").read_text()
FOLDERS = (path for path in (scripts.REPO / "figure" / "studies").iterdir() if path.is_dir())
STUDIES = sorted(path.name for path in FOLDERS if path.name != "finetune")  # test_finetune.py has that one
PAGE = README + (scripts.REPO / "figure" / "studies" / "README.md").read_text()
SHOWN = [name for name in STUDIES if name != "recipe"]  # the recipe's table stands beside its logs alone


@pytest.mark.parametrize("name", STUDIES)
def test_table_md_is_made_of_the_logs(name):
    folder = scripts.REPO / "figure" / "studies" / name
    written = (folder / "table.md").read_text()
    for table in results.tables(runs.read_runs([folder]), "CALLED"):
        for line in results.markdown(table).splitlines()[2:] + results.sentences(table):
            assert line in written


@pytest.mark.parametrize("name", SHOWN)
def test_the_tables_are_those_of_the_logs(name):
    for table in results.tables(runs.read_runs([scripts.REPO / "figure" / "studies" / name])):
        for line in results.markdown(table).splitlines()[2:]:
            assert line in (README if name == "cifar10" else PAGE), (
                f"README.md lacks or changes this line of figure/studies/{name}: {line}"
            )


def test_every_command_parses():
    """Each python command in a block of README.md or of the studies' page has flags that its script knows."""
    blocks = re.findall(r"```bash\n(.*?)```", PAGE, re.DOTALL)
    lines = [re.sub(r"^TF_CONFIG='[^']*' ", "", line) for block in blocks for line in block.splitlines()]
    commands = [line for line in lines if re.match(r"(\.venv/bin/)?python \S+\.py", line)]
    assert len(commands) > 15
    for line in commands:
        script, *flags = shlex.split(line, comments=True)[1:]
        assert (scripts.REPO / script).exists(), line
        if script == "trainer.py":
            trainer.parse_flags(flags)
        if script == "evaler.py":
            evaler.parse_flags(flags)
        if script == "figure/compare.py":
            compare.parse_flags(flags)


def test_links_lead_somewhere():
    for page in ("README.md", "figure/README.md", "figure/studies/README.md", "tests/README.md", "CONTRIBUTING.md"):
        text = (scripts.REPO / page).read_text()
        for target in re.findall(r"\]\(([^)#]+)\)", text):
            if not target.startswith("http"):
                assert ((scripts.REPO / page).parent / target).exists(), f"{page}: {target}"


@pytest.mark.parametrize("number", range(3))
def test_the_examples_for_your_own_model_run(number):
    blocks = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    assert len(blocks) == 3
    names = {}
    exec(blocks[number], names)
    if "model" in names:
        norms = [layer for layer in names["model"].layers if isinstance(layer, names["ops"].GroupNorm)]
        assert len(norms) == (53 if number == 2 else 1)
