"""What the package promises whoever imports it."""

from __future__ import annotations

import subprocess
import sys

import crosstrim

PUBLIC = ["Answer", "CrosstrimError", "FeatureCache", "Session", "TrimConfig", "TrimHandle", "TrimReport"]
PUBLIC += ["calibrate", "compat", "errors", "load", "mini", "policies", "saliency", "select", "trim"]


def test_public_names():
    assert sorted(crosstrim.__all__, key=str) == PUBLIC
    assert all(hasattr(crosstrim, name) for name in PUBLIC)


def test_importing_waits_for_nothing():
    code = """
import sys
import crosstrim
assert not {"torch", "transformers", "crosstrim.trimming"} & set(sys.modules)
assert set(crosstrim.__all__) <= set(dir(crosstrim))
assert crosstrim.policies.PAPER == "union"
assert not hasattr(crosstrim, "no_such_name")
import crosstrim.method.choose
assert callable(crosstrim.saliency)
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "")


def test_using_it_is_lean_and_starts_nothing():
    code = """
import sys, threading, warnings
import torch, transformers.cache_utils
already = set(sys.modules)  # what torch and transformers bring along is theirs
warnings.simplefilter("error", UserWarning)
import crosstrim
assert all(getattr(crosstrim, name) for name in crosstrim.__all__ if name != "calibrate")  # which evaluates
heavy = ["typer", "rich", "matplotlib", "accelerate", "torchvision", "triton", "sklearn", "skimage"]
heavy += ["transformers.models.mllama.modeling_mllama", "transformers.modeling_utils"]
heavy += ["crosstrim.cli", "crosstrim.eval", "crosstrim.bench", "crosstrim.asking.overlay", "crosstrim.data", "PIL"]
heavy += ["crosstrim.asking.images", "crosstrim.engines", "crosstrim.batch", "crosstrim.server"]
heavy += ["ray", "fastapi", "uvicorn"]
loaded = [name for name in heavy if name in set(sys.modules) - already]
assert not loaded, loaded
assert not torch.cuda.is_initialized()
assert threading.active_count() == 1
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "")


def test_the_core_knows_nothing_of_what_is_built_on_it():
    """Imports point one way: the command line, evaluation and pictures use the core, never the reverse."""
    code = """
import importlib, sys
core = ["config", "memory", "capacity", "errors", "method.choose", "trimming.handle"]
core += ["asking.features", "asking.loading"]
core += [f"models.{name}" for name in ("compat", "memory", "parallel", "tiles", "vision")]
for name in core:
    importlib.import_module(f"crosstrim.{name}")
upper = ["crosstrim.cli", "crosstrim.eval", "crosstrim.bench", "crosstrim.asking.overlay", "crosstrim.asking.images"]
upper += ["crosstrim.asking.environment", "crosstrim.engines", "crosstrim.batch", "crosstrim.server"]
upper += ["crosstrim.data"]
assert not [name for name in upper if name in sys.modules]
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)
    assert (result.returncode, result.stderr) == (0, "")
