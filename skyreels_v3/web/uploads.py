"""Reads untrusted request bodies: fields, and files that are streamed to the job's folder under generated names.

A body that is too large, too slow, incomplete or malformed raises ApiError; the caller then removes the folder.
"""

from __future__ import annotations

import asyncio
import base64
import binascii
import os
import re
import time
from collections.abc import AsyncIterator, Callable
from contextlib import suppress
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import IO, Any

from python_multipart import MultipartParser
from python_multipart.exceptions import FormParserError
from python_multipart.multipart import parse_options_header
from starlette.concurrency import run_in_threadpool
from starlette.requests import ClientDisconnect, Request

from skyreels_v3.config_text import read_json_text
from skyreels_v3.errors import UserError, format_value
from skyreels_v3.inputs import input_errors
from skyreels_v3.media.audio import probe_audio
from skyreels_v3.media.files import MAX_IMAGE_BYTES, MAX_VIDEO_BYTES, giga
from skyreels_v3.media.image import open_image
from skyreels_v3.media.video_reader import probe_video
from skyreels_v3.web.errors import ApiError
from skyreels_v3.web.settings import Limits

FORM, JSON = "multipart/form-data", "application/json"
NESTED = re.compile(r"([^\[\]]+)\[([^\[\]]*)\]")  # form fields a[b] and a[]
SUFFIX = re.compile(r"\.[A-Za-z0-9]{1,5}")
DATA_URL = re.compile(r"data:[\w.+-]*/?[\w.+-]*(;[\w.+-]+=[\w.+-]+)*;base64,", re.IGNORECASE)
DRAIN_SECONDS, QUIET_SECONDS = 3.0, 0.2
PROBE_FPS = 24  # any value works: a clip's length is checked later, against the task


@dataclass(frozen=True)
class Upload:
    """A file from a client.

    Attributes:
        name: the client's name for it, used only for messages and `suffix`.
    """

    path: Path
    name: str

    @property
    def suffix(self) -> str:
        """The suffix of the client's name if it is a plain one, else ""; decoders look at the content."""
        suffix = os.path.splitext(self.name)[1].lower()
        return suffix if SUFFIX.fullmatch(suffix) else ""


Fields = dict[str, Any]  # strings, uploads, and lists and dicts of them; from JSON any values


async def read_fields(request: Request, folder: Path, limits: Limits) -> Fields:
    """Read the fields of a JSON or form body; its files go to `folder`.

    Raises:
        ApiError: 400, 408, 413 or 415.
    """
    try:
        return await read_body(request, folder, limits)
    except ApiError as error:
        if error.status == 413:
            await drain(request)
        raise


async def drain(request: Request) -> None:
    """Keep reading for a while: a client still sending would lose the connection before it sees the response."""
    with suppress(TimeoutError):
        async with asyncio.timeout(DRAIN_SECONDS):
            more = True
            while more:
                async with asyncio.timeout(QUIET_SECONDS):
                    more = (await request.receive()).get("more_body", False)


async def read_body(request: Request, folder: Path, limits: Limits) -> Fields:
    kind, options = parse_options_header(request.headers.get("content-type"))
    form = kind.decode("latin-1").lower() == FORM
    if not form and kind.decode("latin-1").lower() != JSON:
        raise ApiError(415, f"Content-Type is not {JSON} or {FORM}; send one of them")
    most = limits.body_bytes if form else limits.json_bytes
    announced = request.headers.get("content-length", "")
    if announced.isdecimal() and int(announced[:20]) > most:
        raise too_large("the body", most)
    body = chunks(request, most, limits)
    try:
        return await (read_form(body, options.get(b"boundary", b""), folder, limits) if form else read_json(body))
    except (FormParserError, UnicodeError, ValueError, RecursionError) as error:  # RecursionError: deep nesting
        raise ApiError(400, f"the body is not valid {FORM if form else JSON} ({format_value(error)})") from error
    except ClientDisconnect as error:
        raise ApiError(400, "the body was cut off") from error


async def chunks(request: Request, most: int, limits: Limits) -> AsyncIterator[bytes]:
    """Yield the body as it arrives; raises ApiError beyond the limits."""
    stream, start, size = request.stream(), time.monotonic(), 0
    while True:
        try:
            async with asyncio.timeout(limits.stall_seconds):
                chunk = await anext(stream)
        except StopAsyncIteration:
            return
        except TimeoutError:
            raise ApiError(408, f"no data for {limits.stall_seconds:g} s", headers=CLOSE) from None
        size += len(chunk)
        seconds = time.monotonic() - start
        if size > most:
            raise too_large("the body", most)
        if seconds > limits.body_seconds or (seconds > limits.stall_seconds and size < seconds * limits.slowest):
            raise ApiError(408, "the body arrives too slowly", headers=CLOSE)
        yield chunk


CLOSE = {"Connection": "close"}


def too_large(what: str, most: int, param: str | None = None) -> ApiError:
    return ApiError(413, f"{what} is larger than {giga(most)}; send less", param, headers=CLOSE)


async def read_json(body: AsyncIterator[bytes]) -> Fields:
    text = b"".join([chunk async for chunk in body])
    content = await run_in_threadpool(read_json_text, text)
    if not isinstance(content, dict):
        raise ValueError("not an object")
    return content


async def read_form(body: AsyncIterator[bytes], boundary: bytes, folder: Path, limits: Limits) -> Fields:
    if not boundary:
        raise ValueError("no boundary")
    form = FormReader(folder, limits)
    parser = MultipartParser(boundary, form.callbacks)
    try:
        async for chunk in body:
            await run_in_threadpool(parser.write, chunk)
        parser.finalize()
        if not form.ended:
            raise ValueError("it ends too early")
    finally:
        form.close()
    return form.fields


class FormReader:
    """Collects fields and files from a form parser's callbacks."""

    def __init__(self, folder: Path, limits: Limits) -> None:
        self.folder, self.limits = folder, limits
        self.fields: Fields = {}
        self.ended, self.parts = False, 0
        self.headers: dict[bytes, bytes] = {}
        self.header, self.value = b"", b""
        self.name, self.text = "", bytearray()
        self.file: IO[bytes] | None = None
        self.upload: Upload | None = None
        self.size = 0

    @property
    def callbacks(self) -> Any:
        names = ("part_begin", "header_end", "headers_finished", "part_end", "end")
        data = ("header_field", "header_value", "part_data")

        def on_data(name: str) -> Callable[[bytes, int, int], None]:
            return lambda content, start, end: getattr(self, name)(content[start:end])

        return {f"on_{name}": getattr(self, name) for name in names} | {f"on_{name}": on_data(name) for name in data}

    def part_begin(self) -> None:
        self.parts += 1
        if self.parts > self.limits.parts:
            raise ApiError(413, f"more than {self.limits.parts} fields and files; send fewer")
        self.headers, self.text, self.size = {}, bytearray(), 0

    def header_field(self, content: bytes) -> None:
        self.header += content

    def header_value(self, content: bytes) -> None:
        self.value += content

    def header_end(self) -> None:
        self.headers[self.header.lower()] = self.value
        self.header = self.value = b""

    def headers_finished(self) -> None:
        _, options = parse_options_header(self.headers.get(b"content-disposition"))
        self.name = options.get(b"name", b"").decode()
        if not self.name:
            raise ValueError("a part has no name")
        if b"filename" in options:
            name = options[b"filename"].decode(errors="replace").replace("\\", "/").rpartition("/")[2]
            self.upload = Upload(self.folder / f"upload-{self.parts}", name)
            self.file = self.upload.path.open("xb")

    def part_data(self, content: bytes) -> None:
        self.size += len(content)
        most = self.limits.field_bytes if self.file is None else self.limits.file_bytes
        if self.size > most:
            raise too_large(format_value(self.name), most, self.name)
        if self.file is None:
            self.text += content
        else:
            self.file.write(content)

    def part_end(self) -> None:
        upload = self.upload
        self.close()
        if upload is None:
            add(self.fields, self.name, self.text.decode())
        elif upload.name or self.size:
            add(self.fields, self.name, upload)
        else:  # a web page's file input without a file
            upload.path.unlink()

    def end(self) -> None:
        self.ended = True

    def close(self) -> None:
        if self.file is not None:
            self.file.close()
        self.file = self.upload = None


def add(fields: Fields, name: str, value: str | Upload) -> None:
    """Add a form field: `a[b]` is an entry of a dict; `a[]` and a repeated name are entries of a list."""
    nested = NESTED.fullmatch(name)
    if nested is not None and nested[2]:
        inner = fields.setdefault(nested[1], {})
        if not isinstance(inner, dict):
            raise ValueError(f"{format_value(nested[1])} is given in two ways")
        add(inner, nested[2], value)
        return
    name, many = (nested[1], True) if nested is not None else (name, name in fields)
    before = fields.get(name, [])
    if isinstance(before, dict):
        raise ValueError(f"{format_value(name)} is given in two ways")
    fields[name] = [*(before if isinstance(before, list) else [before]), value] if many else value


def decode_data_url(url: str, folder: Path, param: str, limits: Limits) -> Upload:
    """Save the file in a base64 data URL to `folder`."""
    begin = DATA_URL.match(url)
    try:
        if begin is None:
            raise ValueError
        content = base64.b64decode(url[begin.end() :], validate=True)
    except (ValueError, binascii.Error):
        raise ApiError(400, f"{param}: not a data URL in base64; send data:image/png;base64,...", param) from None
    if len(content) > limits.file_bytes:
        raise too_large(param, limits.file_bytes, param)
    path = next(path for number in count() if not (path := folder / f"data-{number}").exists())
    path.write_bytes(content)
    return Upload(path, "data")


IMAGES, SOUNDS = ("image", "input_image", "ref_imgs", "keyframes"), ("input_audio",)


def max_bytes(flag: str) -> int:
    """The maximum size of a flag's file."""
    return MAX_IMAGE_BYTES if flag in IMAGES else MAX_VIDEO_BYTES


def check_kind(flag: str, path: Path, name: str) -> None:
    """Check from its content that a file is of the kind that a flag takes.

    Raises:
        UserError: it is not, or it is empty or damaged.
    """
    if not path.stat().st_size:
        raise UserError(f"--{flag}", f"{format_value(name)} is empty (0 bytes); give a complete file")
    with input_errors(name, f"--{flag}"):
        if flag in IMAGES:
            open_image(path)
        elif flag in SOUNDS:
            probe_audio(path)
        else:
            probe_video(path, PROBE_FPS)
