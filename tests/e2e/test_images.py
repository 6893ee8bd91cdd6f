"""The images as pods run them: uid 1000, a read-only root, the entry point and environment of their Dockerfiles."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest

from tests.cluster import images
from tests.cluster.kind import KindCluster
from tests.e2e.conftest import User

TRITON = """
import os, pathlib
from triton.runtime.build import compile_module_from_src
source = '''
#include <Python.h>
static PyObject *answer(PyObject *self, PyObject *args) { return PyLong_FromLong(42); }
static PyMethodDef methods[] = {{"answer", answer, METH_NOARGS, ""}, {NULL, NULL, 0, NULL}};
static struct PyModuleDef module = {PyModuleDef_HEAD_INIT, "launcher", NULL, -1, methods};
PyMODINIT_FUNC PyInit_launcher(void) { return PyModule_Create(&module); }
'''
print(compile_module_from_src(src=source, name="launcher", library_dirs=[], include_dirs=[], libraries=[]).answer())
print(bool(list(pathlib.Path(os.environ["TRITON_CACHE_DIR"]).rglob("launcher*.so"))))
"""
STACK = """
import pathlib, sys
from importlib.util import cache_from_source
import torch, trl, peft, deepspeed, transformers, datasets, accelerate, bitsandbytes, liger_kernel
modules = [m for m in list(sys.modules.values()) if str(getattr(m, "__file__", "")).startswith("/opt/finetune/site-packages")]
lacking = [m.__name__ for m in modules if str(m.__file__).endswith(".py") and not pathlib.Path(cache_from_source(m.__file__)).exists()]
print(len(modules) > 1000, lacking)
"""


@pytest.fixture(scope="module")
def shell(prepared: User) -> Iterator[User]:
    """A pod of the trainer's image that waits, as restricted as those of a job."""
    container = {
        "name": "shell",
        "image": images.trainer().reference,
        "command": ["sleep", "600"],
        "securityContext": {"allowPrivilegeEscalation": False, "readOnlyRootFilesystem": True, "capabilities": {"drop": ["ALL"]}},
        "volumeMounts": [{"name": "tmp", "mountPath": "/tmp"}],
    }
    security = {"runAsNonRoot": True, "seccompProfile": {"type": "RuntimeDefault"}}
    spec = {"containers": [container], "securityContext": security, "volumes": [{"name": "tmp", "emptyDir": {}}], "restartPolicy": "Never"}
    prepared.apply({"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "shell"}, "spec": spec})
    prepared.kubectl("wait", "--for=condition=Ready", "pod/shell", "--timeout=60s")
    yield prepared
    prepared.kubectl("delete", "pod", "shell", "--wait=false", "--grace-period=0", "--force")


def said(shell: User, script: str) -> list[str]:
    return shell.kubectl("exec", "shell", "--", "python3", "-c", script).strip().splitlines()


def test_a_c_extension_is_compiled_as_triton_does(shell: User) -> None:
    """At the first step of TRL's own loss on a GPU: a compiler, Python's headers, a cache that can be written."""
    assert said(shell, TRITON)[-2:] == ["42", "True"]


def test_the_stack_is_whole_and_compiled(shell: User) -> None:
    """What is not compiled costs each process of each container a dozen core-seconds, again and again."""
    assert said(shell, STACK)[-1] == "True []"


def test_the_user_cannot_write_outside_tmp(shell: User) -> None:
    script = "import os; print(os.getuid(), os.getgid(), [p for p in ('/', '/opt/finetune', '/home/finetune') if os.access(p, os.W_OK)])"
    assert said(shell, script)[-1] == "1000 1000 []"


def _config(image: images.Image) -> dict[str, Any]:
    return dict(json.loads(image.config)["config"])


def test_what_the_dockerfiles_say_is_what_runs(prepared: User) -> None:
    """User, entry point and environment come from the Dockerfiles; a change of code moves kilobytes; the operator's image is small."""
    if isinstance(prepared.cluster, KindCluster):
        pytest.skip("Docker built them")
    for image, module in ((images.operator(), "finetune_operator"), (images.trainer(), "finetune_trainer")):
        config = _config(image)
        assert (config["User"], config["Entrypoint"]) == ("1000:1000", ["python3", "-m", module])
        assert sum(size for _, size in image.layers[-2:]) < 2_000_000, "our code is the top layers"
    gpu = {"NVIDIA_VISIBLE_DEVICES=all", "NVIDIA_DRIVER_CAPABILITIES=compute,utility"}
    assert gpu <= set(_config(images.trainer())["Env"])
    assert images.operator().size < 250e6
