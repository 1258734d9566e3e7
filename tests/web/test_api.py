"""The HTTP API against the real application and queue; also with OpenAI's client against a running server."""

from __future__ import annotations

import base64
import json
import re
import signal
import subprocess
import sys
from typing import Any

import pytest

from skyreels_v3.main import run_command
from skyreels_v3.request import FLAGS
from skyreels_v3.web.queue import Progress, State
from tests.conftest import ASSETS, ROOT
from tests.web.conftest import HINT, SMALL, error_of, png

OPENAI = {
    *("id", "object", "model", "status", "progress", "created_at", "completed_at", "expires_at", "prompt", "seconds"),
    *("size", "remixed_from_video_id", "error"),
}


def data_url(content: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(content).decode()


# New videos


def test_a_form_and_json_make_the_same_job(served):
    fields = {"prompt": "a cat", "seconds": "2", "size": "64x32", "seed": "7", "no_riflex": "true"}
    form = served.client.post("/v1/videos", files={"seed": (None, "7")}, data={**fields, "seed": []}).json()
    inside = served.client.post("/v1/videos", json={"prompt": "a cat", "extra_body": json.dumps({**fields, "seed": 7})})
    both = [served.job(made["id"]).flags for made in (form, inside.json())]
    assert both[0] == both[1] == {
        **{"model_id": "tiny", "device": "cpu", "task_type": "t2v", "prompt": "a cat", "duration": 2},
        **{"width": 64, "height": 32, "seed": 7, "no_riflex": True},
    }  # fmt: skip


def test_the_answer_is_a_video_of_openai(served):
    types = pytest.importorskip("openai.types.video", reason=HINT)
    video = served.post(seconds="2", size="1280x720")
    assert video.keys() == OPENAI | {"details"}
    assert types.Video.model_validate(video, strict=True).status == "queued"
    assert (video["seconds"], video["size"], video["model"], video["progress"]) == ("2", "1280x720", "tiny", 0)
    done = served.client.get(f"/v1/videos/{served.finish(video['id'])}").json()
    assert types.Video.model_validate({**done, "size": "1280x720"}, strict=True).status == "completed"
    assert done["progress"] == 100 and done["completed_at"] >= done["created_at"]
    assert done["details"]["result"]["frames"] == 5


def files(*fields: str) -> list[tuple[str, tuple[str, bytes]]]:
    content = {"clip": (ASSETS / "boat.mp4").read_bytes(), "sound": (ASSETS / "speech.mp3").read_bytes()}
    kinds = {"input_video": "clip", "video": "clip", "input_audio": "sound"}
    return [(field, ("a.bin", content[kinds[field]] if field in kinds else png())) for field in fields]


@pytest.mark.parametrize(
    ("fields", "more", "task", "flags"),
    [
        ((), {}, "t2v", set()),
        (("input_reference",), {}, "i2v", {"image"}),
        (("image",), {}, "i2v", {"image"}),
        (("ref_imgs", "ref_imgs"), {}, "reference_to_video", {"ref_imgs"}),
        (("input_reference",), {"task_type": "reference_to_video"}, "reference_to_video", {"ref_imgs"}),
        (("input_reference",), {"model": "Skywork/SkyReels-V3-R2V-14B"}, "reference_to_video", {"ref_imgs"}),
        (("input_video",), {}, "single_shot_extension", {"input_video"}),
        (("input_video",), {"task_type": "shot_switching_extension"}, "shot_switching_extension", {"input_video"}),
        (("input_image", "input_audio"), {}, "talking_avatar", {"input_image", "input_audio"}),
        (("input_reference", "input_audio"), {"task_type": "talking_avatar"}, "talking_avatar", {"input_image"}),
        (("input_image", "input_audio", "keyframes@1.5"), {}, "talking_avatar", {"keyframes"}),
    ],
)  # fmt: skip
def test_inputs_choose_the_task(served, fields, more, task, flags):
    answer = served.client.post("/v1/videos", data=more, files=[("prompt", (None, "a")), *files(*fields)])
    assert answer.status_code == 200, answer.text
    job = served.job(answer.json()["id"])
    assert job.flags["task_type"] == task
    assert flags <= job.flags.keys()
    for name in flags:
        for entry in job.flags[name] if isinstance(job.flags[name], list) else [job.flags[name]]:
            file, _, seconds = entry.partition("@")
            assert (job.folder / file).is_file() and seconds == ("1.5" if name == "keyframes" else "")
    assert len([*job.folder.iterdir()]) == len(fields)


@pytest.mark.parametrize(
    "reference",
    [data_url(png()), {"image_url": data_url(png())}, {"image_url": {"url": data_url(png())}}],
    ids=["text", "image_url", "nested"],
)
def test_inputs_in_json(served, reference):
    job = served.job(served.post(input_reference=reference)["id"])
    assert (job.folder / job.flags["image"]).read_bytes() == png()


@pytest.mark.parametrize(
    "given", [data_url(png()), [data_url(png())], [data_url(png())] * 2], ids=["one", "list", "two"]
)
def test_references_as_data_urls(served, given):
    made = served.post(task_type="reference_to_video", ref_imgs=given)
    job = served.job(made["id"])
    assert len(job.flags["ref_imgs"]) == (1 if isinstance(given, str) else len(given))
    assert all((job.folder / name).read_bytes() == png() for name in job.flags["ref_imgs"])


def test_a_drawn_seed_is_kept(served):
    video = served.post(seed=-1)
    assert video["details"]["seed"] == served.job(video["id"]).flags["seed"] >= 0


def test_defaults_give_way(serve):
    served = serve(defaults={"model_id": "tiny", "offload": True, "num_inference_steps": 3, "device": "cpu"})
    flags = served.job(served.post(memory="stream")["id"]).flags
    assert flags["memory"] == "stream" and "offload" not in flags and flags["num_inference_steps"] == 3


@pytest.mark.parametrize(
    ("fields", "param", "words"),
    [
        ({"prompt": ""}, "prompt", "missing or empty"),
        ({"prompt": 5}, "prompt", "not text"),
        ({"seconds": "99"}, "seconds", "1 to 16 whole seconds"),
        ({"duration": 99}, "duration", "1 to 16 whole seconds"),
        ({"seconds": "4", "duration": 4}, "duration", "give one of them"),
        ({"seconds": "4", "num_frames": 5}, "seconds", "conflicts with num_frames"),
        ({"size": "big"}, "size", "WIDTHxHEIGHT"),
        ({"size": "100x100"}, "size", "not a multiple of 16"),
        ({"size": "64x64", "width": 64}, "size", "conflicts with width"),
        ({"model": "sora-2"}, "model", "choose one of tiny, Skywork/"),
        ({"promt": "a"}, "promt", "did you mean"),
        ({"steps": 3}, "steps", "num_inference_steps"),
        ({"num_inference_steps": 1000}, "num_inference_steps", "from 1 to 200"),
        ({"speech_only": "perhaps"}, "speech_only", "give true or false"),
        ({"task_type": "poetry"}, "task_type", "choose reference_to_video"),
        ({"task_type": "i2v"}, "image", "missing"),
        ({"device": "cuda"}, "device", "set by the server"),
        ({"attention": "flash"}, "attention", ""),
        ({"extra_body": [1]}, "extra_body", "not a JSON object"),
        ({"image": "fox.png"}, "image", "send the file itself"),
        ({"input_reference": {"file_id": "file-1"}}, "input_reference", "send the file itself"),
    ],
)  # fmt: skip
def test_errors_are_the_command_lines(served, fields, param, words):
    error = error_of(served.client.post("/v1/videos", json={"prompt": "a", **fields}), 400)
    assert error["param"] == param and words in error["message"]
    assert error["type"] == "invalid_request_error"
    assert not [*(served.folder / "jobs").iterdir()]


def test_a_sound_is_no_picture(served):
    for field, name in (("image", "ref_imgs"), ("input_audio", "input_audio")):
        sent = {field: ("a.png", b"no media at all")}
        answer = served.client.post("/v1/videos", data={"prompt": "a"}, files=sent)
        assert error_of(answer, 415)["param"] == field, name


def test_the_queue_is_full(serve):
    served = serve()
    served.queue.max_owner_jobs = 1
    served.post()
    answer = served.client.post("/v1/videos", json={"prompt": "b"})
    assert error_of(answer, 429)["code"] == "queue_full" and answer.headers["retry-after"]
    assert len([*(served.folder / "jobs").iterdir()]) == 1


# From other videos


def test_an_extension_of_a_video(served):
    source = served.done()
    url = "/v1/videos/extensions"
    made = served.client.post(url, json={"prompt": "on", "seconds": "5", "video": {"id": source}}).json()
    job = served.job(made["id"])
    assert job.flags["task_type"] == "single_shot_extension" and job.flags["include_input"] is True
    assert made["remixed_from_video_id"] == job.parent == source and made["seconds"] == "5"
    served.queue.claim("0")
    served.queue.report(job.id, "0", Progress("denoising"), {"frames": 168, "fps": 24})  # including 2 s of the clip
    assert served.client.get(f"/v1/videos/{job.id}").json()["seconds"] == "7"
    served.queue.cancel(job.id)
    assert (job.folder / job.flags["input_video"]).read_bytes() == served.video
    more = {"task_type": "shot_switching_extension", "include_input": "false"}
    sent = {"video": ("boat.mp4", (ASSETS / "boat.mp4").read_bytes())}
    job = served.job(served.client.post(url, data={"prompt": "on", **more}, files=sent).json()["id"])
    assert job.flags["task_type"] == more["task_type"] and "include_input" not in {k for k, v in job.flags.items() if v}
    assert error_of(served.client.post(url, json={"prompt": "on"}), 400)["param"] == "video"
    running = served.post(**SMALL)["id"]
    error_of(served.client.post(url, json={"prompt": "on", "video": {"id": running}}), 409)
    error = error_of(served.client.post(url, data={"prompt": "a", "task_type": "t2v"}, files=sent), 400)
    assert "choose" in error["message"] or "does not take it" in error["message"]


def test_a_remix(served):
    source = served.post(input_reference=data_url(png()), num_frames=5)["id"]
    url = f"/v1/videos/{source}/remix"
    error_of(served.client.post(url, json={"prompt": "a dog"}), 409)
    served.finish(source)
    made = served.client.post(url, json={"prompt": "a dog"}).json()
    old, new = served.job(source), served.job(made["id"])
    assert {**old.flags, "prompt": "a dog"} == new.flags and made["remixed_from_video_id"] == source
    assert served.client.delete(f"/v1/videos/{source}").json()["deleted"]
    assert (new.folder / new.flags["image"]).read_bytes() == png()
    served.finish(made["id"])
    url = f"/v1/videos/{made['id']}/remix"
    assert error_of(served.client.post(url, json={}), 400)["param"] == "prompt"
    assert error_of(served.client.post(url, json={"prompt": "a", "image": "b"}), 400)["param"] == "image"


# Jobs


def test_lists_have_pages(served):
    ids = [served.post()["id"] for _ in range(5)]
    page = served.client.get("/v1/videos?limit=2").json()
    assert [video["id"] for video in page["data"]] == ids[:2:-1] and page["has_more"]
    assert (page["first_id"], page["last_id"]) == (ids[4], ids[3])
    page = served.client.get(f"/v1/videos?limit=100&order=asc&after={ids[2]}").json()
    assert [video["id"] for video in page["data"]] == ids[3:] and not page["has_more"]
    for query, param in (("limit=0", "limit"), ("limit=101", "limit"), ("limit=x", "limit"), ("order=up", "order")):
        assert error_of(served.client.get(f"/v1/videos?{query}"), 400)["param"] == param
    error_of(served.client.get("/v1/videos?after=video_1"), 404)


def test_polling(served):
    id = served.post()["id"]
    assert served.client.get(f"/v1/videos/{id}").headers["openai-poll-after-ms"] == "2000"
    assert served.post()["details"]["place"] == 1
    served.queue.claim("0")
    served.queue.report(id, "0", Progress("denoising", 0.426, 1, 1, 3, 8, 12.5, 1))
    answer = served.client.get(f"/v1/videos/{id}")
    assert answer.headers["openai-poll-after-ms"] == "1000" and answer.json()["progress"] == 42
    assert answer.json()["details"]["progress"]["seconds_left"] == 12.5
    served.queue.fail(id, "0", "internal_error", f"{served.folder}/jobs/{id}/image.png broke /etc/passwd")
    answer = served.client.get(f"/v1/videos/{id}")
    assert "openai-poll-after-ms" not in answer.headers
    assert answer.json()["error"] == {"code": "internal_error", "message": "image.png broke passwd"}
    assert error_of(served.client.get(f"/v1/videos/{id}/content"), 409)["message"].endswith("failed; it has no video")


def test_a_failure_names_fields(served):
    """By their names in the API and on the page, and only those that clients can set."""
    from skyreels_v3.web.page_html import card
    from skyreels_v3.web.settings import Settings

    id = served.post()["id"]
    served.queue.claim("0")
    advice = "reduce memory use with --low_vram, a smaller --num_frames"
    reason = f"out of memory while denoising; --device cpu has more; {advice}"
    served.queue.fail(id, "0", "out_of_memory", reason)
    said = served.client.get(f"/v1/videos/{id}").json()["error"]["message"]
    assert said == "out of memory while denoising; reduce memory use with low_vram, a smaller num_frames"
    shown = card(served.job(id), False, Settings(served.folder))
    assert "denoising; reduce memory use with low vram, a smaller frames" in shown and "--" not in shown


def test_content(served):
    id = served.post(**SMALL)["id"]
    error_of(served.client.get(f"/v1/videos/{id}/content"), 409)
    url = f"/v1/videos/{served.finish(id)}/content"
    answer = served.client.get(url)
    assert answer.content == served.video and answer.headers["content-type"] == "video/mp4"
    assert served.client.head(url).headers["content-length"] == str(len(served.video))
    answer = served.client.get(url, headers={"Range": "bytes=5-9"})
    assert (answer.status_code, answer.content) == (206, served.video[5:10])
    assert served.client.get(url, headers={"Range": "bytes=-3"}).content == served.video[-3:]
    assert served.client.get(f"{url}?variant=thumbnail").content[8:12] == b"WEBP"
    assert served.client.get(f"{url}?variant=spritesheet").content[:2] == b"\xff\xd8"
    assert error_of(served.client.get(f"{url}?variant=../x"), 400)["param"] == "variant"
    (served.job(id).folder / "preview.png").write_bytes(png())
    assert served.client.get(f"/v1/videos/{id}/preview").content == png()


def test_content_of_what_has_not_finished(served):
    """The windows that were finished before a job failed."""
    id = served.post(**SMALL)["id"]
    url = f"/v1/videos/{id}/content?variant=partial"
    error_of(served.client.get(url), 404)
    job = served.queue.claim("0")
    (job.folder / "video.partial.mp4").write_bytes(served.video)
    served.queue.fail(id, "0", "internal_error", "it broke")
    answer = served.client.get(url)
    assert answer.content == served.video and f"{id}-partial.mp4" in answer.headers["content-disposition"]
    assert "variant=partial" in error_of(served.client.get(f"/v1/videos/{id}/content"), 409)["message"]


def test_cancel_and_delete(served):
    queued, running, done = served.post(**SMALL)["id"], None, None
    assert served.client.post(f"/v1/videos/{queued}/cancel").json()["error"]["code"] == "cancelled"
    running = served.post()["id"]
    served.queue.claim("0")
    assert served.client.post(f"/v1/videos/{running}/cancel").json()["details"]["cancelling"]
    assert not served.queue.report(running, "0", Progress())
    assert served.client.delete(f"/v1/videos/{running}").json() == {
        "id": running, "object": "video.deleted", "deleted": True,
    }  # fmt: skip
    served.queue.release("0")
    done = served.done()
    assert served.client.post(f"/v1/videos/{done}/cancel").json()["status"] == "completed"
    folder = served.job(done).folder
    assert served.client.delete(f"/v1/videos/{done}").status_code == 200
    assert not folder.exists() and served.queue.counts()[State.COMPLETED] == 0
    for ask in (served.client.get, served.client.delete):
        error_of(ask(f"/v1/videos/{done}"), 404)


def events_of(text: str) -> list[tuple[str, Any]]:
    return [(name, json.loads(data)) for name, data in re.findall(r"event: (\w+)\r?\ndata: (.*?)\r?\n", text)]


def test_events(served, monkeypatch):
    id = served.post(**SMALL)["id"]
    looks = 0

    async def sleep(_seconds: float) -> None:
        nonlocal looks
        looks += 1
        if looks == 1:
            served.queue.claim("0")
            served.queue.report(id, "0", Progress("denoising", 0.5, 1, 1, 4, 8, 2.0, 1))
        else:
            served.queue.fail(id, "0", "internal_error", "broke")

    monkeypatch.setattr("skyreels_v3.web.api.asyncio.sleep", sleep)
    events = events_of(served.client.get(f"/v1/videos/{id}/events").text)
    assert [name for name, _ in events] == ["progress", "progress", "preview", "end"]
    assert events[1][1]["step"] == 4 and events[2][1]["url"] == f"/v1/videos/{id}/preview?number=1"
    assert events[3][1]["error"]["message"] == "broke"
    error_of(served.client.get("/v1/videos/video_1/events"), 404)


def test_what_cannot_work_is_refused_at_once(served):
    """When it is submitted, not when its turn comes hours later."""
    clip = served.done()  # 48 frames
    small = {"prompt": "a", "task_type": "shot_switching_extension"}
    for fields, param, words in (
        ({"task_type": "t2v", "model": "Skywork/SkyReels-V3-R2V-14B"}, "model", "is the checkpoint of reference_to"),
        ({"task_type": "i2v", "image": {"id": clip}}, "image", "is not a picture"),
        ({"task_type": "i2v", "image": {"url": "http://10.0.0.1/a.png"}}, "image", "; send the file itself"),
        ({"task_type": "t2v", "negative_prompt": "a", "text_guidance_scale": 3}, "text_guidance_scale", "does not"),
    ):
        error = error_of(served.client.post("/v1/videos", json={"prompt": "a", **fields}), 400)
        assert error["param"] == param and words in error["message"] and "--" not in error["message"], error
    (served.job(clip).video).write_bytes(served.short)
    error = error_of(served.client.post("/v1/videos/extensions", json={**small, "video": {"id": clip}}), 400)
    assert "frames" in error["message"] and error["param"] == "video"
    error = error_of(served.client.post(f"/v1/videos/{clip}/remix", json={}), 400)
    assert error["message"] == "prompt: missing; say what the new video shows"
    files = {"prompt": ("a.png", png())}
    assert "prompt: was sent as a file" in error_of(served.client.post("/v1/videos", files=files), 400)["message"]
    error = error_of(served.client.get("/v1/videos?after=video_1"), 404)
    assert error["param"] == "after" and served.client.head("/health").status_code == 200


def test_nobody_takes_all(serve):
    """Each key is limited to a quarter of the request bodies being read and of the event streams."""
    served = serve(keys=("first", "second"))
    api = served.client.app.state.api
    first, second = ({"Authorization": f"Bearer {key}"} for key in ("first", "second"))
    id = served.client.post("/v1/videos", json={"prompt": "a"}, headers=first).json()["id"]
    owner = served.job(id).owner
    api.uploads[owner], api.streams[owner] = 4, 25
    for path in ("/v1/videos", f"/v1/videos/{id}/events"):
        ask = served.client.get if path.endswith("events") else served.client.post
        answer = ask(path, headers=first, **({} if path.endswith("events") else {"json": {"prompt": "a"}}))
        assert error_of(answer, 429) and answer.headers["retry-after"] == "5"
    assert served.client.post("/v1/videos", json={"prompt": "a"}, headers=second).status_code == 200


# Keys


def test_each_key_sees_its_own(serve):
    served = serve(keys=("first", "second"))
    first, second = ({"Authorization": f"Bearer {key}"} for key in ("first", "second"))
    id = served.client.post("/v1/videos", json={"prompt": "a"}, headers=first).json()["id"]
    assert served.client.get(f"/v1/videos/{id}", headers=first).status_code == 200
    assert "first" not in served.job(id).owner
    for path in ("", "/content", "/events", "/preview"):
        error_of(served.client.get(f"/v1/videos/{id}{path}", headers=second), 404)
    for path in ("/cancel", "/remix"):
        error_of(served.client.post(f"/v1/videos/{id}{path}", json={"prompt": "a"}, headers=second), 404)
    error_of(served.client.delete(f"/v1/videos/{id}", headers=second), 404)
    extend = {"prompt": "a", "video": {"id": id}}
    error_of(served.client.post("/v1/videos/extensions", json=extend, headers=second), 404)
    assert served.client.get("/v1/videos", headers=second).json()["data"] == []
    for headers in (
        {},
        {"Authorization": "Bearer third"},
        {"Authorization": "Basic first"},
        {"Authorization": "first"},
    ):
        answer = served.client.get("/v1/models", headers=headers)
        assert error_of(answer, 401)["code"] == "invalid_api_key" and answer.headers["www-authenticate"] == "Bearer"
    assert served.client.get("/health").json()["status"] == "ok"


def test_rates(serve):
    security = pytest.importorskip("skyreels_v3.web.security", reason=HINT)
    from skyreels_v3.web.settings import Limits

    now = [0.0]
    buckets = security.Buckets(60, lambda: now[0])
    assert [buckets.take("a") for _ in range(60)] == [0.0] * 60
    assert buckets.take("a") == pytest.approx(1.0) and buckets.take("b") == 0
    now[0] = 1.0
    assert buckets.take("a") == 0
    served = serve(limits=Limits(posts=2))
    answers = [served.client.post("/v1/videos", json={"prompt": "a"}) for _ in range(3)]
    assert [answer.status_code for answer in answers] == [200, 200, 429]
    assert int(answers[2].headers["retry-after"]) > 1
    assert served.client.get("/v1/videos").status_code == 200


# The server


def test_models_health_and_metrics(serve, tmp_path):
    served = serve(defaults={"model_id": str(tmp_path)})
    models = served.client.get("/v1/models").json()["data"]
    assert models[0]["id"] == tmp_path.name and {"tiny", "Skywork/SkyReels-V3-A2V-19B"} <= {m["id"] for m in models}
    assert served.post()["model"] == tmp_path.name
    text = served.client.get("/metrics").text
    assert 'skyreels_jobs{state="queued"} 1.0' in text
    assert 'skyreels_requests_total{method="POST",route="/v1/videos",status="200"} 1.0' in text


def test_the_docs_page_needs_no_other_host(served):
    page = served.client.get("/docs")
    description = served.client.get("/openapi.json").json()
    fields = description["paths"]["/v1/videos"]["post"]["requestBody"]["content"]["application/json"]["schema"]
    assert page.headers["content-type"].startswith("text/html") and "<script" not in page.text
    assert not re.search(r"(src|href)=\"(?!/)", page.text)
    hidden = {"outdir", "output", "save_latents", "save_quantized", "base_model_id", "model_id", "model_source"}
    hidden |= {"transformer", "text_encoder", "vae", "device", "high_cpu_memory", "checkpoint_every", "url_timeout"}
    hidden |= {"enhance_prompt", "enhancer_model", "text", "voice", "diarization"}
    for flag in FLAGS:
        assert (flag.name in fields["properties"]) == (flag.in_line and flag.name not in hidden)
    for path in description["paths"]:
        assert path in page.text


def test_security_headers_are_everywhere(served):
    for path in ("/health", "/nothing", "/docs", "/v1/videos/x"):
        headers = served.client.get(path).headers
        assert headers["x-content-type-options"] == "nosniff" and headers["x-frame-options"] == "DENY"
        assert "default-src 'none'" in headers["content-security-policy"]


@pytest.mark.slow
def test_plan(served):
    fields = {"prompt": "a", **SMALL}
    plan = served.client.post("/v1/videos/plan", data=fields, files={"input_reference": ("a.png", png())}).json()
    assert plan["object"] == "video.plan" and "latents [1, 16, 2, 4, 4]" in plan["text"]
    assert (plan["task_type"], plan["frames"], plan["passes"][0]["tokens"]) == ("i2v", 5, 8)
    assert plan["memory_bytes"]["resident"]["whole"] > 0 and str(served.folder) not in json.dumps(plan)
    assert "processes" not in plan["text"]
    answer = served.client.post("/v1/videos/plan", json={"prompt": "a", "model": "Skywork/SkyReels-V1-Hunyuan-T2V"})
    assert answer.status_code == 200, answer.text
    assert not [*(served.folder / "jobs").iterdir()] and served.client.get("/v1/videos").json()["data"] == []


@pytest.mark.slow
def test_plan_of_a_group(serve):
    """The plan for each of two processes, not for one alone; or why two cannot share this video."""
    served = serve(defaults={"model_id": "tiny"}, group={"use_usp": True, "gpu_num": 2, "device": "cpu"})
    fields = {"prompt": "a", "task_type": "t2v", "guidance_scale": 6, **SMALL}
    plan = served.client.post("/v1/videos/plan", json=fields).json()
    assert "2: guidance 2 x ring 1 x Ulysses 1" in plan["text"]


# The command


def test_a_file_of_keys(tmp_path, refuse):
    from skyreels_v3.web.serve import keys_of

    path = tmp_path / "keys"
    path.write_text("\ufeff# mine\n  # and others\n\n one \ntwo\none\n", encoding="utf-8")
    assert keys_of({"api_key": str(path)}) == ("one", "two")
    path.write_text("# none\n")
    assert "holds no key" in refuse(["--serve", "--api_key", str(path)])
    path.write_text("one\n\ntwo words\n")
    assert "--api_key: line 3 is not a key" in refuse(["--serve", "--api_key", str(path)])


BUSY = "--port: {port} cannot be listened on"


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--port", "{port}"], BUSY),
        (["--port", "65536"], "--port: 65536 is out of range"),
        (["--host", "0.0.0.0"], "--host: 0.0.0.0: other machines could use this server; add --api_key, or --no_auth"),
        (["--host", "no such host", "--no_auth"], "--host: no such host is not an address of this machine"),
        (["--api_key", "two words of a key"], "--api_key: it is not a key"),
        (["--api_key", "a-long-key-with,a-comma"], "--api_key: it is not a key"),
        (["--api_key", "/no/such/file"], "--api_key: there is no such file /no/such/file"),
        (["--api_key", "keys-of-my-server.txt"], "--api_key: there is no such file keys-of-my-server.txt"),
        (["--api_key", "c2VjcmV0/c2VjcmV0=="], "--api_key: there is no such file; put a key that has a /"),
        (["--api_key", "api_key"], "--api_key: it is not a file, and a key of fewer than 16 characters"),
        (["--outdir", ""], "--outdir: an empty value"),
        (["--num_frames", "7"], "--num_frames: 7: not 4k+1"),
        (["--transformer", "/nope.gguf"], "--transformer: /nope.gguf is not a file or folder"),
        (["--lora", "/nope.safetensors"], "--lora: /nope.safetensors is not a file or folder"),
        (["--api_key", "a", "--no_auth"], "--api_key: conflicts with --no_auth"),
        (["--prompt", "a"], "--prompt: a: cannot be combined with --serve"),
        (["--text", "a"], "--text: a: cannot be combined with --serve"),
        (["--output", "a.mp4"], "--output: a.mp4: cannot be combined with --serve"),
        (["--jobs", "a.jsonl"], "--jobs: a.jsonl: cannot be combined with --serve"),
        (["--gpu_num", "2", "--workers", "2"], "--workers: conflicts with --use_usp"),
        (["--allowed_hosts", "https://a.example"], "--allowed_hosts: https://a.example is not a host name"),
        (
            ["--use_usp", "--device", "cpu", "--gpu_num", "4", "--ulysses_degree", "3"],
            "--ulysses_degree: 3: ring x Ulysses must be 4",
        ),
        (["--ring_degree", "2"], "--ring_degree: is for several processes; add --use_usp"),
        (["--use_usp", "--device", "cpu"], "--use_usp: this machine has no GPUs"),
        (["--keep_days", "0"], "--keep_days: 0 is out of range"),
        (["--keep_gb", "nan"], "--keep_gb: nan is out of range"),
        (["--model_id", "/no/such"], "--model_id: /no/such is neither a folder nor a hub id"),
        (["--device", "cuda"], "--device: cuda: this machine has no"),
        (["--workers", "0"], "--workers: 0 is out of range"),
    ],
    ids=lambda value: " ".join(value)[:30] if isinstance(value, list) else "",
)  # fmt: skip
def test_bad_flags(refuse, argv, words):
    import socket

    pytest.importorskip("fastapi", reason=HINT)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        assert words.format(port=port) in refuse(["--serve", *(word.format(port=port) for word in argv)])


def test_server_flags_without_a_server(refuse):
    assert refuse(["--task_type", "t2v", "--prompt", "a", "--port", "80"]).startswith("error: --port: is for a server")
    assert "secret" not in refuse(["--task_type", "t2v", "--prompt", "a", "--api_key", "secret"])


def test_missing_packages(refuse, monkeypatch):
    monkeypatch.setattr("skyreels_v3.packages.find_spec", lambda name: None)
    assert refuse(["--serve"]).startswith("error: --serve: needs pip install -r requirements-web.txt")


def test_the_subcommand(capsys, monkeypatch):
    monkeypatch.setattr("skyreels_v3.packages.find_spec", lambda name: None)
    assert run_command(["serve"]) == 2
    assert "requirements-web.txt" in capsys.readouterr().err


def test_the_command_line_imports_no_server():
    code = (
        "import sys, skyreels_v3.main; sys.exit(any(name in sys.modules for name in ('fastapi', 'uvicorn', 'torch')))"
    )
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0


def wait_for_address(run: subprocess.Popen[str]) -> str:
    assert run.stdout is not None and run.stderr is not None
    address = run.stdout.readline().strip()
    assert address.startswith("http://127.0.0.1:"), run.stderr.read()
    return address


@pytest.mark.slow
def test_openais_client(start, tmp_path):
    openai = pytest.importorskip("openai", reason=HINT)
    pytest.importorskip("fastapi", reason=HINT)
    (tmp_path / "keys").write_text("# of the tests\nkey-of-the-tests\n")
    flags = ("--model_id", "tiny", "--device", "cpu", "--num_inference_steps", 1, "--no_cache", "--quiet")
    run = start("--serve", "--port", 0, "--api_key", tmp_path / "keys", "--outdir", tmp_path / "out", *flags)
    try:
        client = openai.OpenAI(base_url=f"{wait_for_address(run)}/v1", api_key="key-of-the-tests", max_retries=0)
        use(client, openai, tmp_path)
    finally:
        run.send_signal(signal.SIGINT)
        stderr = run.communicate(timeout=60)[1]
    assert run.returncode == 130 and stderr.endswith("interrupted\n"), stderr
    assert "Traceback" not in stderr and not [*(tmp_path / "working").iterdir()]


def use(client: Any, openai: Any, tmp_path: Any) -> None:
    """Create, poll, download, extend, list, cancel and delete."""
    small = {"num_frames": 49, "height": 32, "width": 32}
    made = client.videos.create_and_poll(prompt="a cat", extra_body=small)
    assert (made.status, made.progress, made.size) == ("completed", 100, "32x32"), made
    client.videos.download_content(made.id).write_to_file(tmp_path / "a.mp4")
    assert (tmp_path / "a.mp4").read_bytes()[4:8] == b"ftyp"
    assert client.videos.download_content(made.id, variant="thumbnail").read()[8:12] == b"WEBP"
    image = ("fox.png", png(64), "image/png")
    begun = client.videos.create(prompt="a fox", input_reference=image, size="32x32", extra_body={"num_frames": 5})
    # elsewhere this client version rejects references to other videos and URLs
    reference = {"input_reference": {"image_url": data_url(png())}, "size": "32x32"}
    linked = client.videos.create(prompt="b", seconds="4", extra_body=reference)
    source = {"video": {"id": made.id}, "height": 32, "width": 32}
    longer = client.videos.extend(video=openai.omit, prompt="on", seconds="5", extra_body=source)
    sent = client.videos.extend(video=(tmp_path / "a.mp4").open("rb"), prompt="on", seconds="5")
    remix = client.videos.remix(made.id, prompt="a dog")
    ids = [video.id for video in client.videos.list(limit=2)]
    assert ids == [video.id for video in (remix, sent, longer, linked, begun, made)]
    assert client.videos.delete(sent.id).deleted and client.videos.delete(linked.id).deleted
    assert client.videos.poll(longer.id).status == "completed"
    assert client.videos.poll(remix.id).remixed_from_video_id == made.id
    assert "tiny" in [model.id for model in client.models.list()]
    with pytest.raises(openai.NotFoundError):
        client.videos.retrieve(sent.id)
    with pytest.raises(openai.BadRequestError) as refused:
        client.videos.create(prompt="a", seconds="99")
    assert refused.value.param == "seconds"
    with pytest.raises(openai.AuthenticationError):
        client.with_options(api_key="wrong").videos.list()
