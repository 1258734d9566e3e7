"""Key maps: from the names of weights in checkpoint files to those in our models and the libraries.

A map is a tuple of (pattern, target) pairs. The first pattern that matches a whole key applies, and its groups may be
used in the target. A tuple of targets splits a tensor of several weights, stacked along its first axis.
A target of None drops a key that is known but not part of the model.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

Target = str | tuple[str, ...] | None
KeyMap = tuple[tuple[str, Target], ...]

IDENTITY: KeyMap = ((r"(.+)", r"\1"),)


def rename_layers(pattern: str, target: str, names: Mapping[str, str | Sequence[str]]) -> KeyMap:
    """Entries for the layers under a prefix, with all of their parameters.

    Args:
        pattern: the prefix in the file; `#` stands for a block's number.
        target: the prefix in the model.
        names: maps a layer, a pattern without groups, to its name in the model, or to several if they are stacked.
    """
    number = target.count("#") + 1  # of the group that matches the parameter's name
    pattern, target = pattern.replace(".", r"\.").replace("#", r"(\d+)"), target.replace("#", r"\1")
    pairs: list[tuple[str, Target]] = []
    for name, new in names.items():
        new_names = tuple(rf"{target}{part}.\{number}" for part in ((new,) if isinstance(new, str) else new))
        pairs.append((rf"{pattern}{name}\.(.+)", new_names[0] if isinstance(new, str) else new_names))
    return tuple(pairs)


def translate(key: str, key_map: KeyMap) -> Target:
    """The target of `key`, with groups filled in; raises KeyError if no pattern matches."""
    for pattern, target in key_map:
        if match := re.fullmatch(pattern, key):
            if isinstance(target, tuple):
                return tuple(match.expand(part) for part in target)
            return None if target is None else match.expand(target)
    raise KeyError(key)


def invert(key_map: KeyMap) -> KeyMap:
    """The map from the model's names back to the file's, without stacked weights and dropped keys.

    The groups of a pattern become references in the new target, and the references of a target become groups.
    """
    inverse: list[tuple[str, Target]] = []
    for pattern, target in reversed(key_map):  # reversed, since plain names come after other spellings
        if not isinstance(target, str):
            continue
        groups = re.findall(r"\((?!\?:)(?:[^()]|\([^()]*\))*\)", pattern)
        back, template = target.replace(".", r"\."), pattern
        for number, group in enumerate(groups, start=1):
            back = back.replace(rf"\{number}", group)
            template = template.replace(group, rf"\{number}", 1)
        inverse.append((back, template.replace(r"\.", ".")))
    return tuple(inverse)


def restore(key: str, inverse: KeyMap) -> str:
    """A model's key as the checkpoint spells it; unchanged if `inverse` does not know it."""
    try:
        return str(translate(key, inverse))
    except KeyError:
        return key
