"""What is learned, and how."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from ..base import APIModel, Rule, Unique
from ..scalars import PlainName
from ..uris import AdapterURI, EndpointURL
from .common import SecretReference
from .model import Endpoint, Model

Objective = Literal["sft", "pretrain", "dpo", "kto", "orpo", "reward", "grpo", "distill"]
Method = Literal["full", "partial", "lora", "qlora", "dora", "rslora", "ia3", "prompt", "prefix", "p-tuning"]
WHOLE_MODEL_METHODS: tuple[Method, ...] = ("full", "partial")
"""Methods that change the model's own weights: the result is a model, not an adapter."""
LORA_METHODS: tuple[Method, ...] = ("lora", "qlora", "dora", "rslora")
VIRTUAL_TOKEN_METHODS: tuple[Method, ...] = ("prompt", "prefix", "p-tuning")
"""Methods that put learned vectors in front of the sequence or of the layers' attention: they cannot be merged."""
PREFERENCE_OBJECTIVES: tuple[Objective, ...] = ("dpo", "orpo", "reward")
"""Objectives that learn from pairs of a chosen and a rejected answer."""


class Lora(APIModel):
    """Low-rank adaptation, https://arxiv.org/abs/2106.09685."""

    rank: Annotated[int, Field(ge=1, le=1024)] = 16
    """Rank of the update matrices."""
    alpha: Annotated[int, Field(ge=1, le=4096)] = 32
    """Scaling numerator; the update is scaled by alpha / rank (alpha / sqrt(rank) for rslora)."""
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.05
    """Dropout on the input of the adapter; 0 where the experts of a mixture are adapted, which have none."""
    target_modules: Annotated[list[PlainName], Field(min_length=1, max_length=64), Unique()] = ["all-linear"]
    """Module names that get an adapter; `all-linear` means every linear layer that an adapter can change, except the output head."""
    plus_ratio: Annotated[float, Field(ge=1, le=256)] | None = None
    """LoRA+ (https://arxiv.org/abs/2402.12354): learning rate of the B matrices as a multiple of learningRate, for example 16."""

    RULES = (
        Rule(
            cel="!self.targetModules.exists(m, m == 'all-linear') || size(self.targetModules) == 1",
            message="lora.targetModules: 'all-linear' stands alone; remove it or the module names beside it",
            holds=lambda m: "all-linear" not in m.target_modules or len(m.target_modules) == 1,
        ),
    )


class Partial(APIModel):
    """Which weights learn; all others are frozen."""

    last_layers: Annotated[int, Field(ge=0, le=1024)] = 2
    """So many of the last transformer layers, with the final norm and the output head."""
    modules: Annotated[list[PlainName], Field(max_length=64), Unique()] = []
    """Also every parameter whose name contains one of these, for example `mlp.down_proj`."""
    embeddings: bool = False
    """Also the token embeddings."""
    norms: bool = False
    """Also all normalisation layers."""

    RULES = (
        Rule(
            cel="self.lastLayers > 0 || size(self.modules) > 0 || self.embeddings || self.norms",
            message="tuning.partial leaves nothing to learn; set lastLayers, modules, embeddings or norms",
            holds=lambda m: m.last_layers > 0 or bool(m.modules) or m.embeddings or m.norms,
        ),
    )


class VirtualTokens(APIModel):
    """Settings of prompt (https://arxiv.org/abs/2104.08691), prefix (https://arxiv.org/abs/2101.00190) and p-tuning."""

    count: Annotated[int, Field(ge=1, le=1024)] = 20
    """Learned vectors in front."""


class EarlyStopping(APIModel):
    """Stop when the loss on the held-out rows no longer falls, and keep the best checkpoint."""

    patience: Annotated[int, Field(ge=1, le=1000)] = 3
    """Evaluations without improvement before the run stops."""
    min_delta: Annotated[float, Field(ge=0, le=10)] = 0.0
    """Smallest fall of the loss that counts as an improvement."""
    every_steps: Annotated[int, Field(ge=1, le=1_000_000)] = 50
    """Optimizer steps between evaluations."""


class Hyperparameters(APIModel):
    """How the training runs. Names follow Hugging Face's TrainingArguments where there is one."""

    epochs: Annotated[float, Field(gt=0, le=1000)] = 3
    """Passes over the training rows. Ignored when maxSteps is set."""
    max_steps: Annotated[int, Field(ge=1, le=100_000_000)] | None = None
    """Optimizer steps to run instead of epochs."""
    learning_rate: Annotated[float, Field(gt=0, le=1)] = 2e-4
    """Peak learning rate. Typical: 1e-4 to 3e-4 for LoRA, 1e-5 to 5e-5 for full fine-tuning, 5e-7 to 5e-6 for DPO, 1e-3 and more for prompt tuning."""
    optimizer: Literal["adamw", "adamw-8bit", "paged-adamw-8bit", "adafactor", "sgd"] = "adamw"
    """Optimizer; the 8-bit ones keep their state in a quarter of the memory (bitsandbytes)."""
    lr_scheduler_type: Literal[
        "linear", "cosine", "cosine_with_restarts", "polynomial", "constant", "constant_with_warmup", "inverse_sqrt"
    ] = "cosine"
    """Learning-rate schedule."""
    warmup_ratio: Annotated[float, Field(ge=0, lt=1)] = 0.03
    """Share of the steps spent warming the learning rate up."""
    weight_decay: Annotated[float, Field(ge=0, le=1)] = 0.0
    """AdamW weight decay."""
    max_grad_norm: Annotated[float, Field(gt=0, le=1000)] = 1.0
    """Gradient clipping norm."""
    global_batch_size: Annotated[int, Field(ge=1, le=1_000_000)] = 16
    """Rows per optimizer step over all workers; kept by gradient accumulation whatever the world size."""
    max_length: Annotated[int, Field(ge=16, le=1_048_576)] = 2048
    """Longest row in tokens."""
    packing: bool = False
    """Pack several short rows into one sequence of maxLength tokens; rows in one sequence do not see each other. With attention auto, where no kernel keeps them apart without a mask (CPUs, some models), rows are sorted by length instead."""
    gradient_checkpointing: bool | None = None
    """Recompute activations in the backward pass: less memory, about a third more time. Unset: only where the plan needs it to fit."""
    precision: Literal["auto", "bf16", "fp16", "fp32"] = "auto"
    """Precision of the computation; `auto` is bf16 where the GPU has it, else fp16, and fp32 on CPU."""
    attention: Literal["auto", "sdpa", "flash-attention-2", "eager"] = "auto"
    """Attention kernel; `auto` is flash-attention-2 when the image and the GPU have it, else PyTorch's own: varlen for rows without padding (sft and pretrain), sdpa for all others."""
    fused_kernels: Literal["auto", "off"] = "auto"
    """Liger kernels, used on a GPU for the models that Liger knows; `off` never uses them."""
    torch_compile: bool = False
    """Compile the model with torch.compile: slower to start, faster steps on GPUs."""
    neftune_noise_alpha: Annotated[float, Field(gt=0, le=100)] | None = None
    """NEFTune (https://arxiv.org/abs/2310.05914): noise on the embeddings, for example 5."""
    early_stopping: EarlyStopping | None = None
    """Stop when the held-out loss no longer falls. Needs dataset.eval."""
    seed: Annotated[int, Field(ge=0, le=4_294_967_295)] = 42
    """Seed of data order, initialisation and splits. The same seed gives the same order whatever the world size."""


class Preference(APIModel):
    """Settings of dpo (https://arxiv.org/abs/2305.18290), kto (https://arxiv.org/abs/2402.01306) and orpo (https://arxiv.org/abs/2403.07691)."""

    beta: Annotated[float, Field(gt=0, le=10)] = 0.1
    """Strength of the pull towards the reference model (dpo, kto), weight of the odds ratio (orpo)."""
    loss_type: Literal["sigmoid", "hinge", "ipo"] = "sigmoid"
    """Loss of dpo; `ipo` resists over-fitting to the preferences (https://arxiv.org/abs/2310.12036)."""


class Reward(APIModel):
    """A verifiable reward in 0..1 of a generated answer."""

    type: Literal["exact-match", "regex", "json-schema", "length"]
    """exact-match: equals the row's answer (answer, solution, completion or the assistant's last turn); regex: the whole answer matches; json-schema: valid by the schema; length: at most maxCharacters."""
    weight: Annotated[float, Field(gt=0, le=100)] = 1.0
    """Weight in the sum of the rewards."""
    pattern: Annotated[str, Field(min_length=1, max_length=2048)] | None = None
    """Regular expression for type regex."""
    json_schema: Annotated[str, Field(min_length=2, max_length=32_768)] | None = None
    """JSON Schema, as JSON text, for type json-schema."""
    max_characters: Annotated[int, Field(ge=1, le=1_000_000)] | None = None
    """Longest answer for type length; beyond it the reward falls linearly to 0 at twice the length."""

    RULES = (
        Rule(
            cel="(self.type == 'regex') == has(self.pattern) && (self.type == 'json-schema') == has(self.jsonSchema) && (self.type == 'length') == has(self.maxCharacters)",
            message="tuning.grpo.rewards: type regex takes pattern, json-schema takes jsonSchema, length takes maxCharacters, exact-match none of them",
            holds=lambda m: (
                (m.type == "regex") == (m.pattern is not None)
                and (m.type == "json-schema") == (m.json_schema is not None)
                and (m.type == "length") == (m.max_characters is not None)
            ),
        ),
    )


class Grpo(APIModel):
    """Group-relative policy optimisation, https://arxiv.org/abs/2402.03300, with verifiable rewards."""

    rewards: Annotated[list[Reward], Field(min_length=1, max_length=8)]
    """Rewards, summed by weight; an empty answer earns nothing."""
    generations: Annotated[int, Field(ge=2, le=256)] = 8
    """Answers sampled per prompt; globalBatchSize counts answers and must be a multiple of it."""
    max_new_tokens: Annotated[int, Field(ge=1, le=32_768)] = 256
    """Longest sampled answer in tokens."""
    temperature: Annotated[float, Field(gt=0, le=5)] = 1.0
    """Sampling temperature."""
    beta: Annotated[float, Field(ge=0, le=10)] = 0.0
    """Weight of the divergence from the base model; 0 needs no reference model."""


class Distillation(APIModel):
    """Learning from a teacher: from its logits, or from answers that it writes."""

    teacher: Model | None = None
    """The teacher model; it must share the student's vocabulary when mode is logits."""
    endpoint: Endpoint | None = None
    """The teacher behind an OpenAI-compatible server; mode generate only."""
    mode: Literal["logits", "generate"] = "logits"
    """logits: match the teacher's distribution on the rows' answers; generate: prepare asks the teacher for the answers, the student learns them."""
    temperature: Annotated[float, Field(gt=0, le=20)] = 2.0
    """Softens both distributions in mode logits (https://arxiv.org/abs/1503.02531)."""
    alpha: Annotated[float, Field(ge=0, le=1)] = 0.5
    """Weight of the rows' own answers beside the teacher's distribution in mode logits."""
    max_new_tokens: Annotated[int, Field(ge=1, le=32_768)] = 512
    """Longest answer the teacher writes in mode generate."""

    RULES = (
        Rule(
            cel="has(self.teacher) != has(self.endpoint)",
            message="tuning.distillation takes exactly one of teacher and endpoint; set one and remove the other",
            holds=lambda m: (m.teacher is None) != (m.endpoint is None),
        ),
        Rule(
            cel="self.mode == 'generate' || has(self.teacher)",
            message="tuning.distillation.mode logits needs teacher: an endpoint gives no logits; set teacher, or mode to generate",
            holds=lambda m: m.mode == "generate" or m.teacher is not None,
        ),
    )


class MLflow(APIModel):
    """Where MLflow listens."""

    tracking_uri: EndpointURL
    """Address of the tracking server."""
    experiment: Annotated[str, Field(min_length=1, max_length=256)] = "finetune"
    """Name of the experiment."""
    secret_ref: SecretReference | None = None
    """Secret with the server's bearer token."""


class WandB(APIModel):
    """Weights & Biases."""

    project: Annotated[str, Field(min_length=1, max_length=128)]
    """Name of the project."""
    entity: Annotated[str, Field(max_length=128)] = ""
    """Team or user."""
    secret_ref: SecretReference
    """Secret with the API key."""


class Tracking(APIModel):
    """Experiment trackers. The full history is always in `reports/history.jsonl` of the workspace, whatever is set here."""

    mlflow: MLflow | None = None
    """Log to an MLflow tracking server."""
    wandb: WandB | None = None
    """Log to Weights & Biases."""
    tensorboard: bool = False
    """Write TensorBoard events to `reports/tensorboard` of the workspace."""


class Tuning(APIModel):
    """What is learned, and how."""

    objective: Objective = "sft"
    """`sft` answers, `pretrain` plain text, `dpo`/`orpo` preferred over rejected answers, `kto` good and bad answers, `reward` a reward model, `grpo` by verifiable rewards, `distill` from a teacher."""
    method: Method = "lora"
    """`full` every weight, `partial` some layers, `lora`/`qlora`/`dora`/`rslora` low-rank adapters, `ia3`, `prompt`/`prefix`/`p-tuning` learned vectors. docs/methods.md compares them."""
    lora: Lora | None = None
    """Settings of the adapter; only with method lora, qlora, dora or rslora."""
    partial: Partial | None = None
    """Which weights learn; only with method partial."""
    virtual_tokens: VirtualTokens | None = None
    """Settings of the learned vectors; only with method prompt, prefix or p-tuning."""
    continue_from: AdapterURI | None = None
    """Start from an earlier adapter of the same method, `model://FINETUNEDMODEL[@VERSION]`, `pvc://CLAIM/PATH`, `hf://ORG/ADAPTER`, `s3://BUCKET/PREFIX`, `oci://HOST/REPOSITORY[:TAG]` or `mlflow://HOST/MODEL[@ALIAS]`; its own settings are used."""
    continue_from_secret_ref: SecretReference | None = None
    """Secret for that adapter, as `model.secretRef` is for the base; an hf:// adapter without one is read with the token of the base."""
    continue_from_s3_endpoint: EndpointURL | None = None
    """Address of an S3-compatible server; unset means the administrator's, or AWS. Only with an s3:// adapter."""
    continue_from_plain_http: bool = Field(default=False, alias="continueFromPlainHTTP")
    """Speak HTTP without TLS with that registry (oci://) or server (mlflow://), which an administrator must allow."""
    preference: Preference | None = None
    """Settings of the preference loss; only with objective dpo, kto or orpo."""
    grpo: Grpo | None = None
    """Rewards and sampling; only, and always, with objective grpo."""
    distillation: Distillation | None = None
    """The teacher; only, and always, with objective distill."""
    assistant_only_loss: bool = True
    """Learn from answers alone: assistant turns of `messages`, completions of `prompt-completion`."""
    chat_template: Annotated[str, Field(min_length=1, max_length=65_536)] | None = None
    """Jinja chat template for a model whose tokenizer has none, or instead of its own. It is published with the result."""
    hyperparameters: Hyperparameters = Field(default_factory=Hyperparameters)
    """Learning rate, batch size, length and the like."""
    tracking: Tracking = Field(default_factory=Tracking)
    """MLflow, Weights & Biases, TensorBoard."""

    RULES = (
        Rule(
            cel="!has(self.lora) || self.method in ['lora', 'qlora', 'dora', 'rslora']",
            message="tuning.lora has no effect with this tuning.method; remove tuning.lora or set method to lora, qlora, dora or rslora",
            holds=lambda m: m.lora is None or m.method in LORA_METHODS,
        ),
        Rule(
            cel="!has(self.partial) || self.method == 'partial'",
            message="tuning.partial has no effect with this tuning.method; remove tuning.partial or set method to partial",
            holds=lambda m: m.partial is None or m.method == "partial",
        ),
        Rule(
            cel="!has(self.virtualTokens) || self.method in ['prompt', 'prefix', 'p-tuning']",
            message="tuning.virtualTokens has no effect with this tuning.method; remove it or set method to prompt, prefix or p-tuning",
            holds=lambda m: m.virtual_tokens is None or m.method in VIRTUAL_TOKEN_METHODS,
        ),
        Rule(
            cel="!(self.method in ['prompt', 'prefix', 'p-tuning', 'ia3']) || self.objective in ['sft', 'pretrain']",
            message="tuning.method prompt, prefix, p-tuning and ia3 work with objective sft and pretrain; set method to lora for this objective",
            holds=lambda m: m.method not in (*VIRTUAL_TOKEN_METHODS, "ia3") or m.objective in ("sft", "pretrain"),
        ),
        Rule(
            cel="!has(self.continueFrom) || !(self.method in ['full', 'partial']) && !has(self.lora) && !has(self.virtualTokens)",
            message="tuning.continueFrom goes on with an adapter and its own settings: remove tuning.lora and virtualTokens; for method full or partial set model.uri to the earlier model instead",
            holds=lambda m: (
                m.continue_from is None or (m.method not in WHOLE_MODEL_METHODS and m.lora is None and m.virtual_tokens is None)
            ),
        ),
        Rule(
            cel="!has(self.continueFromSecretRef) || (has(self.continueFrom) && !self.continueFrom.startsWith('pvc://') && !self.continueFrom.startsWith('model://'))",
            message="tuning.continueFromSecretRef is only used with an hf://, s3://, oci:// or mlflow:// uri in tuning.continueFrom; remove it or change that",
            holds=lambda m: m.continue_from_secret_ref is None or (m.continue_from or "pvc://").partition("://")[0] not in ("pvc", "model"),
        ),
        Rule(
            cel="!has(self.continueFromS3Endpoint) || (has(self.continueFrom) && self.continueFrom.startsWith('s3://'))",
            message="tuning.continueFromS3Endpoint is only used with an s3:// uri in tuning.continueFrom; remove it or change that",
            holds=lambda m: m.continue_from_s3_endpoint is None or (m.continue_from or "").startswith("s3://"),
        ),
        Rule(
            cel="!self.continueFromPlainHTTP || (has(self.continueFrom) && (self.continueFrom.startsWith('oci://') || self.continueFrom.startsWith('mlflow://')))",
            message="tuning.continueFromPlainHTTP is only used with an oci:// or mlflow:// uri in tuning.continueFrom; remove it or change that",
            holds=lambda m: not m.continue_from_plain_http or (m.continue_from or "").startswith(("oci://", "mlflow://")),
        ),
        Rule(
            cel="!has(self.preference) || self.objective in ['dpo', 'kto', 'orpo']",
            message="tuning.preference has no effect with this tuning.objective; remove it or set objective to dpo, kto or orpo",
            holds=lambda m: m.preference is None or m.objective in ("dpo", "kto", "orpo"),
        ),
        Rule(
            cel="has(self.grpo) == (self.objective == 'grpo')",
            message="tuning.grpo and objective grpo belong together; set tuning.grpo.rewards, or remove tuning.grpo",
            holds=lambda m: (m.grpo is not None) == (m.objective == "grpo"),
        ),
        Rule(
            cel="has(self.distillation) == (self.objective == 'distill')",
            message="tuning.distillation and objective distill belong together; set tuning.distillation.teacher, or remove tuning.distillation",
            holds=lambda m: (m.distillation is not None) == (m.objective == "distill"),
        ),
        Rule(
            cel="!self.hyperparameters.packing || (self.objective in ['sft', 'pretrain'] && !(self.method in ['prompt', 'prefix', 'p-tuning']))",
            message="tuning.hyperparameters.packing works with objective sft and pretrain, and not with prompt, prefix or p-tuning; set packing to false",
            holds=lambda m: not m.hyperparameters.packing or (m.objective in ("sft", "pretrain") and m.method not in VIRTUAL_TOKEN_METHODS),
        ),
        Rule(
            cel="!(has(self.hyperparameters.gradientCheckpointing) && self.hyperparameters.gradientCheckpointing && self.method == 'prefix')",
            message="tuning.method prefix cannot be combined with hyperparameters.gradientCheckpointing; set it to false or use another method",
            holds=lambda m: not (m.hyperparameters.gradient_checkpointing and m.method == "prefix"),
        ),
        Rule(
            cel="!has(self.grpo) || self.hyperparameters.globalBatchSize % self.grpo.generations == 0",
            message="tuning.hyperparameters.globalBatchSize counts sampled answers: make it a multiple of tuning.grpo.generations",
            holds=lambda m: m.grpo is None or m.hyperparameters.global_batch_size % m.grpo.generations == 0,
        ),
    )
