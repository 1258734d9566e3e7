"""Turns a user's prompt into the model's. No torch."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

from skyreels_v3.errors import format_value
from skyreels_v3.tasks import CONFIG_DIR, TaskSpec, load_yaml

AUTO = "auto"
TAG = re.compile(r"\[[A-Z][A-Z0-9_]*\]")
DENIAL_REACH = 200  # characters searched for a negation before a matching word
NO_WORD = "--transition auto: no word in the prompt names one"
NOT = r"no|not|never|without|avoid|nor|neither|instead of|rather than|cannot|\w+n't"
# words that may be between a negation and what it negates
BETWEEN = (
    "a an any the some more another other single sudden quick extreme kind sort type of in into to with or nor be do "
    "use using show showing make making go going cut cuts cutting switch switching move moving camera"
)


@dataclass(frozen=True)
class Transition:
    """How a new shot begins.

    Attributes:
        sentence: describes it in plain words.
        words: words in a prompt that imply it.
        tag: the tag documented by the model's authors, "" if there is none.
    """

    sentence: str
    words: tuple[str, ...]
    tag: str = ""


@cache
def texts() -> Mapping[str, Any]:
    """The content of configs/prompts.yaml."""
    return load_yaml(CONFIG_DIR / "prompts.yaml")


@cache
def transitions() -> Mapping[str, Transition]:
    """All transitions by name."""
    return {
        name: Transition(**{**parts, "words": tuple(parts["words"])}) for name, parts in texts()["transitions"].items()
    }


def model_prompt(task: TaskSpec, prompt: str, transition: str | None = None) -> tuple[str, tuple[str, ...]]:
    """The prompt for a task's model, and notes on what was changed.

    Args:
        transition: one of `transitions`, or AUTO for the one that the prompt's words imply.
    """
    notes = []
    if transition is not None:
        prompt, note = with_transition(prompt, transition)
        notes.append(note)
    if not prompt.lstrip().startswith(task.prompt_prefix.strip()):
        prompt = task.prompt_prefix + prompt
        notes.append(f'--prompt now begins with "{task.prompt_prefix.strip()}", as in training')
    return prompt, tuple(notes)


def with_transition(prompt: str, transition: str, reason: str = "") -> tuple[str, str]:
    """Put a transition's tag and sentence before a prompt, unless it has a tag; returns the prompt and a note.

    Args:
        reason: the beginning of the note; by default the flag.
    """
    given = reason or f"--transition {transition}"
    if (tag := TAG.search(prompt)) is not None:
        return prompt, f"{given} is not used: the prompt already has {format_value(tag[0])}"
    if transition == AUTO:
        found = find_words(prompt)
        if found is None:
            return prompt, NO_WORD
        transition, word = found
        given += f': {transition}, for "{word}"'
    chosen = transitions()[transition]
    prompt = " ".join(filter(None, (chosen.tag, chosen.sentence, prompt)))
    return prompt, f"{given}; the prompt begins with: {chosen.tag} {chosen.sentence}".replace(":  ", ": ")


def says_transition(prompt: str) -> bool:
    """Whether a prompt says by a tag or by words how the new shot begins."""
    return TAG.search(prompt) is not None or find_words(prompt) is not None


def find_words(prompt: str) -> tuple[str, str] | None:
    """The first transition that a prompt's words imply, and these words; negated words do not count."""
    text = re.sub(r"[-\s]+", " ", prompt.lower().replace("\u2019", "'"))
    found = [
        (match.start(), name, word)
        for name, transition in transitions().items()
        for word in transition.words
        for match in re.finditer(rf"\b{re.escape(word)}\b", text)
        if denial().search(text, max(0, match.start() - DENIAL_REACH), match.start()) is None
    ]
    return min(found)[1:] if found else None


@cache
def denial() -> re.Pattern[str]:
    """A pattern for a negation at the end of the text before matching words, such as "don't cut to a"."""
    between = {word for transition in transitions().values() for word in transition.words} | {*BETWEEN.split()}
    longest = sorted(map(re.escape, between), key=len, reverse=True)
    return re.compile(rf"\b(?:{NOT}) (?:(?:{'|'.join(longest)}) )*$")
