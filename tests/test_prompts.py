"""From a user's prompt to the model's: transitions, and how they are recognized."""

from __future__ import annotations

from typing import Any

import pytest

from skyreels_v3.checks import request_of
from skyreels_v3.errors import UserError
from skyreels_v3.prompts import transitions
from skyreels_v3.request import GenerationRequest

TAGS = {"cut_in": "[ZOOM_IN_CUT]", "cut_out": "[ZOOM_OUT_CUT]"}


def switching(prompt: str, **flags: Any) -> GenerationRequest:
    return request_of({"task_type": "shot_switching_extension", "input_video": "a.mp4", "prompt": prompt, **flags})


@pytest.mark.parametrize("name", ["cut_in", "cut_out", "shot_reverse_shot", "multi_angle", "cut_away"])
def test_each_transition_is_said_and_only_documented_tags_are_used(name):
    request = switching("The sail", transition=name)
    head = f"{TAGS[name]} " if name in TAGS else ""
    assert request.prompt == f"{head}{transitions()[name].sentence} The sail"
    assert ("[" in request.prompt) == (name in TAGS)
    assert request.given == {"prompt": "The sail", "transition": name}
    again = request_of(request.flags)  # as from the video's metadata
    assert (again.prompt, again.flags, again.given, again.notes) == (request.prompt, request.flags, {}, ())


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("A close-up of the sail", "cut_in"),
        ("The boat, far out: a WIDE\u2011angle view", None),  # a non-breaking hyphen, which keyboards lack
        ("Wide shot of the bay, not a close-up", "cut_out"),
        ("Anna replies with a smile", "shot_reverse_shot"),
        ("The boat from the\nother side", "multi_angle"),
        ("A bird\u2019s eye view", "multi_angle"),
        ("Meanwhile, a wide view of the town", "cut_away"),
        ("He macros a replying widely", None),  # parts of other words
        ("No cut away, please: Anna replies", "shot_reverse_shot"),
        ("Without any close-up or wide shot", None),
        ("Don\u2019t cut to a close-up; the boat from another angle", "multi_angle"),
        ("She does not reply", None),
        ("Not a close-up. A close-up, then: the sail", "cut_in"),
        ("No light in the close-up", "cut_in"),
        ("A boat on a wide river", None),
    ],
)
def test_auto_takes_the_first_telling_words(prompt, expected):
    request = switching(prompt, transition="auto")
    assert request.prompt == (prompt if expected is None else switching(prompt, transition=expected).prompt)
    (note,) = request.notes
    assert note.startswith(
        f"--transition auto: {f'{expected}, for' if expected else 'no word in the prompt names one'}"
    )


@pytest.mark.parametrize("transition", ["auto", "cut_out"])
def test_a_tag_in_the_prompt_wins(transition):
    request = switching("[ZOOM_IN_CUT] A wide view", transition=transition)
    assert request.prompt == "[ZOOM_IN_CUT] A wide view"
    assert request.notes == (f"--transition {transition} is not used: the prompt already has [ZOOM_IN_CUT]",)


def test_without_the_flag_and_for_other_tasks():
    assert switching("A close-up").prompt == "A close-up"
    with pytest.raises(UserError, match="--transition: cut_in: single_shot_extension does not take it; leave it out"):
        switching("a", task_type="single_shot_extension", transition="cut_in")


def test_the_words_of_training_are_recorded_with_what_was_given():
    request = request_of({"task_type": "t2v", "prompt": "A cat"})
    assert request.prompt == request.flags["prompt"] == "FPS-24, A cat"
    assert request.given == {"prompt": "A cat"}
    assert request_of({"task_type": "t2v", "prompt": "FPS-24, A cat"}).given == {}
