"""The CUDA kernels, emulated on the CPU by `cuda_on_cpu`: the ops' own tests pass, planted mistakes are found."""

from __future__ import annotations

import re

import pytest

from tests.cuda_on_cpu import mutants, suite
from tests.cuda_on_cpu.build import HERE, ROOT, build, obstacle

pytestmark = pytest.mark.skipif(obstacle() is not None, reason=str(obstacle()))


def test_the_ops_tests_pass_on_the_cuda_kernels():
    failed, said = suite.run_all(build("plain"))
    assert not failed, said
    assert sum(map(int, re.findall(r"(\d+) passed", said))) > 150 and "skipped" not in said, said


def test_every_mistake_can_be_planted():
    for mutant in mutants.MUTANTS:
        file = next(path for path in (ROOT / "csrc" / mutant.file, HERE / mutant.file) if path.exists())
        assert file.read_text().count(mutant.before) == 1, mutant


@pytest.mark.slow
@pytest.mark.parametrize("mutant", mutants.MUTANTS, ids=[mutant.mistake for mutant in mutants.MUTANTS])
def test_a_planted_mistake_is_found(mutant):
    assert mutants.found(mutant, mutant.found_by[0])
