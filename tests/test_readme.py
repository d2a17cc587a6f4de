"""README.md's numbers are those of the committed logs, its commands are known, and it names files that are there."""

import csv
import re
import shlex
import statistics
import sys

import pytest
import scripts

import compare
import results
import speed

from config import parse_evaluation, parse_training
import download
import ops
import runs

README = (scripts.REPO / "README.md").read_text()
FOLDERS = (path for path in (scripts.REPO / "figure" / "studies").iterdir() if path.is_dir())
STUDIES = sorted(path.name for path in FOLDERS if path.name != "finetune")  # test_finetune.py has that one
RESULTS = (scripts.REPO / "figure" / "studies" / "README.md").read_text()
PAGE = README + RESULTS + (scripts.REPO / "figure" / "README.md").read_text()
PARSERS = {
    "download.py": download.parse_args,
    "evaler.py": parse_evaluation,
    "figure/compare.py": compare.parse_flags,
    "figure/speed.py": speed.parse_flags,
    "trainer.py": parse_training,
}
SHOWN = [name for name in STUDIES if name not in ("recipe", "rates")]  # these tables stand beside their logs alone


@pytest.mark.parametrize("name", STUDIES)
def test_the_tables_are_those_of_the_logs(name):
    folder = scripts.REPO / "figure" / "studies" / name
    written, found = (folder / "table.md").read_text(), runs.read_runs([folder])
    for table in results.tables(found):
        lines = results.markdown(table).splitlines()[2:]
        for line in lines + results.sentences(table):
            assert line in written, line
        for line in lines if name in SHOWN else ():
            assert line in RESULTS, f"figure/studies/README.md lacks or changes this line of {name}: {line}"


def test_each_norm_has_its_best_rate():
    """The page's table of rates is that of results.csv, with the best of a row in bold, which is not the last one."""
    with open(scripts.REPO / "figure" / "studies" / "rates" / "results.csv", newline="") as file:
        found = list(csv.DictReader(file))
    rows = {(row["norm"], row["batch_size"], row["rate"]): 100 * float(row["accuracy"]) for row in found}
    head, *lines = [line for line in RESULTS.splitlines() if re.match(r"\| (norm, batch size|[a-z+]+, \d+) \|", line)]
    rates = head.strip("| ").split(" | ")[1:]
    assert len(lines) == 6
    for line in lines:
        name, *cells = line.strip("| ").split(" | ")
        found = [rows.pop((*name.split(", "), rate)) for rate in rates[: len(cells)]]
        best = max(found)
        assert cells == [f"**{value:.1f}**" if value == best else f"{value:.1f}" for value in found]
        assert best not in (found[0], found[-1])
    assert not rows


def accuracies_of(study):
    """The accuracies of a study, {(norm, batch size): [of each seed]}."""
    with open(scripts.REPO / "figure" / "studies" / study / "results.csv", newline="") as file:
        rows, values = list(csv.DictReader(file)), {}
    for row in rows:
        norm = row["norm"] + "+acc" * (row["accumulate"] == "True")
        values.setdefault((norm, row["batch_size"]), []).append(float(row["accuracy"]))
    return values


def test_the_front_page_has_the_medians():
    """A bold number is ahead of the next in its column by over two standard errors; empty cells are not trained."""
    head, _, *lines = re.search(r"^\| norm \|(?:.*\n\|)*.*", README, re.MULTILINE)[0].splitlines()
    (_, *sizes), *shown = [[cell.strip() for cell in line.strip("|").split("|")] for line in (head, *lines)]
    accuracies = accuracies_of("full")
    assert {size for _, size in accuracies} == set(sizes)
    assert [norm for norm, *_ in shown] == ["batch", "batch+acc", "group", "group+ws"]
    for size, *column in zip(sizes, *(cells for _, *cells in shown)):
        found = {norm: accuracies.get((norm, size), []) for norm, *_ in shown}
        *others, best = sorted(filter(None, found.values()), key=statistics.median)
        is_ahead = False
        if others:
            error = results.standard_error(others[-1], best, 10_000)
            is_ahead = statistics.median(best) - statistics.median(others[-1]) > 2 * error
        for values, cell in zip(found.values(), column, strict=True):
            text = f"{100 * statistics.median(values):.1f}" if values else ""
            assert cell == (f"**{text}**" if is_ahead and values is best else text), size


def test_the_variance_between_seeds_is_that_of_the_short_budget():
    """Of all cells but batch norm at batch size 1, as a number of images with the same variance."""
    found = [values for cell, values in accuracies_of("cifar10").items() if cell != ("batch", "1")]
    of_image = statistics.mean(statistics.median(values) * (1 - statistics.median(values)) for values in found)
    of_seed = statistics.mean(statistics.variance(values) for values in found)
    assert len(found) == 17 and of_image / of_seed == pytest.approx(results.SEED_IMAGES, rel=0.01)


def test_every_command_parses(monkeypatch):
    """Each python command in a block of these pages names a script, and flags that the script knows (PARSERS)."""
    blocks = re.findall(r"```bash\n(.*?)```", PAGE, re.DOTALL)
    lines = [re.sub(r"^(TF_\w+=('[^']*'|\d) )?", "", line) for block in blocks for line in block.splitlines()]
    commands = [line for line in lines if re.match(r"(\.venv/bin/)?python \S+\.py", line)]
    assert len(commands) > 15
    for line in commands:
        script, *flags = shlex.split(line, comments=True)[1:]
        assert (scripts.REPO / script).exists(), line
        monkeypatch.setattr(sys, "argv", [script, *flags])
        if script in PARSERS:
            PARSERS[script]()


def anchors(path):
    headings = re.findall(r"^#+ (.*)", path.read_text(), re.MULTILINE)
    return [re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings]


def test_links_lead_somewhere():
    for page in ("README.md", "figure/README.md", "figure/studies/README.md", "tests/README.md", "CONTRIBUTING.md"):
        text = (scripts.REPO / page).read_text()
        for target, anchor in re.findall(r"\]\(([^)#]*)#?([^)]*)\)", text):
            path = (scripts.REPO / page).parent / target if target else scripts.REPO / page
            if not target.startswith("http"):
                assert path.exists(), f"{page}: {target}"
                assert not anchor or anchor in anchors(path), f"{page}: {target}#{anchor}"


@pytest.mark.parametrize("number", range(2))
def test_the_examples_for_your_own_model_run(number):
    blocks = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    assert len(blocks) == 2
    names = {}
    exec(blocks[number], names)
    if "model" in names:
        norms = [layer for layer in names["model"].layers if isinstance(layer, ops.GroupNorm)]
        assert len(norms) == (53 if number == 1 else 1)
