"""Bodies of users, keys, log-ins and LoRAs: a null means "not given", and 10.0 is the number 10."""

import httpx
import pytest
from pydantic import BaseModel

from serve_app.api.schemas.access import KeyBody, LoginBody, UserBody, UserChange
from serve_app.api.schemas.lora import RegisterLoraBody


def optional_names(schema: type[BaseModel]) -> list[str]:
    return [name for name, info in schema.model_fields.items() if not info.is_required()]


@pytest.mark.parametrize(
    ("path", "schema", "given"),
    [
        ("/admin/users", UserBody, {"name": "Ada", "email": "ada@example.org"}),
        ("/api/loras", RegisterLoraBody, {"base64": "AAAA"}),
        ("/auth/token", LoginBody, {}),
    ],
)
async def test_nulls_of_every_other_body_mean_not_given(
    client: httpx.AsyncClient, path: str, schema: type[BaseModel], given: dict[str, str]
):
    without = await client.post(path, json=given)
    nulls = {name: None for name in optional_names(schema) if name not in given}
    email = {"email": "grace@example.org"} if "email" in given else {}
    with_nulls = await client.post(path, json={**given, **nulls, **email})

    assert with_nulls.status_code == without.status_code
    assert with_nulls.json().keys() == without.json().keys()


async def test_nulls_of_a_key_mean_not_given(client: httpx.AsyncClient):
    user = (await client.post("/admin/users", json={"name": "Ada", "email": "ada@example.org"})).json()

    key = await client.post(f"/admin/users/{user['id']}/keys", json=dict.fromkeys(optional_names(KeyBody)))
    change = await client.patch(f"/admin/users/{user['id']}", json={"disabled": None})

    assert key.json()["key"]["scopes"] == ["generate", "read"]
    assert change.json()["error"]["message"] == "disabled is missing"
    assert optional_names(UserChange) == []


async def test_numbers_of_the_admin_interface_may_have_a_decimal_point(client: httpx.AsyncClient):
    body = {"name": "Ada", "email": "ada@example.org", "images_per_day": 10.0}

    user = await client.post("/admin/users", json=body)
    wrong = await client.post("/admin/users", json=body | {"images_per_day": True})
    key = await client.post(f"/admin/users/{user.json()['id']}/keys", json={"expires_in_s": 3600.0})

    assert user.json()["images_per_day"] == 10
    assert "valid integer" in wrong.json()["error"]["message"]
    assert key.json()["key"]["expires_at"] == pytest.approx(key.json()["key"]["created_at"] + 3600, abs=2)
