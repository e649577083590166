"""Keys of transformers' Trainer that set nothing here, and why (read in 5.24.0)."""

from lora_cli.conversion import Fixed, reasons

_ADAM = "AdamW has betas 0.9 and 0.999, epsilon 1e-8"
FIXED = {
    "adam_beta1": Fixed((0.9,), _ADAM, _ADAM),
    "adam_beta2": Fixed((0.999,), _ADAM, _ADAM),
    "adam_epsilon": Fixed((1e-8,), _ADAM, _ADAM),
    "label_smoothing_factor": Fixed((0,), "nothing is smoothed", "labels are not smoothed here"),
    "metric_for_best_model": Fixed(
        ("eval_loss", "loss"), "it is the validation loss", "the best is that of the lowest validation loss", False
    ),
}
_ADAMW = ("adamw*", "paged_adamw*", "optimi_adamw", "ao_adamw*")
OPTIMIZER = Fixed(_ADAMW, "AdamW with moments in float32", "AdamW is what there is")

NOT_NEEDED = reasons(
    {
        "rows are loaded by threads of their own": "dataloader_*",
        "processes are found and joined by themselves": "local_rank world_size ddp ddp_*",
        "every step is written to metrics.jsonl": """
            logging_* log_level* include_num_input_tokens_seen disable_tqdm run_name
        """,
        "the best is always kept": "load_best_model_at_end greater_is_better",
        "safetensors always": "save_safetensors",
        "sums are made in float32 or more": "tf32 average_tokens_across_devices",
        "micro_batch_tokens says what one forward sees, and changes no number": """
            auto_find_batch_size per_device_eval_batch_size eval_batch_size
        """,
        "the loss is taken from every row of a validation pass": """
            eval_accumulation_steps prediction_loss_only eval_do_*
        """,
        "changes no number here": "gradient_checkpointing_kwargs torch_empty_cache_steps gc_steps full_determinism",
        "an adapter lies on no embedding": "loraplus_lr_embedding",
        "columns that nothing reads are said": "remove_unused_columns",
    }
)
NOT_POSSIBLE = reasons(
    {
        "`lora merge --push REPO` uploads what was verified": "push_to_hub push_to_hub_* hub_*",
        "the order of rows follows from seed; train.order groups rows of one prompt": """
            group_by_length length_column_name
        """,
        "validation begins with the base, before the first step": "eval_on_start eval_delay",
        "data order and initialisation have one seed": "data_seed",
    }
)
OTHER_TRAINING = reasons(
    {
        "AdamW takes no further settings": "optim_args optim_target_modules",
        "a schedule takes no further settings": "lr_scheduler_kwargs",
    }
)
