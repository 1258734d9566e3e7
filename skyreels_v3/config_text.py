"""Reads untrusted YAML and JSON in bounded time.

Aliases (a short text could expand to gigabytes), deep nesting and repeated keys are refused.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable
from typing import Any

import yaml
from yaml.events import AliasEvent, CollectionEndEvent, CollectionStartEvent, ScalarEvent
from yaml.nodes import MappingNode, ScalarNode

MAX_DEPTH = 10
MAX_EVENTS = 4_000  # one for each scalar, two for each list and mapping
MAX_PLAIN = 10_000  # characters of an unquoted value; parsing a number takes quadratic time


class Loader(yaml.SafeLoader):
    """PyYAML's pure-Python loader, since libyaml's crashes on deeply nested brackets; refuses repeated keys."""

    def flatten_mapping(self, node: MappingNode) -> None:
        """Refuse repeated keys. PyYAML calls this to expand `<<` merge keys, which the constructor then refuses."""
        repeated = first_repeated(key.value for key, _ in node.value if isinstance(key, ScalarNode))
        if repeated is not None:
            raise refused(f"{repeated[:100]} is given twice", node.start_mark)


def read_yaml_text(text: str) -> Any:
    """Parse a YAML text.

    Raises:
        yaml.YAMLError: it is not YAML, exceeds a limit, or has an invalid date or number.
    """
    try:
        check_limits(text)
        return yaml.load(text, Loader=Loader)
    except (ValueError, OverflowError) as error:
        raise yaml.YAMLError(str(error)) from error


def check_limits(text: str) -> None:
    """Raise YAMLError as soon as a text exceeds a limit, without building any objects."""
    depth = 0
    for number, event in enumerate(yaml.parse(text, Loader=yaml.SafeLoader)):
        depth += isinstance(event, CollectionStartEvent) - isinstance(event, CollectionEndEvent)
        problem = ""
        if isinstance(event, AliasEvent):
            problem = "anchors and aliases are not supported, write the value out"
        elif depth > MAX_DEPTH or number > MAX_EVENTS:
            problem = "too many values, or nested too deeply"
        elif isinstance(event, ScalarEvent) and event.implicit[0] and len(event.value) > MAX_PLAIN:
            problem = f"a value without quotes of more than {MAX_PLAIN} characters"
        if problem:
            raise refused(problem, event.start_mark)


def refused(problem: str, mark: Any) -> yaml.YAMLError:
    return yaml.MarkedYAMLError(problem=problem, problem_mark=mark)


def read_json_text(text: str | bytes) -> Any:
    """Parse a JSON text; raises ValueError, or RecursionError for thousands of nested brackets."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        repeated = first_repeated(name for name, _ in pairs)
        if repeated is not None:
            raise ValueError(f"{repeated[:100]} is given twice")
        return dict(pairs)

    return json.loads(text, object_pairs_hook=unique)


def first_repeated(names: Iterable[str]) -> str | None:
    return next((name for name, times in Counter(names).items() if times > 1), None)
