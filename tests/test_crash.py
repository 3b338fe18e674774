"""The server against SIGKILL: a short run of crash.py, and whether that run would notice what must not be."""

from __future__ import annotations

import sys
from typing import Dict, List

import pytest
from crash import Ledger, Life, Run, Step

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="there is no SIGKILL")


def test_server_loses_nothing_and_repeats_nothing_when_it_is_killed() -> None:
    ledger = Run(kills=2, seed=1).go()
    assert ledger.counts()["acknowledged"] > 0
    assert set(ledger.violations().values()) == {0}, ledger.violations()


def life(steps: str, finished: str = "", healthy: bool = True) -> Life:
    """A life of one sender's server, told shortly: "b1 e1" begins and ends message 1."""
    words = {"b": "begin", "e": "end"}
    return Life([Step(words[step[0]], f"app/user/text/{step[1:]}") for step in steps.split()],
                {f"app/user/text/{number}" for number in finished.split()}, healthy)


@pytest.mark.parametrize(("lives", "violations"), [
    pytest.param([life("b1 e1 b2 e2", "1 2")], {}, id="all well"),
    pytest.param([life("b1 e1 b2", "1"), life("b2 e2", "1 2")], {}, id="begun, and again"),
    pytest.param([life("b1 e1", ""), life("b1 e1 b2 e2", "1 2")], {}, id="done and not marked, and again"),
    pytest.param([life(""), life("b1 e1 b2 e2", "1 2")], {}, id="killed before it did anything"),
    pytest.param([life("b1 e1", "1")], {"acknowledged and lost": 1}, id="never begun"),
    pytest.param([life("b1 e1 b2", "1"), life("")], {"acknowledged and lost": 1}, id="never ended"),
    pytest.param([life("b1 e1", "1"), life("b1 e1 b2 e2", "1 2")],
                 {"finished twice without need": 1, "begun again without need": 1, "out of their sender's order": 0},
                 id="marked, and again"),
    pytest.param([life("b1 e1 b1 e1 b2 e2", "1 2")],
                 {"finished twice without need": 1, "begun again without need": 1}, id="twice in one life"),
    pytest.param([life("b1 e1 b2", "1"), life("b2 e2 b2 e2", "1 2")], {"begun again without need": 1},
                 id="again after a kill, twice"),
    pytest.param([life("b2 e2 b1 e1", "1 2")], {"out of their sender's order": 2}, id="the second first"),
    pytest.param([life("b1 b2 e1 e2", "1 2")], {"out of their sender's order": 1}, id="both at a time"),
    pytest.param([life("b1 e1 b2 e2", "1 2", healthy=False)], {"kills that damaged the journal": 1}, id="damaged"),
])
def test_ledger_violations(lives: List[Life], violations: Dict[str, int]) -> None:
    found = Ledger({"user": 2}, lives).violations()
    assert {name: count for name, count in found.items() if count} == {
        name: count for name, count in violations.items() if count}


def test_ledger_violations_counts_what_is_in_hand_beyond_the_workers() -> None:
    begun = " ".join(f"b{number}" for number in range(1, 11))
    assert Ledger({}, [life(begun)]).violations()["in hand beyond the 8 workers"] == 2
