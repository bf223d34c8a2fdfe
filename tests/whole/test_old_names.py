"""Public names that were renamed work until 0.2, and say what to write instead."""

import importlib

import pytest


@pytest.mark.parametrize(
    ("package", "old", "new"),
    [
        ("broadcache.publisher", "Teller", "InvalidationSender"),
        ("broadcache.shared", "Outcome", "AddressOutcome"),
        ("broadcache.subscriber", "Outcome", "ApplyOutcome"),
    ],
)
def test_an_old_name_gives_what_has_the_new_one_and_warns_where_it_stands(package: str, old: str, new: str) -> None:
    module = importlib.import_module(package)
    with pytest.warns(DeprecationWarning, match=rf"{old} is now {package}\.{new}") as warned:
        assert getattr(module, old) is getattr(module, new)
    assert warned[0].filename == __file__
    assert old not in module.__all__


@pytest.mark.parametrize("package", ["broadcache.publisher", "broadcache.shared", "broadcache.subscriber"])
def test_a_name_that_never_was_is_still_an_error(package: str) -> None:
    with pytest.raises(AttributeError, match=f"module '{package}' has no attribute 'Nonsense'"):
        _ = importlib.import_module(package).Nonsense


@pytest.mark.parametrize(
    ("old", "new", "name"),
    [
        ("broadcache.publisher.diagnosis", "broadcache.publisher.doctor.diagnosis", "Diagnosis"),
        ("broadcache.publisher.metrics", "broadcache.publisher.telemetry.prometheus", "PublisherMetrics"),
        ("broadcache.shared.logs", "broadcache.shared.process.logs", "JsonFormatter"),
    ],
)
def test_an_old_path_that_the_docs_named_leads_to_the_new_one(old: str, new: str, name: str) -> None:
    with pytest.warns(DeprecationWarning, match=rf"{old} is now {new}"):
        assert getattr(importlib.import_module(old), name) is getattr(importlib.import_module(new), name)
