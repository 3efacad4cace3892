"""Style sheet, scripts and pictures: read once, served by name and by nothing else."""

import hashlib
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from fastapi import APIRouter, Request
from starlette.responses import Response

from swlora.web.problems import ApiError

FOLDER = Path(__file__).parents[1] / "static"
TYPES = {".css": "text/css", ".js": "text/javascript", ".svg": "image/svg+xml"}
# What is asked for by its version never changes; scripts that others import have none.
FOREVER, ASK_AGAIN = "public, max-age=31536000, immutable", "no-cache"

router = APIRouter(include_in_schema=False)


@dataclass(frozen=True)
class Asset:
    """A file as it is sent."""

    content: bytes
    media_type: str
    version: str


@cache
def assets() -> dict[str, Asset]:
    """Return all files by name."""
    return {
        path.relative_to(FOLDER).as_posix(): Asset(
            content := path.read_bytes(),
            TYPES[path.suffix],
            hashlib.sha256(content).hexdigest()[:16],
        )
        for path in FOLDER.rglob("*")
        if path.suffix in TYPES
    }


def asset_url(name: str) -> str:
    """Return the address of a file, which changes with its content."""
    return f"/static/{name}?v={assets()[name].version}"


@router.api_route("/static/{name:path}", methods=["GET", "HEAD"])
def static(request: Request, name: str) -> Response:
    """Send a file, or say that the browser has it already."""
    asset = assets().get(name)
    if asset is None:
        raise ApiError(404, "there is no such file")
    tag = f'"{asset.version}"'
    is_versioned = request.query_params.get("v") == asset.version
    headers = {"etag": tag, "cache-control": FOREVER if is_versioned else ASK_AGAIN}
    if request.headers.get("if-none-match") == tag:
        return Response(status_code=304, headers=headers)
    return Response(asset.content, headers=headers, media_type=asset.media_type)
