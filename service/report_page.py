"""The before/after report as a page: one HTML document without scripts or anything to load."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup
from starlette.responses import HTMLResponse

from service.report_view import view_report

_PAGES = Path(__file__).with_name("pages")
_TEMPLATES = Environment(
    loader=FileSystemLoader(_PAGES),
    autoescape=True,
    undefined=StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
)
_CSS = (_PAGES / "report.css").read_text(encoding="utf-8")
_CSS_SHA256 = base64.b64encode(hashlib.sha256(_CSS.encode("utf-8")).digest()).decode("ascii")
_HEADERS: Final = {
    # The texts are of users and models: nothing in them may load, run or be sent anywhere.
    "Content-Security-Policy": f"default-src 'none'; style-src 'sha256-{_CSS_SHA256}';"
    " base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "Cache-Control": "no-store",
    "Vary": "Accept",
}


def wants_page(accept: str | None) -> bool:
    """Tell whether an Accept header asks for HTML rather than JSON, as browsers do."""
    lowered = (accept or "").lower()
    return "text/html" in lowered and "application/json" not in lowered


def report_page(job: Mapping[str, Any], report: Mapping[str, Any]) -> HTMLResponse:
    """Return the page.

    Args:
        job: As `GET /jobs/{id}` answers.
        report: As `GET /jobs/{id}/report` answers.
    """
    template = _TEMPLATES.get_template("report.html")
    # The style is ours and must stay as it was hashed.
    html = template.render(page=view_report(job, report), css=Markup(_CSS))
    return HTMLResponse(html, headers=dict(_HEADERS))
