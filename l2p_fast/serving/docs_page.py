"""The API as a page of plain HTML, which loads nothing from elsewhere."""

from __future__ import annotations

import json
from html import escape
from typing import Any

_HEAD = """<!doctype html><html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>l2p_fast: the API</title><style>
:root { color-scheme: light dark } body { font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto;
padding: 0 1rem } table { border-collapse: collapse; width: 100% } td { border-top: 1px solid #8886;
padding: .3rem .6rem .3rem 0; vertical-align: top } code { overflow-wrap: anywhere }</style>
<h1>l2p_fast</h1><p>OpenAI's API of images. The same for programs: <a href="openapi.json">openapi.json</a>.</p>
"""


def docs_page(api: dict[str, Any]) -> str:
    """HTML of an OpenAPI document: each operation and the fields of its body."""
    parts = [_HEAD]
    for path, operations in api["paths"].items():
        for method, operation in operations.items():
            words = escape(operation.get("description") or operation["summary"])
            parts.append(f"<h2><code>{method.upper()} {escape(path)}</code></h2><p>{words}</p>")
            for kind, body in operation.get("requestBody", {}).get("content", {}).items():
                parts.append(f"<p>Body: <code>{escape(kind)}</code></p>{_fields(api, body['schema'])}")
    return "".join(parts)


def _fields(api: dict[str, Any], schema: dict[str, Any]) -> str:
    if "$ref" in schema:
        schema = api["components"]["schemas"][schema["$ref"].rpartition("/")[2]]
    rows = []
    for name, field in schema["properties"].items():
        kinds = [part for part in field.get("anyOf", [field]) if part.get("type") != "null"]
        kind = ", ".join(
            " or ".join(map(json.dumps, part["enum"])) if "enum" in part else part.get("type", "one value")
            for part in kinds
        )
        default = f"; default <code>{escape(json.dumps(field['default']))}</code>" if field.get("default") else ""
        wanted = "; required" if name in schema.get("required", ()) else ""
        words = escape(field.get("description", ""))
        rows.append(f"<tr><td><code>{escape(name)}</code><td>{escape(kind)}{wanted}{default}<td>{words}</tr>")
    return f"<table>{''.join(rows)}</table>"
