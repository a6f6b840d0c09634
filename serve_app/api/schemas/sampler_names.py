"""Noise schedulers under the names that other tools give them."""

from typing import Annotated, Any

from pydantic import BeforeValidator

# in lower case; the values are names of deployments/pipelines/noise_schedulers.py
OTHER_NAMES = {
    "": "auto",
    "automatic": "auto",
    "default": "auto",
    "k_euler": "euler",
    "euler karras": "euler_karras",
    "euler a": "euler_a",
    "euler ancestral": "euler_a",
    "euler_ancestral": "euler_a",
    "k_euler_a": "euler_a",
    "k_euler_ancestral": "euler_a",
    "dpm++ 2m": "dpmpp_2m",
    "dpm++ 2m karras": "dpmpp_2m_karras",
    "dpm++ 2m sde": "dpmpp_2m_sde",
    "dpm++ 2m sde karras": "dpmpp_2m_sde_karras",
    "dpm++ sde": "dpmpp_sde",
    "plms": "pndm",
}


def _noise_scheduler(value: Any) -> Any:
    """The name used here. Case does not count, as in `Euler a` and `DDIM`."""
    if not isinstance(value, str):
        return value
    name = value.strip().lower()
    return OTHER_NAMES.get(name, name)


SchedulerName = Annotated[str, BeforeValidator(_noise_scheduler)]
