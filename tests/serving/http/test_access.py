"""Keys, web pages of others, and the page that shows how the server is."""

import re

from tests.support.small_server import complete, error, load, serving


def test_a_second_key_for_what_changes_the_server(folder):
    from fastpeft.serving.http.server import Door

    def with_key(key):
        return {"headers": {"Authorization": f"Bearer {key}"}}

    with serving(folder, door=Door("ask", "change")) as (_, client):
        body = {"lora_name": "alice"}
        unload = "/v1/unload_lora_adapter"
        error(client.post(unload, json=body), 401, "invalid_api_key")
        error(client.post(unload, json=body, **with_key("wrong")), 401, "invalid_api_key")
        error(client.post(unload, json=body, **with_key("ask")), 403, "admin_key_needed")
        from_tensors = "/v1/load_lora_adapter_from_tensors?lora_name=x"
        error(client.post(from_tensors, content=b"", **with_key("ask")), 403, "admin_key_needed")
        assert client.get("/v1/models", **with_key("ask")).status_code == 200
        assert client.get("/v1/models", **with_key("change")).status_code == 200
        assert client.post(unload, json=body, **with_key("change")).status_code == 200
    with serving(folder, door=Door(admin_key="change")) as (_, client):
        assert complete(client, max_tokens=1).status_code == 200
        error(load(client, "alice"), 401, "invalid_api_key")


def test_web_pages_may_ask_where_an_option_says_so(folder):
    from fastpeft.serving.http.server import Door

    preflight = {
        "Origin": "http://a",
        "Access-Control-Request-Method": "POST",
        "Access-Control-Request-Headers": "content-type",
    }
    with serving(folder, door=Door("key", origins=["http://a"])) as (_, client):
        allowed = client.options("/v1/completions", headers=preflight)
        assert (allowed.status_code, allowed.headers["access-control-allow-origin"]) == (200, "http://a")
        assert client.options("/v1/completions", headers={**preflight, "Origin": "http://b"}).status_code == 400
        refused = client.get("/v1/models", headers={"Origin": "http://a"})
        assert error(refused, 401, "invalid_api_key")
        assert refused.headers["access-control-allow-origin"] == "http://a"


def test_the_page_shows_what_metrics_say(served):
    """Each metric that its script reads is one; it loads nothing from elsewhere."""
    _, client = served
    complete(client, "bob", max_tokens=2)
    page = client.get("/")
    assert page.headers["content-type"].startswith("text/html")
    assert "default-src 'none'" in page.headers["content-security-policy"]
    assert not re.findall(r"(?:src|href)\s*=\s*[\"'](?!data:)|https?:|@import|innerHTML", page.text)
    rows = client.get("/metrics").text
    read = set(re.findall(r'(?:sum\((?:before\.)?rows, |rate\()"(\w+)"', page.text))
    assert len(read) >= 8
    for name in read:
        assert re.search(rf"^fastpeft_{name}[ {{]", rows, re.MULTILINE), name
    assert client.head("/").status_code == 200


def test_the_page_is_behind_the_key_or_off(folder):
    from fastpeft.serving.http.server import Door

    with serving(folder, door=Door("key")) as (_, client):
        refused = client.get("/")
        assert (refused.status_code, refused.headers["www-authenticate"].split()[0]) == (401, "Basic")
        for auth, status in ((("me", "key"), 200), (("me", "wrong"), 401)):
            assert client.get("/", auth=auth).status_code == client.get("/metrics", auth=auth).status_code == status
        error(client.get("/v1/models", auth=("me", "key")), 401, "invalid_api_key")
        assert client.get("/metrics", headers={"Authorization": "Basic !"}).status_code == 401
    with serving(folder, door=Door(page=False)) as (_, client):
        error(client.get("/"), 404)
        assert client.get("/metrics").status_code == 200


def test_openapi_names_what_is_served(client):
    document = client.get("/openapi.json").json()
    for path, operations in document["paths"].items():
        for method in operations:
            status = client.request(method, path, json={}).status_code
            assert status in (200, 400, 415), (method, path, status)
    fields = document["components"]["schemas"]["CompletionRequest"]
    assert fields["additionalProperties"] is False
    assert {"prompt", "model", "logprobs", "user"} <= set(fields["properties"])
