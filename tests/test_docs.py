"""README.md, CONTRIBUTING.md and docs/: links, code, commands, options and figures are those of this repository."""

import argparse
import ast
import csv
import importlib
import re
import shlex
from pathlib import Path

import pytest
import torch
import torch.distributed.run
import yaml

import capszoo
from capszoo.command_line import predict
from capszoo.command_line.training import build_parser
from capszoo.recipes import tables as tables_recipe

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").glob("*.md"))]
RECIPES = sorted(path.stem for path in (ROOT / "recipes").glob("*.py") if path.stem != "__init__")
every_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)

FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
OPTION = re.compile(r"(?<![\w-])--[a-z][a-z0-9-]*")


def blocks(page, language):
    return [code for name, code in FENCE.findall(page.read_text()) if name == language]


def prose(page):
    """The text of a page without its code blocks."""
    return FENCE.sub("", page.read_text())


def links(page):
    return re.findall(r"\]\(([^)\s]+)\)", prose(page))


def anchors(page):
    """Anchors of the headings, as GitHub and most site generators name them."""
    titles = re.findall(r"^#+ (.+)$", prose(page), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).strip().replace(" ", "-") for title in titles}


def parser_of(recipe):
    if recipe == "train":
        return build_parser()
    module = importlib.import_module(f"capszoo.recipes.{recipe}")
    return module.build_parser()


def options_of(parser):
    """The options of a parser and of its subcommands."""
    options = set(parser._option_string_actions)
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            options.update(*(options_of(job) for job in action.choices.values()))
    return options


def commands(page):
    """The commands of a page's shell blocks, as words; comments are left out."""
    for block in blocks(page, "sh"):
        for line in block.replace("\\\n", " ").splitlines():
            for command in re.split(r" && ", line):
                if words := shlex.split(command, comments=True):
                    yield words


# Links


@every_page
def test_relative_links_lead_somewhere(page):
    for link in links(page):
        if re.match(r"[a-z]+:", link):
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.is_relative_to(ROOT) and target.exists(), link
        assert not anchor or anchor in anchors(target), link


def test_every_page_of_docs_is_linked_from_the_readme_and_leads_on():
    for page in (ROOT / "docs").glob("*.md"):
        assert f"docs/{page.name}" in links(ROOT / "README.md"), page.name
        assert any(link.endswith(".md") for link in links(page)), page.name


@every_page
def test_files_named_in_the_text_exist(page):
    for path in re.findall(r"`((?:capszoo|kernels|recipes|tests)/[\w./-]+)`", prose(page)):
        if "NAME" not in path:
            assert (ROOT / path).exists(), path


# Code


@every_page
def test_python_parses_and_its_names_exist(page):
    for code in blocks(page, "python"):
        for node in ast.walk(ast.parse(code)):
            if isinstance(node, ast.ImportFrom):
                module = importlib.import_module(node.module)
                assert [name.name for name in node.names if not hasattr(module, name.name)] == []
            elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "capszoo":
                assert hasattr(capszoo, node.attr), node.attr


@every_page
def test_dotted_names_in_the_text_exist(page):
    for name in re.findall(r"`(capszoo(?:\.\w+)+)", prose(page)):
        value = capszoo
        for number, part in enumerate(name.split(".")[1:], 2):
            module = ".".join(name.split(".")[:number])
            if not hasattr(value, part):
                try:
                    importlib.import_module(module)
                except ModuleNotFoundError as error:
                    if error.name == module:
                        raise
                    break  # it is there, and needs a package that is not
            value = getattr(value, part)


def test_first_lines_of_the_readme_run():
    space = {}
    exec(blocks(ROOT / "README.md", "python")[0], space)
    assert space["scores"].shape == (8, 10)
    assert space["reconstruction"].shape == (8, 1, 28, 28)


def test_losses_of_the_page_on_training_run():
    (code,) = [code for code in blocks(ROOT / "docs" / "training.md", "python") if "MarginLoss(" in code]
    model = capszoo.create_model("capsnet_tiny", num_classes=2, img_size=20)
    labels = torch.tensor([0, 1, 1])
    space = {"model": model, "images": torch.rand(3, 1, 20, 20), "labels": labels, "scores": torch.rand(3, 2)}
    exec(code, space)
    assert space["per_image"].shape == (3,)
    assert all(p.grad is not None for p in model.parameters())


def test_pruning_of_the_page_runs():
    (code,) = blocks(ROOT / "docs" / "pruning.md", "python")
    model = capszoo.create_model("capsnet_tiny", img_size=20, num_types=16)
    space = {"model": model, "batches": [(torch.rand(4, 1, 20, 20), torch.arange(4))]}
    exec(code, space)
    assert space["smaller"].arguments()["keep_types"] is not None


# Commands and options


@every_page
def test_commands_have_the_options_they_are_given(page):
    torchrun = options_of(torch.distributed.run.get_args_parser())
    for words in commands(page):
        if any("runpy" in word for word in words):
            continue  # a script of timm's
        found = [number for number, word in enumerate(words) if re.fullmatch(r"recipes/\w+\.py", word)]
        if not found:
            continue
        before, recipe, after = words[: found[0]], Path(words[found[0]]).stem, words[found[0] + 1 :]
        given = {word.partition("=")[0] for word in after if word.startswith("--")}
        assert given <= options_of(parser_of(recipe)), words
        if before[0] == "torchrun":
            assert {word for word in before if word.startswith("--")} <= torchrun, words
        if recipe in ("validate", "explore", "benchmark", "starts"):
            parser_of(recipe).parse(after)


@every_page
def test_options_named_in_the_text_exist(page):
    known = set().union(*(options_of(parser_of(recipe)) for recipe in RECIPES))
    known |= options_of(torch.distributed.run.get_args_parser()) | options_of(predict.build_parser())
    assert {*OPTION.findall(" ".join(re.findall(r"`[^`]+`", prose(page))))} <= known


@every_page
def test_environment_variables_are_read_somewhere(page):
    code = "".join(
        path.read_text() for folder in ("capszoo", "kernels", "tests") for path in (ROOT / folder).rglob("*.py")
    )
    for name in re.findall(r"CAPSZOO_\w+", page.read_text()):
        assert re.search(rf'(?:environ|read_switch)[^\n]*"{name}"|"{name}"[^\n]*environ', code), name


def test_train_configs_named_are_readable():
    for page in PAGES:
        for name in re.findall(r"recipes/configs/[\w./-]+\.yaml", page.read_text()):
            assert isinstance(yaml.safe_load((ROOT / name).read_text()), dict), name


# Figures


def tables(page, head):
    """Rows of the tables whose first line begins so, as cells."""
    for table in re.findall(rf"^{re.escape(head)}.*\n\|[-|]+\n((?:\|.*\n)+)", page.read_text(), re.MULTILINE):
        for line in table.splitlines():
            yield [cell.strip() for cell in line.strip("|").split("|")]


def test_table_of_models():
    rows = list(tables(ROOT / "README.md", "| name | what it is"))
    assert sorted(row[0].strip("`") for row in rows) == capszoo.list_models()
    for name, _, parameters, with_decoder, macs in rows:
        info = capszoo.model_info(name.strip("`"))
        assert parameters == f"{info.parameters:,}"
        if with_decoder != "-":
            assert with_decoder == f"{capszoo.model_info(name.strip('`'), decoder=True).parameters:,}"
        assert macs == f"{info.macs / 1e6:.1f} M"


def test_tables_of_figures_are_those_of_their_files(capsys):
    assert tables_recipe.main(["--check"]) == 0, capsys.readouterr().out


@pytest.mark.parametrize(
    ("table", "file", "pages", "count"),
    [
        ("| time over ours", "benchmark-cpu.csv", ("README.md", "docs/routing.md"), 6),
        ("| H100: time over ours", "benchmark-h100.csv", ("docs/routing.md",), 4),
    ],
)
def test_table_of_speeds_is_that_of_its_file(table, file, pages, count):
    ratios = {}
    with open(ROOT / "recipes" / "results" / file, newline="") as opened:
        for row in csv.DictReader(opened):
            if row["batch_size"] == "128" and row["ratio_to_fused"]:
                key = row["subject"], row["variant"], row["model"]
                ratios[key] = float(row["ratio_to_fused"]), float(row["peak_ratio_to_fused"])
    variants = {"plainly": "plain", "compile": "compiled", "without": "none", "public": "reference"}
    for page in pages:
        rows = list(tables(ROOT / page, table))
        assert len(rows) == count
        for what, *cells in rows:
            subject = "routing" if what.startswith("routing") else "training step"
            variant = next(variant for word, variant in variants.items() if word in what)
            for model, cell in zip(("capsnet", "capsnet_ws"), cells, strict=True):
                if cell == "not measured yet":
                    assert (subject, variant, model) not in ratios
                    continue
                shown = map(float, re.fullmatch(r"([\d.]+) \(([\d.]+)\)", cell).groups())
                assert list(shown) == pytest.approx(ratios[subject, variant, model], rel=0.03), (page, what)


@pytest.mark.parametrize(
    ("name", "table"),
    [
        ("convolutions-cpu.csv", "| one core: time over ours"),
        ("convolutions-zen5-cpu.csv", "| one core of Zen 5: time over ours"),
        ("convolutions-zen5-bf16-cpu.csv", "| one core of Zen 5, bfloat16: time over ours"),
    ],
)
def test_table_of_convolutions_is_that_of_its_file(name, table):
    with open(ROOT / "recipes/results" / name, newline="") as file:
        measured = {(row["variant"], row["batch_size"]): row for row in csv.DictReader(file) if not row["layer"]}
    variants = {"PyTorch's own": "direct", "plainly": "plain", "public": "reference", "without": "none"}
    rows = list(tables(ROOT / "docs/routing.md", table))
    assert len(rows) == 4
    for what, *cells in rows:
        variant = next(variant for word, variant in variants.items() if word in what)
        for size, cell in zip(("128", "16", "1"), cells, strict=True):
            shown = map(float, re.fullmatch(r"([\d.]+) \(([\d.]+)\)", cell).groups())
            row = measured[variant, size]
            expected = [float(row["ratio_to_fused"]), float(row["peak_ratio_to_fused"])]
            assert list(shown) == pytest.approx(expected, rel=0.05), (what, size)


# Other files


def test_readme_has_the_two_commands():
    lines = [line for line in (ROOT / "README.md").read_text().splitlines() if line.startswith("python3 -m venv ")]
    assert len(lines) == 2
    assert all(line in (ROOT / "CONTRIBUTING.md").read_text() for line in lines)


def test_citation():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert {"cff-version", "message", "title", "authors"} <= citation.keys()
    assert citation["cff-version"] == "1.2.0" and str(citation["version"]) == capszoo.__version__
    assert citation["type"] == "software" and citation["authors"] == [{"name": "The capszoo authors"}]
    papers = [reference["url"].rsplit("/", 1)[1] for reference in citation["references"]]
    assert papers == ["1710.09829", "1905.10142"]
    for reference in citation["references"]:
        assert {"type", "title", "authors"} <= reference.keys()
