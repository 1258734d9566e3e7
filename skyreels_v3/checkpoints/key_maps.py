"""Key maps: what a checkpoint file calls a weight, and what our models and the libraries call it.

A map is a tuple of (pattern, target) pairs. A key belongs to the first pattern that matches all of it; the target may
use the pattern's groups. A tuple of targets means that the tensor holds several weights, stacked in equal parts along
its first axis. Target None drops the key: it is known, and not part of the model that is loaded.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

Target = str | tuple[str, ...] | None
KeyMap = tuple[tuple[str, Target], ...]

IDENTITY: KeyMap = ((r"(.+)", r"\1"),)


def rename_layers(pattern: str, target: str, names: Mapping[str, str | Sequence[str]]) -> KeyMap:
    """Entries for the layers under a prefix, all of their parameters included.

    Args:
        pattern: the prefix in the file; `#` stands for the number of a block.
        target: the prefix in the model.
        names: of each layer, as a pattern without groups, its name in the model; a tuple where it is a stack of them.
    """
    number = target.count("#") + 1  # of the group that holds the parameter's name
    pattern, target = pattern.replace(".", r"\.").replace("#", r"(\d+)"), target.replace("#", r"\1")
    pairs: list[tuple[str, Target]] = []
    for name, new in names.items():
        new_names = tuple(rf"{target}{part}.\{number}" for part in ((new,) if isinstance(new, str) else new))
        pairs.append((rf"{pattern}{name}\.(.+)", new_names[0] if isinstance(new, str) else new_names))
    return tuple(pairs)


def translate(key: str, key_map: KeyMap) -> Target:
    """The target of `key`, groups filled in; raises KeyError when no pattern matches."""
    for pattern, target in key_map:
        if match := re.fullmatch(pattern, key):
            if isinstance(target, tuple):
                return tuple(match.expand(part) for part in target)
            return None if target is None else match.expand(target)
    raise KeyError(key)


def invert(key_map: KeyMap) -> KeyMap:
    """The map from the model's names back to the file's; stacked weights and dropped keys have no way back.

    Each pattern's groups become references in the new target, each target's references the groups they stand for.
    """
    inverse: list[tuple[str, Target]] = []
    for pattern, target in reversed(key_map):  # plain names after spellings that are also known
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
    """A model's key as its checkpoint calls it; a key that `inverse` has no way back for stays as it is."""
    try:
        return str(translate(key, inverse))
    except KeyError:
        return key
