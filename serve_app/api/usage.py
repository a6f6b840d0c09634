"""/api/usage: what jobs used, by day, user, key and model, as JSON or CSV."""

import csv
import io
from collections.abc import Sequence
from datetime import date
from typing import Annotated, Literal

from fastapi import APIRouter, Query
from starlette.responses import Response

from deployments.protocol.errors import BadRequest, Forbidden
from serve_app.api.auth import CurrentCaller
from serve_app.api.caller import CallerContext
from serve_app.api.schemas.usage import UsageOut, UsageRowOut
from serve_app.jobs.usage import GROUPS, GroupBy, grouped

router = APIRouter(tags=["usage"])
GROUPS_PATTERN = "^((day|user|key|model)(,(day|user|key|model))*)?$"  # for the description; _groups says more


@router.get("/api/usage", response_model=UsageOut, responses={200: {"content": {"text/csv": {}}}})
async def read_usage(
    caller: CurrentCaller,
    first: Annotated[
        date | None, Query(alias="from", description="First UTC day; default: the first of the month.")
    ] = None,
    last: Annotated[date | None, Query(alias="to", description="Last UTC day; default: today.")] = None,
    by: Annotated[
        str,
        Query(
            max_length=100,
            description="Groups with commas between: day, user, key, model.",
            json_schema_extra={"pattern": GROUPS_PATTERN},
        ),
    ] = "day,model",
    user: Annotated[
        str | None, Query(max_length=100, description="Only this user's; an admin's key may name any.")
    ] = None,
    format: Annotated[Literal["json", "csv"], Query(description="csv: a table with a header.")] = "json",
) -> Response | UsageOut:
    """What ended jobs used: of the caller, or of all users for a key with the scope admin.

    A job is counted once, on the day it ends. Device seconds are the job's share, by batch rows, of each
    forward, so the sums of all users are the seconds that the devices computed.
    """
    groups = _groups(by)
    rows = grouped(await caller.job_service.usage(first, last, _whose(caller, user)), groups)
    shown = [UsageRowOut.of(row) for row in rows]
    if format == "json":
        return UsageOut(usage=shown)
    return Response(_as_csv(shown, groups), media_type="text/csv; charset=utf-8")


def _groups(text: str) -> list[GroupBy]:
    """Raises BadRequest for a group that does not exist."""
    names = [name.strip() for name in text.split(",") if name.strip()]
    unknown = next((name for name in names if name not in GROUPS), None)
    if unknown is not None:
        raise BadRequest(f"{unknown!r} is no group of usage; there are {', '.join(GROUPS)}", param="by")
    return [name for name in GROUPS if name in names]


def _whose(caller: CallerContext, user: str | None) -> str | None:
    """Whose usage the caller gets; None: everyone's. Raises Forbidden for another user's."""
    if caller.is_admin:
        return user
    if user not in (None, caller.owner):
        raise Forbidden("only a key with the scope admin may read the usage of other users", param="user")
    return caller.owner


def _as_csv(rows: Sequence[UsageRowOut], groups: Sequence[GroupBy]) -> str:
    """A table with the groups that were asked for and all amounts."""
    left_out = set(GROUPS) - set(groups)
    names = [name for name in UsageRowOut.model_fields if name not in left_out]
    text = io.StringIO()
    table = csv.DictWriter(text, names, extrasaction="ignore")
    table.writeheader()
    table.writerows(row.model_dump() for row in rows)
    return text.getvalue()
