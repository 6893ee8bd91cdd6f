"""End together with the process that started this one: a killed parent must leave nothing that trains on."""

from __future__ import annotations

import os
import select
import threading

from finetune_api.contract import Env, ExitCode


def start() -> None:
    """Watch the process named in the environment from a thread of its own. Without one, or where the kernel cannot, do nothing."""
    pid = os.environ.get(Env.PARENT, "")
    if not pid.isdigit():
        return
    try:
        parent = os.pidfd_open(int(pid))
    except ProcessLookupError:
        os._exit(int(ExitCode.INFRASTRUCTURE))
    except (OSError, AttributeError):  # an old kernel, a sandbox without it, macOS
        return
    threading.Thread(target=_watch, args=(parent,), name="parent-watch", daemon=True).start()


def _watch(parent: int) -> None:
    watched = select.poll()
    watched.register(parent, select.POLLIN)  # a pidfd is readable once its process has ended (pidfd_open(2))
    while not watched.poll():
        pass
    os._exit(int(ExitCode.INFRASTRUCTURE))
