"""Which of Trainer's arguments count for a single step: every field of TrainingArguments, as data.

The four tables name each stock field once. Fields that a newer transformers adds are in none of them and are left
alone; a test lists them.
"""

from __future__ import annotations

import dataclasses
import os
import warnings
from typing import Any

from transformers import TrainingArguments

BATCHES = (
    "memory and speed; micro-batches only add up, so the step is the same. Unless you say otherwise 16 and 32, and in "
    "`train` on a single GPU as many more as give it something to do where the model has a head and is small"
)
CHECKPOINTING = "saves memory in the pass; the gradient is the same"
WORKERS = "who collates the batches, and how they reach the device"
CHECKPOINTS = "Trainer's checkpoints, beside what `save_model` writes; never pushed"
EVALUATION = "evaluates within the run, beside the stages of the report; these rows never choose"

#: Fields that do what they say, and what that is for a single step.
HONOURED: dict[str, str] = {
    "max_steps": "number of walks through the rows, each with as many steps as `slices` says; 1 by default",
    **dict.fromkeys(("per_device_train_batch_size", "per_device_eval_batch_size", "auto_find_batch_size"), BATCHES),
    "bf16": "forwards and backwards in bfloat16, sums and update in fp32; the gradient is as exact as bfloat16",
    "tf32": "as in Trainer: rounds factors of products on the GPU",
    **dict.fromkeys(
        (
            "activation_checkpointing", "activation_checkpointing_kwargs", "gradient_checkpointing",
            "gradient_checkpointing_kwargs",
        ),
        CHECKPOINTING,
    ),
    "use_cache": "as in Trainer; the step is the same",
    **dict.fromkeys(("eval_strategy", "eval_steps", "eval_delay", "eval_on_start"), EVALUATION),
    "metric_for_best_model": (
        "what `stop_at` is compared with, and `save_strategy=\"best\"`; of an F1 see `tune_threshold`"
    ),
    "greater_is_better": "which way that metric gets better",
    **dict.fromkeys(("save_strategy", "save_steps", "save_total_limit", "save_only_model"), CHECKPOINTS),
    "enable_jit_checkpoint": "a checkpoint on SIGTERM, before or after the step",
    "restore_callback_states_from_checkpoint": "as in Trainer, for a resumed run of several steps",
    "push_to_hub": "`save_model` pushes the finished folder in one commit",
    "seed": "draws a fresh head and the adapter's `lora_A`; the pass itself draws nothing",
    "full_determinism": "as in Trainer: deterministic algorithms only",
    "use_cpu": "as in Trainer",
    **dict.fromkeys(
        (
            "dataloader_num_workers", "dataloader_prefetch_factor", "dataloader_multiprocessing_context",
            "dataloader_pin_memory",
        ),
        WORKERS,
    ),
    "remove_unused_columns": "False hands a tokenised set's further columns to the collator",
}  # fmt: skip

RULE = "the step is the optimizer; see `direction`"
SCHEDULE = "there is no schedule over one step"
ORDER = "the pass goes through the rows longest first, and order does not change a sum"
PUSHES = "only the finished folder is pushed"

#: Fields that a single step has no use for, and why: one warning, and their defaults are restored.
IGNORED: dict[str, str] = {
    "learning_rate": "the step size is `step_size`",
    "num_train_epochs": "the number of passes is `max_steps`",
    "gradient_accumulation_steps": "a step always accumulates over all rows",
    "average_tokens_across_devices": "the mean is always over the items of all processes",
    **dict.fromkeys(("lr_scheduler_type", "lr_scheduler_kwargs"), SCHEDULE),
    "warmup_steps": "a warm-up would make the first step zero",
    "weight_decay": "it would move parameters that the direction does not",
    "max_grad_norm": "clipping would change the step that the search measures",
    **dict.fromkeys(("optim", "optim_args", "optim_target_modules", "adam_beta1", "adam_beta2", "adam_epsilon"), RULE),
    **dict.fromkeys(("train_sampling_strategy", "length_column_name"), ORDER),
    "dataloader_drop_last": "every row counts",
    "dataloader_in_order": "rows are known by their place in the pass",
    "dataloader_persistent_workers": "each loader is used once, so its workers would only pile up",
    "label_names": "the task knows its labels",
    "debug": "its hooks fail on Boolean masks; rows whose loss is not finite are named anyway",
    **dict.fromkeys(("hub_strategy", "hub_always_push"), PUSHES),
}

FULL_EVALUATION = (
    "Trainer rounds the weights themselves before it evaluates, and an update is smaller than that. Use `bf16=True`."
)
COMPILED = "the compiled pass leaves out what the directions are worked out from. Leave it out."
LIGER = "its kernels replace the layers whose inputs and output gradients the step reads. Leave it out."
SHARDED = (
    "a direction needs whole layers, and here every process would see a part. Use `accelerate launch` with plain "
    "data parallelism."
)

#: Fields that would spoil the step, with the reason and the fix.
REFUSED: dict[str, str] = {
    "fp16": "its loss scaler may skip the only step. Use `bf16=True`, or full precision.",
    **dict.fromkeys(("bf16_full_eval", "fp16_full_eval"), FULL_EVALUATION),
    "deepspeed": "DeepSpeed replaces the optimizer's step. Use `accelerate launch` without it.",
    **dict.fromkeys(("fsdp", "fsdp_config", "parallelism_config"), SHARDED),
    "ddp_static_graph": "it needs a reduction with every backward, and the pass has one at its end. Leave it out.",
    "accelerator_config": (
        "the rows are already dealt out so that every process gets as many full batches of its own. Leave out "
        "`split_batches`, `dispatch_batches` and `even_batches`; its other keys are harmless."
    ),
    **dict.fromkeys(("torch_compile", "torch_compile_backend", "torch_compile_mode"), COMPILED),
    **dict.fromkeys(("use_liger_kernel", "liger_kernel_config"), LIGER),
    "label_smoothing_factor": "the search and the guard read the rows' own losses. Leave it out.",
    "neftune_noise_alpha": "noise in the embeddings biases the gradient. Leave it out.",
    "load_best_model_at_end": (
        "the evaluation rows would choose, and their scores would flatter. Held-out rows do: give `search_dataset`, or "
        "`stop_at`."
    ),
}

#: Fields that cannot touch the step, and what they are about.
HARMLESS: dict[str, str] = {
    "output_dir": "where results go",
    **dict.fromkeys(
        (
            "logging_strategy", "logging_steps", "logging_first_step", "log_on_each_node", "logging_nan_inf_filter",
            "include_num_input_tokens_seen", "log_level", "log_level_replica", "disable_tqdm", "report_to",
            "run_name", "project", "trackio_space_id", "trackio_bucket_id", "trackio_static_space_id",
        ),
        "logs and where they go",
    ),
    **dict.fromkeys(("torch_empty_cache_steps", "skip_memory_metrics"), "the device's cache and its measurement"),
    **dict.fromkeys(
        (
            "prediction_loss_only", "eval_do_concat_batches", "eval_use_gather_object", "eval_accumulation_steps",
            "include_for_metrics", "batch_eval_metrics",
        ),
        "how an evaluation collects its batches, and what its metrics get",
    ),
    "save_on_each_node": "on which machines Trainer's checkpoints are written",
    **dict.fromkeys(
        ("hub_token", "hub_private_repo", "hub_model_id", "hub_revision"),
        "where a push goes; the token is never written",
    ),
    **dict.fromkeys(("data_seed", "ignore_data_skip"), "a shuffled or half-done epoch; a pass is neither"),
    **dict.fromkeys(
        (
            "ddp_find_unused_parameters", "ddp_bucket_cap_mb", "ddp_broadcast_buffers", "ddp_backend", "ddp_timeout",
            "local_rank",
        ),
        "how processes talk; the step adds up their sums itself",
    ),
    **dict.fromkeys(
        ("do_train", "do_eval", "do_predict", "resume_from_checkpoint"),
        "only scripts read it; `train(resume_from_checkpoint=...)` resumes",
    ),
}  # fmt: skip

# What `accelerate launch` says through the environment, and the field that would say the same.
LAUNCHED = {
    "ACCELERATE_USE_DEEPSPEED": "deepspeed",
    "ACCELERATE_USE_FSDP": "fsdp",
    "ACCELERATE_USE_PARALLELISM_CONFIG": "parallelism_config",
    "ACCELERATE_DYNAMO_BACKEND": "torch_compile",
}


def refuse(args: TrainingArguments) -> None:
    """Refuses what would spoil the step, in the arguments or from `accelerate launch`.

    Raises:
        ValueError: With the field, its value, the reason and the fix.
    """
    for name, why in REFUSED.items():
        value = getattr(args, name, None)
        if _spoils(name, value):
            raise ValueError(f"`{name}={value!r}` does not go with a single step: {why}")
    for variable, name in LAUNCHED.items():
        said = os.environ.get(variable, "no")
        if said.lower() not in ("", "0", "no", "false"):
            raise ValueError(f"`accelerate launch` says {variable}={said!r}: {REFUSED[name]}")
    precision = getattr(args, "mixed_precision", "no")  # set by TrainingArguments, from the environment too
    if precision not in ("no", "bf16"):
        raise ValueError(f"`accelerate launch` says mixed precision {precision!r}: {REFUSED['fp16']}")


def _spoils(name: str, value: Any) -> bool:
    if name != "accelerator_config":
        return bool(value)
    # A file or a dict until TrainingArguments has read it.
    spoilt = getattr(value, "split_batches", False) or getattr(value, "dispatch_batches", False)
    return bool(spoilt) or not getattr(value, "even_batches", True)


def ignore(args: TrainingArguments, stacklevel: int = 2) -> None:
    """Gives the ignored fields their defaults back, with one warning for all that had another value."""
    defaults = {f.name: f.default for f in dataclasses.fields(args)}
    given = {name: getattr(args, name) for name in IGNORED if name in defaults}
    # Unset may be "", None, or an empty list or dict.
    given = {k: value for k, value in given.items() if value != defaults[k] and (value or defaults[k])}
    if given:
        said = "; ".join(f"`{name}={value!r}`: {IGNORED[name]}" for name, value in given.items())
        warnings.warn(f"Ignored, since one step has no use for them: {said}.", stacklevel=stacklevel + 1)
    for name in given:
        setattr(args, name, defaults[name])


def table() -> str:
    """The classification as a Markdown table, fields of one reason in one row; README holds it."""
    lines = ["| | fields | |", "|---|---|---|"]
    classes = {"honoured": HONOURED, "ignored": IGNORED, "refused": REFUSED, "harmless": HARMLESS}
    for name, fields in classes.items():
        for why in dict.fromkeys(fields.values()):
            same = ", ".join(f"`{field}`" for field, reason in fields.items() if reason == why)
            lines.append(f"| {name} | {same} | {why} |")
    return "\n".join(lines)
