"""Hooks of `make docs`: pages made of files outside docs/, a page for each kind of part, and the API reference.

README, CHANGELOG, CONTRIBUTING, the tables of benchmarks, the READMEs of plugins and the notebook are pages too. Their
links are written for readers of the repository, and are rewritten here for the site. The notebook is run, and its page
shows the outputs; a cell that fails stops the build.
"""

from __future__ import annotations

import posixpath
import re
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from mkdocs.structure.files import File, Files

from longalign.registry import REGISTRIES

ROOT = Path(__file__).parent.parent
#: page of the site -> file of the repository
PAGES = {
    "index.md": "README.md",
    "changelog.md": "CHANGELOG.md",
    "contributing.md": "CONTRIBUTING.md",
    "license.md": "LICENSE",
    "notebook.md": "examples/quickstart.ipynb",
    **{
        path.relative_to(ROOT).as_posix(): path.relative_to(ROOT).as_posix()
        for pattern in ("benchmarks/*.md", "benchmarks/*.svg", "plugins/*/README.md")
        for path in sorted(ROOT.glob(pattern))
    },
}
#: modules of the reference by page; a folder stands for all modules in it
REFERENCE = {
    "composition": ["compose", "model", "registry", "parts", "runtime", "errors"],
    "config": ["config"],
    **{kind: [kind] for kind in REGISTRIES},
    "edits": ["edits", "directions"],
    "functional": ["functional"],
    "loop": ["loop"],
    "inference": ["inference", "image_folder", "image_io"],
    "evaluation": ["evaluation"],
    "checkpoints": ["checkpoints", "caching"],
    "testing": ["testing"],
}
#: name and first paragraph of a part in docs/config.md
PART = re.compile(r"^### `(.*)`\n\n(.*)$", re.MULTILINE)
#: the mark of blocks that need downloads, which the site's Markdown does not know
HUB = re.compile(r"^(```\w+) hub$", re.MULTILINE)
LINK = re.compile(r"(?<=\]\()(?!https?:|mailto:|#)([^)#\s]+)(#[^)\s]*)?(?=\))")


def on_files(files: Files, config) -> Files:
    for page, source in PAGES.items():
        if source == "LICENSE":  # plain text, whose brackets are no links
            text = (ROOT / source).read_text(encoding="utf-8")
            files.append(File.generated(config, page, content=f"# License\n\n```text\n{text}```\n"))
        elif source.endswith(".ipynb"):
            files.append(File.generated(config, page, content=run_notebook(ROOT / source)))
        else:
            files.append(File.generated(config, page, abs_src_path=str(ROOT / source)))
    for name in REFERENCE:
        files.append(File.generated(config, f"reference/{name}.md", content=reference(name)))
    for kind in REGISTRIES:
        files.append(File.generated(config, f"parts/{kind}.md", content=parts(kind)))
    return files


def parts(kind: str) -> str:
    """A page with the parts of a kind and their keys, from the reference in docs/config.md."""
    text = (ROOT / "docs" / "config.md").read_text(encoding="utf-8")
    section = re.search(rf"^## {kind}\n(.*?)(?=^## |^<!--|\Z)", text, re.MULTILINE | re.DOTALL)[1]
    rows = [f"| [`{name}`](#{name}) | {about} |" for name, about in PART.findall(section)]
    title = kind.replace("_", " ").capitalize()
    return "\n".join(
        [
            f"# {title}",
            "",
            f"The built-in parts of kind `{kind}`. See also how to [write one](../plugins.md#{kind}) and the",
            f"[classes](../reference/{kind}.md).",
            "",
            "| name | description |",
            "|---|---|",
            *rows,
            "",
            section.replace("\n### ", "\n## "),
        ]
    )


def run_notebook(path: Path) -> str:
    """Runs a notebook in an empty folder, and returns it as Markdown with the cells' outputs, without stderr."""
    import nbformat
    from nbclient import NotebookClient

    notebook = nbformat.read(path, as_version=4)
    with TemporaryDirectory() as folder:
        NotebookClient(notebook, timeout=1800, resources={"metadata": {"path": folder}}).execute()
    blocks = []
    for cell in notebook.cells:
        blocks.append(f"```python\n{cell.source}\n```" if cell.cell_type == "code" else cell.source)
        blocks += [text for output in cell.get("outputs", ()) if (text := output_block(output))]
    return "\n\n".join(blocks) + "\n"


def output_block(output: Any) -> str:
    """One output of a cell as Markdown: an image or text; nothing for stderr."""
    data = output.get("data", {})
    if "image/png" in data:
        return f'<img alt="output" src="data:image/png;base64,{data["image/png"].strip()}">'
    text = output.get("text", "") if output.get("name") == "stdout" else data.get("text/plain", "")
    return f"```text\n{text.rstrip()}\n```" if text.strip() else ""


def reference(name: str) -> str:
    """A page with the docstrings of a group of modules."""
    lines = [f"# {name.replace('_', ' ').capitalize()}", ""]
    for module in REFERENCE[name]:
        path = ROOT / "longalign" / module
        found = sorted(path.rglob("*.py")) if path.is_dir() else [path.with_suffix(".py")]
        for file in found:
            parts = file.relative_to(ROOT).with_suffix("").parts
            if parts[-1] != "__init__" and "plugin" not in parts:  # templates of plugins
                lines += [f"::: {'.'.join(parts)}", ""]
    return "\n".join(lines)


def on_page_markdown(markdown: str, page, config, files: Files) -> str:
    here = page.file.src_uri
    source = PAGES.get(here, f"docs/{here}")
    sites = {source: page for page, source in PAGES.items()}

    def rewrite(match: re.Match) -> str:
        target = posixpath.normpath(posixpath.join(posixpath.dirname(source), match[1]))
        site = sites.get(target) or (target.removeprefix("docs/") if target.startswith("docs/") else None)
        if site is None:
            return match[0]  # which the check of links reports
        return posixpath.relpath(site, posixpath.dirname(here) or ".") + (match[2] or "")

    return LINK.sub(rewrite, HUB.sub(r"\1", markdown))
