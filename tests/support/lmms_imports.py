"""What takes every run of lmms-eval seconds: its imports, and looking its own tasks up in a thousand files."""

from __future__ import annotations

import lmms_eval.__main__  # noqa: F401 - what the command line imports once it is called
from lmms_eval.tasks import TaskManager

_own = TaskManager().task_index
_look_up = TaskManager.initialize_tasks


def _initialize_tasks(manager, include_path=None, include_defaults=True):
    found = _look_up(manager, include_path, include_defaults=False)
    return {**found, **_own} if include_defaults else found


TaskManager.initialize_tasks = _initialize_tasks
