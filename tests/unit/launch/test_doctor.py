"""demix doctor: what it tries, what it takes for a problem, and its exit code."""

from __future__ import annotations

import importlib.metadata
import json
import re

import pytest

from megatron_demix.cli import main
from megatron_demix.launch import doctor


@pytest.fixture
def installed(monkeypatch):
    """installed(name, version, needs): a package that is not there, as if it were; version None hides one that is."""
    real_version, real_requires = importlib.metadata.version, importlib.metadata.requires
    versions, requirements = {}, {}

    def version(name):
        if versions.get(name, "") is None:
            raise importlib.metadata.PackageNotFoundError(name)
        return versions.get(name) or real_version(name)

    monkeypatch.setattr(importlib.metadata, "version", version)
    monkeypatch.setattr(importlib.metadata, "requires", lambda name: requirements.get(name) or real_requires(name))

    def install(name, version, needs=()):
        versions[name] = version
        if needs:
            requirements[name] = list(needs)

    return install


def found(name):
    return doctor._package(next(p for p in doctor._PACKAGES if p.distribution == name))


def test_versions_fit_by_what_packages_require(installed):
    installed("megatron-core", "0.16.1", ["transformer-engine[pytorch]<2.12.0,>=2.9.0a0; extra == 'dev'"])
    installed("transformer-engine", "2.10.0")
    assert found("transformer-engine").state == "installed"
    installed("transformer-engine", "2.13.0")
    misfit = found("transformer-engine")
    assert (misfit.state, misfit.is_problem) == ("misfit", True)
    assert misfit.found == "2.13.0, but megatron-core 0.16.1 needs <2.12.0,>=2.9.0a0"
    assert misfit.advice == "pip install 'transformer-engine<2.12.0,>=2.9.0a0'"
    installed("megatron-core", "0.14.0")
    assert "but megatron-demix" in found("megatron-core").found


def test_what_is_absent_is_a_problem_only_where_it_is_needed(installed):
    installed("lightgbm", None)
    optional = found("lightgbm")
    assert (optional.state, optional.is_problem) == ("absent", False)
    assert optional.advice == "pip install 'megatron-demix[search]'"
    installed("megatron-core", None)
    assert found("megatron-core").is_problem


def test_the_core_is_tried(monkeypatch):
    assert doctor._compiled_core().state == "works"
    monkeypatch.setenv("MEGATRON_DEMIX_ISA", "mmx")
    broken = doctor._compiled_core()
    assert (broken.state, broken.is_problem) == ("broken", True)
    assert "Unset it or choose one" in broken.advice


def test_a_trial_that_fails_says_how():
    assert doctor._try("print('a'); print('b')") == doctor._Tried(True, "b")
    tried = doctor._try("raise RuntimeError('libcudart.so: no such file')")
    assert (tried.ok, tried.found) == (False, "RuntimeError: libcudart.so: no such file")
    assert doctor._try("import os; os._exit(3)").found == "ended with exit code 3"


def test_devices_as_they_are_reported(monkeypatch):
    facts = {"cuda": "13.0", "devices": ["H100", "H100"], "nccl": "2.27.3", "multiplies": True, "merge": "broken"}
    monkeypatch.setattr(doctor, "_try", lambda code: doctor._Tried(True, json.dumps(facts)))
    lines = {f.name: f for f in doctor._devices()}
    assert lines["CUDA"].found == "13.0: 2 x H100"
    assert lines["CUDA merge"].is_problem
    facts |= {"devices": []}
    absent = next(iter(doctor._devices()))
    assert (absent.state, absent.advice) == ("absent", "if this machine has a GPU: install its driver")
    monkeypatch.setattr(doctor, "_try", lambda code: doctor._Tried(False, "ImportError: libtorch_cuda.so"))
    assert next(iter(doctor._devices())).is_problem


def test_the_command(monkeypatch, capsys):
    findings = [doctor.Finding("python", "works", "3.11", "everything", needed=True)]
    monkeypatch.setattr(doctor, "examine", lambda: findings)
    assert main(["doctor"]) == 0
    assert "everything that is needed works" in capsys.readouterr().out
    findings.append(doctor.Finding("apex", "broken", "ImportError: [amp_C]", "fused Adam", "build it"))
    assert main(["doctor"]) == 2
    said = capsys.readouterr().out
    assert "to repair: apex" in said
    assert "[amp_C]" in said
    assert main(["doctor", "--json"]) == 2
    assert json.loads(capsys.readouterr().out)[1]["state"] == "broken"


def test_all_of_it_runs_here():
    names = [f.name for f in doctor.examine()]
    assert len(names) == len(set(names))
    assert {"torch", "megatron-core", "compiled core", "CUDA", "CUDA merge", "SLURM", "apex (NVIDIA's)"} <= set(names)


def test_every_extra_is_looked_at():
    """Of [data] all but what datatrove alone needs, or a tool that trains a model."""
    lines = importlib.metadata.requires("megatron-demix") or []
    named = {re.split(r"[^\w.-]", line)[0] for line in lines if re.search(r"extra == .(data|search|te|eval|hf).$", line)}
    assert named - {p.distribution for p in doctor._PACKAGES} <= {"orjson", "kaldingram"}
