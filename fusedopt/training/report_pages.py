"""Pages of reports: one list of blocks, written as Markdown and as a single HTML file that needs nothing else."""

from __future__ import annotations

import html
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Heading:
    """A heading below the title."""

    text: str


@dataclass(frozen=True)
class Text:
    """A paragraph.

    Attributes:
        text: Plain text.
        is_verdict: Whether it is what a reader in a hurry wants.
    """

    text: str
    is_verdict: bool = False


@dataclass(frozen=True)
class Rows:
    """A table: headers first. The first column is text, the others numbers, unless `is_text`."""

    rows: Sequence[Sequence[str]]
    is_text: bool = False


@dataclass(frozen=True)
class Code:
    """Text as it is, such as a file or a command line."""

    text: str
    kind: str = ""


@dataclass(frozen=True)
class Picture:
    """A picture: its caption, and an SVG element."""

    caption: str
    svg: str


Block = Heading | Text | Rows | Code | Picture


@dataclass(frozen=True)
class Report:
    """A page that a colleague can read without us.

    Attributes:
        title: Of the page.
        blocks: What is on it.
    """

    title: str
    blocks: tuple[Block, ...] = field(repr=False)

    def save(self, path: str | Path) -> None:
        """Writes the page: .html as one file, .md with its pictures in a folder beside it.

        Args:
            path: Ends with .html or .md.

        Raises:
            ValueError: It ends with something else.
        """
        path = Path(path)
        if path.suffix not in (".html", ".md"):
            raise ValueError(f"{path} has none of the suffixes .html and .md, which say how it is written")
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.suffix == ".html":
            path.write_text(self.html(), encoding="utf-8")
            return
        folder = path.with_name(f"{path.stem}-pictures")
        for i, block in enumerate(self.pictures):
            folder.mkdir(exist_ok=True)
            (folder / f"{i + 1}.svg").write_text(block.svg, encoding="utf-8")
        path.write_text(self.markdown(folder.name), encoding="utf-8")

    @property
    def pictures(self) -> list[Picture]:
        """The pictures in order."""
        return [block for block in self.blocks if isinstance(block, Picture)]

    def markdown(self, pictures: str = "pictures") -> str:
        """The page as Markdown.

        Args:
            pictures: The folder in which `save` puts them: 1.svg, 2.svg and so on.
        """
        parts, count = [f"# {_escaped(self.title)}"], 0
        for block in self.blocks:
            if isinstance(block, Heading):
                parts.append(f"## {_escaped(block.text)}")
            elif isinstance(block, Text):
                parts.append(f"**{_escaped(block.text)}**" if block.is_verdict else _escaped(block.text))
            elif isinstance(block, Rows):
                head, *rest = [[_escaped(cell).replace("|", "\\|") for cell in row] for row in block.rows]
                line = "|".join("---" if block.is_text or i == 0 else "---:" for i in range(len(head)))
                parts.append("\n".join([_row(head), f"|{line}|", *map(_row, rest)]))
            elif isinstance(block, Code):
                fence = "`" * max([3, *(len(run) + 1 for run in re.findall(r"`+", block.text))])
                parts.append(f"{fence}{block.kind}\n{block.text.rstrip()}\n{fence}")
            else:
                count += 1
                parts.append(f"![{_escaped(block.caption)}]({pictures}/{count}.svg)\n\n*{_escaped(block.caption)}*")
        return "\n\n".join(parts) + "\n"

    def html(self) -> str:
        """The page as one HTML file, with nothing from elsewhere."""
        parts = []
        for block in self.blocks:
            if isinstance(block, Heading):
                parts.append(f"<h2>{html.escape(block.text)}</h2>")
            elif isinstance(block, Text):
                kind = ' class="verdict"' if block.is_verdict else ""
                parts.append(f"<p{kind}>{html.escape(block.text)}</p>")
            elif isinstance(block, Rows):
                head, *rest = block.rows
                kind = "words" if block.is_text else "numbers"
                rows = [_cells("th", head), *(_cells("td", row) for row in rest)]
                parts.append(f'<div class="wide"><table class="{kind}">\n' + "\n".join(rows) + "\n</table></div>")
            elif isinstance(block, Code):
                parts.append(f"<pre>{html.escape(block.text.rstrip())}</pre>")
            else:
                caption = html.escape(block.caption)
                parts.append(
                    f'<figure role="img" aria-label="{caption}">{block.svg}<figcaption>{caption}</figcaption></figure>'
                )
        title = html.escape(self.title)
        return _PAGE.format(title=title, style=_STYLE, body="\n".join(parts))


def described(report: Report) -> dict[str, Any]:
    """A report as plain values, for programs; of pictures the captions."""
    blocks = []
    for block in report.blocks:
        values = {"kind": type(block).__name__.lower(), **vars(block)}
        blocks.append({key: value for key, value in values.items() if key not in ("svg", "is_text", "is_verdict")})
    return {"title": report.title, "blocks": blocks}


def _row(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def _cells(tag: str, cells: Sequence[str]) -> str:
    return "<tr>" + "".join(f"<{tag}>{html.escape(cell)}</{tag}>" for cell in cells) + "</tr>"


def _escaped(text: str) -> str:
    return re.sub(r"([\\`*_<>#\[\]])", r"\\\1", text)


_STYLE = """
:root { color-scheme: light; }
body { margin: 2rem auto; max-width: 60rem; padding: 0 1.25rem; background: #fff; color: #1b1f24;
  font: 16px/1.5 system-ui, -apple-system, "Segoe UI", "DejaVu Sans", sans-serif; }
h1 { font-size: 1.7rem; margin: 0 0 1rem; }
h2 { font-size: 1.2rem; margin: 2.2rem 0 .6rem; border-bottom: 1px solid #d8dce2; padding-bottom: .25rem; }
p { margin: .6rem 0; }
.verdict { background: #eef4ff; border-left: 4px solid #1f5fd0; padding: .7rem 1rem; font-weight: 600; }
.wide { overflow-x: auto; margin: .8rem 0; }
table { border-collapse: collapse; font-size: .9rem; font-variant-numeric: tabular-nums; }
th, td { padding: .3rem .7rem; border-bottom: 1px solid #e3e6ea; text-align: left; vertical-align: top; }
th { border-bottom: 2px solid #b8bfc8; }
.numbers th:not(:first-child), .numbers td:not(:first-child) { text-align: right; white-space: nowrap; }
.words td:not(:first-child) { overflow-wrap: anywhere; }
pre { background: #f5f6f8; border: 1px solid #e3e6ea; border-radius: 4px; padding: .7rem 1rem;
  white-space: pre-wrap; overflow-wrap: anywhere;
  font: .85rem/1.45 ui-monospace, "DejaVu Sans Mono", monospace; }
figure { margin: 1rem 0; }
figure svg { max-width: 100%; height: auto; }
figcaption { color: #5a626c; font-size: .88rem; }
@media print { body { margin: 0; max-width: none; } figure, tr { break-inside: avoid; } }
"""
_PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>{style}</style>
</head>
<body>
<h1>{title}</h1>
{body}
</body>
</html>
"""
