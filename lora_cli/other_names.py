"""What other programs call the keys of a config; `tests/test_peers.py` holds this against what is converted."""

_BY_KEY = {
    "model.path": "base_model model_name_or_path model_id base checkpoint_dir",
    "model.revision": "revision_of_model model_revision",
    "model.dtype": "torch_dtype bf16 fp16 bfloat16 float16 float32 pure_bf16 precision",
    "model.quantization": """
        load_in_4bit load_in_8bit quantization_bit quantization_method quantization_type double_quantization quant_bits
        quantize
    """,
    "lora.method": """
        adapter finetuning_type fine_tune_type train_type tuner_type training_type use_peft use_dora use_rslora
        peft_use_dora peft_use_rslora
    """,
    "lora.init": "peft_init_lora_weights init_lora_weights init_weights pissa_init pissa_iter pissa_convert",
    "lora.rank": "r lora_r lora_rank",
    "lora.alpha": "lora_alpha",
    "lora.dropout": "lora_dropout",
    "lora.target_modules": "target_modules lora_target_modules lora_target_linear lora_target",
    "data.train": "dataset datasets dataset_dir dataset_name train_file local_dataset",
    "data.validation": "val_set_size val_size val_split val_dataset eval_dataset test_datasets split_dataset_ratio",
    "data.format": "format_type",
    "data.chat_template": "template chat_template_jinja chat_template_path prompt_style",
    "data.max_length": "max_seq_length cutoff_len sequence_len",
    "data.too_long": "excess_length_strategy truncation_mode truncation_strategy",
    "train.epochs": "num_epochs num_train_epochs",
    "train.max_steps": "iters",
    "train.batch_size": "per_device_train_batch_size micro_batch_size gradient_accumulation_steps global_batch_size",
    "train.learning_rate": "lr",
    "train.loraplus_ratio": "loraplus_lr_ratio lorap_lr_ratio",
    "train.schedule": "lr_scheduler lr_scheduler_type lr_schedule scheduler",
    "train.warmup_ratio": "warmup_steps lr_warmup_steps",
    "train.activation_checkpointing": """
        gradient_checkpointing disable_gradient_checkpointing use_unsloth_gc grad_checkpoint
    """,
    "train.compile": "torch_compile",
    "train.shard": "deepspeed fsdp fsdp_config fsdp_version dp_shard_size",
    "train.early_stopping.patience": "early_stopping_patience early_stopping_steps early_stop_interval",
    "train.neftune_alpha": "neftune_noise_alpha",
    "train.trackers": "report_to use_wandb wandb_project use_mlflow use_tensorboard logger_name",
    "eval.per_epoch": "evals_per_epoch eval_steps eval_strategy evaluation_strategy steps_per_eval",
    "save.per_epoch": "saves_per_epoch save_steps save_strategy save_every",
    "save.keep": "save_total_limit",
    "seed": "random_seed",
    "output_dir": "output out_dir adapter_path",
}
OTHER_NAMES = {name: key for key, names in _BY_KEY.items() for name in names.split()}
