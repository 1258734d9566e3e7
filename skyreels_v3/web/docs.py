"""The page at /docs: the API in plain HTML, made from its OpenAPI description, without scripts or other hosts."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from html import escape
from typing import Any

from skyreels_v3.web.uploads import FORM

PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>{title}</title></head>
<body><h1>{title} {version}</h1>
<p>OpenAI's API for videos. Machine-readable: <a href="/openapi.json">openapi.json</a>.</p>
{operations}
<h2>Fields of a new video</h2>
<table><tr><th>field</th><th>type</th><th>meaning</th></tr>
{fields}
</table></body></html>
"""


def docs_page(description: Mapping[str, Any]) -> str:
    """HTML for an OpenAPI description."""
    info = description["info"]
    body = description["paths"]["/v1/videos"]["post"]["requestBody"]["content"][FORM]["schema"]
    fields = "\n".join(map(row, body["properties"].items()))
    operations = "\n".join(describe(description["paths"]))
    title, version = escape(info["title"]), escape(info["version"])
    return PAGE.format(title=title, version=version, operations=operations, fields=fields)


def describe(paths: Mapping[str, Any]) -> Iterator[str]:
    """A heading and a paragraph for each operation."""
    for path, methods in paths.items():
        for method, operation in methods.items():
            names = ", ".join(each["name"] for each in operation.get("parameters", ()) if each["in"] == "query")
            query = f" Query: {escape(names)}." if names else ""
            yield f"<h3><code>{method.upper()} {escape(path)}</code></h3>"
            yield f"<p>{escape(operation.get('description', ''))}{query}</p>"


def row(field: tuple[str, Mapping[str, Any]]) -> str:
    name, entry = field
    one = entry.get("items", entry)
    kind = "file" if one.get("format") == "binary" else one["type"]
    kind += ", several" if entry["type"] == "array" else ""
    return f"<tr><td><code>{escape(name)}</code></td><td>{kind}</td><td>{escape(one['description'])}</td></tr>"
