"""The page's HTML for jobs. Everything that a user has written is escaped."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from html import escape
from time import monotonic_ns
from typing import Any

from skyreels_v3.errors import format_duration
from skyreels_v3.forms import label_of, title_of, without_dashes
from skyreels_v3.media.files import giga
from skyreels_v3.web.queue import Job, State
from skyreels_v3.web.settings import Settings
from skyreels_v3.web.views import error_of, progress_of, size_of

# flags that are shown elsewhere, or of no interest here
SHOWN = ("task_type", "prompt", "include_input", "memory", "width", "height")
ENDS = {State.COMPLETED: "Completed", State.CANCELLED: "Cancelled", State.FAILED: "Failed"}


def button(do: str, id: str, text: str, **attributes: str) -> str:
    """A button that tells the page what to do with a job."""
    more = "".join(f' {name.replace("_", "-")}="{escape(value)}"' for name, value in attributes.items())
    return f'<button type="button" data-do="{do}" data-id="{escape(id)}"{more}>{escape(text)}</button>'


def actions(job: Job, buttons: Iterable[str]) -> str:
    """A job's buttons, as a group labeled with its prompt for screen readers."""
    return f'<div class="actions" role="group" aria-label="{escape(prompt_of(job)[:80])}">{"".join(buttons)}</div>'


def notice(text: str, field: str = "", group: str = "") -> str:
    """An error above the buttons, or at the element `field`: page.js moves it there and opens the field's group."""
    at = f'data-field="{escape(field)}" data-group="{escape(group)}"' if field else ""
    return f'<p class="notice" role="alert" data-time="{monotonic_ns()}" {at}>{escape(text)}</p>'


def message(text: str, link: str = "", scroll: str = "") -> str:
    """A message above the buttons, with a link to an element of the page or a scroll to it; shown anew each time."""
    more = f' <a href="#{link}">Show it</a>' if link else ""
    to = f'data-scroll="{scroll}"' if scroll else ""
    return f'<p class="message" role="status" data-time="{monotonic_ns()}" {to}>{escape(text)}{more}</p>'


def plan_html(plan: Mapping[str, Any]) -> str:
    """A plan: its main numbers, and below them the text of --dry_run."""
    most = plan["memory_bytes"][plan["memory"]]["whole"]
    seconds = plan.get("denoising_seconds")
    facts = {
        "Size": f"{plan['width']} x {plan['height']}",
        "Frames": f"{plan['frames']} ({plan['seconds']:.2f} s at {plan['fps']} fps)",
        "Memory": f"{giga(most)}, {plan['memory']}",
        "Time": "not measured here yet" if seconds is None else f"about {format_duration(seconds)}",
    }
    return (
        f'<div class="plan" role="status">{terms(facts)}'
        f"<details><summary>Full plan</summary><pre>{escape(plan['text'])}</pre></details></div>"
    )


def terms(facts: Mapping[str, str]) -> str:
    """A description list of names and values."""
    pairs = "".join(f"<div><dt>{escape(name)}</dt><dd>{escape(value)}</dd></div>" for name, value in facts.items())
    return f"<dl>{pairs}</dl>"


def queue_html(jobs: Sequence[Job], places: Mapping[str, int]) -> str:
    """Waiting and running jobs, in order; `places` has the number of jobs ahead of each waiting one."""
    if not jobs:
        return '<p class="empty">Nothing is waiting. Videos that you start appear here.</p>'
    movable = [job.id for job in jobs if job.id in places]
    entries = "".join(queue_entry(job, places.get(job.id), movable) for job in jobs)
    return f'<ol class="queue">{entries}</ol>'


def status_html(waiting: Sequence[Job], ended: Sequence[Job]) -> str:
    """The state of all jobs in one line. It changes with the stage, not each step, as screen readers read it out."""
    running = [job for job in waiting if job.state is State.IN_PROGRESS]
    stage = f" ({stage_of(running[0])})" if running else ""
    parts = [f"{len(running)} running{stage}", f"{len(waiting) - len(running)} waiting"] if waiting else []
    parts += [f"last video {ENDS[job.state].lower()}" for job in ended[:1]]
    return f'<p role="status">{escape(", ".join(parts))}</p>'


def queue_entry(job: Job, place: int | None, movable: Sequence[str]) -> str:
    """A waiting or running job; `movable` has the ids of the waiting ones, in order."""
    preview = progress_of(job)["preview"]
    picture = f'<img class="picture" src="{escape(preview)}" alt="Preview">' if preview else ""
    part = round(100 * min(1.0, max(0.0, job.progress.part)))
    bar = f'<progress max="100" value="{part}" aria-label="Progress">{part} %</progress>' if place is None else ""
    moves = (
        button("up", job.id, "\u2191", aria_label="Move up", aria_disabled=str(movable[:1] == [job.id]).lower()),
        button("down", job.id, "\u2193", aria_label="Move down", aria_disabled=str(movable[-1:] == [job.id]).lower()),
    )
    buttons = [*(moves if place is not None else ()), "" if job.cancelling else button("cancel", job.id, "Cancel")]
    return (
        f'<li data-job="{escape(job.id)}" data-state="{job.state.value}">{picture}'
        f'<div class="body"><b>{escape(title_of(task_of(job)))}</b><p class="prompt">{escape(prompt_of(job))}</p>'
        f'<p class="state">{escape(state_text(job, place))}</p>{bar}</div>{actions(job, buttons)}</li>'
    )


def stage_of(job: Job) -> str:
    """What a running job is doing."""
    progress = job.progress
    stage = "cancelling" if job.cancelling else progress.stage or "starting"
    return (
        f"{stage}, window {progress.window} of {progress.windows}"
        if progress.windows > 1 and progress.window
        else stage
    )


def state_text(job: Job, place: int | None) -> str:
    """The state of a waiting or running job in one line."""
    progress = job.progress
    if place is not None:
        return "next" if place == 0 else f"waiting, {place} ahead of it"
    parts = [stage_of(job)]
    if progress.step and progress.stage == "denoising":
        parts.append(f"step {progress.step} of {progress.steps}")
    if progress.seconds_left and not job.cancelling:
        parts.append(f"{format_duration(progress.seconds_left)} left")
    return ", ".join(parts)


def gallery_html(jobs: Iterable[Job], chosen: Sequence[str], settings: Settings) -> str:
    """Jobs that have ended, newest first."""
    cards = "".join(card(job, job.id in chosen, settings) for job in jobs)
    return f'<ul class="gallery">{cards}</ul>' if cards else '<p class="empty">Finished videos appear here.</p>'


def card(job: Job, chosen: bool, settings: Settings) -> str:
    reload, delete = button("reload", job.id, "Reuse"), button("delete", job.id, "Delete")
    if job.state is State.COMPLETED:
        head = player(content(job), prompt_of(job), poster=f"{content(job)}?variant=thumbnail")
        buttons = [
            reload,
            button("extend", job.id, "Extend"),
            button("again", job.id, "New seed"),
            button("compare", job.id, "Compare", aria_pressed=str(chosen).lower()),
            f'<a href="{content(job)}" download="{escape(job.id)}.mp4">Download</a>',
            delete,
        ]
    else:
        why = error_of(job) if job.state is State.FAILED else None
        text = f": {without_dashes(why['message'])}" if why else ""
        head, buttons = f'<p class="ended"><b>{ENDS[job.state]}</b>{escape(text)}</p>', [reload, delete]
        if job.partial.exists():
            head += player(f"{content(job)}?variant=partial", "The finished windows", "metadata")
    return (
        f'<li data-job="{escape(job.id)}" data-state="{job.state.value}">{head}'
        f'<p class="prompt">{escape(prompt_of(job))}</p>'
        f"<details><summary>{escape(summary(job))}</summary>{terms(facts_of(job, settings))}</details>"
        f"{actions(job, buttons)}</li>"
    )


def content(job: Job) -> str:
    return escape(f"/v1/videos/{job.id}/content")


def player(source: str, label: str, preload: str = "none", poster: str = "") -> str:
    picture = f'poster="{poster}" ' if poster else ""
    return (
        f'<video controls loop muted playsinline preload="{preload}" {picture}src="{source}" '
        f'aria-label="{escape(label[:80])}"></video>'
    )


def compare_html(jobs: Sequence[Job], settings: Settings) -> str:
    """One or two videos side by side, with the settings that differ."""
    if not jobs:
        return ""
    facts = [facts_of(job, settings) | {"Prompt": prompt_of(job)} for job in jobs]
    sides = ""
    for job, mine in zip(jobs, facts, strict=True):
        others = [other for other in facts if other is not mine]
        differing = {name: value for name, value in mine.items() if any(other.get(name) != value for other in others)}
        sides += f"<li>{player(content(job), prompt_of(job), 'auto')}{terms(differing)}</li>"
    hint = "" if len(jobs) == 2 else '<p class="empty">Choose a second video to see them side by side.</p>'
    play = button("play", "", "Play both") if len(jobs) == 2 else ""
    return f'<ul class="compare">{sides}</ul>{hint}<div class="actions">{play}{button("close", "", "Close")}</div>'


def facts_of(job: Job, settings: Settings) -> dict[str, str]:
    """A job's settings."""
    facts = {"Task": title_of(task_of(job)), "Size": size_of(job, None), "Seed": str(job.flags.get("seed", ""))}
    if job.started and job.ended:
        facts["Took"] = format_duration(job.ended - job.started)
    for name, value in job.flags.items():
        if name not in (*SHOWN, "seed"):
            text = ", ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)
            facts[label_of(name)] = settings.model_name(text) if name == "model_id" else text
    return {name: value for name, value in facts.items() if value}


def summary(job: Job) -> str:
    """A job in a few words."""
    seconds = f"{job.facts['frames'] / job.facts['fps']:.1f} s" if job.facts and job.facts.get("fps") else ""
    parts = (title_of(task_of(job)), size_of(job, None), seconds, f"seed {job.flags.get('seed')}")
    return ", ".join(part for part in parts if part)


def task_of(job: Job) -> str:
    return str(job.flags.get("task_type", ""))


def prompt_of(job: Job) -> str:
    return str(job.flags.get("prompt", ""))
