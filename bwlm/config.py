"""Settings of grids and runs, validated before anything runs.

`Recipe` holds the sections that a grid file and an experiment share. `Experiment` is one resolved run. The fields
that only a grid file has are in `bwlm.plan.spec`.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from bwlm.credentials import secrets_in
from bwlm.directions import DIRECTIONS, DirectionName, is_marked
from bwlm.phases import FIRST, PHASES, PhaseName

Reversal = Literal["whole", "turns"]
Inherited = Literal["direction", "reversal"]


NULL, PRODUCTS = CONTROL_SOURCES = ("builtin:null", "builtin:products")
MERGE_FREE_VOCABULARY = 264
"""Vocabulary of a tokenizer without merges: 256 bytes and 8 special tokens."""


def _hide_default(schema: dict[str, Any]) -> None:
    """Remove the default from a field's JSON Schema.

    The value of such a field, when it is left out, is resolved for each run, so no user ever gets the default.
    """
    schema.pop("default", None)


class Settings(BaseModel):
    """Base of all settings: frozen and strict, without unknown fields, NaN or infinity."""

    model_config = ConfigDict(frozen=True, strict=True, extra="forbid", allow_inf_nan=False, hide_input_in_errors=True)


Weight = Annotated[float, Field(gt=0, le=1000)]


class DataSettings(Settings):
    """Text to learn from: documents in the base phase, conversations in the later ones."""

    source: str = Field(
        "builtin:pydocs",
        description="folder, glob, file or URI of parquet, .jsonl, .txt, .md; builtin:pydocs, null, products, reversal",
        min_length=1,
    )
    text_column: str = Field(
        "text", min_length=1, description="column of parquet or .jsonl files that holds the documents"
    )
    validation: str | None = Field(
        None,
        description="validation files; default: files named for validation, else the last shard; 1 in 20 of .txt, .md",
    )
    shuffle: bool = Field(
        True, description="shuffle the documents of a shard, with its content as the seed; false: keep the file's order"
    )
    mixture: dict[str, Weight] = Field(
        default_factory=dict,
        description="mid, sft, rl: map from task or file to how often an epoch reads it; default: by phase",
        json_schema_extra=_hide_default,
    )
    skip_invalid: bool = Field(
        False, description="mid, sft: leave out conversations of files that cannot be used; false: refuse the file"
    )
    reversal: Reversal = Field(
        "whole",
        description="of a backward model. whole: conversations reversed, it writes questions; turns: it writes answers",
    )

    @property
    def mixture_words(self) -> str:
        """Mixture in words: `gsm8k x 2, talks.json x 0.5, invalid conversations left out`."""
        left_out = ["invalid conversations left out"] if self.mixture and self.skip_invalid else []
        return ", ".join([*(f"{name} x {weight:g}" for name, weight in self.mixture.items()), *left_out])


class TaskSettings(Settings):
    """Place of one task's data."""

    path: str | None = Field(None, description="folder, file or URI of the task's data; default: the hub's")


class TokenizerSettings(Settings):
    """Size of the tokenizer to train, or the folder of a trained one."""

    vocab_size: int = Field(
        4096,
        ge=MERGE_FREE_VOCABULARY,
        le=2**20,
        description="size of the vocabulary: bytes, special tokens and merges; 264: no merges, each byte is a token",
    )
    path: str | None = Field(None, description="folder of a trained tokenizer, instead of training one on the data")


class ModelSettings(Settings):
    """Shape of the model, besides its depth, and the reach of its attention."""

    sequence_length: int = Field(2048, ge=8, le=2**17, description="T, tokens of a row")
    head_dim: int = Field(
        64, ge=8, multiple_of=2, description="width of an attention head; the model is 64 x depth wide, in whole heads"
    )
    kv_heads: int | None = Field(None, ge=1, description="key/value heads; default: as many as query heads")
    document_mask: bool = Field(
        True,
        description="attention stays inside a segment, and positions start at 0 there. Default: true; mid: as parent",
    )


class OptimSettings(Settings):
    """Optimizer, and the schedule of its learning rates."""

    init_lr_frac: float = Field(
        1.0,
        gt=0,
        le=1000,
        description="multiplies all learning rates, besides lr; default: base and mid 1, sft 0.02, rl 0.05 (nanochat)",
        json_schema_extra=_hide_default,
    )
    kind: Literal["muon", "adamw"] = Field(
        "muon", description="muon: Muon for the hidden matrices, AdamW for the rest; adamw: AdamW for all"
    )
    weight_decay: float = Field(0.0, ge=0, description="weight decay of the blocks' matrices; falls to 0 over the run")
    warmup_steps: int | None = Field(
        None, ge=0, description="steps of warmup of the learning rates; default: 40, but at most a tenth of the run"
    )
    warmdown_ratio: float = Field(
        0.65, ge=0, le=0.9, description="fraction of the steps, at the end, over which the learning rates decay"
    )
    final_lr_frac: float = Field(0.05, ge=0, le=1, description="final learning rate as a share of the peak")
    grad_clip: float = Field(1.0, ge=0, description="largest global norm of the gradients; 0: no clipping")


HORIZONS = ("steps", "tokens", "flops", "tokens_per_parameter")


class BudgetSettings(Settings):
    """Length of the training, by exactly one of four horizons, and the tokens of a step."""

    steps: int | None = Field(None, ge=1, le=10**9, description="optimizer steps")
    tokens: int | None = Field(None, ge=1, le=10**15, description="total training tokens, rounded to whole steps")
    flops: float | None = Field(None, gt=0, le=1e30, description="training FLOPs, in whole steps")
    tokens_per_parameter: float | None = Field(
        None,
        gt=0,
        le=1e9,
        description="tokens over parameters (matrices and output head); default: base 20, mid 1, sft 0.5",
    )
    batch_tokens: int = Field(
        2**19,
        ge=8,
        le=10**12,
        description="tokens of one optimizer step over all workers; default: nanochat's for the depth",
        json_schema_extra=_hide_default,
    )

    @model_validator(mode="after")
    def _one_horizon(self) -> BudgetSettings:
        horizons = [name for name in HORIZONS if getattr(self, name) is not None]
        if len(horizons) != 1:
            named = " and ".join(horizons) or "none"
            raise ValueError(f"needs exactly one of {', '.join(HORIZONS)} (found {named})")
        return self


class EvaluationSettings(Settings):
    """Validation during training: how often, and on how many tokens."""

    every: int = Field(250, ge=0, description="steps between validations; 0: only at the end")
    tokens: int = Field(2**18, ge=1, description="maximum number of validation tokens")
    tasks: list[str] = Field(
        default_factory=list,
        description="tasks that score each checkpoint saved at a validation, and the last: [arc_easy, mmlu:anatomy]",
    )
    max_examples: int | None = Field(None, ge=1, description="items of each of these tasks; default: all")


class CheckpointSettings(Settings):
    """Checkpoints: how often one is saved, and which are kept."""

    every: int = Field(100, ge=0, description="steps between checkpoints; 0: only at the end")
    keep: int = Field(2, ge=1, description="how many of the newest checkpoints are kept")
    keep_best: bool = Field(
        False, description="keep also the best one on the tuning half of the validation windows: ID@best"
    )
    keep_every: int = Field(0, ge=0, description="also keep checkpoints at multiples of this step; 0: off")


class RewardSettings(Settings):
    """Settings of the rl phase: policy gradient on samples of the model, rewarded by their tasks."""

    prompts: int = Field(
        16, ge=1, description="prompts per step; fewer if their samples would exceed budget.batch_tokens"
    )
    samples: int = Field(
        16, ge=2, description="samples per prompt, an even number; a bidirectional model writes half in each direction"
    )
    new_tokens: int = Field(64, ge=1, description="maximum number of tokens of a sample")
    temperature: float = Field(1.0, gt=0, le=10, description="sampling temperature")
    top_k: int | None = Field(None, ge=1, description="sample from this many likeliest tokens; default: from all")
    validation: int = Field(128, ge=1, description="validation problems, answered greedily")

    @model_validator(mode="after")
    def _halves(self) -> RewardSettings:
        if self.samples % 2:
            raise ValueError(f"samples: must be even, for halves in two readings (found {self.samples})")
        return self


class ResearchLogSettings(Settings):
    """Parts of the research log `<phase>.h5`, and how often each is logged; 0 or false leaves a part out."""

    scalars: int = Field(1, ge=0, description="steps between entries of losses, rates and speeds")
    tokens: int = Field(10, ge=0, description="steps between entries of every token's loss and prediction")
    gradients: int = Field(100, ge=0, description="steps between statistics of every parameter's gradient")
    activations: int = Field(100, ge=0, description="steps between statistics of the model's activations")
    validation: bool = Field(True, description="the loss of every validation token, at each validation")
    attention: bool = Field(True, description="statistics of each attention head, at each validation")
    representations: int = Field(1024, ge=0, description="validation tokens whose states are kept at each validation")


class ComputeSettings(Settings):
    """Settings of how the model is computed; each is chosen for the hardware and the run's length unless it is set.

    They decide how fast a run is, not what it trains; of them only the resolved precision is part of a run's
    identity.
    """

    precision: Literal["auto", "float32", "bfloat16"] = Field(
        "auto", description="precision of activations; weights are float32"
    )
    attention: Literal["auto", "sdpa", "blocked", "flex"] = Field(
        "auto",
        description="sdpa: torch's; blocked: bwlm's, for CPUs; flex: flex_attention, compiled, GPU, document_mask",
    )
    fused_loss: bool | None = Field(
        None, description="compute output head and loss together, without all logits; default: yes"
    )
    compile: bool | None = Field(None, description="torch.compile; default: where it saves more than it costs")
    device_batch_size: int | None = Field(None, ge=1, description="rows of one forward pass; default: by device")


class WorkerRange(Settings):
    """Fewest and most workers of a cell that shrinks and grows with the nodes of its cluster."""

    min: int = Field(ge=1)
    max: int = Field(ge=1)


class ResourceSettings(Settings):
    """Workers of a cell, and the threads and GPUs of each worker."""

    workers: Annotated[int, Field(ge=1)] | WorkerRange = Field(
        1, description="DDP workers of one cell; {min: 1, max: 4}: shrinks and grows with the nodes of a cluster"
    )
    cpus_per_worker: int = Field(
        1,
        ge=1,
        description="CPU threads per worker; default: this machine's cores, shared by cells; 1 on a cluster",
        json_schema_extra=_hide_default,
    )
    gpus_per_worker: float = Field(
        0,
        ge=0,
        le=1,
        description="GPUs per worker; with 0.25 four cells share one; default: 1 if this machine has enough, else 0",
        json_schema_extra=_hide_default,
    )

    @model_validator(mode="before")
    @classmethod
    def _range_of_workers(cls, content: Any) -> Any:
        """Raise `ValueError` for a range that is none; pydantic would say that it is no number."""
        ends = content.get("workers") if isinstance(content, dict) else None
        if not isinstance(ends, dict):
            return content
        low, high = (end if type(end) is int else 0 for end in (ends.get("min"), ends.get("max")))
        if len(ends) != 2 or not 1 <= low <= high:
            raise ValueError(f"workers: a range goes from min up to max: write {{min: 1, max: 4}} (found {ends})")
        return content | {"workers": WorkerRange(min=low, max=high)}

    @property
    def is_elastic(self) -> bool:
        """True for a cell whose number of workers follows the nodes."""
        return isinstance(self.workers, WorkerRange)

    @property
    def fewest(self) -> int:
        """Workers that the cell needs to train: by these it is planned and placed."""
        return self.workers.min if isinstance(self.workers, WorkerRange) else self.workers

    @property
    def most(self) -> int:
        """Workers that the cell has at its largest."""
        return self.workers.max if isinstance(self.workers, WorkerRange) else self.workers

    @property
    def drives_group(self) -> bool:
        """True if a process of its own drives the cell's workers; a single worker of a fixed number needs none."""
        return self.is_elastic or self.fewest > 1

    def with_workers(self, count: int) -> ResourceSettings:
        """Return the same for a fixed number of workers."""
        return self.model_copy(update={"workers": count})

    @model_validator(mode="after")
    def _whole_gpus_for_several(self) -> ResourceSettings:
        if self.most > 1 and self.gpus_per_worker not in (0, 1):
            raise ValueError(
                f"gpus_per_worker: several workers need a GPU each: 1, or 0 for none (found {self.gpus_per_worker:g}, "
                f"workers {self.most})"
            )
        return self


class Recipe(Settings):
    """Settings that a grid file states once for all its cells."""

    phase: PhaseName = Field(FIRST, description="base on documents; mid and sft on conversations; rl by rewards")
    parent: str | None = Field(
        None,
        description="finished run that a phase after base begins from; `ID@STEP`, `ID@best`: an earlier checkpoint",
    )
    differs: list[Inherited] = Field(
        default_factory=list, description="direction, reversal or both: what the run may change against its parent"
    )
    data: DataSettings = DataSettings()
    tasks: dict[str, TaskSettings] = Field(
        default_factory=dict, description="local files of a task, instead of the hub's: tasks.gsm8k.path: FOLDER"
    )
    tokenizer: TokenizerSettings = TokenizerSettings()
    model: ModelSettings = ModelSettings()
    optim: OptimSettings = OptimSettings()
    budget: BudgetSettings = BudgetSettings(tokens_per_parameter=20.0)
    evaluation: EvaluationSettings = EvaluationSettings()
    checkpoint: CheckpointSettings = CheckpointSettings()
    rl: RewardSettings = RewardSettings()
    research_log: ResearchLogSettings = ResearchLogSettings()
    compute: ComputeSettings = ComputeSettings()
    resources: ResourceSettings = ResourceSettings()

    @model_validator(mode="before")
    @classmethod
    def _no_secrets(cls, content: Any) -> Any:
        """Raise `ValueError` for a secret in the settings, before any other error, which may quote what it found."""
        if fault := next(secrets_in(content), None):
            raise ValueError(fault)
        return content

    @model_validator(mode="after")
    def _checkpoints_to_keep(self) -> Recipe:
        """Raise `ValueError` for a rule that would never find its checkpoint."""
        saved, validated = self.checkpoint.every, self.evaluation.every
        if self.checkpoint.keep_every and (not saved or self.checkpoint.keep_every % saved):
            raise ValueError(
                f"checkpoint.keep_every: must be a multiple of checkpoint.every "
                f"(found {self.checkpoint.keep_every} and {saved})"
            )
        if self.checkpoint.keep_best and (not saved or not validated or saved % validated):
            raise ValueError(
                f"checkpoint.keep_best: checkpoints need a validation at their step: make checkpoint.every a multiple "
                f"of evaluation.every (found {saved} and {validated})"
            )
        return self

    @model_validator(mode="after")
    def _parent_of_its_phase(self) -> Recipe:
        if PHASES[self.phase].is_first and self.parent is not None:
            raise ValueError("parent: a base run has none: choose another phase, or leave the parent out")
        return self

    @model_validator(mode="after")
    def _controls_without_merges(self) -> Recipe:
        """Raise `ValueError` for a control corpus whose tokenizer has merges.

        Merges are chosen on forward text, so with them the corpus is no control any more.
        """
        wanted, vocab_size = MERGE_FREE_VOCABULARY, self.tokenizer.vocab_size
        if self.data.source in CONTROL_SOURCES and vocab_size != wanted:
            raise ValueError(
                f"tokenizer.vocab_size: {self.data.source} is a control only where each symbol is one token: "
                f"set tokenizer.vocab_size={wanted} (found {vocab_size})"
            )
        return self


Depth = Annotated[int, Field(ge=1, le=256)]
LearningRate = Annotated[float, Field(gt=0, le=1000)]
Seed = Annotated[int, Field(ge=0, lt=2**31)]


class Experiment(Recipe):
    """Settings of one run, fully resolved."""

    direction: DirectionName
    depth: Depth
    lr: LearningRate = 1.0
    seed: Seed = 0

    @property
    def prompts_per_step(self) -> int:
        """Prompts of an rl step over all workers, few enough that the samples stay within `budget.batch_tokens`."""
        return min(self.rl.prompts, self.budget.batch_tokens // (self.rl.samples * self.rl.new_tokens))

    @model_validator(mode="after")
    def _phase_fits(self) -> Experiment:
        phase = PHASES[self.phase]
        if phase.reads_documents and self.data.mixture:
            raise ValueError(f"data.mixture: a {self.phase} run reads the documents of data.source: leave it out")
        if not phase.reads_documents and not self.data.mixture:
            raise ValueError("data.mixture: empty: name tasks or files of conversations, and how often each is read")
        if not phase.reads_documents and DIRECTIONS[self.direction].is_control:
            raise ValueError(
                f"direction: {self.direction} is a control for documents, and conversations have no such order: "
                "choose another direction"
            )
        if phase.has_reward and is_marked(self.direction) and self.rl.samples < 4:
            raise ValueError(
                "rl.samples: a bidirectional model writes half in each reading, and compares those: take 4 or more"
            )
        return self
