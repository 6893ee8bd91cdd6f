"""All that is built once and cached: Kubernetes, Kueue, images, environments, Debian's packages.

Before the tests, not within one of them: on a fresh machine this takes longer than a test may.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

from . import binaries, debian, environment, images, javascript, machine, store
from .quickstart import model


def everything() -> None:
    """Build what is absent. Raises CommandFailed."""
    machine.check()
    kind = machine.with_kind()
    debian.ensure({**debian.TESTS, **({} if kind else {**debian.RUNTIME, **debian.IMAGES})})
    with ThreadPoolExecutor(max_workers=1) as pool:  # what comes from the network while processors compile
        installed = pool.submit(_install)
        for name in (binaries.NEWEST, binaries.OLDEST, "kueue", *binaries.RUNTIME):
            binaries.ensure(name)
        installed.result()
    if not kind:
        store.ensure([images.pause(), *images.both(), images.vllm(), images.nginx()])


def _install() -> None:
    environment.site_packages("vllm")
    environment.mlflow()
    debian.unpacked("docker-registry")
    javascript.install()
    model("tiny.py", "tiny")
    images.both()
