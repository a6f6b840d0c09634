"""The bits of a row do not depend on its batch: proven batch sizes, padding of small linear layers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from deployments.engine import bit_trials
from deployments.engine.batch_buckets import BucketProver, pad_small_linears
from deployments.engine.bit_trials import BitTrials
from deployments.engine.call import ModuleCall, Seam
from deployments.engine.device_errors import DeviceBroken
from deployments.engine.proof_state import ProofState
from deployments.protocol.request import Exactness

KEY = "key"


class BatchDependent(nn.Module):
    """x + 1, and a little more in the forwards whose number of rows is listed, or in later rows."""

    def __init__(self, odd_counts: Sequence[int] = (), *, by_index: bool = False) -> None:
        super().__init__()
        self.odd_counts = odd_counts
        self.by_index = by_index
        self.seen: list[int] = []

    def forward(self, hidden_states: Tensor, timestep: Tensor | None = None) -> tuple[Tensor]:
        rows = hidden_states.shape[0]
        self.seen.append(rows)
        more = torch.arange(rows).view(-1, 1) * 1e-6 if self.by_index else 0
        return (hidden_states + 1 + (1e-6 * rows if rows in self.odd_counts else 0) + more,)


@pytest.fixture(autouse=True)
def _inference(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The modules of these tests change every value: few are enough."""
    monkeypatch.setattr(bit_trials, "PROOF_VALUES", 1)
    with torch.inference_mode():
        yield


class Case:
    """A module, its seam and a prover."""

    def __init__(
        self, module: nn.Module, policy: Exactness = "prefer", rows: int = 8, *, denoiser: bool = True
    ) -> None:
        self.module = module
        names = ("hidden_states", "timestep") if denoiser else ("hidden_states",)
        self.seam = Seam(f"{type(module).__name__}.forward", module.forward, names)
        self.prover = BucketProver(rows, policy, lambda _key: None)

    def call(self, rows: int, exact: Exactness | None = None) -> ModuleCall:
        return ModuleCall(self.seam, {"hidden_states": torch.randn(rows, 3)}, rows, KEY, exact=exact)

    def prove(self, *rows: int, before_traffic: bool = False) -> None:
        """All trials for calls of these sizes."""
        for n in rows:
            self.prover.sizes(self.call(n))
        while self.prover.rows_to_run() is not None:
            self.prover.run_trial(before_traffic=before_traffic)

    def run(self, *rows: int) -> tuple[int, list[int]]:
        """The batch size that ran and the sizes of the calls that shared it without a proof; every output is
        held against its call alone where there is a proof."""
        calls = [self.call(n) for n in rows]
        outputs, size, unproven = self.prover.forward(calls)
        for call, output in zip(calls, outputs, strict=True):
            if call not in unproven:
                assert torch.equal(output[0], self.prover.forward([call])[0][0][0])
        return size, [call.batch_size for call in unproven]

    def state(self, rows: int) -> ProofState:
        return next(state for state in self.prover.states() if state.call_rows == rows)


def test_calls_run_alone_until_batch_sizes_are_proven() -> None:
    case = Case(BatchDependent())

    assert case.prover.sizes(case.call(1)) == ()
    case.module.seen.clear()
    case.run(1, 1)
    assert case.module.seen[:2] == [1, 1], "no trial runs beside the calls of requests"

    case.prove(1)
    assert case.prover.sizes(case.call(1)) == (2, 3, 4, 6, 8)
    assert case.run(1, 1, 1, 1, 1) == (6, [])


def test_a_call_alone_is_run_once_per_trial_and_a_batch_size_once() -> None:
    case = Case(BatchDependent())

    case.prove(1)

    alone, together = [rows for rows in case.module.seen if rows == 1], set(case.module.seen)
    assert len(alone) == 8, "each of the eight rows, once for all batch sizes"
    assert together == {1, 2, 3, 4, 6, 8}
    assert len(case.module.seen) == 8 + 5


@given(
    st.lists(st.integers(1, 4), min_size=1, max_size=5),
    st.sets(st.integers(1, 8), max_size=5),
    st.sampled_from(["prefer", "strict"]),
)
def test_a_proven_call_has_the_bits_it_has_alone_whatever_sizes_change_bits(
    rows: list[int], odd: set[int], policy: Exactness
) -> None:
    with torch.inference_mode():
        case = Case(BatchDependent(sorted(odd)), policy)
        case.prove(*rows)

        size, unproven = case.run(*rows)

        assert policy == "prefer" or not unproven
        if odd == set() and len(rows) > 1 and sum(rows) <= 8:
            assert size >= sum(rows)
            assert case.module.seen[-1 - len(rows)] == size, "one forward for all"


def test_a_batch_size_that_changes_bits_is_passed_over() -> None:
    case = Case(BatchDependent([3]))
    case.prove(1, 2)

    assert case.run(1, 2) == (4, []), "the next larger one, with a padded row"
    assert case.state(1).refused == (3,)
    assert case.state(2).proven == (4, 6, 8)


def test_calls_of_several_rows_are_held_against_calls_of_as_many() -> None:
    """With classifier-free guidance a call has two rows, and one row alone does not matter."""
    case = Case(BatchDependent([1]))
    case.prove(2)

    assert case.state(2).proven == (4, 6, 8)
    assert 1 not in case.module.seen
    assert case.run(2, 2, 2) == (6, [])


def test_calls_of_other_rows_open_the_batch_sizes_between() -> None:
    case = Case(BatchDependent())
    case.prove(2)
    assert case.state(2).proven == (4, 6, 8), "three rows cannot be filled by calls of two"

    case.prove(1)

    assert case.state(2).proven == (3, 4, 6, 8)
    assert case.run(1, 2) == (3, [])


def test_where_no_batch_size_is_proven_prefer_merges_and_says_so_and_strict_does_not() -> None:
    case = Case(BatchDependent(by_index=True))
    case.prove(1)

    assert case.prover.sizes(case.call(1)) is None
    assert case.run(1, 1, 1) == (3, [1, 1, 1])
    strict = [case.call(1, exact="strict"), case.call(1)]
    assert case.prover.sizes(strict[0]) == ()
    case.module.seen.clear()
    _, _, unproven = case.prover.forward(strict)
    assert case.module.seen == [1, 1]
    assert not unproven


def test_modules_outside_the_steps_never_merge_without_a_proof() -> None:
    case = Case(BatchDependent(by_index=True), denoiser=False)
    case.prove(1)

    assert case.prover.sizes(case.call(1)) == ()


def test_after_three_refused_batch_sizes_no_larger_one_is_tried() -> None:
    case = Case(BatchDependent(by_index=True), rows=64)

    case.prove(1)

    assert max(case.module.seen) == 4


def test_batch_sizes_beyond_eight_are_tried_when_so_many_rows_have_waited() -> None:
    case = Case(BatchDependent(), rows=64)
    case.prove(1)
    assert case.prover.sizes(case.call(1))[-1] == 8  # type: ignore[index]

    case.prover.want(KEY, 14)
    case.prove(1)

    assert case.prover.sizes(case.call(1))[-1] == 16  # type: ignore[index]


@pytest.mark.parametrize("cheap", [True, False])
def test_a_row_is_doubled_before_traffic_where_only_that_is_exact_and_cheap(
    cheap: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    seconds = {1: 1.0, 2: 1.1 if cheap else 1.9}
    monkeypatch.setattr(BitTrials, "seconds", lambda _self, batch_size: seconds[batch_size])
    case = Case(BatchDependent([1]))
    case.prove(1, before_traffic=True)
    call = case.call(1)

    outputs, size, _ = case.prover.forward([call])

    assert size == (2 if cheap else 1)
    assert torch.equal(outputs[0][0], call.arguments["hidden_states"] + 1) is cheap
    assert case.run(1, 1, 1) == (3, [] if cheap else [1, 1, 1])


def test_forwards_are_timed_to_know_whether_a_second_row_is_cheap() -> None:
    class Slow(nn.Module):
        def forward(self, hidden_states: Tensor) -> tuple[Tensor]:
            x = torch.ones(256, 256)
            for _ in range(hidden_states.shape[0] ** 4):
                x = x @ x
            return (hidden_states + x[0, 0] * 0,)

    trials = BitTrials(Case(Slow()).call(1))

    assert 0 < trials.seconds(1) < trials.seconds(3)


def test_the_reference_of_a_call_never_changes_once_requests_are_computed() -> None:
    case = Case(BatchDependent([1]))
    case.prove(1)

    assert case.prover.forward([case.call(1)])[1] == 1
    assert case.state(1).proven == ()


def test_an_error_in_a_trial_means_that_the_batch_size_is_not_used() -> None:
    class Small(BatchDependent):
        def forward(self, hidden_states: Tensor, timestep: Tensor | None = None) -> tuple[Tensor]:
            if hidden_states.shape[0] > 4:
                raise torch.OutOfMemoryError("CUDA out of memory")
            return super().forward(hidden_states, timestep)

    case = Case(Small())
    case.prove(1)

    assert case.state(1) == ProofState("Small.forward", "3 float32", 1, (2, 3, 4), (6, 8), ())
    assert case.run(1, 1, 1) == (3, [])


def test_no_batch_size_beyond_the_memory_is_tried() -> None:
    case = Case(BatchDependent())
    case.prover = BucketProver(8, "prefer", lambda _key: 5)

    case.prove(1)

    assert max(case.module.seen) == 4


class Rare(nn.Module):
    """x + 1; in forwards of three rows the values above a limit come out otherwise."""

    def __init__(self, limit: float) -> None:
        super().__init__()
        self.limit = limit

    def forward(self, hidden_states: Tensor) -> tuple[Tensor]:
        answer = hidden_states + 1
        if hidden_states.shape[0] == 3:
            answer = torch.where(hidden_states > self.limit, answer + 1, answer)  # of the normal distribution
        return (answer,)


@pytest.mark.parametrize(
    ("dtype", "limit"),
    [(torch.bfloat16, 4.2), (torch.float32, 3.3)],  # about one value in 75,000, and in 2,000
)
def test_a_rare_difference_is_found_though_a_forward_has_few_values(
    dtype: torch.dtype, limit: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.undo()
    case = Case(Rare(limit))
    call = ModuleCall(case.seam, {"hidden_states": torch.zeros(1, 512, dtype=dtype)}, 1, KEY)
    case.prover.sizes(call)
    while case.prover.rows_to_run() is not None:
        case.prover.run_trial()

    assert case.state(1).refused == (3,)


def test_every_row_of_a_trial_has_a_timestep_of_its_own() -> None:
    class Times(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.seen: list[list[float]] = []

        def forward(self, hidden_states: Tensor, timestep: Tensor) -> tuple[Tensor]:
            self.seen.append(timestep.tolist())
            return (hidden_states,)

    case = Case(Times(), rows=4)
    arguments = {"hidden_states": torch.zeros(1, 3), "timestep": torch.tensor(900)}
    case.prover.sizes(ModuleCall(case.seam, arguments, 1, KEY))
    while case.prover.rows_to_run() is not None:
        case.prover.run_trial()

    largest = max(case.module.seen, key=len)  # type: ignore[attr-defined]
    assert len(set(largest)) == 4
    assert all(0 <= time <= 900 for time in largest)


def test_trials_keep_no_large_tensor_of_the_call() -> None:
    case = Case(BatchDependent())
    call = case.call(1)
    case.prover.sizes(call)
    alive = torch.utils.weak.WeakTensorKeyDictionary()
    alive[call.arguments["hidden_states"]] = True

    del call

    assert len(alive) == 0


def test_small_linear_layers_are_padded_and_give_what_they_gave() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(5, 7), nn.SiLU(), nn.Linear(7, 3))
    x = torch.randn(2, 5)
    plain = net(x)

    restore = pad_small_linears([net])
    padded = net(x)
    wide = net(torch.randn(4, 9, 5))
    restore()

    assert padded.shape == (2, 3)
    assert wide.shape == (4, 9, 3)
    assert torch.allclose(plain, padded, atol=1e-6)
    assert all("forward" not in vars(part) for part in net)


def test_rows_of_a_small_linear_layer_have_the_same_bits_in_any_number() -> None:
    torch.manual_seed(0)
    linear = nn.Linear(640, 640)
    x = torch.randn(8, 640)
    restore = pad_small_linears([linear])

    answers = [linear(x[:count])[0] for count in range(1, 9)]
    restore()

    assert all(torch.equal(answer, answers[0]) for answer in answers)


def test_a_device_that_breaks_in_a_trial_is_not_taken_for_a_batch_size_that_fails() -> None:
    class Broken(BatchDependent):
        def forward(self, hidden_states: Tensor, timestep: Tensor | None = None) -> tuple[Tensor]:
            raise torch.AcceleratorError("CUDA error: an illegal memory access was encountered")

    with pytest.raises(DeviceBroken):
        Case(Broken()).prove(1)


def test_the_memory_of_trials_is_measured_and_lets_larger_sizes_be_tried() -> None:
    """As on a GPU: nothing is known to fit beyond twice the rows that have been measured."""
    measured = {1}

    class Meter:
        def start(self, _key: object, rows: int) -> int:
            return rows

        def stop(self, started: int, _lane: str, _key: object, rows: int) -> None:
            assert rows in (0, started)
            measured.add(rows)

    case = Case(BatchDependent())
    case.prover = BucketProver(8, "prefer", lambda _key: 2 * max(measured), Meter())

    case.prove(1)

    assert case.state(1).proven == (2, 3, 4, 6, 8)


def test_a_size_that_did_not_fit_is_tried_once_there_is_more_memory() -> None:
    fitting = [8]
    case = Case(BatchDependent(), rows=64)
    case.prover = BucketProver(64, "prefer", lambda _key: fitting[0])
    case.prove(1)
    case.prover.want(KEY, 16)
    case.prove(1)
    assert case.state(1).proven[-1] == 8

    fitting[0] = 16
    case.prover.want(KEY, 16)
    case.prove(1)

    assert case.state(1).proven[-1] == 16
