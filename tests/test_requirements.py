"""The scripts of requirements/: what they write into locks, and where they let packages come from."""

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest
from packaging.requirements import Requirement

REQUIREMENTS = Path(__file__).parent.parent / "requirements"


def script(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, REQUIREMENTS / f"{name}.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


lock, install = script("lock"), script("install")


@pytest.mark.parametrize("name", ["demo", "test", "label"])
def test_locks_for_any_machine_leave_cuda_to_the_build_of_torch(name):
    pinned = [lock.name_of(line) for line in lock.read(f"{name}.lock")]
    assert "torch" in pinned
    assert not [package for package in pinned if package.startswith(("nvidia-", "cuda-"))]


@pytest.mark.parametrize(
    ("resolved", "line"),
    [
        ("a==1", "a==1"),
        ("a==1 ; python_full_version < '3.14' and sys_platform == 'linux' or sys_platform == 'darwin'", "a==1"),
        ("a==1 ; sys_platform == 'linux' and platform_machine == 'x86_64'", "a==1 ; sys_platform == 'linux'"),
        ("a==1 ; python_full_version < '3.13'", "a==1 ; python_version <= '3.12'"),
        (
            "a==1 ; python_full_version >= '3.13' and platform_system == 'Darwin'",
            "a==1 ; sys_platform == 'darwin' and python_version >= '3.13'",
        ),
    ],
)
def test_markers_say_only_what_makes_a_difference(resolved, line):
    assert lock.simplified(Requirement(resolved), ("linux", "darwin")) == line


def test_nothing_but_the_index_is_used(monkeypatch):
    monkeypatch.setenv("PIP_FIND_LINKS", "/wheels")
    monkeypatch.setenv("UV_INDEX", "https://example.org/simple")
    environment = lock.index_alone()
    assert "PIP_FIND_LINKS" not in environment and "UV_INDEX" not in environment
    assert environment["PIP_CONFIG_FILE"] == "/dev/null"


def test_uv_uses_what_pip_is_configured_to_use(monkeypatch, tmp_path):
    file = tmp_path / "pip.conf"
    file.write_text(
        "[global]\nindex-url = https://example.org/simple\nextra-index-url =\n    https://a/s\n    https://b/s\n"
    )
    for name in ("PIP_INDEX_URL", "PIP_EXTRA_INDEX_URL", "PIP_FIND_LINKS", "UV_INDEX", "UV_DEFAULT_INDEX"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PIP_CONFIG_FILE", str(file))
    monkeypatch.setenv("PIP_FIND_LINKS", "/wheels /more")
    environment = install.uv_environment()
    assert environment["UV_DEFAULT_INDEX"] == "https://example.org/simple"
    assert environment["UV_INDEX"] == "https://a/s https://b/s"
    assert environment["UV_FIND_LINKS"] == "/wheels,/more"
    monkeypatch.setenv("PIP_INDEX_URL", "https://other/simple")
    assert install.uv_environment()["UV_DEFAULT_INDEX"] == "https://other/simple"
    monkeypatch.setenv("UV_DEFAULT_INDEX", "https://uv/simple")
    assert install.uv_environment()["UV_DEFAULT_INDEX"] == "https://uv/simple"
