"""The HTTP API over loopback: what it answers, what it refuses and how, and what it does when it has too much to do."""

import asyncio
import json
import socket
import threading
import time

import httpx
import pytest

from speeder.model.choice import Choice
from speeder.model.explain import explain
from speeder.serving.http.engine import Engine, RecommendJob
from speeder.serving.http.limits import Limits
from tests.serving.http.worlds import MARKUP, TITLES, listening, served_model

LIMITS = Limits(
    max_history=20, max_k=15, max_explained=3, max_query=40, max_results=6, max_body_bytes=2000, max_filter=30
)
SOON = 120  # seconds; the machine may be busy


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    model = served_model(tmp_path_factory.mktemp("pictures"))
    genres = [("Drama", "Comedy", None)[row % 3] for row in range(len(model.catalogue))]
    model.set_catalogue(model.catalogue.with_columns({"genre": genres}))
    model.set_item_counts([[7, 7, 7, 2], [2, 9]])
    return model


@pytest.fixture(scope="module")
def client(model):
    with (
        listening(model, LIMITS, name="films") as address,
        httpx.Client(base_url=address, timeout=SOON) as client,
    ):
        yield client


@pytest.fixture
def held(monkeypatch):
    """The real engine, which works only while the event is set."""
    free, recommend = threading.Event(), Engine.recommend
    free.entered = threading.Event()

    def wait_and_recommend(self, jobs):
        free.entered.set()
        assert free.wait(SOON)
        return recommend(self, jobs)

    monkeypatch.setattr(Engine, "recommend", wait_and_recommend)
    return free


def problems(response, status):
    assert response.status_code == status, response.text
    return {error["field"]: (error["expected"], error["got"]) for error in response.json()["errors"]}


def metric(client, name):
    for line in client.get("/metrics").text.splitlines():
        if line.startswith(name + " "):
            return float(line.rsplit(" ", 1)[1])
    return 0.0


# ---- answers ----------------------------------------------------------------------------------------------


def test_recommendations_are_the_models(client, model):
    history = ["i1", "i2", "a/b?c=1 d"]
    body = client.post("/v1/recommend", json={"history": history, "k": 5}).json()
    expected = model.recommend([history], 5)[0]
    assert [item["id"] for item in body["items"]] == [item.id for item in expected]
    assert [item["score"] for item in body["items"]] == pytest.approx([e.score for e in expected], abs=1e-4)
    assert [item["id"] for item in body["history"]] == history and body["read"] == 3
    seen = client.post("/v1/recommend", json={"history": history, "k": 15, "exclude_seen": False}).json()[
        "items"
    ]
    assert [item["id"] for item in seen] == [
        r.id for r in model.recommend([history], 15, exclude_seen=False)[0]
    ]


def test_a_history_may_be_titles_and_longer_than_what_is_read(client):
    by_title = client.post("/v1/recommend", json={"titles": ["star wars", "Usual Suspects"], "k": 3}).json()
    by_id = client.post("/v1/recommend", json={"history": ["i1", "i3"], "k": 3}).json()
    assert [item["id"] for item in by_title["items"]] == [item["id"] for item in by_id["items"]]
    long = client.post("/v1/recommend", json={"history": ["i1", "i2"] * 10, "k": 3}).json()
    assert len(long["history"]) == 20 and long["read"] == 8


def test_lists_columns_and_unknown_ids_are_the_models(client, model):
    history = ["i1", "i2"]
    for asked in (
        {"allow": ["i3", "i5", "i9", "i1", "i12"]},
        {"deny": ["i3", "i5"]},
        {"where": {"genre": ["Drama", "none"]}},
        {"allow": ["i3", "i5", "i6", "i9", "i12", "i0"], "deny": ["i9"], "where": {"genre": ["Drama"]}},
    ):
        body = client.post("/v1/recommend", json={"history": history, "k": 3, **asked}).json()
        expected = model.recommend([history], 3, **asked)[0]
        assert [item["id"] for item in body["items"]] == [item.id for item in expected]
        assert body["skipped"] == [] and body["fallback"] is None
    asked = {"history": ["zz", *history], "deny": ["yy", "i3"], "unknown": "skip", "k": 3}
    body = client.post("/v1/recommend", json=asked).json()
    expected = model.recommend([history], 3, deny=["i3"])[0]
    assert [item["id"] for item in body["items"]] == [item.id for item in expected]
    assert body["skipped"] == ["zz", "yy"] and [item["id"] for item in body["history"]] == history
    body = client.post("/v1/recommend", json={"titles": ["star wars", "Gone"], "unknown": "skip"}).json()
    assert body["skipped"] == ["Gone"] and body["read"] == 1


def test_new_users_get_what_is_popular(client):
    for asked in (
        {"history": []},
        {"history": ["zz"], "unknown": "skip"},
        {"titles": ["Gone"], "unknown": "skip"},
    ):
        body = client.post("/v1/recommend", json={"k": 4, "fallback": "popularity", **asked}).json()
        assert [item["id"] for item in body["items"]] == ["i7", "i2", "i9", "i0"]
        assert [item["score"] for item in body["items"]] == [3, 2, 1, 0]
        assert body["fallback"] == "popularity" and body["read"] == 0
    body = client.post("/v1/recommend", json={"history": ["i1"], "k": 4, "fallback": "popularity"}).json()
    assert body["fallback"] is None and body["read"] == 1


def test_requests_of_all_kinds_share_a_batch(model):
    everything = RecommendJob((1, 2), 5, True)
    chosen = RecommendJob((3,), 2, False, Choice.of(model.catalogue, allow=[3, 5, 6]))
    new = RecommendJob((), 3, True, Choice.of(model.catalogue, deny=[7]))
    small = RecommendJob((4,), 1, True)
    found = Engine(model).recommend([everything, new, chosen, small])
    assert [[item.item for item in row] for row in found] == [
        [item.item for item in model.recommend([[1, 2]], 5)[0]],
        [2, 9, 0],
        [item.item for item in model.recommend([[3]], 2, exclude_seen=False, allow=[3, 5, 6])[0]],
        [item.item for item in model.recommend([[4]], 1)[0]],
    ]


def test_a_recommender_without_counts_has_no_fallback():
    with listening(served_model()) as address, httpx.Client(base_url=address, timeout=SOON) as client:
        answer = client.post("/v1/recommend", json={"history": [], "fallback": "popularity"})
        assert "no training counts" in problems(answer, 422)["fallback"][0]


def test_explanations_are_the_librarys(client, model):
    history, items = ["i1", "i2", "i9"], ["i5", "i7"]
    found = client.post("/v1/explain", json={"history": history, "items": items}).json()["items"]
    for got, expected in zip(found, explain(model, history, items), strict=True):
        assert (got["id"], got["title"]) == (expected.id, expected.title)
        assert got["score"] == pytest.approx(expected.score, abs=1e-4)
        assert got["gates"] == pytest.approx(expected.gates, abs=1e-5)
        assert [effect["id"] for effect in got["history"]] == history
        changes = [effect.change for effect in expected.history]
        assert [effect["change"] for effect in got["history"]] == pytest.approx(changes, abs=1e-4)


def test_search_and_pictures(client):
    found = client.get("/v1/items", params={"q": "star"}).json()["items"]
    assert [item["title"] for item in found] == ["Star Wars (1977)", "Star Trek: First Contact (1996)"]
    assert client.get("/v1/items", params={"q": "bold"}).json()["items"][0]["title"] == MARKUP
    pictures = client.get("/v1/items", params={"q": "toy"}).json()["items"][0]["picture"]
    answer = client.get("/" + pictures)
    assert answer.headers["content-type"] == "image/jpeg" and answer.content[:3] == b"\xff\xd8\xff"
    assert found[0]["picture"] is None and "item" in problems(client.get("/v1/pictures/i1"), 404)


def test_the_server_tells_of_itself(client):
    about = client.get("/v1/model").json()
    assert (about["name"], about["items"], about["reads"]) == ("films", len(TITLES), 8)
    assert about["modalities"] == ["collaborative", "image", "text", "item"] and about["pictures"]
    assert client.get("/healthz").json() == {"status": "ok"}
    assert client.head("/healthz").status_code == client.head("/readyz").status_code == 200
    assert client.get("/readyz").json() == {"status": "ready"}


def test_nothing_on_the_pages_comes_from_elsewhere(client):
    """The page, the API's description and Swagger UI: every file is this server's."""
    for page in ("/", "/docs"):
        answer = client.get(page)
        assert "default-src 'none'" in answer.headers["content-security-policy"]
        assert answer.headers["x-content-type-options"] == "nosniff" and "server" not in answer.headers
        assert "//" not in answer.text.replace("<!doctype", "")
    for path in ("static/app.js", "static/style.css", "static/swagger/swagger-ui-bundle.js", "openapi.json"):
        assert client.get("/" + path).status_code == 200
    assert client.get("/static/../app.py").status_code == 404
    assert client.get("/static/%2e%2e/app.py").status_code == 404


def test_openapi_states_the_bounds(client):
    schema = client.get("/openapi.json").json()
    assert {"/v1/recommend", "/v1/explain", "/v1/items", "/healthz", "/readyz", "/metrics"} <= set(
        schema["paths"]
    )
    fields = schema["components"]["schemas"]["RecommendRequest"]["properties"]
    assert fields["k"]["maximum"] == 15
    assert fields["history"]["anyOf"][0]["maxItems"] == 20 and fields["deny"]["anyOf"][0]["maxItems"] == 30
    explained = schema["components"]["schemas"]["ExplainRequest"]["properties"]
    assert {"maxItems": 20, "minItems": 1}.items() <= explained["history"]["anyOf"][0].items()


# ---- refusals ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("body", "field", "expected", "got"),
    [
        ({"history": ["i1"], "k": 16}, "k", "less than or equal to 15", "16"),
        ({"history": ["i1"], "k": 0}, "k", "greater than or equal to 1", "0"),
        ({"history": ["i1"], "k": "many"}, "k", "a valid integer", "many"),
        ({"history": ["i1"], "k": "5"}, "k", "a valid integer", "5"),
        ({"history": ["i1"], "k": 5.0}, "k", "a valid integer", "5.0"),
        ({"history": ["i1"], "k": True}, "k", "a valid integer", "True"),
        ({"history": ["i1"], "exclude_seen": "no"}, "exclude_seen", "a valid boolean", "no"),
        ({"history": ["i1"], "exclude_seen": 0}, "exclude_seen", "a valid boolean", "0"),
        ({"history": [True]}, "history.0", "a valid string", "True"),
        ({"history": [1.9]}, "history.0", "a valid string", "1.9"),
        ({"history": ["i1"] * 21}, "history", "at most 20 entries", "21 entries"),
        ({"history": []}, "history", "at least 1 entries", "0 entries"),
        ({"history": ["i1", "zz"]}, "history.1", "the id of an item", "zz"),
        ({"history": ["x" * 600]}, "history.0", "at most 512 characters", "600 characters"),
        ({"history": [1]}, "history.0", "a valid string", "1"),
        ({"history": "i1"}, "history", "a valid list", "i1"),
        ({"history": ["i1"], "titles": ["Heat"]}, "body", "exactly one of history and titles", "{"),
        ({"k": 3}, "body", "exactly one of history and titles", "{"),
        ({"history": ["i1"], "allow": []}, "allow", "at least 1 entries", "0 entries"),
        ({"history": ["i1"], "allow": ["i2", "zz"]}, "allow.1", "the id of an item", "zz"),
        ({"history": ["i1"], "allow": ["i2", "i3"], "k": 3}, "k", "at most 2", "3"),
        ({"history": ["i1"], "deny": ["zz"]}, "deny.0", "the id of an item", "zz"),
        ({"history": ["i1"], "deny": ["i2"] * 31}, "deny", "at most 30 entries", "31 entries"),
        ({"history": ["i1"], "where": {"colour": ["red"]}}, "where.colour", "the catalogue (genre)", "colour"),
        ({"history": ["i1"], "where": {"genre": "Drama"}}, "where.genre", "a valid list", "Drama"),
        ({"history": ["i1"], "unknown": "ignore"}, "unknown", "'error' or 'skip'", "ignore"),
        ({"history": ["i1"], "fallback": "content"}, "fallback", "'popularity'", "content"),
        ({"history": ["zz"], "unknown": "skip"}, "history", "at least 1 entries", "1 unknown"),
        ({"history": [], "fallback": "popularity", "allow": ["i2"], "k": 2}, "k", "at most 1", "2"),
        ({"history": ["i1"], "kk": 3}, "kk", "no such field", "3"),
        ({"titles": ["Heat", "Gone"]}, "titles.1", "the title of an item", "Gone"),
        ({"titles": ["Heat"] * 21}, "titles", "at most 20 entries", "21 entries"),
        ({"titles": ["Star"]}, "titles.0", "one item, not of 2: Star Wars (1977) (i1); Star Trek", "Star"),
        ({"history": [f"i{n}" for n in (0, 1, 2, 3, *range(5, 20))], "k": 15}, "k", "at most 5", "15"),
    ],
)  # fmt: skip
def test_mistakes_name_the_field_what_was_expected_and_what_came(client, body, field, expected, got):
    found = problems(client.post("/v1/recommend", json=body), 422)
    assert list(found) == [field] and expected in found[field][0] and found[field][1].startswith(got)


def test_other_mistakes(client):
    post = client.post
    assert "body" in problems(
        post("/v1/recommend", content=b"{", headers={"content-type": "application/json"}), 422
    )
    assert (
        problems(post("/v1/explain", json={"history": ["i1"], "items": ["i2"] * 4}), 422)["items"][1]
        == "4 entries"
    )
    assert problems(post("/v1/explain", json={"history": ["i1"], "items": ["zz"]}), 422)["items.0"][1] == "zz"
    assert problems(post("/v1/explain", json={"history": ["i1"]}), 422)["items"] == ("a value", "nothing")
    assert "q" in problems(client.get("/v1/items"), 422)
    assert problems(client.get("/v1/items", params={"q": "x" * 41}), 422)["q"][1] == "41 characters"
    assert "limit" in problems(client.get("/v1/items", params={"q": "x", "limit": 7}), 422)
    assert problems(client.get("/v1/pictures/zz"), 404)["item"][1] == "zz"
    assert "path" in problems(client.get("/nowhere"), 404)
    assert "path" in problems(client.get("/v1/recommend"), 405)


@pytest.mark.parametrize(
    ("body", "status", "field", "expected", "got"),
    [
        (b"{", 422, "body", "JSON", "something else (Expecting"),
        (b"[" * 1500, 400, "body", "JSON", "something that is not JSON"),
        (rb'{"history": ["\ud800"]}', 422, "history.0", "a valid string", "?"),
        (rb'{"titles": ["\ud800"]}', 422, "titles.0", "a valid string", "?"),
        (rb'{"history": ["i1"], "\ud800": 1}', 422, "body", "a valid string", "?"),
        (b'{"history": ["i1"], "k": NaN}', 422, "k", "a valid integer", "nan"),
    ],
)  # fmt: skip
def test_bodies_that_are_hardly_json_are_the_clients_mistake(client, body, status, field, expected, got):
    headers = {"content-type": "application/json"}
    found = problems(client.post("/v1/recommend", content=body, headers=headers), status)
    assert list(found) == [field] and expected in found[field][0] and found[field][1].startswith(got)


@pytest.mark.parametrize(
    "kind", [None, "application/x-www-form-urlencoded", "text/plain", "application/jsonp"]
)
@pytest.mark.parametrize("body", [b'{"history": ["i1"], "k": 1}', b"{", b"history=i1"])
def test_a_body_without_the_header_of_json_is_told_so(client, kind, body):
    """As `curl -d` sends it."""
    answer = client.post("/v1/recommend", content=body, headers={"content-type": kind} if kind else {})
    found = problems(answer, 422)
    assert found == {"content-type header": ("application/json", kind or "no such header")}
    for kind in ("application/json; charset=utf-8", "Application/JSON", "application/vnd.shop+json"):
        sound = client.post(
            "/v1/recommend", content=b'{"history": ["i1"], "k": 1}', headers={"content-type": kind}
        )
        assert sound.status_code == 200
    wrong = client.post("/v1/recommend", content=b'"text"', headers={"content-type": "application/json"})
    assert list(problems(wrong, 422)) == ["body"]


def test_bodies_have_a_bound_whether_their_length_is_told_or_not(client):
    large = json.dumps({"history": ["i1"], "k": 1, "x": "y" * 3000}).encode()
    headers = {"content-type": "application/json"}
    told = client.post("/v1/recommend", content=large, headers=headers)
    assert problems(told, 413)["body"] == ("at most 2000 bytes", f"{len(large)} bytes")
    untold = client.post("/v1/recommend", content=iter([large[:1000], large[1000:]]), headers=headers)
    assert "more than 2000 bytes" in problems(untold, 413)["body"][1]
    assert client.post("/v1/recommend", json={"history": ["i1"], "k": 1}).status_code == 200


# ---- under strain -----------------------------------------------------------------------------------------


def test_many_at_once_are_batched_and_each_gets_its_own(client, model):
    async def all_at_once():
        async with httpx.AsyncClient(base_url=client.base_url, timeout=SOON) as many:
            histories = [[f"i{n % 4}", f"i{5 + n % 18}"] for n in range(60)]
            posts = [
                many.post("/v1/recommend", json={"history": h, "k": 1 + n % 7})
                for n, h in enumerate(histories)
            ]
            return histories, await asyncio.gather(*posts)

    batches = metric(client, 'speeder_batch_size_count{lane="recommend"}')
    histories, answers = asyncio.run(all_at_once())
    assert metric(client, 'speeder_batch_size_count{lane="recommend"}') - batches < 60  # some ran together
    for n, (history, answer) in enumerate(zip(histories, answers, strict=True)):
        expected = model.recommend([history], 1 + n % 7)[0]
        got = answer.json()["items"]
        assert [item["score"] for item in got] == pytest.approx([e.score for e in expected], abs=1e-4)


def test_a_full_queue_says_when_to_come_again(held):
    limits = Limits(max_queue=2, max_batch=1, batch_wait_ms=0)
    with listening(served_model(), limits) as address:

        async def six():
            async with httpx.AsyncClient(base_url=address, timeout=SOON) as many:

                def post():
                    return asyncio.ensure_future(many.post("/v1/recommend", json={"history": ["i1"], "k": 2}))

                posts = [post()]
                assert await asyncio.to_thread(held.entered.wait, SOON)
                posts += [post() for _ in range(5)]
                refused, _ = await asyncio.wait(posts, return_when=asyncio.FIRST_COMPLETED, timeout=SOON)
                while len(refused) < 3:
                    await asyncio.sleep(0.05)
                    refused = {post for post in posts if post.done()}
                waiting = (await many.get("/metrics")).text
                held.set()
                return refused, waiting, await asyncio.gather(*posts)

        refused, waiting, answers = asyncio.run(six())
        assert sorted(answer.status_code for answer in answers) == [200] * 3 + [503] * 3
        for post in refused:
            assert int(post.result().headers["retry-after"]) >= 1
            assert problems(post.result(), 503) == {"server": ("room in the queue", "a full queue")}
        assert 'speeder_queue_depth{lane="recommend"} 2.0' in waiting
        assert 'speeder_refused_total{lane="recommend",reason="queue"} 3.0' in waiting


def test_a_deadline_ends_the_waiting_and_a_stuck_model_shows_itself(held):
    with (
        listening(served_model(), Limits(deadline_s=0.5, stuck_s=0.2, batch_wait_ms=0)) as address,
        httpx.Client(base_url=address, timeout=SOON) as client,
    ):
        late = client.post("/v1/recommend", json={"history": ["i1"], "k": 2})
        assert problems(late, 504)["server"][0] == "an answer within 0.5 s"
        time.sleep(0.3)
        assert client.get("/healthz").status_code == client.get("/readyz").status_code == 503
        assert metric(client, "speeder_ready") == 0
        held.set()
        until = time.monotonic() + SOON
        while client.get("/readyz").status_code != 200:
            assert time.monotonic() < until
        assert metric(client, 'speeder_refused_total{lane="recommend",reason="deadline"}') == 1


def test_a_client_that_goes_away_is_dropped(held):
    limits = Limits(max_batch=1, max_queue=5, batch_wait_ms=0)
    with listening(served_model(), limits) as address, httpx.Client(base_url=address, timeout=SOON) as client:
        host, port = address.removeprefix("http://").split(":")
        body = b'{"history": ["i1"], "k": 2}'
        head = b"POST /v1/recommend HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n"
        sockets = [socket.create_connection((host, int(port))) for _ in range(4)]
        for connection in sockets:
            connection.sendall(head % len(body) + body)

        def until(wanted):
            deadline = time.monotonic() + SOON
            while metric(client, 'speeder_queue_depth{lane="recommend"}') != wanted:
                assert time.monotonic() < deadline
                time.sleep(0.02)

        until(3)  # one runs
        for connection in sockets[1:]:
            connection.close()
        until(0)
        held.set()
        assert sockets[0].recv(9) == b"HTTP/1.1 "
        sockets[0].close()
        assert metric(client, 'speeder_refused_total{lane="recommend",reason="client"}') == 3
        lost = 'speeder_requests_total{method="POST",route="/v1/recommend",status="499"}'
        assert metric(client, lost) == 3


def test_a_body_that_does_not_come_is_not_waited_for():
    with listening(served_model(), Limits(deadline_s=0.3)) as address:
        host, port = address.removeprefix("http://").split(":")
        with socket.create_connection((host, int(port)), timeout=SOON) as connection:
            head = b"POST /v1/recommend HTTP/1.1\r\nHost: x\r\nContent-Length: 99\r\n"
            connection.sendall(head + b'Content-Type: application/json\r\n\r\n{"history"')
            answer = read_to_the_end(connection)
        assert answer.startswith(b"HTTP/1.1 408 ") and b"a whole body within 0.3 s" in answer


def read_to_the_end(connection):
    answer = b""
    while part := connection.recv(4096):  # ends: the server closes
        answer += part
    return answer


@pytest.mark.parametrize("sent", [b"", b"\r\n", b"GET /healthz HTTP/1.1\r\nHost"])
def test_a_head_that_does_not_come_is_not_waited_for(sent):
    with listening(served_model(), Limits(deadline_s=0.3)) as address:
        host, port = address.removeprefix("http://").split(":")
        with socket.create_connection((host, int(port)), timeout=SOON) as connection:
            connection.sendall(sent)
            answer = read_to_the_end(connection)
            assert answer.startswith(b"HTTP/1.1 400 ") and b"head must come within 0.3 s" in answer
        with socket.create_connection((host, int(port)), timeout=SOON) as connection:
            connection.sendall(b"GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n")
            assert connection.recv(4096).startswith(b"HTTP/1.1 200 ")
            connection.sendall(b"GET /healthz HTTP/1.1\r\nHost")  # the second on a connection that is kept
            assert b"head must come" in read_to_the_end(connection)


def test_a_client_that_does_not_read_is_cut_off(caplog):
    path, times = "/static/swagger/swagger-ui-bundle.js", 16
    with (
        listening(served_model(), Limits(deadline_s=1)) as address,
        httpx.Client(base_url=address, timeout=SOON) as client,
    ):
        size = len(client.get(path, headers={"accept-encoding": "identity"}).content)
        assert times * size > 16_000_000  # more than the system keeps for a reader
        host, port = address.removeprefix("http://").split(":")
        with socket.create_connection((host, int(port)), timeout=SOON) as connection:
            connection.sendall(times * f"GET {path} HTTP/1.1\r\nHost: x\r\n\r\n".encode())
            connection.recv(1)
            until, alone = time.monotonic() + SOON, 0
            while alone < 3:  # the only request is the one that asks
                assert time.monotonic() < until
                time.sleep(0.1)
                alone = alone + 1 if metric(client, "speeder_requests_in_flight") == 1 else 0
            read = 0
            try:
                while part := connection.recv(1 << 20):
                    read += len(part)
            except ConnectionResetError:
                pass
        assert read < times * size
    assert not [record for record in caplog.records if record.exc_info], "that is no fault of the server"


def test_heads_have_a_bound(client):
    host, port = client.base_url.host, client.base_url.port
    with socket.create_connection((host, port), timeout=SOON) as connection:
        connection.sendall(b"GET /healthz HTTP/1.1\r\nHost: x\r\n" + 5000 * b"X-More: and more\r\n")
        assert b"A request's head may have" in read_to_the_end(connection)
    assert client.get("/healthz", headers={"X-Long": "x" * 5000}).status_code == 200


def test_connections_beyond_the_bound_are_refused_and_the_others_served():
    with listening(served_model(), Limits(max_connections=3)) as address:
        host, port = address.removeprefix("http://").split(":")
        with httpx.Client(base_url=address, timeout=SOON) as client:
            assert client.get("/healthz").status_code == 200
            others = [socket.create_connection((host, int(port))) for _ in range(2)]
            refused = httpx.get(address + "/healthz", timeout=SOON)
            assert refused.status_code == 503 and refused.headers["connection"] == "close"
            assert client.get("/healthz").status_code == 200
            for connection in others:
                connection.close()
            until = time.monotonic() + SOON
            while httpx.get(address + "/healthz", timeout=SOON).status_code != 200:
                assert time.monotonic() < until


def test_a_fault_has_a_number_that_the_log_knows_and_the_server_goes_on(monkeypatch, caplog):
    recommend = Engine.recommend

    def break_on_three(self, jobs):
        if any(job.k == 3 for job in jobs):
            raise RuntimeError("out of something")
        return recommend(self, jobs)

    monkeypatch.setattr(Engine, "recommend", break_on_three)
    with listening(served_model()) as address, httpx.Client(base_url=address, timeout=SOON) as client:
        answer = client.post("/v1/recommend", json={"history": ["i1"], "k": 3})
        number = answer.json()["errors"][0]["message"].split()[-1]
        assert answer.status_code == 500 and "out of something" not in answer.text
        assert any(number in record.message and record.exc_info for record in caplog.records)
        assert client.post("/v1/recommend", json={"history": ["i1"], "k": 2}).status_code == 200
        assert client.get("/healthz").status_code == 200
        failed = 'speeder_requests_total{method="POST",route="/v1/recommend",status="500"}'
        assert metric(client, failed) == 1


@pytest.mark.parametrize(
    "wrong",
    [{"max_k": 0}, {"batch_wait_ms": -1}, {"deadline_s": 0}, {"max_queue": -5}, {"deadline_s": float("inf")}],
)
def test_bounds_that_cannot_be_are_refused(wrong):
    from speeder.errors import SpeederError

    with pytest.raises(SpeederError, match=f"{next(iter(wrong))}: expected (at least|a finite)"):
        Limits(**wrong)
