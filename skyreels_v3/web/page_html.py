"""What the page shows of jobs, as HTML. Everything that a user has written is escaped."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from html import escape
from typing import Any

from skyreels_v3.media.files import giga
from skyreels_v3.web.page_form import label_of, title_of
from skyreels_v3.web.queue import Job, State
from skyreels_v3.web.settings import Settings
from skyreels_v3.web.views import error_of, progress_of, size_of

SHOWN = ("task_type", "prompt", "include_input", "memory")  # flags that are shown elsewhere, or say nothing here
WORDS = {State.QUEUED: "waiting", State.CANCELLED: "cancelled", State.FAILED: "failed"}


def button(do: str, id: str, text: str, label: str = "", pressed: bool | None = None) -> str:
    """A button that tells the page what to do with a job."""
    more = f' aria-label="{escape(label)}"' if label else ""
    more += f' aria-pressed="{str(pressed).lower()}"' if pressed is not None else ""
    return f'<button type="button" data-do="{do}" data-id="{escape(id)}"{more}>{escape(text)}</button>'


def notice(text: str, field: str = "") -> str:
    """An error above the buttons; the field at fault is marked."""
    mark = (
        f"<style>#{escape(field)}{{outline:2px solid var(--error-icon-color);border-radius:8px}}</style>"
        if field
        else ""
    )
    return f'<p class="notice" role="alert">{escape(text)}</p>{mark}'


def message(text: str) -> str:
    return f'<p class="message" role="status">{escape(text)}</p>'


def plan_html(plan: Mapping[str, Any]) -> str:
    """A plan: its numbers in large, the text of --dry_run below."""
    most = plan["memory_bytes"][plan["memory"]]["whole"]
    seconds = plan.get("denoising_seconds")
    facts = {
        "Size": f"{plan['width']} x {plan['height']}",
        "Frames": f"{plan['frames']} ({plan['seconds']:.2f} s at {plan['fps']} fps)",
        "Memory": f"{giga(most)}, {plan['memory']}",
        "Time": "not measured here yet" if seconds is None else f"about {duration(seconds)}",
    }
    return (
        f'<div class="plan" role="status">{terms(facts)}'
        f"<details><summary>All of the plan</summary><pre>{escape(plan['text'])}</pre></details></div>"
    )


def terms(facts: Mapping[str, str]) -> str:
    """A list of names with values."""
    pairs = "".join(f"<div><dt>{escape(name)}</dt><dd>{escape(value)}</dd></div>" for name, value in facts.items())
    return f"<dl>{pairs}</dl>"


def duration(seconds: float) -> str:
    """Seconds for people."""
    if seconds < 60:
        return f"{max(1, round(seconds))} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"


def queue_html(jobs: Sequence[Job], places: Mapping[str, int]) -> str:
    """Jobs that wait or run, in order; `places` says how many are before each that waits."""
    if not jobs:
        return '<p class="empty">Nothing is waiting. Videos that you start appear here.</p>'
    return f'<ol class="queue">{"".join(queue_entry(job, places.get(job.id)) for job in jobs)}</ol>'


def queue_entry(job: Job, place: int | None) -> str:
    progress = progress_of(job)
    part = round(100 * min(1.0, max(0.0, job.progress.part)))
    picture = (
        f'<img src="{escape(progress["preview"])}" alt="preview">'
        if progress["preview"]
        else '<span class="blank"></span>'
    )
    bar = f'<progress max="100" value="{part}" aria-label="progress">{part} %</progress>' if place is None else ""
    actions = button("up", job.id, "\u2191", "move up") if place else ""
    actions += button("cancel", job.id, "Cancel") if not job.cancelling else ""
    return (
        f'<li data-job="{escape(job.id)}">{picture}<div class="body"><b>{escape(title_of(task_of(job)))}</b>'
        f'<p class="prompt">{escape(prompt_of(job))}</p>'
        f'<p class="state">{escape(state_text(job, place))}</p>{bar}</div>'
        f'<div class="actions">{actions}</div></li>'
    )


def state_text(job: Job, place: int | None) -> str:
    """Where a job is, in a line."""
    progress = job.progress
    if place is not None:
        return "next" if place == 0 else f"waiting, {place} before it"
    if job.cancelling:
        return "cancelling"
    parts = [progress.stage or "starting"]
    if progress.windows > 1 and progress.window:
        parts.append(f"window {progress.window} of {progress.windows}")
    if progress.step and progress.stage == "denoising":
        parts.append(f"step {progress.step} of {progress.steps}")
    if progress.seconds_left:
        parts.append(f"{duration(progress.seconds_left)} left")
    return ", ".join(parts)


def gallery_html(jobs: Iterable[Job], chosen: Sequence[str], settings: Settings) -> str:
    """Jobs that have ended, newest first."""
    cards = "".join(card(job, job.id in chosen, settings) for job in jobs)
    return f'<ul class="gallery">{cards}</ul>' if cards else '<p class="empty">Finished videos appear here.</p>'


def card(job: Job, chosen: bool, settings: Settings) -> str:
    delete = button("delete", job.id, "Delete")
    if job.state is State.COMPLETED:
        head = player(job)
        actions = [
            button("reload", job.id, "Use settings"),
            button("extend", job.id, "Extend this"),
            button("again", job.id, "Another seed"),
            button("compare", job.id, "Compare", pressed=chosen),
            f'<a href="{content(job)}" download="{escape(job.id)}.mp4">Download</a>',
            delete,
        ]
    else:
        why = error_of(job) or {"message": ""}
        text = "" if job.state is State.CANCELLED else why["message"]
        head = f'<p class="ended"><b>{WORDS[job.state]}</b> {escape(text)}</p>'
        actions = [button("reload", job.id, "Use settings"), delete]
    return (
        f'<li data-job="{escape(job.id)}" data-state="{job.state.value}">{head}'
        f'<p class="prompt">{escape(prompt_of(job))}</p>'
        f"<details><summary>{escape(summary(job))}</summary>{terms(facts_of(job, settings))}</details>"
        f'<div class="actions">{"".join(actions)}</div></li>'
    )


def content(job: Job) -> str:
    return escape(f"/v1/videos/{job.id}/content")


def player(job: Job, preload: str = "none") -> str:
    poster = f"{content(job)}?variant=thumbnail"
    label = escape(f"video: {prompt_of(job)[:80]}")
    return (
        f'<video controls loop muted playsinline preload="{preload}" poster="{poster}" src="{content(job)}" '
        f'aria-label="{label}"></video>'
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
        sides += f"<li>{player(job, 'auto')}{terms(differing)}</li>"
    hint = "" if len(jobs) == 2 else '<p class="empty">Choose a second one to see them side by side.</p>'
    play = button("play", "", "Play both") if len(jobs) == 2 else ""
    return f'<ul class="compare">{sides}</ul>{hint}<div class="actions">{play}{button("close", "", "Close")}</div>'


def facts_of(job: Job, settings: Settings) -> dict[str, str]:
    """A job's settings."""
    facts = {"Task": title_of(task_of(job)), "Size": size_of(job, None), "Seed": str(job.flags.get("seed", ""))}
    if job.started and job.ended:
        facts["Took"] = duration(job.ended - job.started)
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
