"""The only list of rules, by the names of csrc/rules/all.h: each file has those of its equation."""

from __future__ import annotations

import importlib

from .rule import Rule as Rule

_FILES = ("adafactor", "adagrad", "adamw", "ademamix", "lion", "rmsprop", "schedule_free", "sgd", "stable_adamw")

RULES: dict[str, Rule] = {}
for _file in _FILES:
    RULES |= importlib.import_module(f".{_file}", __package__).RULES
