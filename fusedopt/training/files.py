"""Plain values as YAML, TOML and JSON, read strictly: a key given twice is an error, and 1e-4 is a number."""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

from .. import checks

SUFFIXES = {".yaml": "yaml", ".yml": "yaml", ".toml": "toml", ".json": "json"}


def needed(module: str) -> None:
    """Raises an ImportError that says what to install, if a module is missing."""
    checks.installed(module, "a recipe", "'fusedopt[training]'")


def plain(value: Any) -> Any:
    """A value with lists for tuples, and dicts for other mappings."""
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [plain(item) for item in value]
    return value


def dumps(values: Mapping[str, Any], kind: str) -> str:
    """The text of a file.

    Args:
        values: Plain values. TOML has no null: keys of the top level that are None are left out there.
        kind: "yaml", "toml" or "json".

    Returns:
        The text.

    Raises:
        ValueError: A None further down cannot be written in TOML.
    """
    if kind == "json":
        return json.dumps(values, indent=2) + "\n"
    if kind == "toml":
        needed("tomlkit")
        import tomlkit

        return tomlkit.dumps(_without_null(values))
    out = io.StringIO()
    _yaml().dump(dict(values), out)
    return out.getvalue()


def loads(text: str, kind: str) -> dict[str, Any]:
    """The values of a text that `dumps` or a person wrote.

    Args:
        text: The text.
        kind: "yaml", "toml" or "json".

    Returns:
        Plain values.

    Raises:
        ValueError: It is not of that kind, or has a key twice.
    """
    if kind == "json":
        return json.loads(text, object_pairs_hook=_once)
    if kind == "toml":
        needed("tomlkit")
        import tomlkit

        return tomlkit.parse(text).unwrap()
    yaml = _yaml()
    from ruamel.yaml.error import YAMLError

    try:
        return yaml.load(text)
    except YAMLError as error:
        raise ValueError(" ".join(str(error).split())) from None


def write(values: Mapping[str, Any], path: Path) -> None:
    """Writes a file at once: who reads it meanwhile sees the old one or the new one."""
    text = dumps(values, _kind(path))
    with replacing(path) as file:
        file.write(text)


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[IO[str]]:
    """A file to write, which takes the path when all is on the disk. Errors name the path, and leave nothing behind."""
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with beside.open("w", encoding="utf-8") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        beside.replace(path)
    except BaseException as error:
        with contextlib.suppress(OSError):
            beside.unlink()
        if isinstance(error, OSError):
            raise type(error)(error.errno, error.strerror, os.fspath(path)) from error
        raise


def read(path: Path) -> dict[str, Any]:
    """The values of a file, whatever they are. Raises a ValueError that names it."""
    kind = _kind(path)
    try:
        return loads(path.read_text(encoding="utf-8"), kind)
    except OSError as error:
        raise ValueError(f"{path} cannot be read ({error.strerror}); pass the path of a recipe") from error
    except ValueError as error:
        raise ValueError(f"{path} is not {kind.upper()}: {error}") from error


def _kind(path: Path) -> str:
    if path.suffix not in SUFFIXES:
        raise ValueError(f"{path} has none of the suffixes {', '.join(SUFFIXES)}, which say how it is written")
    return SUFFIXES[path.suffix]


def _yaml() -> Any:
    needed("ruamel.yaml")
    from ruamel.yaml import YAML

    yaml: Any = YAML(typ="safe", pure=True)  # of version 1.2, where 1e-4 is a number and no is a word
    yaml.default_flow_style = False
    yaml.sort_base_mapping_type_on_output = False
    yaml.width = 120
    yaml.representer.add_representer(list, _in_a_line)
    yaml.representer.add_representer(float, _with_point)
    yaml.representer.add_representer(str, _quoted)
    return yaml


_PLAIN = re.compile(r"[A-Za-z][A-Za-z0-9_-]*")
_NO_WORDS = {"y", "n", "yes", "no", "on", "off", "true", "false", "null"}  # of YAML 1.1


def _quoted(representer: Any, value: str) -> Any:
    is_plain = _PLAIN.fullmatch(value) and value.lower() not in _NO_WORDS
    style = None if is_plain else '"' if "\n" in value else "'"
    return representer.represent_scalar("tag:yaml.org,2002:str", value, style=style)


def _with_point(representer: Any, value: float) -> Any:
    """1.0e-05: without the point, readers of YAML 1.1, such as PyYAML, take it for a word."""
    text = {"inf": ".inf", "-inf": "-.inf", "nan": ".nan"}.get(repr(value), repr(value))
    return representer.represent_scalar("tag:yaml.org,2002:float", text if "." in text else text.replace("e", ".0e"))


def _in_a_line(representer: Any, value: list[Any]) -> Any:
    return representer.represent_sequence("tag:yaml.org,2002:seq", value, flow_style=all(_is_scalar(v) for v in value))


def _is_scalar(value: Any) -> bool:
    return not isinstance(value, (list, dict))


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) < len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in keys if keys.count(key) > 1)
        raise ValueError(f"{twice!r} is there twice; keep one")
    return result


def _without_null(values: Mapping[str, Any]) -> dict[str, Any]:
    kept = {key: value for key, value in values.items() if value is not None}
    for key, value in kept.items():
        _refuse_null(key, value)
    # Tables come last: what follows one in a file would belong to it.
    return dict(sorted(kept.items(), key=lambda item: isinstance(item[1], dict)))


def _refuse_null(where: str, value: Any) -> None:
    if value is None:
        raise ValueError(f"{where} is None, which TOML cannot say; leave it out, or write YAML or JSON")
    if isinstance(value, dict):
        for key, item in value.items():
            _refuse_null(f"{where}.{key}", item)
    elif isinstance(value, list):
        for i, item in enumerate(value):
            _refuse_null(f"{where}[{i}]", item)
