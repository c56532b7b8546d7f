"""What MkDocs does not do by itself for docs/: API pages, listings of linked files, equations; see mkdocs.yml."""

from __future__ import annotations

import html
import os
import re
from pathlib import Path, PurePosixPath
from typing import Literal

from latex2mathml.converter import convert
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parent.parent
OUTSIDE = re.compile(r"\]\(((?:\.\./)+[^)#\s]+)")
INLINE = re.compile(r'<span class="arithmatex">\\\((.*?)\\\)</span>', re.S)
BLOCK = re.compile(r'<div class="arithmatex">\s*\\\[(.*?)\\\]\s*</div>', re.S)
LANGUAGES = {".py": "python", ".yaml": "yaml", ".toml": "toml", ".sh": "sh"}
UNLISTED = "---\nsearch: {exclude: true}\n---\n\n"


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Put a page for each module under Reference, API."""
    reference = next(entry["Reference"] for entry in config.nav if "Reference" in entry)
    reference[-1]["API"] = [
        {package: [{module.rpartition(".")[2]: _api_page(module)} for module in modules]}
        for package, modules in _modules().items()
    ]
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Pages that are not files of docs/: the API, the changelog, and listings of files that pages link to."""
    made = {_api_page(module): f"::: {module}\n" for names in _modules().values() for module in names}
    made["changelog.md"] = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    for file in files.documentation_pages():
        for target in OUTSIDE.findall(file.content_string):
            if source := _outside(file.src_uri, target):
                made.setdefault(_listing_page(source), _listing(source))
    for uri, content in made.items():
        files.append(File.generated(config, uri, content=content))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Lead links that leave docs/ to the listing of what they name."""
    here = page.file.src_uri

    def replaced(match: re.Match[str]) -> str:
        source = _outside(here, match[1])
        return f"]({os.path.relpath(_listing_page(source), PurePosixPath(here).parent)}" if source else match[0]

    return OUTSIDE.sub(replaced, markdown)


def on_page_content(content: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Equations as MathML, which browsers draw without a script."""
    content = INLINE.sub(lambda match: _math(match[1], "inline"), content)
    return BLOCK.sub(lambda match: _math(match[1], "block"), content)


def on_post_page(output: str, page: Page, config: MkDocsConfig) -> str:
    """Refuse a page that would load anything from elsewhere."""
    if found := re.search(r"<(?:script|link|img|iframe)\b[^>]*\b(?:src|href)=\"?https?://[^\s\">]+", output):
        raise PluginError(f"{page.file.src_uri} loads from elsewhere: {found[0]}")
    return output


def _modules() -> dict[str, list[str]]:
    """Modules by package, `bkd` itself first; the command line has a page of its own."""
    found: dict[str, list[str]] = {}
    for path in sorted((ROOT / "bkd").rglob("*.py")):
        name = ".".join(path.relative_to(ROOT).with_suffix("").parts)
        package = name.rpartition(".")[0]
        if path.stem not in ("__init__", "__main__") and package != "bkd.cli":
            found.setdefault(package, []).append(name)
    return dict(sorted(found.items()))


def _api_page(module: str) -> str:
    return f"reference/api/{module}.md"


def _outside(page: str, target: str) -> Path | None:
    """The file of this repository, outside docs/, that a link of a page names."""
    path = Path(os.path.normpath(ROOT / "docs" / PurePosixPath(page).parent / target))
    inside = path.is_relative_to(ROOT / "docs") or not path.is_relative_to(ROOT)
    return None if inside or not path.is_file() else path


def _listing_page(source: Path) -> str:
    name = source.relative_to(ROOT).as_posix()
    return "changelog.md" if name == "CHANGELOG.md" else f"source/{name}.md"


def _listing(source: Path) -> str:
    text, name = source.read_text(encoding="utf-8"), source.relative_to(ROOT)
    return f'{UNLISTED}# {name}\n\n````{LANGUAGES.get(source.suffix, "text")} linenums="1"\n{text}````\n'


def _math(latex: str, display: Literal["block", "inline"]) -> str:
    return convert(html.unescape(latex), display=display)
