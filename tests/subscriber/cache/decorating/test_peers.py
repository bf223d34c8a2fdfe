"""The tests of cachetools and async-lru, from their source distributions, pass with our decorator but for what we list.

The distributions are downloaded, in the versions and with the hashes of requirements/.
"""

import os
import re
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
from tests.support.paths import ROOT
from tests.support.peer_suites import outcomes_of

DIFFERENCES: dict[str, dict[str, str]] = {
    "cachetools": {
        "no `lock=` and `condition=`": r"test_(decorator_)?(clear_)?(zero_size_cache_decorator_)?\w*(lock|cond)",
        "no attributes `cache`, `cache_key`, `cache_lock`": r"test_decorator_attributes|test_stacked_decorators",
        "counters are those of the whole cache": r"_info$|test_decorator_method|_override$|test_shared_cache",
        "a bound method has a bound `__wrapped__`": r"MethodTest::test_(decorator_)?(wrapped|repr|wrapped_method)$",
        "a method is made anew at each access": r"test_decorator_(slots|immutable_dict)|test_class_access_alias",
        "caches, and objects that have one, are not copied": r"pickle|deepcopy",
        "a mapping has to be one": r"::(CustomCache|InvalidCache|NoneMethod)Test::",
        "class methods, aliases and wrong keys": r"::ClassMethodTest::|_no_set_name|_different_names|_wrapper_error",
        "`self` cannot be passed as a keyword": r"test_class_call_keyword_receiver|test_self_keyword",
        "a function without a signature is refused": r"test_copy_partial",
    },
    "async-lru": {
        "a cache is not closed, and not bound": r"test_close|test_thread_safety",
        "no `jitter=`, no `functools.partialmethod`": r"jitter|test_partialmethod",
        "a key may be any text": r"test_key_(unhashable_result|not_callable|with_typed_raises)",
        "is not given to a key function": r"test_key_on_method",
        "callers that share a load count as misses": r"test_alru_cache_zero_max_size",
        "no attributes `cache`": r"removing_lru|dict_not_shared|clear_(ttl_callback|pending_task)|annotation_attr",
    },
}
SUITES = {
    "cachetools": ("cachetools", ["tests/test_cached.py", "tests/test_cachedmethod.py"], 40),
    # Its internals are its own.
    "async-lru": ("async_lru", ["tests", "--ignore=tests/test_internals.py"], 55),
}


def unpacked(project: str, folder: Path) -> Path:
    """Download the source distribution of the locked version, and unpack it. Skips the test if that is impossible."""
    locked = (ROOT / "requirements" / "dev.txt").read_text()
    found = re.search(rf"^{project}==\S+ (\\\n +--hash=\S+ ?)+", locked, re.MULTILINE)
    assert found is not None, f"expected {project} in requirements/dev.txt"
    (folder / "requirement.txt").write_text(found[0].rstrip(" \\\n") + "\n")
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-binary=:all:", "--require-hashes"]
    command += ["--no-build-isolation", "--disable-pip-version-check", "--retries=1", "--dest", str(folder)]
    command += ["--requirement", str(folder / "requirement.txt")]
    ran = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    if ran.returncode:
        pytest.skip(f"the source distribution of {project} cannot be downloaded: {ran.stderr[-300:]}")
    [archive] = folder.glob("*.tar.gz")
    with tarfile.open(archive) as packed:
        packed.extractall(folder, filter="data")
    [unpacked] = (path for path in folder.iterdir() if path.is_dir())
    return unpacked


@pytest.mark.timeout(240)
@pytest.mark.parametrize("project", SUITES)
def test_the_tests_of_others_pass_but_for_the_differences_that_the_docs_list(project: str, tmp_path: Path) -> None:
    module, arguments, passed_min = SUITES[project]
    suite = unpacked(project, tmp_path)
    (tmp_path / "pytest.ini").write_text("[pytest]\n")
    command = [sys.executable, "-m", "pytest", "-c", str(tmp_path / "pytest.ini"), "--rootdir", str(suite), "-rA"]
    command += [
        "-p",
        "peer_suites",
        "-p",
        "no:xdist",
        "-p",
        "no:valkey",
        "--import-mode=importlib",
        "--tb=no",
        "--timeout=20",
    ]
    environment = {**os.environ, "BROADCACHE_PEER": module, "PYTHONPATH": str(ROOT / "tests" / "support")}
    ran = subprocess.run(
        [*command, *arguments], cwd=suite, env=environment, capture_output=True, text=True, check=False, timeout=200
    )
    outcomes = dict(outcomes_of(ran.stdout))
    failed = {test for test, outcome in outcomes.items() if outcome not in ("PASSED", "SKIPPED")}
    differences = DIFFERENCES[project]
    unlisted = {test for test in failed if not any(re.search(names, test) for names in differences.values())}
    assert unlisted == set(), ran.stdout[-3_000:]
    unused = {what for what, names in differences.items() if not any(re.search(names, test) for test in failed)}
    assert unused == set()
    assert sum(outcome == "PASSED" for outcome in outcomes.values()) >= passed_min, ran.stdout[-3_000:]


@pytest.mark.parametrize("project", SUITES)
def test_the_docs_list_each_difference(project: str) -> None:
    page = (ROOT / "docs" / "decorator.md").read_text()
    assert [what for what in DIFFERENCES[project] if what not in page] == []
