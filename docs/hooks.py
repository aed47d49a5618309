"""Hooks of `make docs`: pages made of files outside docs/, a page for each kind of part, and the API reference.

README, CHANGELOG, CONTRIBUTING, the tables of benchmarks and the READMEs of plugins are pages too. Their links are
written for readers of the repository, and are rewritten here for the site.
"""

from __future__ import annotations

import posixpath
import re
from pathlib import Path

from mkdocs.structure.files import File, Files

from longalign.registry import REGISTRIES

ROOT = Path(__file__).parent.parent
#: page of the site -> file of the repository
PAGES = {
    "index.md": "README.md",
    "changelog.md": "CHANGELOG.md",
    "contributing.md": "CONTRIBUTING.md",
    "license.md": "LICENSE",
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
    "functional": ["functional"],
    "loop": ["loop"],
    "inference": ["inference", "image_folder", "image_io"],
    "evaluation": ["evaluation"],
    "checkpoints": ["checkpoints", "caching"],
    "testing": ["testing"],
}
#: name and first paragraph of a part in docs/config.md
PART = re.compile(r"^### `(.*)`\n\n(.*)$", re.MULTILINE)
LINK = re.compile(r"(?<=\]\()(?!https?:|mailto:|#)([^)#\s]+)(#[^)\s]*)?(?=\))")


def on_files(files: Files, config) -> Files:
    for page, source in PAGES.items():
        if source == "LICENSE":  # plain text, whose brackets are no links
            text = (ROOT / source).read_text(encoding="utf-8")
            files.append(File.generated(config, page, content=f"# License\n\n```text\n{text}```\n"))
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

    return LINK.sub(rewrite, markdown)
