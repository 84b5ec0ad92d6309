"""What the site needs beside mkdocs and its plugins.

- Pages that stay at the root of the repository, such as README.md, appear on the site, and links between files of the
  repository lead where they lead in it.
- Public names in running text, as in `AdamW`, lead to the API reference.
- An optimizer appears in the navigation and in the API reference without being listed there.
- A built site that takes anything from another one, or lacks something of its own, is an error.
"""

from __future__ import annotations

import ast
import os
import re
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parent.parent
DOCS = ROOT / "docs"
AT_ROOT = {
    "README.md": "index.md",
    "ARCHITECTURE.md": "architecture.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
}

_LINK = re.compile(r"(?P<image>!?)\[(?P<text>[^\[\]]*)\]\((?P<path>[^)#\s:]+)(?P<anchor>#[^)\s]*)?\)")
_FENCED = re.compile(r"(^```.*?^```)", re.DOTALL | re.MULTILINE)


# ---- pages and links ----------------------------------------------------------------------------------


def on_config(config: MkDocsConfig) -> None:
    """Fills the navigation's empty section with the optimizers' pages, which are titled by their headings."""
    pages = [path.relative_to(DOCS).as_posix() for path in sorted(DOCS.glob("optimizers/*.md"))]
    for section in config.nav:
        if "Optimizers" in section:
            section["Optimizers"] = pages


def on_files(files: Files, config: MkDocsConfig) -> Files:
    for name, page in AT_ROOT.items():
        files.append(File.generated(config, page, abs_src_path=str(ROOT / name)))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Links as the site has them, outside of blocks of code."""
    if page.is_homepage:
        page.meta["hide"] = ["navigation"]  # a page of one section
    source = Path(page.file.abs_src_path).resolve()

    def moved(link: re.Match[str]) -> str:
        target = (source.parent / unquote(link["path"])).resolve()
        if not target.exists() or not target.is_relative_to(ROOT):
            return link[0]  # mkdocs says what is wrong with it
        path = target.relative_to(ROOT).as_posix()
        if target.is_relative_to(DOCS):
            place = target.relative_to(DOCS).as_posix()
        elif path in AT_ROOT:
            place = AT_ROOT[path]
        elif link["image"]:
            place = path
            if files.get_file_from_path(place) is None:
                files.append(File.generated(config, place, abs_src_path=str(target)))
        else:  # a source or a folder, which the site does not have
            return link["text"]
        relative = os.path.relpath(place, Path(page.file.src_uri).parent)
        return f"{link['image']}[{link['text']}]({relative}{link['anchor'] or ''})"

    if page.file.src_uri == "api/optimizers.md":
        listed = (DOCS / "api/groups.md").read_text()
        names = sorted(_public_names("fusedopt.optimizers"), key=str.lower)
        markdown += "".join(f"\n::: fusedopt.{name}\n" for name in names if f"::: fusedopt.{name}\n" not in listed)

    parts = _FENCED.split(markdown)
    return "".join(part if part.startswith("```") else _LINK.sub(moved, part) for part in parts)


# ---- references to public names -----------------------------------------------------------------------


def _public_names(module: str) -> list[str]:
    """A module's __all__, without importing it: the site is built without torch."""
    tree = ast.parse((ROOT / module.replace(".", "/") / "__init__.py").read_text())
    assigned = (node for node in tree.body if isinstance(node, ast.Assign))
    return next(ast.literal_eval(node.value) for node in assigned if node.targets[0].id == "__all__")


def _references() -> dict[str, str]:
    """Text that can only mean a public name, and the name's full path.

    `param_groups` is left out, as every optimizer has an attribute of that name, and so are words.
    """
    found = {}
    for module, public in (
        ("fusedopt.schedules", "fusedopt.schedules"),
        ("fusedopt.optimizers", "fusedopt"),
        ("fusedopt", "fusedopt"),
    ):
        for name in _public_names(module):
            found[f"{public}.{name}"] = f"{public}.{name}"
            if name != name.lower() or ("_" in name.strip("_") and name != "param_groups"):
                found[name] = f"{public}.{name}"
    for method in ("health_report", "memory_report", "record_health"):
        found[method] = f"fusedopt.FusedOptimizer.{method}"
    return found


_REFERENCES = _references()
_ELSEWHERE = re.compile(r"(<(a|pre|h[1-6]|autoref)\b.*?</\2>)", re.DOTALL)
_CODE = re.compile(r"<code>([\w.]+)(\([^<]*\))?</code>")


def on_page_content(html: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Public names become references, outside of links, headings and blocks of code."""

    def referred(code: re.Match[str]) -> str:
        path = _REFERENCES.get(code[1])
        return code[0] if path is None else f'<autoref identifier="{path}">{code[0]}</autoref>'

    # A split by two groups gives text, what is left alone, its tag, text, ...
    parts = _ELSEWHERE.split(html)
    return "".join(_CODE.sub(referred, part) if i % 3 == 0 else part for i, part in enumerate(parts) if i % 3 != 2)


# ---- what the built site loads ------------------------------------------------------------------------

_LOADED_BY_CSS = re.compile(r"(?:url\(|@import)\s*['\"]?\s*([^'\")\s]+)")


class _Addresses(HTMLParser):
    """What a page loads, and what it only leads to."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.loaded = _LOADED_BY_CSS.findall(text)
        self.linked: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = {key: value for key, value in attrs if value}
        addresses = self.linked if tag == "a" else self.loaded
        addresses.extend(found[key] for key in ("src", "href", "data", "poster") if key in found)
        self.loaded.extend(part.split()[0] for part in found.get("srcset", "").split(",") if part.strip())
        if "mermaid" in found.get("class", "").split():  # the one thing that the theme's scripts fetch by themselves
            self.loaded.append("https://unpkg.com/mermaid")


def on_post_build(config: MkDocsConfig) -> None:
    """Looks at every page and style sheet of the built site. Raises PluginError."""
    site = Path(config.site_dir)
    faults = []
    for file in sorted([*site.rglob("*.html"), *site.rglob("*.css")]):
        text, name = file.read_text(), file.relative_to(site)
        page = _Addresses(text if file.suffix == ".html" else "")
        loaded = page.loaded if file.suffix == ".html" else _LOADED_BY_CSS.findall(text)
        for address in dict.fromkeys([*loaded, *page.linked]):
            url = urlsplit(address)
            if url.netloc or url.scheme:
                if address in loaded and url.scheme != "data":
                    faults.append(f"{name} loads {address}")
            elif name.name == "404.html":  # its addresses begin at the server's root
                continue
            elif url.path and not (file.parent / unquote(url.path)).exists():
                faults.append(f"{name} refers to {address}, which is not there")
    if faults:
        raise PluginError("\n".join(["the site is not whole:", *faults]))
