"""A job may crash, hang or want too much memory: that is its answer, and the next job is served as if nothing was."""

import pytest

from benchmarks.sweep.pool import Limits, Server


@pytest.fixture(scope="module")
def server():
    server = Server("tests.sweep_handlers:any_of_them", [], Limits(seconds=2, gigabytes=8))
    server.wait_until_ready()
    yield server
    server.close()


def test_an_answer_is_the_result_alone(server):
    assert server.ask({"how": "well", "number": 21}) == {"twice": 42}


def test_a_crash_keeps_what_was_known(server):
    assert server.ask({"how": "killed"}) == {"known": "so far", "crash": "ended by signal SIGSEGV"}
    assert server.ask({"how": "well", "number": 1}) == {"twice": 2}


def test_a_job_that_hangs_is_stopped(server):
    assert server.ask({"how": "hangs"}) == {"known": "so far", "crash": "stopped after 2 s"}
    assert server.ask({"how": "well", "number": 1}) == {"twice": 2}


def test_a_job_that_wants_too_much_memory_fails_alone(server):
    assert "MemoryError" in server.ask({"how": "greedy"})["crash"]
    assert server.ask({"how": "well", "number": 1}) == {"twice": 2}


def test_an_unknown_handler_is_the_jobs_failure(server):
    assert "KeyError" in server.ask({"how": "no such thing"})["crash"]
