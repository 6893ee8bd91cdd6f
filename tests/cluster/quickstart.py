"""`make quickstart`: from nothing to a published adapter, on a Kubernetes of this machine."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

from . import helm, images, loader
from .__main__ import cluster
from .shell import CACHE, REPO, CommandFailed, digest_of, locked, run, say, step

NAMESPACE = "default"
JOB = "support-tickets"
EXAMPLES = REPO / "examples"


def model(script: str, name: str) -> Path:
    """A model that a script of examples/models makes; made once per content of the script."""
    source = EXAMPLES / "models" / script
    folder = CACHE / "models" / digest_of(source) / name
    with locked(f"model-{name}"):
        if not (folder / "model.safetensors").exists():
            folder.parent.mkdir(parents=True, exist_ok=True)
            with step(f"making the model {name} (once)"):
                run([sys.executable, source, folder])
            for file in folder.iterdir():
                file.chmod(0o644)
    return folder


def main() -> None:
    """Entry point."""
    started = time.monotonic()
    target = cluster()
    try:
        smollm2 = model("smollm2.py", "SmolLM2-135M-Instruct")
        target.up(load=images.both())
        helm.install(target.kubeconfig)

        def kubectl(*words: str, input: str | None = None) -> str:
            return target.kubectl("-n", NAMESPACE, *words, input=input)

        kubectl("delete", "finetunejob", JOB, "--ignore-not-found", "--wait")
        kubectl("apply", "-f", str(EXAMPLES / "volumes.yaml"))
        rows = [f"--from-file={EXAMPLES / 'data' / f'{name}.jsonl'}" for name in (JOB, f"{JOB}-held-out")]
        config_map = kubectl("create", "configmap", JOB, *rows, "--dry-run=client", "-o", "yaml")
        kubectl("apply", "-f", "-", input=config_map)
        with step("copying the model into the claim models"):
            loader.put(target, NAMESPACE, "models", smollm2)
        with loader.mounted(target, NAMESPACE, "published") as pod:  # an earlier quickstart's result is another job's
            kubectl("exec", pod, "--", "rm", "-rf", f"/volume/{JOB}")
        say(f"set-up took {time.monotonic() - started:.0f} s")
        print("$ kubectl apply -f examples/quickstart.yaml", flush=True)
        print(kubectl("apply", "-f", str(EXAMPLES / "quickstart.yaml")), end="", flush=True)
    except CommandFailed as failure:
        sys.exit(f"quickstart: {failure}")
    print(f"$ finetune watch {JOB}", flush=True)
    applied = time.monotonic()
    watch = [sys.executable, "-m", "finetune_cli", "watch", JOB, "-n", NAMESPACE, "--kubeconfig", str(target.kubeconfig)]
    code = subprocess.run(watch, check=False).returncode
    print("$ kubectl get finetunejobs", flush=True)
    print(target.kubectl("-n", NAMESPACE, "get", "finetunejobs", check=False), end="")
    if code == 0:
        took = time.monotonic() - applied
        with loader.mounted(target, NAMESPACE, "published", models="models") as pod:
            files = kubectl("exec", pod, "--", "ls", f"/volume/{JOB}").split()
            kubectl("cp", str(EXAMPLES / "data" / f"{JOB}-held-out.jsonl"), f"{NAMESPACE}/{pod}:/tmp/rows.jsonl")
            quietly = 'python3 - "$@" 2>/tmp/warnings || { cat /tmp/warnings; exit 1; }'
            words = ["sh", "-c", quietly, "ask", f"/models/{smollm2.name}", f"/volume/{JOB}", "/tmp/rows.jsonl"]
            print(f"$ python examples/ask.py models/{smollm2.name} published/{JOB} {JOB}-held-out.jsonl", flush=True)
            print(kubectl("exec", "-i", pod, "--", *words, input=(EXAMPLES / "ask.py").read_text()))
        print(f"\nThe adapter is in the claim 'published', folder '{JOB}': {', '.join(files)}")
        print(f"From apply to published: {took:.0f} s; everything: {(time.monotonic() - started) / 60:.1f} minutes.")
        print(
            f"Look around:  export KUBECONFIG={target.kubeconfig}\n              {os.path.relpath(REPO / '.venv/bin/kubectl')} describe finetunejob {JOB}"
        )
        print("Clean up:     make down")
    sys.exit(code)


if __name__ == "__main__":
    main()
