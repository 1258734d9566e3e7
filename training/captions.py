"""Captions of the drawn world, with synonyms, and their vocabulary."""

from __future__ import annotations

import re
from collections.abc import Sequence

import numpy as np

from skyreels_v3.prompts import transitions, with_transition
from training.drawing import COLORS

# The text encoder gives synonyms the same embedding
SYNONYMS: dict[str, tuple[str, ...]] = {
    "fox": ("fox", "vixen"),
    "cat": ("cat", "kitten"),
    "lantern": ("lantern", "lamp"),
    "boat": ("boat", "sailboat", "ship"),
    "ball": ("ball", "sphere"),
    "cube": ("cube", "box", "block"),
    "star": ("star",),
    "heart": ("heart",),
    "sunglasses": ("sunglasses", "shades"),
    "red": ("red", "scarlet", "crimson"),
    "orange": ("orange",),
    "yellow": ("yellow", "golden"),
    "green": ("green",),
    "blue": ("blue", "azure"),
    "purple": ("purple", "violet"),
    "pink": ("pink", "rosy"),
    "white": ("white",),
    "black": ("black",),
    "brown": ("brown",),
    "grey": ("grey", "gray"),
    "moves": ("moves", "goes", "travels", "walks", "runs", "sails", "rolls", "drifts", "glides", "trots", "floats"),
    "left": ("left", "leftwards"),
    "right": ("right", "rightwards"),
    "up": ("up", "upwards", "rises"),
    "down": ("down", "downwards", "sinks"),
    "closer": ("closer", "nearer", "approaches"),
    "away": ("away",),
    "spins": ("spins", "turns", "rotates"),
    "rests": ("rests", "waits", "stands", "sits", "stays"),
    "snow": ("snow", "snowy", "snowfall"),
    "night": ("night", "dark"),
    "sea": ("sea", "bay", "water", "ocean"),
    "hills": ("hills", "meadow", "field"),
    "room": ("room", "indoors"),
    "pool": ("pool",),
    "sky": ("sky", "clouds"),
    "dusk": ("dusk", "sunset"),
    "woman": ("woman", "lady"),
    "man": ("man",),
    "person": ("person", "someone"),
    "talks": ("talks", "speaks", "talking", "speaking"),
    "coat": ("coat", "jacket", "dress"),
    "zooms": ("zooms", "zoom"),
    "pans": ("pans", "pan"),
    "carries": ("carries", "holds"),
    "beside": ("beside", "near"),
}
OTHERS = (
    "a an the to of at on by with and over through across into under while its it is this that as for from "
    "camera still slowly falling deep stars winter green blue swimming living summer distance towards next "
    "works lifeguard goes leaves lit low sun light calm natural looks around off out view close wide shot side "
    "something else other another angle same thing sail behind cinematic paper lights us we see frame"
).split()
TAGS = ("[ZOOM_IN_CUT]", "[ZOOM_OUT_CUT]", "[MULTI_ANGLE_CUT]", "[CUT_AWAY]", "[SHOT_REVERSE_SHOT_CUT]")
PUNCTUATION = tuple(".,;:!?")

GROUNDS: dict[str, tuple[str, ...]] = {
    "snow": ("through the snow", "in the snow", "through falling snow", "in the snowfall", "over the snowy field"),
    "night": ("at night", "under the stars", "in the dark", "through the night"),
    "sea": ("on the sea", "across the bay", "on the water", "into the dusk", "on the ocean at sunset"),
    "hills": ("over green hills", "in the hills", "in a meadow", "across the field"),
    "room": ("in a room", "in a living room", "indoors"),
    "pool": ("at a pool", "by the swimming pool", "at the pool"),
    "sky": ("in the sky", "in the clouds", "through the blue sky"),
}
MOVES: dict[str, tuple[str, ...]] = {
    "left": ("moves to the left", "moves left", "moves leftwards"),
    "right": ("moves to the right", "moves right", "moves rightwards"),
    "up": ("moves up", "moves upwards", "rises"),
    "down": ("moves down", "moves downwards", "sinks"),
    "towards": ("moves towards the camera", "comes closer", "approaches", "moves nearer"),
    "away": ("moves away", "moves into the distance", "moves away from the camera"),
    "turning": ("spins", "turns around", "rotates"),
    "still": ("rests", "waits", "stands still", "sits"),
    "": ("is", "works", "moves"),
}
CAMERAS: dict[str, tuple[str, ...]] = {
    "still": ("", "", "", "", "The camera is still."),
    "left": ("The camera pans to the left.", "The camera pans left."),
    "right": ("The camera pans to the right.", "The camera pans right."),
    "in": ("The camera zooms in.", "The camera goes closer."),
    "out": ("The camera zooms out.", "The camera goes away."),
}
CUT_VIEWS: dict[str, tuple[str, ...]] = {
    "ZOOM_IN_CUT": ("Close view of {}", "A close shot of {}", "{} from close by"),
    "ZOOM_OUT_CUT": ("Wide view of {}", "A wide shot of {}", "{} from the distance"),
    "MULTI_ANGLE_CUT": ("Another angle of {}", "{} from the other side"),
    "CUT_AWAY": ("{}", "We see {}"),
}
CUT_TRANSITIONS = {  # values of --transition
    "ZOOM_IN_CUT": ("cut_in",),
    "ZOOM_OUT_CUT": ("cut_out",),
    "MULTI_ANGLE_CUT": ("multi_angle", "shot_reverse_shot"),
    "CUT_AWAY": ("cut_away",),
}


def one_of(random: np.random.Generator, choices: Sequence[str]) -> str:
    return choices[int(random.integers(len(choices)))]


def word(random: np.random.Generator, meaning: str) -> str:
    """A synonym of `meaning`; half of the time the plain word."""
    choices = SYNONYMS.get(meaning, (meaning,))
    return meaning if random.random() < 0.5 else one_of(random, choices)


def named(random: np.random.Generator, kind: str, color: str, natural: bool) -> str:
    """A noun phrase for a thing with its color, which may be left out if it is the natural one."""
    first, _, worn = kind.partition(" in ")
    words = [] if natural and random.random() < 0.5 else [word(random, color)]
    words.append(word(random, first))
    article = "the" if random.random() < 0.25 else "an" if words[0][0] in "aeiou" else "a"
    more = f" {one_of(random, ('wearing', 'in', 'with'))} {word(random, worn)}" if worn else ""
    return f"{article} {' '.join(words)}{more}"


def describe(
    random: np.random.Generator,
    things: Sequence[tuple[str, str, bool]],
    relation: str,
    direction: str,
    ground: str,
    camera: str,
) -> str:
    """The caption of a scene; `things` are kind, color and whether the color is the natural one."""
    names = [named(random, *thing) for thing in things]
    move = one_of(random, MOVES[direction])
    if move.startswith("moves"):
        move = move.replace("moves", word(random, "moves"), 1)
    subject = names[0]
    place = one_of(random, GROUNDS[ground])
    if relation == "carries":
        carries = word(random, "carries")
        if direction:
            text = f"{subject} {carries} {names[1]} and {move} {place}"
        else:
            text = f"{subject} {carries} {names[1]} {place}"
    elif relation:
        beside = one_of(random, ("next to", "beside", "near", "with", "and"))
        text = (
            f"{subject} {move} {place}, {beside} {names[1]}"
            if beside != "and"
            else (f"{subject} {move} {place}, and there is {names[1]}")
        )
    else:
        text = f"{subject} {move} {place}"
    if random.random() < 0.15:
        text = f"{place}, {text.replace(f' {place}', '', 1)}"
    sentence = one_of(random, CAMERAS[camera])
    end = "." if sentence or random.random() < 0.5 else ""
    return f"{text[0].upper()}{text[1:]}{end} {sentence}".strip()


def without_colors(caption: str) -> str:
    """The caption without colors, which are then known only from reference pictures."""
    first, *others = caption.split(" ")
    kept = [word for word in others if meaning_of(word.strip(".,")) not in COLORS]
    return " ".join([first, *kept])


def describe_cut(random: np.random.Generator, kind: str, thing: str, color: str, natural: bool, ground: str) -> str:
    """The prompt of a shot after a cut: a tag and a matching sentence, or the prompt that `--transition` creates."""
    seen = named(random, thing, color, natural)
    place = f" {one_of(random, GROUNDS[ground])}" if random.random() < 0.6 else ""
    tagged = random.random() < 0.5
    text = one_of(random, CUT_VIEWS[kind]).format(seen) if tagged else seen
    text = f"{text[0].upper()}{text[1:]}{place}"
    return f"[{kind}] {text}" if tagged else with_transition(text, one_of(random, CUT_TRANSITIONS[kind]))[0]


def describe_face(random: np.random.Generator, coat: str, long_hair: bool) -> str:
    """The caption of a talking person."""
    if random.random() < 0.4:
        return "a person is talking"
    who = word(random, one_of(random, ("woman" if long_hair else "man", "person")))
    article = "" if who == "someone" else "a "
    wearing = f" in a {word(random, coat)} {word(random, 'coat')}" if random.random() < 0.7 else ""
    text = f"{article}{who}{wearing} {one_of(random, ('talks', 'speaks'))} to the camera"
    return f"{text[0].upper()}{text[1:]}"


def vocabulary() -> list[str]:
    """All words, sorted, in lower case."""
    known = [*OTHERS, *PUNCTUATION, "fps", "24", "there", "comes"]
    sentences = [
        text for table in (GROUNDS, MOVES, CAMERAS, CUT_VIEWS) for choices in table.values() for text in choices
    ] + [transition.sentence for transition in transitions().values()]
    known += [token for text in sentences for token in re.findall(r"[a-z]+", text.lower())]
    known += [name for names in SYNONYMS.values() for name in names]
    return sorted(set(known))


def meaning_of(token: str) -> str:
    """The first of a word's synonyms, or the word itself."""
    return MEANINGS.get(token.lower(), token.lower())


MEANINGS = {name: meaning for meaning, names in SYNONYMS.items() for name in names}
