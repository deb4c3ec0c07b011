"""The command of an engine can be built where the engine is not installed."""

from __future__ import annotations

import subprocess
import sys


def test_building_a_command_imports_no_engine():
    code = """
import sys
import crosstrim.engines.sglang.launch, crosstrim.engines.sglang.slots, crosstrim.engines.vllm.launch
assert not {"sglang", "vllm"} & set(sys.modules)
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
