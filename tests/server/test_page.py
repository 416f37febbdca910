from __future__ import annotations

import re
from collections.abc import Iterator
from importlib.resources import files

import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient

from hadal.server.page import page_router

NAMES = sorted(file.name for file in files("hadal").joinpath("assets/page").iterdir())


@pytest.fixture(scope="module")
def client() -> Iterator[TestClient]:
    app = FastAPI()
    app.include_router(page_router())
    with TestClient(app) as it:
        yield it


def test_every_file_is_served_with_its_type_and_a_policy_without_exceptions(client: TestClient) -> None:
    kinds = {"html": "text/html", "css": "text/css", "js": "text/javascript", "svg": "image/svg+xml"}
    for name in NAMES:
        got = client.get("/" if name == "index.html" else f"/page/{name}")
        assert got.status_code == 200 and got.headers["content-type"].startswith(kinds[name.rpartition(".")[2]])
        policy = got.headers["content-security-policy"]
        assert (
            policy.startswith("default-src 'self';") and "unsafe" not in policy and "frame-ancestors 'none'" in policy
        )
        assert got.headers["x-content-type-options"] == "nosniff" and got.headers["referrer-policy"] == "no-referrer"


def test_a_file_that_did_not_change_is_not_sent_again(client: TestClient) -> None:
    first = client.get("/page/app.js")
    again = client.get("/page/app.js", headers={"If-None-Match": first.headers["etag"]})
    assert first.headers["cache-control"] == "no-cache" and again.status_code == 304 and not again.content
    head = client.head("/")
    assert head.status_code == 200 and not head.content


@pytest.mark.parametrize(
    "path", ["../../server/api.py", "..%2f..%2f__init__.py", "%2e%2e/nano/config.json", "index.html/", "none.js", ""]
)
def test_nothing_else_can_be_named(client: TestClient, path: str) -> None:
    assert client.get(f"/page/{path}").status_code == 404


def test_the_page_needs_nothing_from_elsewhere_and_makes_no_markup_from_text() -> None:
    folder = files("hadal").joinpath("assets/page")
    texts = {name: folder.joinpath(name).read_text("utf-8") for name in NAMES}
    named = set(re.findall(r'(?:src|href)="page/([\w.]+)"', texts["index.html"]))
    imported = {name for text in texts.values() for name in re.findall(r'from "\./([\w.]+)"', text)}
    assert named | imported | {"index.html"} == set(NAMES)
    for name, text in texts.items():
        foreign = re.findall(r"(?:https?:)?//[\w-]+\.[\w.-]+", text.replace("http://www.w3.org/2000/svg", ""))
        assert not foreign, name
        assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|eval\(|\bstyle=", text), name
        assert len(text.splitlines()) <= 400, name
