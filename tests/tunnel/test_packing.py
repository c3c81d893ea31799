"""Workers for each GPU: as many as measured throughput pays for; and how many there are where it is stated."""

from __future__ import annotations

import math

import pytest

from windtunnel import desk as desk_module
from windtunnel.base.devices import Crew
from windtunnel.base.errors import UserError, WindtunnelError
from windtunnel.desk import Desk, Machine
from windtunnel.home import Home
from windtunnel.tunnel.packing import measure_in_turns, measure_together, pack


@pytest.mark.parametrize(
    ("throughput", "best", "tried"),
    [
        (lambda n: 100.0 * n, 16, [1, 2, 4, 8, 16]),  # never full
        (lambda n: 100.0 * min(n, 4), 4, [1, 2, 4, 8]),  # full with four
        (lambda n: 100.0 * n / (1 + 0.02 * n * n), 8, [1, 2, 4, 8, 16]),  # falls beyond seven
        (lambda n: 100.0, 1, [1, 2]),
        (lambda n: 100.0 * n if n < 4 else None, 2, [1, 2]),  # four do not fit into memory
        (lambda n: None, 1, []),
    ],
)
def test_workers_double_as_long_as_a_doubling_pays(throughput, best, tried):
    found, seen = pack(throughput)
    assert (found, [count for count, _ in seen]) == (best, tried)
    rates = dict(seen)
    assert all(rates[2 * n] >= 1.1 * rates[n] for n in tried if 2 * n in rates and 2 * n <= best)


@pytest.mark.slow
def test_processes_that_measure_together_wait_for_each_other_and_their_rates_add_up(make_trial, monkeypatch):
    monkeypatch.setattr("windtunnel.tunnel.packing._SECONDS", 0.5)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    rate = measure_together(make_trial(8), "cpu", 2)
    assert rate is not None
    assert math.isfinite(rate)
    assert rate > 0
    assert measure_together(make_trial(8, objective="none of ours"), "cpu", 1) is None


@pytest.mark.slow
def test_stages_are_measured_in_turns_and_a_failure_says_why(make_trial, monkeypatch):
    monkeypatch.setattr("windtunnel.tunnel.packing._TURN", 0.2)
    monkeypatch.setattr("windtunnel.tunnel.packing._TURNS", 3)
    small, large = make_trial(8), make_trial(8, batch=16)
    rounds = measure_in_turns([small, large], "cpu")
    assert [len(one) for one in rounds] == [2, 2, 2]
    assert all(rate > 0 for one in rounds for rate in one)
    with pytest.raises(WindtunnelError, match="none of ours"):
        measure_in_turns([make_trial(8, objective="none of ours")], "cpu")


def test_a_machine_has_the_workers_that_are_stated_and_else_one_for_each_core_or_gpu():
    cores = Machine.of("cpu").workers
    assert Machine.of("cpu", Crew("3")).workers == 3
    assert Machine.of("cpu", Crew("auto", "auto")).workers == cores
    assert (Machine.of("0,1").workers, Machine.of("0,1").packed) == (2, True)
    assert Machine.of("0,1", Crew(per_gpu="3")).workers == 6
    assert Machine.of("0,1", Crew("5", "auto")).workers == 5
    open_question = Machine.of("0,1", Crew(per_gpu="auto"))
    assert (open_question.workers, open_question.packed) == (2, False)
    assert (Machine.of("ray:10.0.0.1:6379", Crew("5")).seats, Machine.of("ray").seats) == (5, 0)
    with pytest.raises(UserError, match="--workers-per-gpu: expected a GPU, there is none in use; use --workers"):
        Machine.of("cpu", Crew(per_gpu="3"))
    with pytest.raises(UserError, match="--workers-per-gpu: expected 1 with a Ray cluster, got 3"):
        Machine.of("ray+cuda", Crew(per_gpu="3"))
    for bad in (Crew, lambda v: Crew(per_gpu=v)):
        with pytest.raises(UserError, match="expected auto or a number from 1 on, got '0'"):
            bad("0")


def test_a_gpu_is_measured_once_and_what_was_found_is_recorded_and_used(tmp_path, make_trial, monkeypatch):
    asked = []

    def measured(stage, device, count):
        asked.append(count)
        return 100.0 * min(count, 2)

    monkeypatch.setattr(desk_module, "measure_together", measured)
    with Desk(Home(tmp_path), "tiny", devices="0,1", quiet=True, crew=Crew(per_gpu="auto")) as desk:
        desk._pack(make_trial(8))
        assert desk.machine.workers == 4
        assert desk.machine.packed
        assert desk.book.fact("tiny", "machine", "packing")["workers_per_gpu"] == 2
    assert asked == [1, 2, 4]
