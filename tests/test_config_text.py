"""Config text that expands, nests too deeply or repeats a key is refused early; parsing it all would take minutes."""

from __future__ import annotations

import json

import pytest
import yaml

from skyreels_v3.config_text import read_json_text, read_yaml_text

BOMB = "a0: &a0 {x: 1}\n" + "".join(f"a{i}: &a{i}\n  <<: [*a{i - 1}, *a{i - 1}]\n" for i in range(1, 40))
LAUGHS = "a0: &a0 [lol]\n" + "".join(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 40))


def test_plain_texts_are_what_pyyaml_reads() -> None:
    content = {
        "prompt": "a: #b\n'c' \u732b",
        "seed": 5,
        "shift": 1e-3,
        "quiet": True,
        "ref_imgs": ["a", "b"],
        "lora": None,
    }
    for text in (yaml.safe_dump(content), json.dumps(content), yaml.safe_dump(content, allow_unicode=True)):
        assert read_yaml_text(text) == yaml.safe_load(text) == content
    assert read_yaml_text("# nothing\n") is None


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        (BOMB, "anchors and aliases are not supported"),
        (LAUGHS, "anchors and aliases are not supported"),
        ("<<: {seed: 1}", "tag:yaml.org,2002:merge"),
        ("a: " + "[" * 100_000, "too many values, or nested too deeply"),
        ("a: " + "{a: " * 50_000, "too many values, or nested too deeply"),
        ("".join(f"{' ' * depth}a:\n" for depth in range(500)), "too many values, or nested too deeply"),
        ("- 1\n" * 50_000, "too many values, or nested too deeply"),
        ("seed: 1" + ":1" * 100_000, "a value without quotes of more than 10000"),
        ("shift: 1" + ":1" * 1000 + ".5", "too large"),
        ("seed: 1\nshift: 2\n'seed': 3", "seed is given twice"),
        ("prompt: !!python/object/apply:os.system [id]", "could not determine a constructor"),
        ("? [a, b]\n: c", "unhashable key"),
        ("%YAML 1." + "1" * 9000, "Exceeds the limit"),
        ("a: 1\n---\nb: 2", "another document"),
    ],
)
def test_yaml_that_is_refused(text: str, problem: str) -> None:
    with pytest.raises(yaml.YAMLError, match=problem):
        read_yaml_text(text)


@pytest.mark.parametrize(
    ("text", "error", "problem"),
    [
        ('{"seed": 1, "seed": 2}', ValueError, "seed is given twice"),
        ("[" * 1_000_000, RecursionError, "recursion"),
        ('{"seed": ' + "1" * 5000 + "}", ValueError, "Exceeds the limit"),
    ],
)
def test_json_that_is_refused(text: str, error: type[Exception], problem: str) -> None:
    with pytest.raises(error, match=problem):
        read_json_text(text)
