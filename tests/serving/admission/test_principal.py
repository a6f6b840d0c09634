"""Who is calling."""

import base64

import pytest
from pydantic import SecretStr

from deployments.protocol.errors import Unauthorized
from serve_app.admission.principals import LOCAL, identify, presented_key
from serve_app.settings import Settings

OPEN = Settings()
LOCKED = Settings(api_key=SecretStr("correct horse"))


def basic(credentials: str) -> str:
    return f"Basic {base64.b64encode(credentials.encode()).decode()}"


@pytest.mark.parametrize(
    "headers",
    [
        {"authorization": "Bearer correct horse"},
        {"authorization": "bearer correct horse"},
        {"x-api-key": "correct horse"},
        {"authorization": "Basic dXNlcjpwdw==", "x-api-key": "correct horse"},
        {"authorization": basic("user:correct horse")},
        {"authorization": basic(":correct horse")},
        {"authorization": basic("correct horse")},
        {"authorization": basic("correct horse:")},
        {"authorization": "Key correct horse"},
        {"authorization": "Token correct horse"},
        {"api-key": "correct horse"},
        {"authorization": "", "api-key": "correct horse"},
    ],
)
def test_the_key_is_taken_from_either_header(headers: dict[str, str]):
    assert identify(presented_key(headers), LOCKED).owner == LOCAL


@pytest.mark.parametrize(
    "headers",
    [
        {"authorization": "Bearer correct hors"},
        {"authorization": "Bearer correct horse2"},
        {"authorization": "Basic correct horse"},
        {"authorization": basic("correct horse:wrong")},
        {"authorization": basic("correct horse ")[:-2]},
        {"authorization": "Digest correct horse"},
        {"x-api-key": "CORRECT HORSE"},
        {"x-api-key": "\xff\xfe"},
    ],
)
def test_another_key_is_refused_without_repeating_it(headers: dict[str, str]):
    with pytest.raises(Unauthorized) as refusal:
        identify(presented_key(headers), LOCKED)

    assert not any(part in refusal.value.message for part in headers.values())


def test_a_call_without_a_key_is_refused_with_where_to_put_one():
    with pytest.raises(Unauthorized, match="Authorization: Bearer"):
        identify(presented_key({}), LOCKED)


def test_while_no_key_is_set_all_callers_are_one_owner_whatever_they_send():
    assert identify(presented_key({"authorization": "Bearer sk-anything"}), OPEN).owner == LOCAL
    assert identify(None, OPEN).owner == LOCAL


@pytest.mark.parametrize("sent", ["", "Bearer", "Bearer ", "Basic", "Basic Og==", "Key "])
def test_an_empty_key_is_none_at_all(sent: str):
    assert presented_key({"authorization": sent}) is None
