"""Folders that are sent as a zip: what is in them, and little of it in memory at any time."""

import asyncio
import io
import os
import tracemalloc
import zipfile
from pathlib import Path

import pytest
from starlette.requests import ClientDisconnect

from swlora.bounded_read import UnreadableError
from swlora.web import packed_folder
from swlora.web.packed_folder import PART_BYTES, PackedFolder

FILES = {"a.json": b"{}", "empty.txt": b"", "weights.bin": bytes(range(256)) * 1000}


def write(folder: Path, files: dict[str, bytes]) -> Path:
    folder.mkdir()
    for name, content in files.items():
        (folder / name).write_bytes(content)
    return folder


async def sent(response: PackedFolder, most_parts: int = 1_000_000) -> bytes:
    """What a client gets, who leaves after so many parts."""
    parts: list[bytes] = []

    async def receive():
        if len(parts) < most_parts:
            await asyncio.sleep(60)
        return {"type": "http.disconnect"}

    async def send(message):
        parts.append(message.get("body", b""))
        if len(parts) > most_parts:
            raise OSError("the client has left")

    await response({"type": "http", "asgi": {"spec_version": "2.4"}}, receive, send)
    return b"".join(parts)


def test_it_is_a_zip_of_the_regular_files(tmp_path):
    folder = write(tmp_path / "adapter", FILES)
    (folder / "link").symlink_to("/etc/passwd")
    (folder / "inner").mkdir()
    response = PackedFolder(folder, "mine.zip")
    packed = zipfile.ZipFile(io.BytesIO(asyncio.run(sent(response))))
    assert packed.testzip() is None
    assert {n: packed.read(n) for n in packed.namelist()} == {
        f"adapter/{name}": content for name, content in FILES.items()
    }
    assert response.headers["content-disposition"] == 'attachment; filename="mine.zip"'


@pytest.mark.parametrize(("written_s", "year"), [(0, 1980), (10**10, 2107)])
def test_a_time_that_a_zip_cannot_name_is_the_nearest(written_s, year, tmp_path):
    folder = write(tmp_path / "adapter", {"a.json": b"{}"})
    os.utime(folder / "a.json", (written_s, written_s))
    packed = zipfile.ZipFile(io.BytesIO(asyncio.run(sent(PackedFolder(folder, "mine.zip")))))
    assert packed.infolist()[0].date_time[0] == year


def test_its_name_may_hold_anything(tmp_path):
    folder = write(tmp_path / "adapter", {"a.json": b"{}"})
    said = PackedFolder(folder, 'ü"\r\n.zip').headers["content-disposition"]
    assert said == "attachment; filename*=utf-8''%C3%BC%22%0D%0A.zip"


def test_files_that_are_replaced_meanwhile_are_those_of_before(tmp_path):
    folder = write(tmp_path / "adapter", FILES)
    response = PackedFolder(folder, "mine.zip")
    folder.rename(tmp_path / "old")
    write(tmp_path / "adapter", {name: b"new" for name in FILES})
    packed = zipfile.ZipFile(io.BytesIO(asyncio.run(sent(response))))
    assert packed.read("adapter/weights.bin") == FILES["weights.bin"]


def test_many_who_take_a_large_one_take_little_memory(tmp_path):
    n_bytes = 200 * PART_BYTES
    folder = write(tmp_path / "adapter", {})
    with (folder / "weights.bin").open("wb") as file:
        file.truncate(n_bytes)
    responses = [PackedFolder(folder, "mine.zip") for _ in range(8)]
    n_sent = [0] * len(responses)
    tracemalloc.start()
    bodies = [response.body_iterator for response in responses]

    async def take() -> None:
        for _ in range(50):
            for i, body in enumerate(bodies):
                n_sent[i] += len(await anext(body))

    try:
        asyncio.run(take())
        _, peak_bytes = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
        for response in responses:
            response._opened.close()
    assert min(n_sent) >= 49 * PART_BYTES
    assert peak_bytes < 4 * PART_BYTES * len(responses) < n_bytes


def test_the_files_are_closed_when_the_client_leaves(tmp_path):
    folder = write(tmp_path / "adapter", {"weights.bin": bytes(5 * PART_BYTES)})
    response = PackedFolder(folder, "mine.zip")
    files = [file for _, file in response.files]
    with pytest.raises(ClientDisconnect):
        asyncio.run(sent(response, most_parts=2))
    assert all(file.closed for file in files)


@pytest.mark.parametrize("n_files", [0, 3])
def test_a_folder_without_files_or_with_too_many_is_refused(n_files, tmp_path, monkeypatch):
    monkeypatch.setattr(packed_folder, "MAX_FILES", 2)
    folder = write(tmp_path / "adapter", {f"{n}.bin": b"" for n in range(n_files)})
    with pytest.raises(UnreadableError, match=f"it holds {n_files} files"):
        PackedFolder(folder, "mine.zip")
    with pytest.raises(UnreadableError, match="No such file"):
        PackedFolder(tmp_path / "gone", "mine.zip")
