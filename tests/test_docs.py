"""The documents: Python blocks run, commands parse, named objects exist, generated blocks are up to date.

``python tests/test_docs.py`` regenerates the reference of parts and keys in docs/config.md, the table of
docs/pipelines.md, and the tables of recipes and their logs in docs/synthetic-scenes.md.

Python runs with tiny random checkpoints instead of the bundled weights. README and the quickstart run one after the
other in one folder, including their commands, with fewer steps. Blocks marked ``hub`` need downloads, so only their
syntax is checked. The comment after a one-line ``print(...)`` is its expected output.
"""

import ast
import inspect
import json
import pkgutil
import re
import shlex
import tomllib
from pathlib import Path

import catalogue
import diffusers
import pytest
import yaml
from diffusers.pipelines.auto_pipeline import AUTO_TEXT2IMAGE_PIPELINES_MAPPING

from longalign import load_config, override
from longalign.cli.main import COMMANDS, main, parse
from longalign.config.changes import parse_assignments
from longalign.config.describe import describe_model, describe_part
from longalign.config.parsing import parse_value
from longalign.config.run import RunConfig, to_dict
from longalign.inference.inputs import prompt_inputs, width_keys
from longalign.loop.resume_checks import RESUMABLE_KEYS
from longalign.registry import REGISTRIES, metrics, rewards
from longalign.runtime import resolve_checkpoint
from longalign.testing.tiny import tiny_clip, tiny_sd, tiny_sd3, tiny_sdxl

ROOT = Path(__file__).parent.parent
DOCS = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")] + sorted(
    (ROOT / "docs").rglob("*.md")
)
RECIPES = ROOT / "recipes" / "mini"
WEIGHTS = ROOT / "longalign" / "mini" / "weights"
NOTEBOOK = ROOT / "examples" / "quickstart.ipynb"
NEEDED = ("sd/unet/config.json", "clip/config.json", "denscore/config.json")

BLOCK = re.compile(r"^```(\w+)[ ]?(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
FOLDERS = r"(?:longalign|examples|docs|recipes|tests|plugins|benchmarks)/"

pytestmark = pytest.mark.docs
documents = pytest.mark.parametrize("path", DOCS, ids=lambda path: path.stem)
needs_weights = pytest.mark.skipif(
    not all((WEIGHTS / name).exists() for name in NEEDED), reason="the bundled weights are missing"
)


def blocks(path, *languages):
    """``(mark, text)`` of each fenced block in one of the languages."""
    text = path.read_text(encoding="utf-8")
    return [(mark, body) for language, mark, body in BLOCK.findall(text) if language in languages]


def prose(path):
    """A document without its fenced blocks."""
    return BLOCK.sub("", path.read_text(encoding="utf-8"))


# Python


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """A folder ``mini`` of tiny checkpoints with the bundled widths. Local paths win over the bundled weights."""
    folder = tmp_path_factory.mktemp("docs") / "mini"
    tiny_sd(folder / "sd", width=128)
    tiny_clip(folder / "denscore")
    return folder


@pytest.fixture
def workdir(tmp_path, monkeypatch, tiny):
    """A working directory with the examples and weights. Restores the registries afterwards."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    for folder in (ROOT / "examples", tiny):
        (tmp_path / folder.name).symlink_to(folder)
    before = dict(catalogue.REGISTRY)
    yield
    catalogue.REGISTRY.clear()
    catalogue.REGISTRY.update(before)


EXECUTED = [ROOT / "README.md", ROOT / "docs" / "quickstart.md"]


def run_python(path, body, names, capsys):
    """Runs a block in a namespace and compares what it prints with its comments."""
    capsys.readouterr()
    exec(compile(body, f"{path.name}: {body.splitlines()[0]}", "exec"), names)
    printed = re.findall(r"^ *print\(.*\)  # (.*)$", body, re.MULTILINE)
    assert not printed or capsys.readouterr().out.splitlines() == printed


@pytest.mark.parametrize("path", [d for d in DOCS if d not in EXECUTED], ids=lambda path: path.stem)
def test_python_blocks_run(path, workdir, capsys):
    names = {}
    for mark, body in blocks(path, "python"):
        assert mark in ("", "hub")
        if mark == "hub":
            compile(body, path.name, "exec")
        else:
            run_python(path, body, names, capsys)


def test_readme_and_quickstart_run_in_one_folder(workdir, capsys):
    """The Python blocks of the quickstart are run as in a notebook where each cell is run twice."""
    commands_run = []
    for path in EXECUTED:
        names = {}
        for language, mark, body in BLOCK.findall(path.read_text(encoding="utf-8")):
            if language == "python" and mark == "hub":
                compile(body, path.name, "exec")
            elif language == "python":
                for _ in range(2 if path.stem == "quickstart" else 1):
                    run_python(path, body, names, capsys)
            elif mark != "hub" and language == "sh":
                for words in commands(body):
                    if words[0] == "longalign" and words[1] != "demo":  # tests/test_demo.py runs that
                        assert main(shortened(words[1:])) == 0, f"{path.name}: {words}\n{capsys.readouterr().err}"
                        commands_run.append(words[1])
    assert set(commands_run) == {
        "list",
        "describe",
        "train",
        "generate",
        "score",
        "eval",
        "export",
        "cache",
        "compute-direction",
        "ablate",
    }


@pytest.mark.filterwarnings("ignore::longalign.encoders.base.TruncationWarning")  # which the notebook shows
def test_notebook_cells_run(workdir):
    names = {}
    for cell in json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]:
        body = "".join(cell["source"])
        assert cell["cell_type"] == "markdown" or not cell["outputs"]
        if cell["cell_type"] == "code":
            body = re.sub(r'("(?:loop.steps|num_steps)": )\d+', r"\g<1>2", body)
            exec(compile(body, f"{NOTEBOOK.name}: {cell['id']}", "exec"), names)
    assert set(names["images"]) == {"truncated", "segments", "reward"}


# raised by diffusers' Euler scheduler with numpy 2
@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
@pytest.mark.parametrize("write", [tiny_sd, tiny_sdxl, tiny_sd3])
def test_readme_pipeline_runs(write, tmp_path):
    """The pipeline of the README, with a tiny checkpoint in place of the published one."""
    (body,) = [body for mark, body in blocks(ROOT / "README.md", "python") if mark == "hub"]
    folder = write(tmp_path / "checkpoint")
    body, count = re.subn(r'from_pretrained\("[^"]+"\)', f"from_pretrained({str(folder)!r})", body)
    names = {}
    exec(compile(body, "README.md", "exec"), names)
    assert count == 1 and names["image"].width > 0


def shortened(arguments):
    """A command with fewer steps and smaller batches."""
    command, *rest = arguments
    rest = [re.sub(r"(?<=^loop\.steps=)\d+", lambda n: str(int(n[0]) // 100), word) for word in rest]
    rest = [re.sub(r"(?<=^data\.size=)\d+", "6", word) for word in rest]
    if command in ("train", "ablate"):
        rest[1:1] = ["loop.batch_size=2", "trainer.lora.rank=2"]
        rest[1:1] = [] if any(word.startswith("loop.steps=") for word in rest) else ["loop.steps=1"]
        rest[1:1] = ["trainer.num_steps=2"] if "reward" in rest[0] else []
    rest += ["--num-steps", "2"] if command in ("generate", "ablate") else []
    return [command, *rest, *(["--seeds", "1", "--num-prompts", "2"] if command == "ablate" else [])]


# Commands and configs


@documents
def test_commands_parse(path, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    for _, body in blocks(path, "sh"):
        for words in commands(body):
            check_command(words)


@pytest.mark.parametrize("path", [p for p in DOCS if p.name != "CHANGELOG.md"], ids=lambda path: path.stem)
def test_inline_commands_exist(path):
    assert {*re.findall(r"`longalign ([a-z][\w-]*)", prose(path))} <= {*COMMANDS}


def commands(body):
    """The words of each command of a block."""
    lines = body.replace("\\\n", " ").splitlines()
    return [words for line in lines if (words := shlex.split(line, comments=True))]


def check_command(words):
    targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    while re.fullmatch(r"\w+=.*", words[0]):
        words = words[1:]
    command = words[0].removeprefix(".venv/bin/")
    if command == "longalign":
        check_longalign(words[1:])
    elif command in ("accelerate", "torchrun"):
        check_longalign(words[words.index("longalign") + 1 :])
    elif command == "make":
        assert {w for w in words[1:] if "=" not in w} <= set(targets), words
    elif command in ("python", "sh") and words[1] != "-m":
        assert (ROOT / words[1]).is_file(), words
    elif command == "pip" or words[:2] == ["uv", "pip"]:
        check_installable(words[words.index("install") + 1 :])
    else:
        assert command in ("python", "hf", "ruff", "uv", "."), words


def check_installable(arguments):
    """Checks that pip arguments are package folders with existing extras, or published distributions."""
    projects = [
        tomllib.loads(path.read_text()) for path in (ROOT / "pyproject.toml", *ROOT.glob("plugins/*/pyproject.toml"))
    ]
    unpublished = {project["project"]["name"] for project in projects}
    for word in (w for w in arguments if not w.startswith("-") and "://" not in w and w != "cpu"):
        name, _, extras = word.rstrip("]").partition("[")
        assert name not in unpublished, f"{name} is not published: use pip install -e ."
        if name.startswith(".") or "/" in name:
            project = tomllib.loads((ROOT / name / "pyproject.toml").read_text())["project"]
            assert set(filter(None, extras.split(","))) <= set(project.get("optional-dependencies", {})), word


def check_longalign(arguments):
    args = parse(arguments)
    if args.command == "train":
        changes = parse_assignments(args.overrides)
        if Path(args.config).is_relative_to("examples"):
            override(args.config, changes)
    specs = getattr(args, "reward", None)
    for reward in [] if args.command == "demo" or not specs else [specs] if isinstance(specs, str) else specs:
        rewards.validate(parse_value(reward))
    for metric in getattr(args, "metric", []):
        if not metric.endswith(".yaml"):  # a file of the reader's
            metrics.validate(parse_value(metric))
    if args.command == "list" or (args.command == "describe" and args.topic in ("run", *REGISTRIES)):
        assert main(arguments) == 0


@documents
def test_config_blocks_are_valid(path):
    for _, body in blocks(path, "yaml"):
        tree = yaml.safe_load(body)
        if "backbone" in tree:
            load_config(tree)
    for _, body in blocks(path, "toml"):
        assert tomllib.loads(body)


def test_migration_keys_exist():
    """Each key that docs/migrating.md names is a key of one of its configs, or of another trainer."""
    path = ROOT / "docs" / "migrating.md"
    configs = [to_dict(load_config(yaml.safe_load(body))) for _, body in blocks(path, "yaml")]
    configs += [to_dict(load_config(ROOT / "examples" / f"longalign-sd15-{name}.yaml")) for name in ("lcm", "reward")]
    named = re.findall(r"`((?:backbone|encoder|rewards|trainer|data|loop|monitor)\.[\w.]+)", prose(path))
    assert len(configs) == 5 and len(named) > 50
    missing = [key for key in named if not any(has_key(config, key.split(".")) for config in configs)]
    assert not missing


def has_key(tree, steps):
    for step in steps:
        if isinstance(tree, list) and step.isdigit() and int(step) < len(tree):
            tree = tree[int(step)]
        elif isinstance(tree, dict) and step in tree:
            tree = tree[step]
        else:
            return False
    return True


@pytest.mark.skipif(not (ROOT / "mkdocs.yml").exists(), reason="the site is built from a checkout only")
def test_navigation_lists_all_pages():
    pages = [*(ROOT / "docs").rglob("*.md"), *(ROOT / "benchmarks").glob("*.md")]
    navigation = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    for page in pages:
        name = page.relative_to(ROOT).as_posix().removeprefix("docs/")
        assert re.search(rf": {re.escape(name)}$", navigation, re.MULTILINE), f"add {name} to nav in mkdocs.yml"


# Named objects


@documents
def test_link_targets_exist(path):
    for target, anchor in re.findall(r"\]\(([^)\s#]*)(?:#([^)\s]*))?\)", prose(path)):
        if target.startswith("https://"):
            continue
        file = (path.parent / target).resolve() if target else path
        assert file.exists(), f"{path.name} links to {target}"
        if anchor:
            titles = re.findall(r"^#+ (.*)$", file.read_text(encoding="utf-8"), re.MULTILINE)
            assert anchor in [re.sub(r"[^\w\- ]", "", t).lower().replace(" ", "-") for t in titles], anchor


@documents
def test_named_files_exist(path):
    for name in re.findall(rf"`({FOLDERS}[\w./*-]*)`", prose(path)):
        assert list(ROOT.glob(name)), f"{path.name} names {name}"


@documents
def test_named_objects_exist(path):
    for name in re.findall(r"`(longalign(?:\.[A-Za-z_]\w*)+)(?:\([^`]*\))?`", prose(path)):
        if not name.endswith(".safetensors"):
            pkgutil.resolve_name(name)


def test_cited_tests_exist():
    sources = (path.read_text(encoding="utf-8") for path in (ROOT / "tests").rglob("*.py"))
    tests = set(re.findall(r"def (test_\w+)", "".join(sources)))
    text = (ROOT / "docs" / "reliability.md").read_text(encoding="utf-8")
    cited = set(re.findall(r"(?:::|`)(test_\w+)(?![\w.])", text))
    assert cited and not cited - tests


@needs_weights
@documents
def test_named_weights_exist(path):
    for name in re.findall(r"(?<![\w/.])mini/[a-z]\w*", path.read_text(encoding="utf-8")):
        assert Path(resolve_checkpoint(name)).is_dir()


def test_readme_lists_every_part():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    missing = [f"{kind}: {name}" for kind, name in builtin_parts() if f"`{name}`" not in text]
    assert not missing


def test_config_page_lists_resumable_keys():
    section = re.search(r"^## Resuming$(.*?)^#", (ROOT / "docs" / "config.md").read_text(), re.MULTILINE | re.DOTALL)
    assert section and {*RESUMABLE_KEYS} <= {*re.findall(r"`([\w.]+)`", section[1])}


def test_license_file_matches_pyproject():
    text = (ROOT / "LICENSE").read_text(encoding="utf-8")
    assert "Apache License" in text and "Version 2.0, January 2004" in text and "END OF TERMS AND CONDITIONS" in text
    assert tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["license"] == "Apache-2.0"


# Generated blocks


def builtin_parts():
    """``(kind, name)`` of the parts of this package, without plugins."""
    return [
        (kind, name)
        for kind, registry in REGISTRIES.items()
        for name in registry.names()
        if any(info.owner.startswith("longalign ") for info in registry.infos(name))
    ]


def reference():
    """Every part and every key, as printed by `longalign describe`."""
    out = ["## A run", "", *entry(describe_model(RunConfig))]
    last_kind = None
    for kind, name in builtin_parts():
        if kind != last_kind:
            out += [f"## {kind}", ""]
        last_kind = kind
        out += [f"### `{name}`", "", *entry(describe_part(kind, name).partition("\n\n")[2])]
    return "\n".join(out)


def entry(text):
    """One description in Markdown: its summary, and a list of its keys."""
    summary, _, keys = text.rpartition("\n\n") if re.search(r"\n\n\w+: .*\n    ", text) else (text, "", "")
    out = [" ".join(p.split()) + "\n" for p in summary.split("\n\n")]
    for key, kind, about in re.findall(r"^(\S+): (.*)\n((?:    .*\n?)*)", keys, re.MULTILINE):
        kind, equals, default = kind.rpartition(" = ") if " = " in kind else (kind, "", "")
        required = kind.endswith(" (required)")
        shape = f"`{kind.removesuffix(' (required)')}`"
        shape += f", default `{default}`" if equals else ", required" if required else ""
        out.append(f"- **`{key}`** ({shape}): {' '.join(about.split())}")
    return [*out, ""] if keys else out


def recipes():
    """Table of the recipes with the first paragraph of each docstring."""
    rows = ["| recipe | what it trains |", "|---|---|"]
    for path in sorted(RECIPES.glob("*.py")):
        about = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
        if "Run:" in about:
            summary = about.split("\n\n")[0].split("Run:")[0]
            rows.append(f"| `{path.relative_to(ROOT)}` | {' '.join(summary.split())} |")
    return "\n".join([*rows, ""])


def logs():
    """The rows of each recipe's log."""
    return {
        path.stem: [json.loads(line) for line in path.read_text().splitlines()]
        for path in sorted((RECIPES / "logs").glob("*.jsonl"))
    }


def measured():
    """The last evaluation in each log. Evaluation keys are those missing from the shortest of the last rows."""
    out = ["| log | steps | minutes | measured on held-out data |", "|---|---|---|---|"]
    for name, rows in logs().items():
        training_row = min(rows[-10:], key=len)
        if last := [row for row in rows if row.keys() - training_row.keys()]:
            values = ", ".join(f"{k} {v}" for k, v in last[-1].items() if k not in training_row)
            out.append(f"| {name} | {last[-1]['step']} | {last[-1]['seconds'] / 60:.0f} | {values} |")
    return "\n".join([*out, ""])


def text_to_image_pipelines():
    """Classes of the installed diffusers that make images from a prompt alone, or with a control image, by name."""
    known = {cls.__name__ for cls in AUTO_TEXT2IMAGE_PIPELINES_MAPPING.values()}
    for name in dir(diffusers):
        cls = getattr(diffusers, name) if name.endswith("Pipeline") else None
        if cls is None or ".deprecated." in cls.__module__ or "Audio" in name:
            continue
        parameters = inspect.signature(cls.__call__).parameters
        other = any(re.fullmatch(r"images?|image_latents|.*(frame|video|audio).*", key) for key in parameters)
        if name in known or ("prompt" in parameters and not other and prompt_inputs(cls).sequences):
            yield name, cls


def pipelines():
    """A row for each text-to-image pipeline: the arguments that `condition` fills, and where a width comes from."""
    run = set(re.findall(r"\b\w+Pipeline(?=\")", (ROOT / "tests/inference/test_pipeline_inputs.py").read_text("utf-8")))
    lines = [
        f"From the classes of diffusers {diffusers.__version__}:\n",
        "| pipeline | states | mask | pooled | tested |",
    ]
    lines += ["|---|---|---|---|---|"]
    for name, cls in text_to_image_pipelines():
        inputs, parts = prompt_inputs(cls), inspect.signature(cls.__init__).parameters
        part = next(
            (parts[key].annotation for key in ("unet", "transformer", "prior", "prior_prior") if key in parts), None
        )
        part = getattr(diffusers, part, None) if isinstance(part, str) else part
        keys = inspect.signature(part.__init__).parameters if inspect.isclass(part) else {}
        if inputs.unsupported or not inputs.sequences:
            reason = f"needs {inputs.unsupported}" if inputs.unsupported else "takes no embeddings of a prompt"
            lines.append(f"| `{name}` | not supported: {reason} | | | |")
            continue
        states = []
        for item in inputs.sequences:
            widths = ", ".join(f"`{key}`" for key in width_keys(item.states, keys))
            states.append(f"`{item.states}`" + (f" ({widths})" if widths else "") + (", list" if item.as_list else ""))
        masks = [f"`{s.mask}`" for s in inputs.sequences if s.mask]
        pooled = f"`{inputs.pooled}`" if inputs.pooled else ""
        lines.append(
            f"| `{name}` | {'; '.join(states)} | {'; '.join(masks)} | {pooled} | {'yes' if name in run else ''} |"
        )
    return "\n".join(lines) + "\n"


GENERATED = {
    "pipelines": (ROOT / "docs" / "pipelines.md", pipelines),
    "reference": (ROOT / "docs" / "config.md", reference),
    "recipes": (ROOT / "docs" / "synthetic-scenes.md", recipes),
    "measured": (ROOT / "docs" / "synthetic-scenes.md", measured),
}


def split_at_markers(name):
    """Text before, between and after the markers of a generated block."""
    text = GENERATED[name][0].read_text(encoding="utf-8")
    begin, end = f"<!-- {name}: written by tests/test_docs.py -->\n", f"<!-- end of {name} -->\n"
    before, _, rest = text.partition(begin)
    inside, _, after = rest.partition(end)
    return before + begin, inside, end + after


@pytest.mark.parametrize("name", ["reference", "recipes"])
def test_generated_blocks_are_up_to_date(name):
    assert split_at_markers(name)[1] == GENERATED[name][1](), "run: python tests/test_docs.py"


def test_table_of_pipelines_is_up_to_date():
    written = split_at_markers("pipelines")[1]
    if written.startswith(f"From the classes of diffusers {diffusers.__version__}:"):
        assert written == pipelines(), "run: python tests/test_docs.py"


def test_measured_table_matches_logs():
    rows = [
        [cell.strip() for cell in line.split("|")[1:-1]] for line in split_at_markers("measured")[1].splitlines()[2:]
    ]
    log_rows = logs()
    for name, step, minutes, values in rows:
        (row,) = [row for row in log_rows[name] if str(row["step"]) == step]
        assert f"{row['seconds'] / 60:.0f}" == minutes
        for key, value in (item.split(" ") for item in values.split(", ")):
            assert str(row[key]) == value, f"{name}, step {step}: run: python tests/test_docs.py"


@needs_weights
def test_measured_table_lists_every_log():
    assert {line.split("|")[1].strip() for line in split_at_markers("measured")[1].splitlines()[2:]} == set(logs())


if __name__ == "__main__":
    for generated, (document, write) in GENERATED.items():
        head, _, tail = split_at_markers(generated)
        document.write_text(head + write() + tail, encoding="utf-8")
