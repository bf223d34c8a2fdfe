"""The specification in `docs/specification`, searched in its small scope: it holds, and each rule taken out fails."""

import pytest
from docs.specification import check

needs_spin = pytest.mark.skipif(check.missing_tools() is not None, reason=str(check.missing_tools()))


@needs_spin
@pytest.mark.timeout(300)  # a compiler and an exhaustive search, on a busy machine
@pytest.mark.parametrize("run", check.RUNS, ids=lambda run: run.name.replace(" ", "-"))
def test_the_specification_holds_and_each_rule_taken_out_fails(run: check.Run) -> None:
    result = check.search(run, is_small=True, is_shortest=False)

    assert result.is_expected, f"{run.name}: expected {run.expected}, got {result.found}\n{result.trail}"


@needs_spin
def test_a_counterexample_is_told_in_the_words_of_the_project() -> None:
    run = next(run for run in check.RUNS if run.name == "confirmation WITHOUT_EACH_PART")

    result = check.search(run, is_small=True, is_shortest=True)

    assert result.trail.splitlines() == [
        "publisher: an invalidation in two parts is accepted",
        "replica: applies part 1, and reports it",
        "publisher: the confirmation is complete",
    ]


@pytest.mark.parametrize("old", ["OLD_SKIP", "OLD_C2", "OLD_C3", "OLD_C4"])
def test_each_way_in_which_the_promise_was_broken_is_searched_for(old: str) -> None:
    assert any(old in run.switches.split() and run.expected == "fails" for run in check.RUNS)


def test_without_spin_one_line_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")

    assert check.missing_tools() == (
        "spin and gcc not found: install the Debian packages spin and gcc (apt-get install spin gcc)"
    )
