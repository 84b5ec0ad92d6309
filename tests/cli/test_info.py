"""``fusedopt info`` on the command line."""

from __future__ import annotations

import json

import pytest

from fusedopt.backends import info

typer_testing = pytest.importorskip("typer.testing")
pytest.importorskip("rich")


def test_info() -> None:
    from fusedopt.cli.app import app

    result = typer_testing.CliRunner().invoke(app, ["info"])
    assert result.exit_code == 0
    assert result.output.strip() == info.render()
    result = typer_testing.CliRunner().invoke(app, ["info", "--json"])
    assert json.loads(result.output) == info.info()
