"""Totals of usage by day, user, key and model: counted with the ending of each job, and read for reports."""

from __future__ import annotations

from collections import defaultdict
from datetime import date, timedelta
from typing import cast

from redis.asyncio import Redis
from redis.asyncio.client import Pipeline

from serve_app.admission.quota import day_of
from serve_app.jobs.job import Job
from serve_app.jobs.store.key_names import Keys
from serve_app.jobs.usage import AMOUNTS, Amounts, UsageAccount, UsageRow, account_of, amounts_of, month_of
from serve_app.redis.transactions import clock_us, redis_errors

DAY_S = 86_400
BUDGET_KEPT_S = 62 * DAY_S  # lifetime of an owner's cost by month
DAYS_AT_ONCE = 31  # hashes read in one round trip


def count_usage(pipe: Pipeline, keys: Keys, job: Job, now_us: int, kept_days: int) -> None:
    """Add what an ended job used to the totals of its day, as writes on a pipe after `begin`.

    In the transaction that ends the job: it is counted once, whatever dies.
    """
    day, account, amounts = day_of(now_us), account_of(job), amounts_of(job)
    for name in AMOUNTS:
        if amount := getattr(amounts, name):
            pipe.hincrby(keys.usage(day), account.field(name), amount)
    pipe.expire(keys.usage(day), kept_days * DAY_S)
    if amounts.cost_micros:
        pipe.hincrby(keys.cost(job.owner), month_of(day), amounts.cost_micros)
        pipe.expire(keys.cost(job.owner), BUDGET_KEPT_S)


class UsageTotals:
    """Reads the totals. Raises StoreUnreachable."""

    def __init__(self, redis: Redis, keys: Keys) -> None:
        self._redis = redis
        self._keys = keys

    async def today(self) -> date:
        """The UTC day of the store's clock."""
        with redis_errors():
            return date.fromisoformat(day_of(await clock_us(self._redis)))

    async def rows(self, first: date, last: date, user: str | None = None) -> list[UsageRow]:
        """One row for each day and account from the first day to the last. user: only theirs."""
        days = [(first + timedelta(number)).isoformat() for number in range((last - first).days + 1)]
        rows: list[UsageRow] = []
        for start in range(0, len(days), DAYS_AT_ONCE):
            part = days[start : start + DAYS_AT_ONCE]
            with redis_errors():
                async with self._redis.pipeline(transaction=False) as pipe:
                    for day in part:
                        pipe.hgetall(self._keys.usage(day))
                    found = cast(list[dict[str, str]], await pipe.execute())
            for day, totals in zip(part, found, strict=True):
                rows += _rows_of(day, totals, user)
        return rows

    async def cost_of_month(self, user: str) -> int:
        """What a user's ended jobs cost in the current month, in millionths."""
        with redis_errors():
            month = month_of(day_of(await clock_us(self._redis)))
            cost = await self._redis.hget(self._keys.cost(user), month)
        return int(cast("str | None", cost) or 0)


def _rows_of(day: str, totals: dict[str, str], user: str | None) -> list[UsageRow]:
    """The rows in the hash of one day."""
    amounts: dict[UsageAccount, dict[str, int]] = defaultdict(dict)
    for field, value in totals.items():
        account, name = UsageAccount.parse(field)
        if user in (None, account.user) and name in AMOUNTS:  # a later version may count more
            amounts[account][name] = int(value)
    return [
        UsageRow(day, account.user, account.key, account.model, Amounts(**found))
        for account, found in amounts.items()
    ]
