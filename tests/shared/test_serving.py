"""Serving an application of any kind, and what it costs to import."""

import json
import subprocess
import sys

import pytest
from tests.support.paths import ROOT

from broadcache.shared import InvalidSettings
from broadcache.shared.process import extras
from broadcache.shared.process.serving import AddressUnavailable, listen


def test_a_port_in_use_is_an_error_that_says_what_to_do() -> None:
    with listen("127.0.0.1", 0) as listener:
        port = listener.getsockname()[1]
        with pytest.raises(AddressUnavailable, match=rf"127\.0\.0\.1 port {port}: .* choose another port"):
            listen("127.0.0.1", port)


def test_an_address_of_another_machine_is_an_error() -> None:
    with pytest.raises(AddressUnavailable, match=r"192\.0\.2\.1"):
        listen("192.0.2.1", 0)


def test_without_uvicorn_serving_says_which_extra_installs_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(extras, "find_spec", lambda module: None)
    with pytest.raises(InvalidSettings, match=r"uvicorn.*pip install 'broadcache\[publisher\]'"):
        listen("127.0.0.1", 0)


def test_importing_the_server_loads_no_web_server_and_the_demo_replica_no_publisher() -> None:
    assert _loaded_by("import broadcache.shared.process.serving") & {"fastapi", "starlette", "uvicorn"} == set()
    loaded = _loaded_by(
        "import broadcache.cli.demo.replica_api; from broadcache.shared.process.serving import new_server; "
        "new_server(None, on_ready=print)"
    )
    assert "uvicorn" in loaded
    assert {name for name in loaded if name.startswith("broadcache.publisher")} == set()


def _loaded_by(statement: str) -> set[str]:
    program = f"{statement}; import json, sys; print(json.dumps(list(sys.modules)))"
    finished = subprocess.run(
        [sys.executable, "-I", "-c", program], capture_output=True, text=True, check=True, cwd=ROOT
    )
    return set(json.loads(finished.stdout))
