"""The model card's snippets run when they are pasted in the published folder: every block of it, offline."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from finetune_api.contract import JobFile
from finetune_api.spec import Lora
from finetune_api.validation import parse_spec
from finetune_trainer.export.usage import Usage
from finetune_trainer.stages.publish import publish
from tests.cluster.shell import REPO
from tests.factory import MINIMAL, merged
from tests.trainer.bases import copied
from tests.trainer.conftest import ROWS, Bench

HYPER = {"maxSteps": 2, "learningRate": 1e-2, "globalBatchSize": 8, "maxLength": 64}
SYSTEM = {"role": "system", "content": 'answer "yes" or no'}
WITH_SYSTEM = [{"messages": [SYSTEM, *row["messages"]]} for row in ROWS["messages"]]

#: what servers are told is looked at as they would: they are not installed here
SERVERS = {
    "vllm": """
import json, sys
from pathlib import Path
words = sys.argv[1:]
assert words[0] == "serve" and json.loads(Path(words[1], "config.json").read_text())["model_type"]
if "--enable-lora" in words:
    most = int(words[words.index("--max-lora-rank") + 1])
    assert most in (1, 8, 16, 32, 64, 128, 256, 320, 512), most
    name, _, folder = words[words.index("--lora-modules") + 1].partition("=")
    adapter = json.loads(Path(folder, "adapter_config.json").read_text())
    assert name and adapter["r"] <= most and not adapter["use_dora"], adapter
else:
    assert list(Path(words[1]).glob("model*.safetensors")), "a whole model"
""",
    "ollama": """
import sys
from pathlib import Path
words = sys.argv[1:]
if words[0] == "create":
    file = Path(words[words.index("-f") + 1])
    named = [line.split()[1] for line in file.read_text().splitlines() if line.split()[:1] in (["FROM"], ["ADAPTER"])]
    assert named and all((file.parent / name).read_bytes()[:4] == b"GGUF" for name in named), named
else:
    assert words[0] == "run" and len(words) == 3
""",
}


def blocks(card: str) -> list[tuple[str, str]]:
    """Language and text of every code block."""
    return re.findall(r"^```(\w*)\n(.*?)^```$", card, re.MULTILINE | re.DOTALL)


def offline() -> dict[str, str]:
    """The environment of somebody who has the trainer's packages and no hub."""
    return {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}


def paste(folder: Path, tools: Path) -> list[tuple[str, str]]:
    """Run every block of a card in its folder. Returns them with what they said."""
    tools.mkdir()
    for name, text in SERVERS.items():
        (tools / name).write_text(f"#!{sys.executable}\n{text}")
        (tools / name).chmod(0o755)
    (tools / "python").symlink_to(sys.executable)
    env = {**offline(), "PATH": f"{tools}:{os.environ['PATH']}"}
    env.pop("BASE_MODEL", None)
    said = []
    found = blocks((folder / "README.md").read_text())
    assert found
    for language, text in found:
        command = {"python": [sys.executable, "-c", text], "sh": ["sh", "-e", "-c", text]}[language]
        done = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, check=False)
        assert done.returncode == 0, f"{text}\n{done.stderr}"
        said.append((text, done.stdout))
    return said


def card_of(bench: Bench, rows: list[dict[str, Any]], **spec: Any) -> list[tuple[str, str]]:
    context = bench.context(rows, publish=[{"uri": "pvc://published/card"}], **spec)
    bench.train(context)
    publish(context)
    return paste(bench.folder / "published" / "card", bench.folder / "tools")


def test_an_adapter_of_conversations_with_a_system_text(bench: Bench) -> None:
    (python, said), (shell, _) = card_of(bench, WITH_SYSTEM, tuning={"lora": {"rank": 12, "dropout": 0}, "hyperparameters": HYPER})
    assert f'{{"role": "system", "content": {json_text(SYSTEM["content"])}}}' in python, "used as it was trained"
    assert said.strip() and "--max-lora-rank 16" in shell and 'job=$PWD"' in shell
    ask = [sys.executable, str(REPO / "examples" / "ask.py"), str(bench.model), str(bench.folder / "published" / "card")]
    answers = subprocess.run([*ask, str(bench.data / "train.jsonl")], env=offline(), capture_output=True, text=True, check=True).stdout
    assert [line.split(":")[0] for line in answers.splitlines()] == ["question", "base", "tuned", "right"]


def json_text(text: str) -> str:
    return '"' + text.replace('"', '\\"') + '"'


@pytest.mark.parametrize(
    ("rows", "spec"),
    [
        ("messages", {"tuning": {"method": "full", "hyperparameters": HYPER}}),
        ("text", {"tuning": {"method": "prompt", "hyperparameters": HYPER}}),
        (
            "messages",
            {"tuning": {"method": "dora", "lora": {"rank": 4, "dropout": 0}, "hyperparameters": HYPER}, "output": {"merged": True}},
        ),
        ("preference", {"tuning": {"objective": "reward", "lora": {"rank": 4, "dropout": 0}, "hyperparameters": HYPER}}),
    ],
    ids=["full", "text-prompt-vectors", "dora-merged", "reward"],
)
def test_other_results(bench: Bench, rows: str, spec: dict[str, Any]) -> None:
    said = card_of(bench, ROWS[rows], **spec)
    assert "PATH" not in "".join(text for text, _ in said)
    if spec["tuning"].get("objective") == "reward":
        assert float(said[0][1]) == pytest.approx(float(said[0][1])) and len(said) == 1


def test_an_adapter_that_goes_on_from_a_larger_one(bench: Bench) -> None:
    """Its rank is the earlier one's; and the tokenizer says more than the model takes."""
    bench.model = copied(bench.model, bench.folder / "tiny")
    told = json.loads((bench.model / "tokenizer_config.json").read_text())
    names = ["input_ids", "token_type_ids", "attention_mask"]
    (bench.model / "tokenizer_config.json").write_text(json.dumps({**told, "model_input_names": names}))
    tuning = {"lora": {"rank": 24, "dropout": 0}, "hyperparameters": HYPER}
    first = bench.context(ROWS["messages"], name="first", tuning=tuning, publish=[{"uri": "pvc://published/first"}])
    bench.train(first)
    publish(first)
    said = card_of(bench, ROWS["messages"], tuning={"continueFrom": "pvc://published/first", "hyperparameters": HYPER})
    assert "--max-lora-rank 32" in said[1][0]


def usage(uri: str, *, publish_to: str = "pvc://out/m", **blocks_of_spec: Any) -> str:
    secret = {"secretRef": {"name": "t"}} if publish_to.startswith("hf://") else {}
    spec = parse_spec(merged(MINIMAL, **{"model": {"uri": uri}, "publish": [{"uri": publish_to, **secret}], **blocks_of_spec}))
    adapter = {"r": (spec.tuning.lora or Lora()).rank}
    job = JobFile(name="j", namespace="n", uid="u", spec=spec)
    return "\n".join(Usage(job, {"path": "/home/me/models/it's mine"}, True, adapter=adapter).lines())


def test_where_the_base_is() -> None:
    hub = usage("hf://org/base@v1.0")
    assert 'from_pretrained(base, revision="v1.0")' in hub and 'base = "org/base"' in hub and "vllm serve org/base --revision v1.0" in hub
    here = usage("pvc://models/tiny")
    assert """os.environ.get("BASE_MODEL", "/home/me/models/it's mine")""" in here and "folder tiny of claim models" in here
    assert """BASE_MODEL=${BASE_MODEL:-'/home/me/models/it'"'"'s mine'}""" in here
    told = subprocess.run(
        ["sh", "-ec", """BASE_MODEL=${BASE_MODEL:-'/home/me/models/it'"'"'s mine'}; echo "$BASE_MODEL" """],
        capture_output=True,
        text=True,
        check=True,
    )
    assert told.stdout == "/home/me/models/it's mine\n"
    public = usage("pvc://models/tiny", publish_to="hf://org/m")
    assert "/home/me" not in public and 'base = os.environ["BASE_MODEL"]' in public and '"${BASE_MODEL:?}"' in public
    remote = usage("hf://org/base", model={"uri": "hf://org/base", "trustRemoteCode": True})
    assert "from_pretrained(base, trust_remote_code=True)" in remote
    assert "hf download org/base --local-dir base" in usage("hf://org/base", output={"ggufAdapter": True})
    wide = usage("hf://org/base", tuning={"lora": {"rank": 1024}})
    assert "vllm serve" not in wide and "vLLM loads no adapter of this kind; `output.merged: true`" in wide
    assert "vLLM loads no adapter of this kind." in usage("hf://org/base", tuning={"method": "prompt"}), "and nothing can be merged"
