"""Stories: lines of a jobs file that continue other lines' videos, and the film that joins them all."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from threading import Timer
from typing import Any

import numpy as np
import pytest
from PIL import Image

from skyreels_v3 import batch
from skyreels_v3.batch import (
    Results,
    choose_jobs,
    find_inputs,
    group_by_model,
    join_videos,
    lock_offset,
    read_jobs,
    results_file,
    videos_in,
)
from skyreels_v3.concat import check_film, digest_of, make_film
from skyreels_v3.errors import UserError
from skyreels_v3.media.ffmpeg import AUDIO, find_track, read_track
from skyreels_v3.media.video_reader import read_frames
from skyreels_v3.media.video_writer import copy_frames, write_video
from skyreels_v3.parallel.ranks import SINGLE
from skyreels_v3.story import Job, with_inputs
from tests.conftest import ASSETS, files_in, write_tone

FPS, SIZE = 24, (32, 48)
TOY = ("--model_id", "tiny", "--device", "cpu", "--height", SIZE[0], "--width", SIZE[1], "--num_inference_steps", 2)
FOX = {"task_type": "reference_to_video", "ref_imgs": [str(ASSETS / "fox.png")], "num_frames": 9, "prompt": "a fox"}
ON = {"task_type": "single_shot_extension", "input_video": "{prev}", "prompt": "on"}
CUT = {"task_type": "shot_switching_extension", "input_video": "{prev}", "duration": 2, "prompt": "close"}
SPEECH = {"input_audio": str(ASSETS / "speech.mp3")}
TALK = {"task_type": "talking_avatar", "input_image": "{prev}", "prompt": "a"} | SPEECH
I2V = {"task_type": "i2v", "image": "{prev}", "prompt": "a"}


@pytest.fixture
def write(tmp_path, monkeypatch) -> Callable[..., str]:
    """Write a jobs file with these lines."""
    monkeypatch.chdir(tmp_path)

    def write(*lines: dict[str, Any]) -> str:
        Path("a.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
        return "a.jsonl"

    return write


def ids(*lines: dict[str, Any], write: Callable[..., str]) -> list[str]:
    return [job.id for job in read_jobs(write(*lines), {})]


# Lines


def test_the_id_depends_on_what_comes_before(write):
    fox, on, cut, other = ids(FOX, ON, CUT, FOX | {"seed": 1}, write=write)
    assert ids(FOX | {"name": "x"}, ON | {"input_video": "{job:x}"}, CUT, write=write) == [fox, on, cut]
    changed = ids(FOX | {"seed": 2}, ON, CUT, FOX | {"seed": 1}, write=write)
    assert changed[3] == other and not {*changed[:3]} & {fox, on, cut}
    assert ids(FOX, ON | {"seed": 2}, CUT, write=write)[0] == fox


def test_what_stands_in_for_a_video(write, tmp_path, monkeypatch):
    lines = [FOX, I2V, TALK | {"input_image": "{job:f}"}, FOX | {"ref_imgs": ["{prev}", "b.png"]}, CUT]
    jobs = read_jobs(write(FOX | {"name": "f", "seed": 1}, *lines), {})
    assert [[need.number for need in job.needs] for job in jobs] == [[], [], [2], [1], [4], [5]]
    frames = [Path("a.frames") / job.id[:16] for job in jobs]
    assert jobs[2].request.image == f"{frames[1]}.png"
    assert jobs[3].request.input_image == f"{frames[0]}.png"
    assert jobs[4].request.ref_imgs == (f"{frames[3]}.png", "b.png")
    assert jobs[5].request.input_video == f"{frames[4]}.mp4"
    kept = [None if job.request.frames_copy is None else job.request.frames_copy.stem for job in jobs]
    assert kept == [jobs[0].id[:16], jobs[1].id[:16], None, jobs[3].id[:16], jobs[4].id[:16], None]
    assert all(job.request.frames_copy is not None for job in read_jobs("a.jsonl", {}, keep_frames=True))
    monkeypatch.chdir(tmp_path.parent)
    assert read_jobs(f"{tmp_path.name}/a.jsonl", {})[5].request.input_video == f"{tmp_path.name}/{frames[4]}.mp4"


NO_NAME = "--jobs: name {}: give 1 to 64 letters, digits, dots, dashes or underscores"
CIRCLE = "--jobs: {{job:{}}}: lines 1, 3 need each other's videos; give one of them a file"
A, TO_B = {"name": "a"}, {"input_video": "{job:b}"}


@pytest.mark.parametrize(
    ("lines", "problems"),
    [
        ([ON], ["--input_video: {prev}: there is no line before this one; give a file"]),
        ([FOX, ON | TO_B], ["", '--input_video: {job:b}: no line has that name; give that line a "name"']),
        ([FOX | A, ON | TO_B], ["", "--input_video: {job:b}: no line has that name; names here: a"]),
        ([FOX | {"name": "a b"}, ON, ON], [NO_NAME.format("a b"), "line 1 failed", "line 2 failed"]),
        ([FOX | {"name": 3}], [NO_NAME.format(3)]),
        ([FOX | A] * 2, ["", "--jobs: name a is already that of line 1; give another one"]),
        ([{"prompt": "a"}, ON], ["--task_type: missing; choose one of", "line 1 failed"]),
        (
            [FOX | {"enhance_prompt": "http://a.b/v1", "enhancer_model": "m"}],
            ["--enhance_prompt: http://a.b/v1: a line must not"],
        ),
        (
            [FOX, TALK | {"input_audio": "{prev}"}],
            ["", "--input_audio: {prev}: cannot take another line's video; give"],
        ),
        ([ON | A | {"input_video": "{job:a}"}], ["--jobs: {job:a}: is this line itself; give a file"]),
        (
            [ON | A | TO_B, FOX, ON | {"name": "b", "input_video": "{job:a}"}, CUT],
            [CIRCLE.format("b"), "", CIRCLE.format("a"), "line 3 failed"],
        ),
    ],
)
def test_bad_references(write, lines, problems):
    jobs = read_jobs(write(*lines), {})
    for job, problem in zip(jobs, problems, strict=True):
        assert job.problem.startswith(problem) and bool(job.problem) == bool(problem)
    assert [job.request is None for job in jobs] == [bool(problem) for problem in problems]


def test_colors_are_kept_in_a_story(write):
    """Only there, unless the line says otherwise; the value is recorded in the flags."""
    boat = ON | {"input_video": "boat.mp4"}
    alone, on, other = read_jobs(write(boat, ON, ON | {"color_correction_strength": 0.5}), {})
    strengths = [job.request.color_correction_strength for job in (alone, on, other)]
    assert strengths == [job.request.flags["color_correction_strength"] for job in (alone, on, other)] == [0, 1, 0.5]


def test_order(write):
    """Grouped by model, but each job after those it needs; failed jobs, and those that need them, come last."""
    far = ON | {"input_video": "{job:last}"}
    file = write(far, FOX, ON, CUT, FOX | {"seed": 1}, ON, FOX | {"seed": 2, "name": "last"}, {})
    jobs = read_jobs(file, {})
    assert [job.number for job in group_by_model(jobs)] == [8, 7, 2, 5, 1, 3, 6, 4]
    results = Results(results_file(file))
    results.add({"id": jobs[1].id, "status": "error"})
    order = [job.number for job in choose_jobs(jobs, Results(results.path), SINGLE)]
    assert order == [8, 7, 5, 1, 6, 2, 3, 4]


# Inputs


def fading(count: int, start: int = 0, size: tuple[int, int] = SIZE) -> Iterator[np.ndarray]:
    """A moving picture with all colors that slowly gets darker."""
    y, x = np.indices(size)
    for frame in range(start, start + count):
        picture = np.stack([40 + 3 * x, 60 + 4 * y, 200 - 2 * x], axis=-1)
        yield (np.roll(picture, frame, axis=1) * (1 - frame / 600)).astype(np.uint8)


def put(path: Path, frames: Iterator[np.ndarray], fps: int = FPS) -> None:
    assert len([*copy_frames(frames, path, fps)])


def done(results: Results, job: Job, video: Path) -> None:
    results.add({"job": job.number, "id": job.id, "status": "done", "output": str(video)})


def test_inputs_when_they_are_there(write, tmp_path, caplog):
    """The size is the previous video's, and its last frame becomes the image. Without its frames, the mp4 is read."""
    file = write(FOX, ON, FOX, I2V, FOX, CUT | {"resolution": "540P"})
    jobs, results = read_jobs(file, {}), Results(results_file(file))
    assert [job.follows_size for job in jobs] == [False, True, False, True, False, False]
    video = write_video(fading(9), tmp_path / "fox.mp4", height=SIZE[0], width=SIZE[1], fps=FPS, comment=str)
    for job in jobs[::2]:
        done(results, job, video)
    for job in jobs[2], jobs[4]:
        put(job.request.frames_copy, fading(9))
    on, picture, cut = (with_inputs(job, find_inputs(job, results)).request for job in jobs[1::2])
    assert (on.height, on.width, on.input_video, on.flags["input_video"]) == (*SIZE, str(video), str(video))
    assert caplog.messages == [f"line 2: the frames of line 1 were not kept; reading {video}"]
    assert (picture.height, picture.width) == SIZE
    np.testing.assert_array_equal(np.asarray(Image.open(picture.image)), [*fading(9)][-1])
    put(jobs[2].request.frames_copy, fading(5))  # it was made again
    find_inputs(jobs[3], results)
    np.testing.assert_array_equal(np.asarray(Image.open(picture.image)), [*fading(5)][-1])
    assert (cut.height, cut.input_video) == (None, str(jobs[4].request.frames_copy))
    np.testing.assert_array_equal([*read_frames(Path(cut.input_video), FPS)], [*fading(9)])


def test_what_needs_a_failed_job_fails(write):
    file = write(FOX, ON)
    fox, on = read_jobs(file, {})
    results = Results(results_file(file))
    results.add({"job": 1, "id": fox.id, "status": "error"})
    failed = with_inputs(on, find_inputs(on, results))
    assert failed.request is None and failed.problem == "line 1 failed"


def test_another_process_makes_what_is_needed(write, monkeypatch, tmp_path):
    """The job waits as long as that process is alive."""
    file = write(FOX, ON)
    fox, _ = read_jobs(file, {})
    results, other, slept = Results(results_file(file)), Results(results_file(file)), []
    locked = [False, False, False]
    monkeypatch.setattr(Results, "_lock", lambda *_, **__: locked.pop(0) if locked else True)
    monkeypatch.setattr(batch, "sleep", slept.append)
    assert results.wait(fox.id) is None
    assert len(slept) == 3 + batch.IDLE_POLLS + 1  # locked three times, then unlocked for a while

    def make(seconds: float) -> None:
        (tmp_path / "fox.mp4").touch()
        done(other, fox, tmp_path / "fox.mp4")

    monkeypatch.setattr(batch, "sleep", make)
    assert results.wait(fox.id) == str(tmp_path / "fox.mp4")


def test_what_a_run_that_has_ended_leaves_is_taken_over(write, monkeypatch):
    """The first run ends while the second waits for one of its jobs."""
    file = write(FOX, ON, CUT | {"input_video": "{prev}"})
    jobs, results = read_jobs(file, {}), Results(results_file(file))
    lock, held = Results._lock, [jobs[0].id]
    monkeypatch.setattr(Results, "_lock", lambda self, id="", wait=False: id not in held and lock(self, id, wait))
    monkeypatch.setattr(batch, "sleep", lambda seconds: held.clear())
    order = []
    for job in batch.claim_jobs(jobs, results, SINGLE, SINGLE):
        order.append((job.number, job.problem))
        done(results, job, Path(write_video(fading(9), Path(f"{job.number}.mp4").absolute(), height=SIZE[0],
            width=SIZE[1], fps=FPS, comment=str)))  # fmt: skip
    assert order == [(1, ""), (2, ""), (3, "")]


def test_a_folder_whose_frames_were_not_kept(write, tmp_path):
    file = write(FOX, I2V)
    jobs, results = read_jobs(file, {}), Results(results_file(file))
    (tmp_path / "frames").mkdir()
    done(results, jobs[0], tmp_path / "frames")
    problem = with_inputs(jobs[1], find_inputs(jobs[1], results)).problem
    assert problem.startswith("--jobs: line 1: ") and problem.endswith("move it away to have it made again")


def test_a_file_where_frames_are_to_be_kept(main, write):
    file = write(FOX, ON)
    Path("a.frames").write_text("mine")
    code, out, _ = main(*TOY, "--jobs", file, "--dry_run")
    assert code == 2
    assert "--jobs: a.frames/" in out and "a.frames is not a folder; give another path" in out


# The film


def once(frames: list[np.ndarray]) -> np.ndarray:
    """The frames after being encoded once."""
    path = write_video(iter(frames), Path("once.mp4"), height=SIZE[0], width=SIZE[1], fps=FPS, comment=str)
    made = np.stack([*read_frames(path, FPS)])
    path.unlink()
    return made


def shoot(file: str, shots: list[Any], **sounds: int) -> tuple[list[Job], Results]:
    """Write lossless videos of these frames as the results of a file's jobs, with tones that last `sounds` seconds."""
    jobs, results = read_jobs(file, {}, keep_frames=True), Results(results_file(file))
    for job, frames in zip(jobs, shots, strict=True):
        put(job.request.frames_copy, (frame for frame in frames), job.request.task.fps)
        video = Path(f"{job.number}.mp4").resolve()
        tone = sounds.get(f"line{job.number}")
        audio = None if tone is None else write_tone(Path(f"{job.number}.wav"), tone)
        size = {"height": SIZE[0], "width": SIZE[1], "fps": job.request.task.fps}
        done(results, job, write_video(iter(frames), video, comment=str, audio=audio, **size))
    return jobs, results


def film(write: Callable[..., str], lines: list[dict[str, Any]], shots: list[Any], **sounds: int) -> np.ndarray:
    """The frames of the film for lines whose videos have these frames; see `shoot`."""
    jobs, results = shoot(write(*lines), shots, **sounds)
    made = join_videos(Path("film.mp4"), jobs, results, check=True)
    assert check_film(made, group_by_model(jobs), videos_in(results.path))
    return np.stack([*read_frames(made, FPS)])


def test_each_frame_once(write):
    """In the order of the lines, whichever was made first."""
    frames = [*fading(72)]
    made = film(
        write, [ON | {"input_video": "{job:b}"}, FOX | {"name": "b"}, CUT], [frames[i : i + 24] for i in (0, 24, 48)]
    )
    np.testing.assert_array_equal(made, once(frames))


def test_the_frame_that_begins_a_video_is_there_once(write):
    frames = [*fading(48)]
    made = film(write, [FOX, I2V], [frames[:24], frames[23:]])
    np.testing.assert_array_equal(made, once(frames))


def test_an_avatar_gets_the_rate_of_the_film(write, caplog):
    """Its frames keep their timing, so every 25th is dropped."""
    caplog.set_level("INFO")
    frames, talking = [*fading(24)], [*fading(50, 24)]
    made = film(write, [FOX, TALK], [frames, talking])
    shown = [max(i for i in range(50) if int(i * 24 / 25 + 0.5) <= n) for n in range(48)]
    np.testing.assert_array_equal(made, once(frames + [talking[i] for i in shown]))
    jobs = group_by_model(read_jobs("a.jsonl", {}, keep_frames=True))
    assert not check_film(Path("other.mp4"), jobs, {})
    said = "the film has its first video's 24 frames per second; converting line 2 to that"
    assert caplog.messages[-1] == said


def test_a_film_and_the_videos_that_are_there_now(write, caplog):
    """Missing videos are named, changed ones refused; one remade with the same content is accepted."""
    jobs, results = shoot(write(FOX, CUT), [[*fading(24)], [*fading(24, 24)]])
    path = join_videos(Path("film.mp4"), jobs, results, check=False)
    size = {"height": SIZE[0], "width": SIZE[1], "fps": FPS}
    first, second = videos_in(results.path).values()
    first.unlink()
    write_video(fading(24), first, comment=lambda: "of a slower day", **size)
    assert check_film(path, jobs, videos_in(results.path)) and not caplog.messages
    first.unlink()
    assert check_film(path, jobs, videos_in(results.path))
    assert caplog.messages == ["film.mp4 is done; what line 1 made is gone, but is not needed for it"]
    second.unlink()
    write_video(fading(24), second, comment=str, **size)
    with pytest.raises(
        UserError, match=r"--concat: film\.mp4 was joined before line 2 had the video that is there now; "
    ):
        check_film(path, jobs, videos_in(results.path))


HOLDER = """
import fcntl, os, sys
file = open(sys.argv[1], "ab+")
fcntl.lockf(file, fcntl.LOCK_EX, 1, int(sys.argv[2]))
print(flush=True)
input()
os.rename("made.mp4", "film.mp4")
"""


def test_a_film_is_made_once(write, monkeypatch):
    """A run waits while another one joins the same film, and the other way round."""
    jobs, results = shoot(write(FOX, CUT), [[*fading(24)], [*fading(24, 24)]])
    made = make_film(Path("made.mp4"), jobs, videos_in(results.path), check=False).stat().st_ino
    command = [sys.executable, "-c", HOLDER, str(results.path), str(lock_offset(digest_of(jobs)))]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        other.stdout.readline()
        timer = Timer(0.3, other.stdin.close)
        other.stdin.write(b"\n")
        timer.start()
        assert join_videos(Path("film.mp4"), jobs, results, check=False).stat().st_ino == made
    assert [*Path().glob("*film*")] == [Path("film.mp4")]

    def try_to_join(path: Path, *_: object) -> Path:
        code = HOLDER.replace("LOCK_EX", "LOCK_EX | fcntl.LOCK_NB")
        tried = subprocess.run([*command[:2], code, *command[3:]], input=b"\n", capture_output=True)
        assert b"BlockingIOError" in tried.stderr
        return path

    monkeypatch.setattr(batch, "make_film", try_to_join)
    join_videos(Path("other.mp4"), jobs, results, check=False)


def test_sound_stays_with_its_shot(write):
    film(write, [FOX, CUT, CUT], [[*fading(24)]] * 3, line2=1)
    samples = read_track(find_track(Path("film.mp4"), AUDIO), ["-ac", "1", "-ar", "1000", "-f", "s16le"])
    loud = np.frombuffer(samples, np.int16).astype(float)
    assert abs(len(loud) - 3000) < 30
    level = [np.sqrt((loud[start : start + 900] ** 2).mean()) for start in (50, 1050, 2050)]
    assert level[1] > 3000 and max(level[0], level[2]) < 30


@pytest.mark.parametrize(
    ("lines", "problem"),
    [
        ([FOX, ON, FOX | {"resolution": "480P"}], "--concat: line 3 makes 640 x 640, line 1 960 x 960; give all lines"),
        ([FOX | {"resolution": "480P"}, ON, FOX], "--concat: line 3 makes"),
        ([FOX, ON | {"include_input": True}], "--concat: line 2 would repeat the frames of line 1 in the film"),
        ([FOX, FOX | {"output": "film.mp4"}], "--concat: film.mp4 is the output of line 2; give another name"),
        ([FOX], "--concat: film.mp4 exists already and is never overwritten"),
    ],
)
def test_what_cannot_be_one_film(write, lines, problem):
    jobs = group_by_model(read_jobs(write(*lines), {}, keep_frames=True))
    if len(lines) == 1:
        Path("film.mp4").touch()
    with pytest.raises(UserError) as error:
        check_film(Path("film.mp4"), jobs, {})
    assert str(error.value).startswith(problem)


def test_a_film_needs_jobs(refuse):
    flags = ["--task_type", "reference_to_video", "--prompt", "a", "--ref_imgs", str(ASSETS / "fox.png")]
    line = refuse([*flags, "--concat", "film.mp4"])
    assert line == "error: --concat: film.mp4: joins the videos of a jobs file; give one as --jobs"


# A run


@pytest.mark.slow
def test_a_story(main, write, tmp_path, caplog):
    """Planned, then made: the second shot continues from the first one's exact frames, which are in the film."""
    file = write(FOX | {"output": "fox/"}, CUT, CUT | {"input_video": "nowhere.mp4"}, CUT)
    code, stdout, _ = main("--jobs", file, *TOY, "--dry_run", "--concat", "film.mp4")
    first, second, third, fourth = stdout.rstrip("\n").split("\n\n")
    assert code == 2 and "9 new frames" in first and files_in(tmp_path) == {file}
    assert second.startswith("line          2\nneeds         line 1\n") and "48 new frames" in second
    assert "nowhere.mp4 does not exist" in third and fourth.endswith("error         line 3 failed")
    code, stdout, stderr = main("--jobs", file, *TOY, "--concat", "film.mp4")
    assert code == 1 and stdout.count("\n") == 2 and not Path("film.mp4").exists()
    entries = [json.loads(line) for line in results_file(file).read_text().splitlines()]
    assert [(entry["job"], entry.get("error", "")) for entry in entries][-1] == (4, "line 3 failed")
    assert stderr.endswith("error: 2 of 4 jobs failed; a.results.jsonl says why\n")

    write(FOX | {"output": "fox/"}, CUT)
    code, stdout, _ = main("--jobs", file, *TOY, "--concat", "film.mp4")
    assert (code, stdout) == (0, "film.mp4\n")
    pictures = [np.asarray(Image.open(path)) for path in sorted(Path("fox").iterdir())]
    fox, cut = (list(read_frames(job.request.frames_copy, FPS)) for job in read_jobs(file, defaults(), True))
    np.testing.assert_array_equal(fox, pictures)
    made = np.stack([*read_frames(Path("film.mp4"), FPS)])
    assert made.shape == (9 + 48, *SIZE, 3)
    np.testing.assert_array_equal(made, once(fox + cut))
    before = files_in(tmp_path)
    assert main("--jobs", file, *TOY, "--concat", "film.mp4")[:2] == (0, "film.mp4\n")
    assert files_in(tmp_path) == before


def defaults() -> dict[str, Any]:
    from skyreels_v3.cli import parse_flags

    return parse_flags([str(word) for word in TOY])
