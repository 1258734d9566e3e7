"""Plans the passes of a talking avatar from the audio length, without torch.

A long video is generated in windows of 81 frames. A first pass over the first 81 frames of audio creates *key frames*,
images of how the person may look later on. Each window then begins with the last frames of the one before and ends in
its key frame, so that the video neither jumps nor drifts. Frames just before a key frame are dropped: the next window
generates them again.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

WINDOW_FRAMES = 81
MOTION_FRAMES = 5  # from the window before, at a window's start; also the number of copies of the key frame at its end
DROPPED_FRAMES = 12  # at the end of every window but the last
NEW_FRAMES = WINDOW_FRAMES - MOTION_FRAMES - DROPPED_FRAMES
MAX_FRAMES = 5000  # 200 s at 25 fps; key frames are spread over no more, even if the padding is longer


@dataclass(frozen=True)
class Window:
    """One window.

    Attributes:
        start: first frame, counted from the start of the audio.
        key_frame: frame of the key-frame pass that the window ends in.
        first, end: frames [first, end) of the window are written.
    """

    start: int
    key_frame: int
    first: int
    end: int

    @property
    def frames(self) -> int:
        return self.end - self.first


@dataclass(frozen=True)
class WindowPlan:
    """All windows for `audio_frames` frames of audio; none if the key-frame pass is the whole video.

    The audio is padded to `padded_frames` with its own end, mirrored, so that the last window is full.
    """

    audio_frames: int
    padded_frames: int
    windows: tuple[Window, ...]


def plan_windows(audio_frames: int) -> WindowPlan:
    """The windows for `audio_frames` video frames of audio."""
    if audio_frames < WINDOW_FRAMES:
        return WindowPlan(audio_frames, audio_frames, ())
    padded = audio_frames + (WINDOW_FRAMES - audio_frames) % NEW_FRAMES
    return WindowPlan(audio_frames, padded, tuple(make_windows(audio_frames, padded)))


def make_windows(audio_frames: int, padded: int) -> Iterator[Window]:
    last = min(padded, MAX_FRAMES) - 1
    for start in range(0, padded - WINDOW_FRAMES + 1, NEW_FRAMES):
        is_last = start + WINDOW_FRAMES == padded
        # the end of each window, scaled to the length of the key-frame pass and rounded half to even
        key_frame = round(min(start + WINDOW_FRAMES - 1, last) * (WINDOW_FRAMES - 1) / last)
        end = min(WINDOW_FRAMES, audio_frames - start) if is_last else WINDOW_FRAMES - DROPPED_FRAMES
        yield Window(start, key_frame, MOTION_FRAMES if start else 0, end)
