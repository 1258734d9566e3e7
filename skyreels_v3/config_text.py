"""YAML and JSON that users write, or have from somebody else: read in no time, whatever it says.

Nothing in them can grow (no aliases, no merge keys), nest deeply or be said twice.
"""

from __future__ import annotations

import json
from typing import Any

import yaml
from yaml.events import AliasEvent
from yaml.nodes import MappingNode, Node, ScalarNode

MAX_DEPTH = 10
MAX_NODES = 2_000
MAX_NUMBER = 10_000  # characters of what is no text; to read some takes a time that grows with the square


class _Loader(yaml.SafeLoader):
    """PyYAML's own parser (libyaml's dies of deeply nested brackets) with limits that hold while it reads."""

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self.depth = 0
        self.nodes = 0

    def compose_node(self, parent: Node | None, index: Any) -> Node | None:
        event = self.peek_event()
        self.nodes += 1
        if isinstance(event, AliasEvent):
            raise self._refuse("anchors and aliases are not read, write the value out", event.start_mark)
        if self.depth >= MAX_DEPTH or self.nodes > MAX_NODES:
            raise self._refuse("too many values, or too many in each other", event.start_mark)
        self.depth += 1
        node = super().compose_node(parent, index)
        self.depth -= 1
        is_text = node is None or node.tag == "tag:yaml.org,2002:str"
        if isinstance(node, ScalarNode) and not is_text and len(node.value) > MAX_NUMBER:
            raise self._refuse("an endless number", node.start_mark)
        if isinstance(node, MappingNode):
            self._check_keys(node)
        return node

    def _check_keys(self, node: MappingNode) -> None:
        seen: set[str] = set()
        for key in (key for key, _ in node.value if isinstance(key, ScalarNode)):
            if key.tag == "tag:yaml.org,2002:merge":
                raise self._refuse("merge keys are not read, write the values out", key.start_mark)
            if key.value in seen:
                raise self._refuse(f"{key.value[:100]} stands there twice", key.start_mark)
            seen.add(key.value)

    @staticmethod
    def _refuse(problem: str, mark: yaml.Mark | None) -> yaml.MarkedYAMLError:
        return yaml.MarkedYAMLError(problem=problem, problem_mark=mark)


def read_yaml_text(text: str) -> Any:
    """The content of a YAML text; raises YAMLError, also for dates and numbers that are none."""
    loader = _Loader(text)
    try:
        return loader.get_single_data()
    except (ValueError, OverflowError) as error:
        raise yaml.YAMLError(str(error)) from error
    finally:
        loader.dispose()


def read_json_text(text: str | bytes) -> Any:
    """The content of a JSON text; raises ValueError, or RecursionError for thousands of brackets."""
    return json.loads(text, object_pairs_hook=_unique)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    content = dict(pairs)
    if len(content) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"{twice[:100]} stands there twice")
    return content
