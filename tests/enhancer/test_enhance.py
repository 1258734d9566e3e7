"""--enhance_prompt with well- and badly-behaved endpoints, with a local model, and in whole runs."""

from __future__ import annotations

import base64
import json
import logging
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass, field, replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from io import BytesIO
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen3VLConfig, Qwen3VLForConditionalGeneration
from transformers.models.qwen3_vl.modeling_qwen3_vl import Qwen3VLVisionModel

from skyreels_v3.batch import identity_of
from skyreels_v3.checkpoints.hub import ENHANCER
from skyreels_v3.checks import request_of
from skyreels_v3.cli import read_config_file
from skyreels_v3.enhancer import local, remote
from skyreels_v3.enhancer.enhance import enhance, question_of, read_answer, recall, to_keep
from skyreels_v3.enhancer.question import EnhancerError
from skyreels_v3.errors import UserError
from skyreels_v3.inputs import Inputs
from skyreels_v3.media.video_reader import read_frames
from skyreels_v3.media.video_writer import read_comment
from skyreels_v3.prompts import transitions
from skyreels_v3.request import GenerationRequest
from skyreels_v3.resume import RunRecord

KEY = "sk-very-secret-key"
PROMPT = 'A fox meets Anna at "Bar 7"'
BETTER = 'A red fox walks slowly up to Anna, who waits in the snow before "Bar 7", lit by a lamp.'


def completion(text: Any, reason: str = "stop") -> bytes:
    choice = {"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": reason}
    return json.dumps({"object": "chat.completion", "choices": [choice]}).encode()


@dataclass
class Endpoint:
    """A server on loopback.

    Attributes:
        answer: handles a request.
        asked: path, headers and body of each request.
    """

    answer: Callable[[BaseHTTPRequestHandler], None]
    asked: list[tuple[str, dict[str, str], Any]] = field(default_factory=list)
    url: str = ""
    ended: threading.Event = field(default_factory=threading.Event)


@contextmanager
def serving(answer: Callable[[BaseHTTPRequestHandler], None]) -> Iterator[Endpoint]:
    endpoint = Endpoint(answer)

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            endpoint.asked.append((self.path, dict(self.headers), body))
            with suppress(OSError):  # the client has disconnected
                endpoint.answer(self)

        do_GET = do_POST

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.endpoint = endpoint
    endpoint.url = f"http://127.0.0.1:{server.server_port}/v1"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield endpoint
    finally:
        endpoint.ended.set()
        server.shutdown()
        server.server_close()
        thread.join()


def reply(body: bytes, status: int = 200, **headers: str) -> Callable[[BaseHTTPRequestHandler], None]:
    def answer(handler: BaseHTTPRequestHandler) -> None:
        handler.send_response(status, KEY)  # a reason phrase that must not be repeated
        for name, value in {"Content-Length": str(len(body)), **headers}.items():
            handler.send_header(name.replace("_", "-"), value)
        handler.end_headers()
        handler.wfile.write(body)

    return answer


def hang(handler: BaseHTTPRequestHandler) -> None:
    handler.server.endpoint.ended.wait(30)


def drip(handler: BaseHTTPRequestHandler) -> None:
    handler.send_response(200)
    handler.end_headers()
    while not handler.server.endpoint.ended.wait(0.02):
        handler.wfile.write(b" ")
        handler.wfile.flush()


def close(handler: BaseHTTPRequestHandler) -> None:
    handler.wfile.write(b"HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\n{")


@pytest.fixture
def quick(monkeypatch, tmp_path) -> None:
    monkeypatch.setattr(remote, "TOTAL_SECONDS", 0.6)
    monkeypatch.setattr(remote, "WAITS", (0.01, 0.01))
    monkeypatch.setenv("SKYREELS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("SKYREELS_ENHANCER_API_KEY", KEY)


def asking(url: str, prompt: str = PROMPT, task: str = "reference_to_video", **flags: Any) -> GenerationRequest:
    needed = {"reference_to_video": {"ref_imgs": ["a.png"]}, "shot_switching_extension": {"input_video": "a.mp4"}}
    way = {"enhance_prompt": url, "enhancer_model": "some/model"}
    return request_of({"task_type": task, "prompt": prompt, **needed.get(task, {}), **way, **flags})


def noise(size: tuple[int, int] = (900, 600)) -> Image.Image:
    return Image.effect_noise(size, 80).convert("RGB")


BAD = {
    "hangs": (hang, "no answer within 0.6 s", 1),
    "drip-feeds": (drip, "no answer within 0.6 s", 1),
    "500": (reply(b"{}", 500), "the endpoint answers 500 Internal Server Error;", 3),
    "401": (reply(KEY.encode(), 401), "answers 401 Unauthorized: set SKYREELS_ENHANCER_API_KEY to its key;", 1),
    "huge": (reply(b" " * (2 << 20)), "larger than 1024 KiB", 1),
    "compressed": (reply(b"x", Content_Encoding="gzip"), "is compressed", 1),
    "no JSON": (reply(b"<html>"), "is not a chat completion", 1),
    "deep JSON": (reply(b"[" * 100_000), "is not a chat completion", 1),
    "other JSON": (reply(b'{"choices": []}'), "is not a chat completion", 1),
    "cut off": (reply(completion(BETTER, "length")), "is not complete, cut off after 1024 tokens", 1),
    "no text": (reply(completion(None)), "is not complete", 1),
    "empty": (reply(completion("<think>hm</think>\n ")), "the answer is empty", 1),
    "endless": (reply(completion(BETTER * 50)), "characters, more than 2000", 1),
    "loses a name": (reply(completion(BETTER.replace("Anna", "her"))), "the answer lacks Anna", 1),
    "loses a quote": (reply(completion(BETTER.replace("Bar 7", "Bar 8"))), "the answer lacks Bar 7", 1),
    "adds a tag": (reply(completion(f"[ZOOM_IN_CUT] {BETTER}")), "the answer's tags are not the prompt's", 1),
    "closes": (close, "the endpoint cannot be reached (RemoteProtocolError)", 3),
}


@pytest.mark.parametrize("way", BAD)
def test_a_bad_endpoint_costs_only_the_new_prompt(way, quick, caplog):
    answer, problem, tries = BAD[way]
    caplog.set_level(logging.DEBUG)
    with serving(answer) as endpoint:
        start = time.monotonic()
        request = enhance(asking(endpoint.url), Inputs(images=(noise(),)))
        assert time.monotonic() - start < 3
    assert request.prompt == request.flags["prompt"] == PROMPT and not request.to_enhance
    assert len(endpoint.asked) == tries
    own = [record for record in caplog.records if record.name.startswith("skyreels_v3")]
    (warning,) = (record.getMessage() for record in own if record.levelno >= logging.WARNING)
    assert problem in warning and warning.endswith("; the prompt stays as it was")
    assert not any(KEY in record.getMessage() for record in own)


def test_a_redirect_is_not_followed_and_nobody_there(quick, caplog, monkeypatch):
    with serving(reply(completion(BETTER))) as other:
        with serving(reply(b"", 307, Location=other.url + "/chat/completions")) as endpoint:
            assert enhance(asking(endpoint.url), Inputs()).prompt == PROMPT
        assert not other.asked
        assert "answers 307 Temporary Redirect, which is not followed: give the final address" in caplog.text
        for name in ("http_proxy", "all_proxy"):
            monkeypatch.setenv(name, other.url)  # which would be sent the key
        assert enhance(asking(endpoint.url), Inputs()).prompt == PROMPT  # the endpoint has ended
        assert not other.asked
    assert "the endpoint cannot be reached (ConnectError)" in caplog.text


def test_a_good_endpoint_is_asked_once(quick, caplog):
    caplog.set_level(logging.INFO)
    better = BETTER.replace('"', "'")
    tries = iter((reply(b"", 503), reply(completion(f'<think>Anna?</think>\n"{better}"'))))
    with serving(lambda handler: next(tries)(handler)) as endpoint:
        asked = asking(endpoint.url)
        inputs = Inputs(images=(noise(), noise((40, 60))))
        assert recall(asked, inputs) is asked
        request = enhance(asked, inputs)
        assert request.prompt == request.flags["prompt"] == better
        again = asking(endpoint.url)
        assert enhance(again, inputs).prompt == recall(again, inputs).prompt == request.prompt
        assert len(endpoint.asked) == 2  # the first request was refused
        assert recall(again, Inputs(images=(noise(),))).to_enhance  # different images make a different request
        assert recall(replace(again, no_cache=True), inputs).to_enhance
    assert f"the prompt is now: {request.prompt}" in caplog.messages
    path, headers, body = endpoint.asked[-1]
    assert path == "/v1/chat/completions" and headers["Authorization"] == f"Bearer {KEY}"
    assert (body["model"], body["temperature"]) == ("some/model", 0)
    rules, said = body["messages"]
    assert "references" in rules["content"] and PROMPT not in rules["content"]
    *pictures, text = said["content"]
    assert text == {"type": "text", "text": PROMPT}
    urls = [picture["image_url"]["url"] for picture in pictures]
    sizes = [Image.open(BytesIO(base64.b64decode(url.removeprefix("data:image/jpeg;base64,")))).size for url in urls]
    assert sizes == [(512, 341), (40, 60)]
    assert request.given == {"prompt": PROMPT, "enhance_prompt": "remote", "enhancer_model": "some/model"}
    assert endpoint.url not in json.dumps([dict(request.flags), dict(request.given)])


@pytest.mark.parametrize(
    ("url", "address"),
    [
        ("http://a:80", "http://a:80/v1/chat/completions"),
        ("https://a/v1/", "https://a/v1/chat/completions"),
        ("https://a/b/chat/completions", "https://a/b/chat/completions"),
    ],
)
def test_addresses(url, address):
    assert remote.address_of(url) == address


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"enhance_prompt": "remote"}, "--enhance_prompt: remote: choose off, local or an address such as http"),
        ({"enhance_prompt": "http://a:0/"}, "--enhance_prompt: http://a:0/: choose off, local"),
        ({"enhance_prompt": "ftp://a"}, "--enhance_prompt: ftp://a: choose off, local"),
        ({"enhance_prompt": "http://u:p@a/v1"}, "http://...@a/v1: leave out user, password and query; set SKYREELS_"),
        ({"enhance_prompt": "http://a/?key=p"}, "http://a/?...: leave out user, password and query; set SKYREELS_"),
        ({"enhance_prompt": "http://a"}, "--enhancer_model: missing; give the model's name at the URL of"),
        (
            {"enhancer_model": "m"},
            "--enhancer_model: m: has no effect without --enhance_prompt; add that, with local or a URL",
        ),
        ({"enhance_prompt": "local", "enhancer_model": " "}, "--enhancer_model: an empty value: give a hub id"),
    ],
)
def test_usage_errors(flags, message):
    with pytest.raises(UserError) as error:
        request_of({"task_type": "t2v", "prompt": "a", **flags})
    assert message in str(error.value)


def test_a_bad_key_is_refused_and_not_shown(monkeypatch):
    monkeypatch.setenv("SKYREELS_ENHANCER_API_KEY", f"{KEY}\nX-Other: 1")
    with pytest.raises(UserError, match="SKYREELS_ENHANCER_API_KEY has spaces") as error:
        asking("http://127.0.0.1")
    assert KEY not in str(error.value)


@pytest.mark.parametrize(
    ("prompt", "kept"),
    [
        ("A fox walks. Snow falls; the dog's bowl is full", []),
        ("Then Anna and Jean-Luc go to New York, I think", ["Anna", "Jean-Luc", "New", "York"]),
        ("In the U.S. St. John meets J.R.R. Tolkien", ["U.S", "St", "John", "J.R.R", "Tolkien"]),
        (
            "O'Neill and O\u2019Hara drink. I'm here, it's Samuel L. Jackson",
            ["O'Neill", "O\u2019Hara", "Samuel", "Jackson"],
        ),
        ("Anna walks. Bob's dog barks. NASA builds. iPhone on a table", ["Anna", "Bob", "NASA", "iPhone"]),
        ("She walks. It's cold. Red roses bloom. Snow falls. Walking slowly, he says no. The end", []),
        ("\u00c9mile ist and \u00d8rsted say \u0418\u0432\u0430\u043d", ["\u00d8rsted", "\u0418\u0432\u0430\u043d"]),
        ("A FOX RUNS THROUGH DEEP SNOW", []),
        ("A Fox Runs Through the Deep Snow", []),
        ("Ein Fuchs l\u00e4uft durch den Schnee und das Eis", []),  # German capitalizes all nouns
        ("A POV shot of a TV", []),
        ("[ZOOM_IN_CUT] The sign says \u201cWelcome home\u201d and 'no entry'", ["Welcome home", "no entry"]),
        ('"Stop!" says Bob', ["Stop!", "Bob"]),
    ],
)
def test_what_has_to_survive(prompt, kept):
    assert [*to_keep(prompt)] == kept


@pytest.mark.parametrize(
    ("prompt", "answer", "lost"),
    [
        ("He meets J.R.R. Tolkien in the U.S.", "He meets J. R. R. Tolkien, a writer, in the US", ""),
        ("He goes with us to the U.S.", "He goes with us to the coast", "U.S"),
        ("With St. John and O\u2019Neill", "St John and O'Neill smile", ""),
        ("With Jos\u00e9 and Jean-Luc", "Jose\u0301 and Jean Luc smile", ""),
        ("A Roman in Autumn", "Two Romans in autumn", ""),
        ("A man meets Anna", "A man in Savannah meets Annabel", "Anna"),
        ("Anna walks", "She walks", "Anna"),
        ('A sign says "Don\u2019t stop"', "A sign says \u201cDon't stop\u201d", ""),
        ('A sign says "Stop"', 'A sign says "stop"', "Stop"),
    ],
)
def test_names_survive_in_other_spellings(prompt, answer, lost):
    request = asking("http://127.0.0.1", prompt, "t2v")
    with pytest.raises(EnhancerError, match=f"lacks {lost}$") if lost else nullcontext():
        read_answer(request, answer)


@pytest.mark.parametrize(
    ("given", "flags", "answer", "expected"),
    [
        ("The sail", {"transition": "auto"}, "[cut_in] The sail swells.", "[ZOOM_IN_CUT] {cut_in} The sail swells."),
        ("The sail", {"transition": "auto"}, "cut_away: A gull cries.", "{cut_away} A gull cries."),
        ("The sail", {"transition": "auto"}, "Wide view of it.", "[ZOOM_OUT_CUT] {cut_out} Wide view of it."),
        ("The sail", {"transition": "cut_in"}, "The sail swells.", "[ZOOM_IN_CUT] {cut_in} The sail swells."),
        ("[CUT_AWAY] A", {"transition": "auto"}, "[CUT_AWAY] A gull.", "[CUT_AWAY] A gull."),
        ("[CUT_AWAY] A", {}, "[CUT_AWAY]   A\n\x1b\ud83dgull.", "[CUT_AWAY] A gull."),
    ],
)
def test_transitions_of_answers(given, flags, answer, expected):
    request = asking("http://127.0.0.1", given, "shot_switching_extension", **flags)
    sentences = {name: transition.sentence for name, transition in transitions().items()}
    assert read_answer(request, answer)[0] == expected.format(**sentences)


def test_the_words_of_training_are_not_rewritten():
    request = asking("http://127.0.0.1", "FPS-24, A cat", "t2v")
    assert question_of(request, Inputs()).prompt == "A cat"
    assert read_answer(request, "A grey cat.")[0] == "FPS-24, A grey cat."
    with pytest.raises(EnhancerError, match="tags are not"):
        read_answer(request, "[A_TAG] A grey cat.")


def test_an_interrupted_run_keeps_its_prompt():
    """Runs are compared by the prompt that was given, not by the enhanced one."""
    asked = asking("http://127.0.0.1")
    begun = asked.with_prompt(BETTER)
    left = json.loads(RunRecord(Path("a.mp4"), begun.flags, given=begun.given).to_json())
    assert left["flags"]["prompt"] == BETTER and left["given"]["prompt"] == PROMPT
    RunRecord(Path("a.mp4"), asked.flags, given=asked.given, to_enhance=True).check_same(left)
    for other in (asking("http://127.0.0.1", "A dog"), asking("http://127.0.0.1", enhancer_model="another")):
        with pytest.raises(UserError, match="--resume: the interrupted run had other flags"):
            RunRecord(Path("a.mp4"), other.flags, given=other.given, to_enhance=True).check_same(left)
    plain = json.loads(RunRecord(Path("a.mp4"), asked.flags).to_json())  # the same prompt, but not enhanced
    with pytest.raises(UserError, match="enhance_prompt None -> remote"):
        RunRecord(Path("a.mp4"), asked.flags, given=asked.given, to_enhance=True).check_same(plain)


def test_a_video_from_elsewhere_does_not_say_who_gets_the_key(tmp_path):
    made = {"flags": {"prompt": PROMPT, "enhance_prompt": "http://127.0.0.1:1", "enhancer_model": "m"}}
    comment = PngInfo()
    comment.add_text("comment", json.dumps(made))
    noise((8, 8)).save(tmp_path / "a.png", pnginfo=comment)
    assert read_config_file(str(tmp_path / "a.png")) == {"prompt": PROMPT}


def test_jobs_with_another_transition_are_other_jobs():
    line = {"task_type": "shot_switching_extension", "prompt": "a"}
    assert identity_of(line) != identity_of(line | {"transition": "cut_in"})
    assert identity_of(line) != identity_of(line | {"enhance_prompt": "local"})


# A local model

ALPHABET = sorted(pre_tokenizers.ByteLevel.alphabet())
SPECIAL = ("<|im_end|>", "<|endoftext|>", "<|im_start|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>")
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% for c in m.content %}{% if c.type == 'image' %}"
    "<|vision_start|><|image_pad|><|vision_end|>{% else %}{{ c.text }}{% endif %}{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SAID = "Wind blows"  # no letter repeats, so each determines the next


@pytest.fixture(scope="module")
def qwen(tmp_path_factory) -> Path:
    """A small random Qwen3-VL, except for weights that make each token predict the next one of `SAID`."""
    folder = tmp_path_factory.mktemp("qwen")
    plain = Tokenizer(models.BPE({letter: number for number, letter in enumerate(ALPHABET)}, []))
    plain.pre_tokenizer, plain.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=plain, eos_token=SPECIAL[0], pad_token=SPECIAL[1], additional_special_tokens=list(SPECIAL[2:])
    )
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)
    pictures = {  # the published settings
        **{"size": {"longest_edge": 16777216, "shortest_edge": 4096}, "patch_size": 16, "merge_size": 2},
        **{"temporal_patch_size": 2, "image_mean": [0.5] * 3, "image_std": [0.5] * 3},
        **{"processor_class": "Qwen3VLProcessor", "image_processor_type": "Qwen2VLImageProcessorFast"},
    }
    (folder / "preprocessor_config.json").write_text(json.dumps(pictures))
    end, _, _, *vision = (tokenizer.convert_tokens_to_ids(token) for token in SPECIAL)
    names = ("vision_start_token_id", "vision_end_token_id", "image_token_id")
    rope = {"rope_type": "default", "mrope_section": [2, 3, 3], "mrope_interleaved": True, "rope_theta": 1e4}
    config = Qwen3VLConfig(
        text_config={
            **{"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2},
            **{"num_key_value_heads": 1, "head_dim": 16, "vocab_size": len(tokenizer), "rope_parameters": rope},
            **{"eos_token_id": end, "pad_token_id": end},
        },
        vision_config={
            **{"depth": 2, "hidden_size": 32, "intermediate_size": 64, "num_heads": 2, "out_hidden_size": 32},
            **{"patch_size": 16, "deepstack_visual_indexes": [0, 1], "num_position_embeddings": 16},
        },
        **dict(zip(names, vision, strict=True)),
    )
    with torch.random.fork_rng():
        torch.manual_seed(1)
        model = Qwen3VLForConditionalGeneration(config)
    chain = [*tokenizer(f"\n{SAID}").input_ids, end]
    with torch.no_grad():
        for layer in model.model.language_model.layers:
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
        embeddings, head = model.get_input_embeddings().weight, model.lm_head.weight
        head.zero_()
        for number, (token, following) in enumerate(pairwise(chain)):
            embeddings[token] = head[following] = torch.eye(32)[number]
    model.save_pretrained(folder)
    return folder


def test_a_model_on_this_machine(qwen, quick, monkeypatch):
    seen: list[list[list[int]]] = []
    original = Qwen3VLVisionModel.forward

    def forward(self: Any, pixels: torch.Tensor, grid_thw: torch.Tensor, **more: Any) -> Any:
        seen.append(grid_thw.tolist())
        return original(self, pixels, grid_thw, **more)

    monkeypatch.setattr(Qwen3VLVisionModel, "forward", forward)
    asked = asking("local", "wind", enhancer_model=str(qwen), device="cpu")
    inputs = Inputs(images=(noise((64, 96)), noise((128, 64))))
    assert enhance(asked, inputs).prompt == SAID
    assert seen == [[[1, 6, 4], [1, 4, 8]]]  # patches of 16 pixels
    assert enhance(asked, inputs).prompt == recall(asked, inputs).prompt == SAID
    assert len(seen) == 1  # the answer was cached


def test_an_endless_answer_and_models_that_are_none(qwen, quick, monkeypatch, tmp_path, caplog):
    monkeypatch.setattr(local, "MAX_TOKENS", 4)
    asked = asking("local", "wind", enhancer_model=str(qwen), device="cpu")
    assert enhance(asked, Inputs()).prompt == "wind"
    assert "--enhance_prompt: the answer does not end within 4 tokens" in caplog.text
    other = tmp_path / "other"
    other.mkdir()
    for file in qwen.iterdir():
        (other / file.name).write_bytes(file.read_bytes())
    config = json.loads((other / "config.json").read_text())
    own_code = {"auto_map": {"AutoConfig": "code.Config", "AutoModelForImageTextToText": "code.Model"}}
    (other / "code.py").write_text("raise SystemExit('code of the folder has run')")
    for change in ({"model_type": "unheard_of"} | own_code, {"model_type": "bert"}):
        (other / "config.json").write_text(json.dumps(config | change))
        with pytest.raises(
            UserError, match=r"--enhancer_model: .* is not a vision-language model that transformers can"
        ):
            enhance(asking("local", "wind", enhancer_model=str(other), device="cpu"), Inputs())


def test_files_that_are_fetched():
    assert {"config.json", "*.safetensors", "*.safetensors.index.json", "*.json", "*.jinja"} < {*ENHANCER.patterns}


# Whole runs


def test_runs_of_the_command(main, quick, interrupt, write_lossless, tmp_path, cache, monkeypatch):
    monkeypatch.setattr(remote, "TOTAL_SECONDS", 60.0)
    monkeypatch.setenv("SKYREELS_CACHE", str(cache))  # with the toys
    frames = np.random.default_rng(1).integers(0, 256, (12, 32, 48, 3), np.uint8)
    clip = write_lossless(tmp_path / "clip.mp4", frames)
    common = ("--model_id", "tiny", "--height", 32, "--width", 48, "--duration", 2, "--num_inference_steps", 2)
    command = ("--task_type", "shot_switching_extension", "--input_video", clip, *common, "--prompt", "The sail")
    expected = "[ZOOM_IN_CUT] The camera cuts in to a close shot. The white sail swells."
    with serving(reply(completion("[cut_in] The white sail swells."))) as endpoint:
        enhanced = ("--transition", "auto", "--enhance_prompt", endpoint.url, "--enhancer_model", "m")
        code, plan, stderr = main(*command, *enhanced, "--dry_run")
        assert code == 0 and not endpoint.asked, stderr
        assert "enhancer      m, remote: asked for a better prompt\nprompt        The sail\n" in plan
        interrupt(1)
        code, _, stderr = main(*command, *enhanced, "--output", "a.mp4", "--checkpoint_every", "0.001", "--no_cache")
        assert code == 130 and len(endpoint.asked) == 1, stderr
        interrupt(0)
        code, _, stderr = main(*command, *enhanced, "--output", "a.mp4", "--resume", "--no_cache")
        assert code == 0 and len(endpoint.asked) == 1, stderr
        code, _, stderr = main(*command, *enhanced, "--output", "b/")
        assert code == 0 and len(endpoint.asked) == 2, stderr
        code, _, stderr = main(*command, *enhanced, "--outdir", "two", "--video_num", 2, "--no_cache")
        assert code == 0 and len(endpoint.asked) == 3, stderr
        videos = (tmp_path / "results" / "two").glob("*.mp4")
        assert [json.loads(read_comment(each))["flags"]["prompt"] for each in videos] == [expected] * 2
        code, plan, _ = main(*command, *enhanced, "--dry_run")
        assert f"from an earlier run\nprompt        {expected}\ngiven prompt  The sail\n" in plan
    assert len(endpoint.asked) == 3
    *pictures, _ = endpoint.asked[0][2]["messages"][1]["content"]
    assert len(pictures) == 3
    comment = json.loads(read_comment(tmp_path / "a.mp4"))
    assert comment["flags"]["prompt"] == expected
    given = {"prompt": "The sail", "transition": "auto", "enhance_prompt": "remote", "enhancer_model": "m"}
    assert comment["given"] == given and endpoint.url not in json.dumps(comment)
    code, _, stderr = main("--config", "a.mp4", "--output", "b.mp4", "--no_cache")  # the endpoint is gone
    assert code == 0, stderr
    repeated = json.loads(read_comment(tmp_path / "b.mp4"))
    assert repeated["flags"] == comment["flags"] and "given" not in repeated
    for one, other in zip(read_frames(tmp_path / "a.mp4", 24), read_frames(tmp_path / "b.mp4", 24), strict=True):
        np.testing.assert_array_equal(one, other)
    code, plan, stderr = main(*command, "--transition", "cut_out", "--dry_run")
    assert "prompt        [ZOOM_OUT_CUT] The camera cuts out to a wide shot. The sail\n" in plan
