"""The names that other tools give to noise schedulers lead to ones that there are."""

from deployments.pipelines.noise_schedulers import SCHEDULERS
from serve_app.api.schemas.sampler_names import OTHER_NAMES


def test_every_other_name_of_a_sampler_is_one_that_there_is() -> None:
    assert set(OTHER_NAMES.values()) <= {"auto", *SCHEDULERS}
