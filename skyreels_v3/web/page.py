"""The page at /, in Gradio: forms for all tasks, the queue and the finished videos.

It calls the same code as the HTTP API, and shows files through the API's routes. Gradio itself only stores what a user
drops into a form. Nothing is fetched from other hosts: not by the server, nor by the browser, whose CSP forbids it.
"""

from __future__ import annotations

import json
import os
import secrets
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import gradio as gr
from fastapi import FastAPI
from starlette.concurrency import run_in_threadpool

from skyreels_v3.checks import written_out
from skyreels_v3.cli import read_config_file
from skyreels_v3.errors import UserError, format_value
from skyreels_v3.forms import label_of, title_of, without_dashes
from skyreels_v3.media.ffmpeg import VIDEO, input_options, write_file
from skyreels_v3.media.video_reader import probe_video
from skyreels_v3.request import INPUTS, Flag
from skyreels_v3.tasks import TASK_NAMES, task_spec
from skyreels_v3.web.api import Api, user_errors
from skyreels_v3.web.errors import ApiError
from skyreels_v3.web.fields import FlagReader, files_of, link
from skyreels_v3.web.page_access import SIGN_OUT, Drops, protect
from skyreels_v3.web.page_form import CLIP, KEYFRAMES, TABS, Form, one_size
from skyreels_v3.web.page_html import (
    compare_html,
    gallery_html,
    message,
    notice,
    plan_html,
    queue_html,
    status_html,
)
from skyreels_v3.web.queue import FINAL, Job, State
from skyreels_v3.web.uploads import PROBE_FPS, Fields, Upload, check_kind

HERE = Path(__file__).parent
SCRIPT = (HERE / "page.js").read_text(encoding="utf-8")
BUSY_SECONDS, IDLE_SECONDS = 2.0, 6.0  # between refreshes; Gradio's timer pauses while the tab is hidden
SHOWN_JOBS = 24  # in the gallery, and 24 more with each click
MAX_WAITING = 100
CLEAN_SECONDS = (3600, 24 * 3600)  # between cleanups of dropped files, and their maximum age
WAITING = (State.QUEUED, State.IN_PROGRESS)
HEAD = """<h1>SkyReels</h1><nav aria-label="Page"><a class="narrow" href="#jobs">Queue</a>
<a class="narrow" href="#videos">Videos</a><a href="/docs">HTTP API</a>{more}</nav>"""
SANS = ("ui-sans-serif", "system-ui", "sans-serif")
MONO = ("ui-monospace", "Consolas", "monospace")
# JavaScript that keeps what is in the forms when Gradio reloads the page, as it does once a server is back
KEEP = """(...values) => {
    if (!window.forms) return; // not yet loaded
    const { ids, initial } = window.forms;
    const changed = ids.map((id, i) => [id, values[i]]).filter(([, value], i) => value !== initial[i]);
    sessionStorage.setItem('forms', JSON.stringify(Object.fromEntries(changed)));
}"""
RESTORE = """(...initial) => {
    const ids = IDS, kept = JSON.parse(sessionStorage.getItem('forms') ?? '{}');
    const selected = sessionStorage.getItem('tab') ?? ids[0].split('-')[0];
    window.forms = { ids, initial };
    addEventListener('pagehide', () => {
        const tab = document.querySelector('#tasks [role=tab].selected');
        if (tab) sessionStorage.setItem('tab', tab.id.slice('tab-'.length, -'-button'.length));
    });
    return [{ selected, __type__: 'update' }, ...ids.map((id, i) => id in kept ? kept[id] : initial[i])];
}"""


def mount_page(app: FastAPI) -> None:
    """Serve the page at / of the API's application."""
    api: Api = app.state.api
    drops = Drops(api.settings.folder / "page")
    os.environ["GRADIO_TEMP_DIR"] = str(drops.folder)  # where Gradio stores dropped files
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    blocks = Page(api, drops).build()
    drops.share()  # the examples
    gr.mount_gradio_app(
        app, blocks, path="/", footer_links=[], run_history=False, enable_monitoring=False, ssr_mode=False, pwa=False,
        mcp_server=False, show_error=False, allowed_paths=[], blocked_paths=[str(api.settings.folder / "jobs")],
        max_file_size=api.settings.limits.file_bytes, theme=theme(), css_paths=[HERE / "page.css"],
    )  # fmt: skip
    blocks.has_launched = True  # or Gradio would not check that files in events are uploads
    protect(app, api.settings, drops)


def theme() -> gr.themes.Base:
    """Gradio's default theme in teal with system fonts; text has a contrast of at least 4.5 (WCAG's AA)."""
    base = gr.themes.Default(primary_hue="teal", neutral_hue="slate", font=SANS, font_mono=MONO, radius_size="md")
    soft = {"body_text_color_subdued", "block_info_text_color", "input_placeholder_color"}
    teal = {"button_primary_background_fill", "button_primary_border_color", "color_accent"}
    return base.set(
        **dict.fromkeys(soft, "*neutral_600"), **dict.fromkeys((f"{name}_dark" for name in soft), "*neutral_300"),
        **dict.fromkeys(teal, "*primary_700"), button_primary_background_fill_dark="*primary_700",
        button_primary_background_fill_hover="*primary_800", button_primary_background_fill_hover_dark="*primary_800",
    )  # fmt: skip


@dataclass
class Page:
    """The page of a server.

    Attributes:
        drops: dropped files; job files are linked beside them for a form to show.
    """

    api: Api
    drops: Drops
    forms: dict[str, Form] = field(default_factory=dict)

    def build(self) -> gr.Blocks:
        """Make the page."""
        with gr.Blocks(
            analytics_enabled=False, title="SkyReels", delete_cache=CLEAN_SECONDS, fill_width=True
        ) as blocks:
            more = f'<a href="{SIGN_OUT}">Sign out</a>' if self.api.settings.keys else ""
            gr.HTML(HEAD.format(more=more), elem_id="head", js_on_load=None)
            with gr.Row(elem_id="columns"):
                with gr.Column(scale=6, min_width=320, elem_id="forms"):
                    self.build_forms()
                with gr.Column(scale=5, min_width=320, elem_id="jobs"):
                    self.build_jobs()
            self.connect(blocks)
        blocks.queue(default_concurrency_limit=None, max_size=1000)
        return blocks

    def build_forms(self) -> None:
        with gr.Tabs(elem_id="tasks") as self.tabs:
            for task in sorted(TASK_NAMES, key=[*TABS, *TASK_NAMES].index):
                with gr.Tab(TABS.get(task, title_of(task)), id=task, elem_id=f"tab-{task}"):
                    self.build_form(task)
        with gr.Accordion("Settings from a video", open=False, elem_id="record-box"):
            gr.HTML(
                '<p class="summary">Drop a video made here to load its settings into the form.</p>', js_on_load=None
            )
            self.record = gr.File(label="Video", file_types=["video"], height=130, elem_id="record")
            self.record_notice = live_html("record-notice")

    def build_form(self, task: str) -> None:
        form = self.forms[task] = Form(task_spec(task), self.api.settings)
        gr.HTML(f'<p class="summary">{form.task.summary[0].upper()}{form.task.summary[1:]}.</p>', js_on_load=None)
        form.build()
        with gr.Column(elem_classes="go"):
            form.notice = live_html(f"{task}-notice")
            with gr.Row():
                form.plan_button = gr.Button("Plan", elem_id=f"{task}-plan")
                form.start_button = gr.Button("Generate", variant="primary", elem_id=f"{task}-start")

    def build_jobs(self) -> None:
        gr.HTML("<h2>Queue</h2>", js_on_load=None)
        self.status = live_html("status")
        self.queue = live_html("queue")
        self.compare = live_html("compare")
        gr.HTML("<h2>Videos</h2>", elem_id="videos", js_on_load=None)
        self.gallery = live_html("gallery")
        self.more = gr.Button("Show more", size="sm", visible=False)
        self.timer = gr.Timer(BUSY_SECONDS)
        self.seen = gr.State(())  # hashes of what is shown, to send only changes
        self.chosen = gr.State(())  # ids of videos that are compared
        self.count = gr.State(SHOWN_JOBS)

    def connect(self, blocks: gr.Blocks) -> None:
        """Attach the event handlers."""
        quiet: dict[str, Any] = {"show_progress": "hidden", "api_visibility": "private"}
        view: Any = {self.seen, self.chosen, self.count}
        shown: Any = {self.status, self.queue, self.gallery, self.compare, self.more, self.timer, *view}
        everything: Any = {component for form in self.forms.values() for component in form.components}
        everything |= {self.tabs, *(form.notice for form in self.forms.values())}
        gr.on([blocks.load, self.timer.tick], self.refresh, view, shown, trigger_mode="once", **quiet)
        self.more.click(self.show_more, view, shown, **quiet)
        for html in (self.queue, self.gallery, self.compare):
            html.click(self.act, view, shown | everything, trigger_mode="multiple", **quiet)
        self.record.upload(self.read_record, self.record, everything | {self.record, self.record_notice}, **quiet)
        typed = [part for form in self.forms.values() for part in form.typed]
        ids = json.dumps([part.elem_id for part in typed])
        gr.on([part.change for part in typed], None, typed, None, js=KEEP, **quiet)
        blocks.load(None, typed, [self.tabs, *typed], js=RESTORE.replace("IDS", ids), **quiet)
        for form in self.forms.values():
            inputs = form.components
            options: dict[str, Any] = {
                "show_progress": "minimal",
                "api_visibility": "private",
                "concurrency_limit": None,
            }
            answer: Any = {form.notice}
            form.plan_button.click(for_form(form, self.plan), inputs, answer, **options)
            start = for_form(form, self.start)
            form.start_button.click(start, inputs | view, answer | shown, trigger_mode="once", **options)

    # Forms

    async def plan(self, form: Form, data: dict[Any, Any], request: gr.Request) -> dict[Any, Any]:
        """Show the plan of a form's video."""
        owner = owner_of(request)
        try:
            async with self.api.new_folder(owner, keep=False) as (_, folder):
                reader = self.api.flag_reader(folder, owner)
                made = await self.api.make_plan(await self.read(form, data, reader, owner), reader)
        except ApiError as error:
            return self.describe(form, error)
        return {form.notice: plan_html(made)}

    async def start(self, form: Form, data: dict[Any, Any], request: gr.Request) -> dict[Any, Any]:
        """Queue a form's video."""
        owner = owner_of(request)
        try:
            async with self.api.new_folder(owner) as (id, folder):
                flags = await self.read(form, data, self.api.flag_reader(folder, owner), owner)
                await self.api.add(id, flags, owner, "")
        except ApiError as error:
            return self.describe(form, error)
        return {form.notice: message("Added to the queue.", "jobs"), **await self.refresh(data, request)}

    async def read(self, form: Form, data: Mapping[Any, Any], reader: FlagReader, owner: str) -> dict[str, Any]:
        """The job's flags from a form, whose files are linked into the reader's folder; raises ApiError."""
        fields: Fields = {"task_type": form.task.name}
        with user_errors(reader):
            for each in form.fields:
                if (value := each.value_of(data)) is not None:
                    name = each.flag.name
                    if name in INPUTS:
                        value = await run_in_threadpool(self.take, each.flag, value, reader.folder, owner)
                    fields[name] = value
            return (await reader.read(fields))[0]

    def take(self, flag: Flag, values: list[str], folder: Path, owner: str) -> Any:
        """Link a flag's dropped files into a job's folder, as uploads; raises ApiError or UserError."""
        count = {KEYFRAMES: len(values) - 1, CLIP: 1}.get(flag.name, len(values))
        uploads = []
        for number, text in enumerate(values[:count]):
            path = Path(text)
            if not self.drops.allows(path, owner):
                raise ApiError(400, f"{flag.name}: drop the file again", flag.name)
            target = folder / f"upload-{flag.name}-{number}"
            link(path, target)
            uploads.append(Upload(target, path.name))
        if flag.name == KEYFRAMES:
            times = values[-1].split(",")
            if len(times) != len(uploads):
                raise ApiError(400, f"{flag.name}: give as many seconds as pictures, such as 2, 4.5", flag.name)
            return [{"file": each, "seconds": time.strip()} for each, time in zip(uploads, times, strict=True)]
        if flag.name == CLIP and any(values[1:]):
            return cut(uploads[0], *values[1:])
        return uploads if flag.several else uploads[0]

    def describe(self, form: Form, error: ApiError) -> dict[Any, Any]:
        """Show an error in a form, at its field."""
        name = error.param or ""
        if name not in {each.flag.name for each in form.fields}:
            return {form.notice: notice(without_dashes(error.message))}
        text = f"{label_of(name)}{without_dashes(error.message.removeprefix(name))}"
        return {form.notice: notice(text, f"{form.task.name}-{name}", form.folded.get(name, ""))}

    # Jobs

    async def refresh(self, data: dict[Any, Any], request: gr.Request) -> dict[Any, Any]:
        """Updates for what has changed in queue and gallery."""
        return await run_in_threadpool(self.changes, data, owner_of(request))

    def changes(self, data: dict[Any, Any], owner: str) -> dict[Any, Any]:
        queue, settings = self.api.queue, self.api.settings
        places = {id: number for number, id in enumerate(queue.order())}
        waiting, _ = queue.list(owner, WAITING, limit=MAX_WAITING, newest_first=False)
        waiting.sort(key=lambda job: places.get(job.id, -1))
        ended, more = queue.list(owner, FINAL, limit=data[self.count])
        compared = [job for job in map(queue.get, data[self.chosen]) if job is not None and job.owner == owner]
        chosen = tuple(job.id for job in compared)
        htmls = {
            self.status: status_html(waiting, ended),
            self.queue: queue_html(waiting, places),
            self.gallery: gallery_html(ended, chosen, settings),
            self.compare: compare_html(compared, settings),
        }
        signature = tuple(map(hash, htmls.values()))
        if signature == data[self.seen]:
            return {self.seen: signature}
        before = data[self.seen] or (None,) * len(signature)
        changed = {
            part: html for (part, html), now, was in zip(htmls.items(), signature, before, strict=True) if now != was
        }
        timer = gr.Timer(BUSY_SECONDS if waiting else IDLE_SECONDS)
        return {
            **changed,
            self.seen: signature,
            self.chosen: chosen,
            self.timer: timer,
            self.more: gr.Button(visible=more),
        }

    async def show_more(self, data: dict[Any, Any], request: gr.Request) -> dict[Any, Any]:
        data = {**data, self.count: data[self.count] + SHOWN_JOBS}
        return {self.count: data[self.count], **await self.refresh(data, request)}

    async def act(self, data: dict[Any, Any], request: gr.Request, event: gr.EventData) -> dict[Any, Any]:
        """Handle a click on a button in the queue, gallery or comparison."""
        owner, do, id = owner_of(request), str(event._data.get("do")), str(event._data.get("id"))
        changed: dict[Any, Any] = {}
        try:
            if do == "close":
                data = {**data, self.chosen: ()}
            else:
                job = await self.api.find(id, owner)
                if do == "compare":
                    others = [other for other in data[self.chosen] if other != id]
                    data = {**data, self.chosen: tuple(others if id in data[self.chosen] else [*others[-1:], id])}
                elif do in ("reload", "extend"):
                    changed = await run_in_threadpool(self.fill if do == "reload" else self.extend, job, owner)
                elif do == "again":
                    await self.repeat(job, owner)
                elif do in ("up", "down"):
                    await run_in_threadpool(self.move, job, -1 if do == "up" else 1)
                elif do == "cancel":
                    await run_in_threadpool(self.api.queue.cancel, id)
                elif do == "delete":
                    await run_in_threadpool(self.api.queue.delete, id)
        except ApiError as error:
            raise gr.Error(without_dashes(error.message), print_exception=False) from error
        return {self.chosen: data[self.chosen], **changed, **await self.refresh(data, request)}

    def move(self, job: Job, by: int) -> None:
        """Swap a job with its owner's previous (-1) or next (1) one; other owners' jobs keep their places."""
        order = self.api.queue.order()
        ids, mine = [*order], [id for id, owner in order.items() if owner == job.owner]
        index = mine.index(job.id) if job.id in mine else -1
        if index < 0 or not 0 <= index + by < len(mine):
            return
        first, second = sorted((ids.index(job.id), ids.index(mine[index + by])))
        behind = ids[second + 1] if second + 1 < len(ids) else None
        self.api.queue.move(ids[second], ids[first])
        if second - first > 1:
            self.api.queue.move(ids[first], behind)

    async def repeat(self, job: Job, owner: str) -> None:
        """Queue a job again, with a random seed."""

        async def changes(folder: Path) -> Fields:
            return {"prompt": job.flags["prompt"], "seed": -1}

        await self.api.repeat(job, owner, changes)

    # Settings into forms

    def fill(self, job: Job, owner: str) -> dict[Any, Any]:
        """Put a job's settings and inputs into its form."""
        files = {
            name: [job.folder / path for path in files_of({name: job.flags[name]})]
            for name in INPUTS
            if name in job.flags
        }
        values: dict[str, Any] = {name: [self.show(path, owner) for path in paths] for name, paths in files.items()}
        if KEYFRAMES in values:
            times = [entry.rpartition("@")[2] for entry in job.flags[KEYFRAMES]]
            values[KEYFRAMES] = (values[KEYFRAMES], times)
        return self.fill_form(job.flags, values)

    def fill_form(self, flags: Mapping[str, Any], files: Mapping[str, Any]) -> dict[Any, Any]:
        """Open the form of the flags' task, and put them into it."""
        form = self.forms[flags["task_type"]]
        values = one_size(written_out(flags))
        if "model_id" in values:
            name = self.api.settings.model_name(values["model_id"])
            values["model_id"] = name if name in form.models else None
        changed: dict[Any, Any] = {self.tabs: gr.Tabs(selected=form.task.name), form.notice: ""}
        for each in form.fields:
            name = each.flag.name
            changed |= each.updates_for(files.get(name) if name in INPUTS else values.get(name))
        return changed

    def extend(self, job: Job, owner: str) -> dict[Any, Any]:
        """Open the form of an extension with a job's video as its input."""
        name = next(name for name in TASK_NAMES if task_spec(name).condition_frames and not task_spec(name).cut_at_seam)
        flags = {"task_type": name, "prompt": job.flags.get("prompt"), "include_input": True}
        kept = ("model_id",) if job.flags.get("model_id") in self.api.settings.models.values() else ()
        files = {"input_video": [self.show(job.video, owner)]}
        return self.fill_form(flags | {each: job.flags[each] for each in kept}, files)

    def show(self, path: Path, owner: str) -> str:
        """Link a job's file to where Gradio may serve it to its owner; returns that path."""
        shown = self.drops.folder / secrets.token_hex(16) / path.name
        shown.parent.mkdir()
        link(path, shown)
        self.drops.add(shown, owner)
        return str(shown)

    async def read_record(self, path: str | None) -> dict[Any, Any]:
        """Put the settings in a video's metadata into a form; the metadata does not contain the inputs."""
        empty: dict[Any, Any] = {self.record: None, self.record_notice: ""}
        if path is None:
            return empty
        try:
            flags = await run_in_threadpool(read_config_file, path)
            if flags.get("task_type") not in self.forms:
                raise UserError("--config", "the video does not name its task")
        except UserError as error:
            what, *_ = error.message.replace(f"{Path(path).parent}/", "").partition(";")  # the rest names YAML
            return empty | {self.record_notice: notice(f"{what}; give a video that was made here")}
        inputs = ", ".join(label_of(name).lower() for name in INPUTS if name in flags)
        text = f"The settings are in the form.{f' Add its inputs: {inputs}.' if inputs else ''}"
        form = self.forms[flags["task_type"]]
        return empty | self.fill_form(flags, {}) | {form.notice: message(text, scroll="head")}


def cut(clip: Upload, start: str, end: str) -> Upload:
    """The part of a clip between two times in seconds ("": its start or end), re-encoded to be exact.

    Raises:
        UserError: it is not a clip, or has no such part.
    """
    check_kind(CLIP, clip.path, clip.name)
    seconds = probe_video(clip.path, PROBE_FPS).seconds
    try:
        first, last = float(start or 0), float(end or seconds)
    except ValueError:
        first = last = 0.0
    if not 0 <= first < last <= seconds + 0.1:
        given = format_value(f"{start or 0} to {end or 'the end'}")
        raise UserError(f"--{CLIP}", f"{given}: give two times within its {seconds:.2f} s, such as 0.5 to 2")
    part = clip.path.with_name("upload-part")
    output = ["-c:v", "libx264", "-crf", "10", "-preset", "veryfast", "-c:a", "aac", "-f", "mp4", str(part)]
    times = ["-ss", str(first), "-to", str(last)]
    try:
        write_file([*times, *input_options(clip.path, VIDEO), "-map", "0:v:0", "-map", "0:a:0?", *output], "cut it")
    except RuntimeError as error:
        raise UserError(f"--{CLIP}", f"{error}; give a complete clip, or leave From and To empty") from error
    return Upload(part, f"{clip.path.stem}.mp4")


def live_html(id: str) -> gr.HTML:
    """HTML that page.js updates in place, without losing the focus or stopping a video that plays."""
    return gr.HTML(elem_id=id, html_template='<div class="live"></div>', js_on_load=SCRIPT)


def for_form(form: Form, do: Callable[[Form, dict[Any, Any], gr.Request], Awaitable[dict[Any, Any]]]) -> Any:
    """An event handler bound to a form; Gradio needs its annotations."""

    async def call(data: dict[Any, Any], request: gr.Request) -> dict[Any, Any]:
        return await do(form, data, request)

    return call


def owner_of(request: gr.Request) -> str:
    """The owner of a request, set by `Guard`."""
    assert request.request is not None
    return request.request.scope["owner"]
