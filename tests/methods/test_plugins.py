"""Methods of other packages: the example as a user would build, install and run it, and what broken ones say."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import visibench
from visibench.errors import VisibenchError
from visibench.methods import registry

EXAMPLE = Path(visibench.__file__).parent / "examples" / "plugin"


def python(*arguments: object, path: Path, **options) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PYTHONPATH": str(path), "NO_COLOR": "1"}
    command = [sys.executable, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=280, env=environment, **options)


@pytest.fixture(scope="module")
def installed(tmp_path_factory) -> Path:
    """A folder into which pip has installed the example, built from a copy without network."""
    work = tmp_path_factory.mktemp("plugin")
    source = shutil.copytree(EXAMPLE, work / "source")
    offline = ["--no-index", "--no-deps", "--no-build-isolation", "--disable-pip-version-check"]
    done = python("-m", "pip", "install", *offline, "--target", work / "site", source, path=work)
    assert done.returncode == 0, done.stderr
    return work / "site"


@pytest.mark.slow
def test_example_is_listed(installed):
    done = python("-m", "visibench", "methods", "--json", path=installed)
    (stride,) = (method for method in json.loads(done.stdout) if method["name"] == "stride")
    assert stride["about"] == "Keep every n-th patch of each image."
    assert stride["examples"] == ["stride:n=3", "stride:n=2,positions=renumber"]
    meaning = "Of the patches of an image, in row-major order, the first of each ``n`` stays."
    assert stride["options"]["n"] == {"type": "int", "default": 2, "meaning": meaning}


@pytest.mark.slow
def test_example_runs(installed, tmp_path):
    command = ["run", "--model", "tiny", "--method", "stride:n=3", "--tasks", "pope", "--limit", 4, "--json"]
    done = python("-m", "visibench", *command, path=installed, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    (cell,) = json.loads(done.stdout)["cells"]
    assert cell["config"]["method"] == "stride"
    assert cell["visual_tokens"]["per_layer"] == [48] * len(cell["visual_tokens"]["per_layer"])


@pytest.mark.slow
def test_example_stands_every_test_of_a_method(installed):
    """As CONTRIBUTING.md says: with the package beside them, the tables hold its method too."""
    tests = [Path(__file__).parents[1] / name for name in ("methods/test_invariants.py", "evals/test_flops.py")]
    done = python("-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", "stride", *tests, path=installed)
    assert done.returncode == 0, done.stdout  # 5, had they found none


def publish(folder: Path, package: str, code: str) -> None:
    """Lay out a package with one entry point as an installer would, by hand."""
    module = package.replace("-", "_")
    (folder / f"{module}.py").write_text(code)
    record = folder / f"{module}-1.0.dist-info"
    record.mkdir()
    (record / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: 1.0\n")
    (record / "entry_points.txt").write_text(f"[visibench.methods]\nmine = {module}:Mine\n")


@pytest.fixture
def site(tmp_path, monkeypatch) -> Path:
    """A folder whose packages count as installed for the rest of the test, with a registry that has not looked yet."""
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(registry, "_methods", dict(registry._methods))
    monkeypatch.setattr(registry, "_plugins_loaded", False)
    yield tmp_path
    for file in tmp_path.glob("*.py"):
        sys.modules.pop(file.stem, None)


HEAD = "from visibench.methods import Method\nclass Mine(Method):\n    "


@pytest.mark.parametrize(
    ("code", "reason"),
    [
        ("import surely_missing", "ModuleNotFoundError: No module named 'surely_missing'"),
        ("Other = 1", "AttributeError: module 'their_package' has no attribute 'Mine'"),
        ("class Mine: ...", "<class 'their_package.Mine'> is not a class derived from visibench.methods.Method"),
        (f"{HEAD}pass", "their_package.Mine needs a title, and an identifier as its name"),
        (f"{HEAD}name, title = 'my:method', 'Mine'", "needs a title, and an identifier as its name"),
        (
            f"{HEAD}name, title = 'fastv', 'Mine'",
            "method 'fastv' is registered twice, by visibench.methods.fastv and their_package: rename one of them",
        ),
    ],
)
def test_broken_plugin_raises_one_line_that_names_its_package_each_time(site, code, reason):
    publish(site, "their-package", code)
    for _ in range(2):
        with pytest.raises(VisibenchError) as caught:
            visibench.list_methods()
        line = str(caught.value)
        assert line.startswith("the plug-in 'mine' (their_package:Mine) of package their-package 1.0 cannot be used: ")
        assert reason in line
        assert line.endswith("Fix, update or uninstall that package")


def test_two_plugins_of_one_name_name_each_other(site):
    for package in ("package-a", "package-b"):
        publish(site, package, f"{HEAD}name, title = 'mine', 'Mine'")
    with pytest.raises(VisibenchError, match=r"package_a and package_b|package_b and package_a"):
        visibench.list_methods()


def test_command_line_prints_that_line_and_nothing_else(tmp_path):
    publish(tmp_path, "their-package", "import surely_missing")
    done = python("-m", "visibench", "methods", path=tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: the plug-in 'mine' (their_package:Mine) of package their-package 1.0 cannot be used")
