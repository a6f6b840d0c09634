"""Schemas of /auth and /admin: log-in, users and keys."""

from typing import Annotated, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, SecretStr

from serve_app.admission.api_keys import ApiKey
from serve_app.admission.principals import USER_SCOPES, Role, Scope
from serve_app.admission.users import User
from serve_app.api.schemas.body import NullableFields
from serve_app.api.schemas.numbers import Int

Seconds = Annotated[Int, Field(ge=60, le=10 * 366 * 86_400, strict=True)]


class LoginBody(NullableFields):
    """A key, in this body or in the header."""

    model_config = ConfigDict(extra="forbid")

    api_key: SecretStr | None = Field(None, max_length=200)
    email: str | None = Field(None, max_length=320, description="If sent, it must be the key's user's.")


class TokenOut(BaseModel):
    access_token: str
    token_type: Literal["bearer"] = "bearer"
    expires_in: int  # seconds
    expires_at: int  # unix seconds
    scope: str  # separated by spaces


class TicketOut(BaseModel):
    ticket: str
    expires_in: int  # seconds


class CallerOut(BaseModel):
    """Owner, role, scopes and quota of a caller."""

    owner: str
    role: Role | None = None
    scopes: list[str]
    images_per_day: int | None
    budget_per_month: float | None = Field(None, description="In the operator's currency.")


class LoggedOut(BaseModel):
    status: Literal["logged out"] = "logged out"


class UserBody(NullableFields):
    """A new user."""

    model_config = ConfigDict(extra="forbid")

    name: str = Field(min_length=1, max_length=100)
    email: str = Field(max_length=320)
    role: Role = Role.user
    images_per_day: Int | None = Field(None, ge=0, le=10**9, strict=True)
    budget_per_month: float | None = Field(
        None, ge=0, le=10**12, description="What the jobs of a month may cost, by the prices of their models."
    )


class UserChange(NullableFields):
    """Disable a user, or enable them again."""

    model_config = ConfigDict(extra="forbid")

    disabled: bool


class UserOut(BaseModel):
    id: str
    name: str
    email: str
    role: Role
    images_per_day: int | None
    budget_per_month: float | None
    disabled: bool
    created_at: float  # unix seconds

    @classmethod
    def of(cls, user: User) -> Self:
        return cls(
            id=user.id,
            name=user.name,
            email=user.email,
            role=user.role,
            images_per_day=user.images_per_day,
            budget_per_month=user.budget_per_month,
            disabled=user.disabled,
            created_at=user.created_at,
        )


class UserList(BaseModel):
    users: list[UserOut]


class KeyBody(NullableFields):
    """A new key."""

    model_config = ConfigDict(extra="forbid")

    scopes: list[Scope] = Field(sorted(USER_SCOPES), min_length=1, max_length=len(Scope))
    name: str = Field("", max_length=100)
    expires_in_s: Seconds | None = None


class KeyOut(BaseModel):
    """A key without its secret."""

    prefix: str
    user_id: str
    name: str
    scopes: list[Scope]
    created_at: float  # unix seconds, like the next two
    expires_at: float | None
    revoked_at: float | None

    @classmethod
    def of(cls, key: ApiKey) -> Self:
        return cls(
            prefix=key.prefix,
            user_id=key.user_id,
            name=key.name,
            scopes=sorted(key.scopes),
            created_at=key.created_at,
            expires_at=key.expires_at,
            revoked_at=key.revoked_at,
        )


class KeyCreated(BaseModel):
    key: KeyOut
    api_key: str  # not stored: shown only here


class KeyList(BaseModel):
    keys: list[KeyOut]
