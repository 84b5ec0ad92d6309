"""The results of a check as text: what ran, what was measured, and beside it what was predicted."""

from __future__ import annotations

import json
import re
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

PREDICTIONS = Path(__file__).with_name("gpu_predictions.json")
_SHOWN_FAILURES = 20

Lines = Sequence[dict[str, Any]]


def predictions() -> list[dict[str, Any]]:
    """What is expected of an H100: of which step of which case, which quantity, between what."""
    return json.loads(PREDICTIONS.read_text())


def shown(quantity: str, *values: float | None) -> str:
    """One value, or two that are the ends of a range, as tables have them."""
    if any(value is None for value in values):
        return "not measured"
    texts = list(dict.fromkeys(_number(quantity, value) for value in values if value is not None))
    unit = {"fraction_of_copy": " % of copy", "launches": " launches", "ms": " ms"}[quantity]
    return " to ".join(texts) + unit


def _number(quantity: str, value: float) -> str:
    if quantity == "fraction_of_copy":
        return f"{100 * value:.0f}"
    return f"{value:.2f}".rstrip("0").rstrip(".")


def card_of(lines: Lines) -> str:
    """The name of the device."""
    run = next((line for line in lines if line["kind"] == "run"), {})
    return (run.get("device") or {}).get("name", "unknown")


def file_name(lines: Lines) -> str:
    """What the results are called in bench/results: the card and the day."""
    run = next((line for line in lines if line["kind"] == "run"), {"at": 0})
    card = re.sub(r"[^a-z0-9]+", "-", card_of(lines).lower()).strip("-")
    return f"{card}-{time.strftime('%Y-%m-%d', time.gmtime(run['at']))}.jsonl"


def table(rows: Sequence[Sequence[str]]) -> list[str]:
    """Rows in columns, the first one being the headings."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return ["  ".join(f"{cell:<{width}}" for cell, width in zip(row, widths)).rstrip() for row in rows]


def compared(lines: Lines) -> list[str]:
    """Each prediction beside what was measured."""
    present = [line for line in lines if line["kind"] == "bench" and line["stage"] != "bench-old"]
    measured = {(line["case"], line["step"]): line for line in present}
    rows = [("step", "case", "predicted for an H100", "measured", "card")]
    for each in predictions():
        line = measured.get((each["case"], each["step"]), {})
        found = shown(each["quantity"], line.get(each["quantity"]))
        predicted = shown(each["quantity"], each["low"], each["high"])
        rows.append((each["what"], each["case"], predicted, "failed" if "error" in line else found, card_of(lines)))
    return table(rows)


def _stages(lines: Lines) -> list[str]:
    rows = [("stage", "outcome", "seconds", "limit", "")]
    for line in lines:
        if line["kind"] == "stage":
            seconds, limit = (f"{line[key]:g}" for key in ("seconds", "limit"))
            reason = line.get("reason", "")
            if line.get("running"):
                reason += f", in {', '.join(line['running'])}"
            rows.append((line["name"], line["outcome"], seconds, limit, reason))
    ended = {line["name"] for line in lines if line["kind"] == "stage"}
    rows += [(line["of"], "began", "", "", "") for line in lines if line["kind"] == "begin" and line["of"] not in ended]
    return table(rows)


def _smoke(lines: Lines) -> list[str]:
    found = [line for line in lines if line["kind"] == "smoke" and "format" in line]
    if not found:
        return []
    text = [f"smoke: {sum(line['equal'] for line in found)} of {len(found)} runs have the bits of the CPU backend"]
    for line in found:
        if not line["equal"]:
            text.append(f"  {line['kernels']}, {line['format']}: {line.get('first') or _last(line['error'])}")
    return text


def _tests(lines: Lines) -> list[str]:
    text = []
    found = [line for line in lines if line["kind"] == "test"]
    for stage in dict.fromkeys(line["stage"] for line in found):
        counts = Counter(line["outcome"] for line in found if line["stage"] == stage)
        text.append(f"tests, {stage}: " + ", ".join(f"{count} {outcome}" for outcome, count in counts.items()))
    reasons = Counter(line["reason"] for line in found if line["outcome"] == "skipped")
    text += [f"  skipped, {count}: {reason}" for reason, count in reasons.items()]
    failed = [line for line in found if line["outcome"] in ("failed", "cut off")]
    text += [f"  {line['outcome']}: {line['test']}: {_last(line['lines'])}" for line in failed[:_SHOWN_FAILURES]]
    if len(failed) > _SHOWN_FAILURES:
        text.append(f"  and {len(failed) - _SHOWN_FAILURES} more, in results.jsonl")
    return text


def _bench(lines: Lines) -> list[str]:
    rows = [("case", "step", "ms", "of copy", "copy GB/s", "speed-up", "launches")]
    notes = []
    for line in lines:
        if line["kind"] == "bench" and "ms" in line:
            copied = line["moved_bytes"] / line["copy_ms"] / 1e6 if line["copy_ms"] else None
            numbers = (
                ("{:.3f}", line["ms"]),
                ("{:.0%}", line["fraction_of_copy"]),
                ("{:.0f}", copied),
                ("{:.2f}", line["speed_up"]),
                ("{}", line["launches"]),
            )
            cells = ("" if value is None else how.format(value) for how, value in numbers)
            case = line["case"] + (", old kernels" if line["stage"] == "bench-old" else "")
            rows.append((case, line["step"], *cells))
        elif line["kind"] in ("bench", "case"):
            who = " / ".join(filter(None, (line["case"], line.get("step"))))
            if (reason := line.get("unavailable") or line.get("error")) is not None:
                notes.append(f"  {who}: {_last(reason)}")
            if line.get("finite") is False:
                notes.append(f"  {who}: parameters are no longer finite")
    return [*(table(rows) if len(rows) > 1 else []), *notes]


def _profiles(lines: Lines) -> list[str]:
    text = []
    for line in lines:
        if line["kind"] == "ncu" and "metrics" in line:
            metrics = {name: value for name, value in line["metrics"].items() if isinstance(value, float)}
            stalls = sorted((m for m in metrics.items() if "stalled" in m[0]), key=lambda m: -m[1])[:4]
            memory = [m for m in metrics.items() if m[0].startswith("dram__throughput")][:1]
            text.append(f"ncu, {line['kernel']}:")
            text += [f"  {name}: {value:g}" for name, value in memory + stalls]
    return text


def _last(text: str) -> str:
    lines = text.strip().splitlines()
    return lines[-1].strip() if lines else ""


def render(lines: Lines) -> str:
    """The summary of one run."""
    run = next((line for line in lines if line["kind"] == "run"), None)
    if run is None:
        return "no results yet"
    head = [f"{card_of(lines)}, torch {run.get('versions', {}).get('torch')}, {file_name(lines)}"]
    if run["dry"]:
        head.append("A dry run: tiny tensors on the CPU. The figures say nothing but that it runs.")
    if "error" in run:
        head.append(f"versions and device are not known: {_last(run['error'])}")
    ends = [line for line in lines if line["kind"] == "end"]
    if not ends:
        head.append("This run has not ended, or was killed.")
    elif ends[-1].get("stopped"):
        head.append(f"This run was ended by {ends[-1]['stopped']}.")
    parts = (head, _stages(lines), _smoke(lines), compared(lines), _bench(lines), _tests(lines), _profiles(lines))
    return "\n\n".join("\n".join(part) for part in parts if part)
