"""Suggestions for unknown flags and values: other tools' names, and typos.

The scripts of Wan and HunyuanVideo, diffusers and ComfyUI have other names for the same things. For a known name we
suggest our flag, with the value in our notation; for any other name only a flag with nearly the same spelling, since no
suggestion is better than a flag with another meaning.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Collection
from functools import cache

from skyreels_v3.errors import format_value
from skyreels_v3.tasks import CONFIG_DIR, TASK_NAMES, load_yaml

MAX_WORD = 100  # characters compared
CUTOFF = 0.8  # difflib's ratio for one wrong letter among five
SEE_HELP = "see --help"
SIZE = re.compile(r"(\d{1,6}) *[*xX:,] *(\d{1,6})")  # width first, as everywhere
VALUES = {"gpu": "cuda", "bf16": "bfloat16", "fp32": "float32", "fp16": "", "float16": ""}  # "": suggest nothing
TASKS = {name: name for name in TASK_NAMES} | {
    **{"r2v": "reference_to_video", "a2v": "talking_avatar", "s2v": "talking_avatar", "v2v": "single_shot_extension"},
    **{"text_to_video": "t2v", "image_to_video": "i2v"},
}


@cache
def remedies() -> dict[str, str]:
    """Our flag, or other advice, by the name that other tools use; {} stands for the value."""
    synonyms = load_yaml(CONFIG_DIR / "synonyms.yaml")
    return {word: remedy for remedy, words in synonyms.items() for word in words.split()}


def suggest_flag(word: str, value: str, flags: Collection[str]) -> str:
    """What to do instead of giving an unknown flag.

    Args:
        word: the flag that was given.
        value: its value, "" if it had none.
        flags: the names of our flags.
    """
    first, _, rest = word.partition(" ")
    if rest and first.strip("-") in flags:
        return f'put quotes around the value only: {first} "{format_value(rest)}"'
    word = word[:MAX_WORD].strip("-").replace("-", "_").lower()
    if word in ("task", "mode"):
        return f"give --task_type {suggest_task(value)}".strip()
    if "size" in word and (sides := as_size(value)):
        return f"give {sides}"
    if remedy := remedies().get(word):
        if "{}" not in remedy and value.lower() in ("false", "0", "no"):
            return "leave it out"
        value = f'"{format_value(value)}"' if re.search(r"\s", value) else format_value(value)
        return f"{'give ' if remedy.startswith('-') else ''}{remedy.replace('{}', value)}".strip()
    begun = [name for name in flags if name.startswith(word)] if len(word) > 2 else []
    close = begun if len(begun) == 1 else difflib.get_close_matches(word, flags, 1, CUTOFF)
    return f"did you mean --{close[0]}?" if close else SEE_HELP


def suggest_value(flag: str, value: str, choices: Collection[str]) -> str:
    """What to add to a list of choices for a value that is not among them; may be ""."""
    if flag == "resolution" and (sides := as_size(value)):
        return f", or {sides}"
    if flag == "resolution" and re.fullmatch(r"1080[pP]?|1440[pP]?|2160[pP]?|[24][kK]", value):
        return ", or --height and --width for other sizes"
    if flag == "device" and (number := re.fullmatch(r"cuda:(\d{1,2})", value)):
        return f"; to choose a GPU set CUDA_VISIBLE_DEVICES={number[1]}"
    folded = {choice.lower(): choice for choice in choices}
    close = difflib.get_close_matches(value[:MAX_WORD].lower(), folded, 1, CUTOFF)
    meant = VALUES.get(value.lower(), folded[close[0]] if close else "")
    meant = (suggest_task(value) if flag == "task_type" else "") or meant
    return f"; did you mean {meant}?" if meant else ""


def suggest_task(value: str) -> str:
    """The task for another tool's name such as Wan's t2v-14B; "" if there is none."""
    name = value.lower().replace("-", "_")
    return TASKS.get(name) or TASKS.get(name.split("_")[0], "")


def as_size(value: str) -> str:
    """Our flags for a size such as 832*480; "" for anything else."""
    sides = SIZE.fullmatch(value.strip())
    return f"--height {sides[2]} --width {sides[1]}" if sides else ""
