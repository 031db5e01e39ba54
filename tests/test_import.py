"""Importing stays light."""

from __future__ import annotations

import subprocess
import sys

import pytest

import l2p_fast


def loaded_after(statement: str) -> set[str]:
    code = f"import sys; {statement}; print(' '.join(sys.modules))"
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    return set(said.split())


def test_importing_the_package_loads_nothing_heavy():
    modules = loaded_after("import l2p_fast")
    heavy = {"torch", "diffusers", "transformers", "numpy", "PIL", "l2p_fast._build", "l2p_fast.ops"}
    assert "l2p_fast" in modules and not heavy & modules


def test_command_lines_answer_before_torch_is_loaded():
    assert "torch" not in loaded_after("import l2p_fast.sample, l2p_fast.info")


def test_ops_load_no_model_libraries():
    assert not {"diffusers", "transformers"} & loaded_after("import l2p_fast.ops")


def test_unknown_names_are_attribute_errors():
    with pytest.raises(AttributeError, match="no attribute 'Nothing'"):
        _ = l2p_fast.Nothing


def test_what_a_quick_start_leaves_out():
    code = (
        "from l2p_fast import startup; startup.hide_unused(); import gc, importlib.util, sys\n"
        "with startup.all_stays():\n"
        "    assert not gc.isenabled()\n"
        "    import l2p_fast.sampling.session, l2p_fast.loading\n"
        "assert gc.isenabled() and gc.get_freeze_count() > 100_000\n"
        "assert not any(importlib.util.find_spec(name) for name in startup.UNUSED)\n"
        "assert 'torch' in sys.modules and not any(sys.modules[name] for name in startup.UNUSED)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
