"""Keys of Axolotl that set nothing here, and why.

Read in axolotl-ai-cloud/axolotl, src/axolotl/utils/schemas: config.py, training.py, peft.py, model.py, datasets.py.
"""

from lora_cli.conversion import Fixed, reasons
from lora_cli.peers.trainer_keys import OPTIMIZER

FIXED = {
    "optimizer": OPTIMIZER,
    "shuffle_merged_datasets": Fixed((True,), "rows are shuffled", "rows are always shuffled"),
    "merge_method": Fixed(("memory_efficient", "legacy"), "`lora merge` reads a base piece by piece", "", False),
}

NOT_NEEDED = reasons(
    {
        "sequences are packed by themselves, where a trial gives the same logits": """
            sample_packing sample_packing_* eval_sample_packing pad_to_sequence_len multipack_real_batches
            batch_flattening pretrain_multipack_* pretraining_sample_concatenation
            streaming_multipack_buffer_size
        """,
        "attention and kernels are chosen by a trial": """
            flash_attention flash_attn_* flash_optimum sdp_attention xformers_attention flex_attention
            flex_attn_* eager_attention sage_attention attn_implementation use_kernels unsloth_* lora_*_kernel
            liger_* cut_cross_entropy* chunked_cross_entropy* tiled_mlp* torch_compile_*
        """,
        "read from the model's own files": """
            model_type base_model_config tokenizer_type tokenizer_use_fast tokenizer_legacy
            tokenizer_use_mistral_common tokenizer_save_jinja_files processor_type is_*_derived_model
            lora_fan_in_fan_out cls_model_config
        """,
        "tokens are made once and kept by content": """
            dataset_prepared_path dataset_processes dataset_num_proc dataset_keep_in_memory streaming
            preprocess_iterable is_preprocess push_dataset_to_hub
        """,
        "the end of an answer is found in the chat template": "eot_tokens",
        "unknown keys are always errors": "strict",
        "shown by `lora check` and written while training": """
            include_tokens_per_second include_tkps eval_table_size total_num_tokens total_supervised_tokens
            sample_packing_eff_est debug profiler_steps profiler_steps_start
        """,
        "checkpoints hold what a run needs to go on": "save_only_model save_first_step",
        "model.device says where": """
            device device_map low_cpu_mem_usage max_memory gpu_memory_limit lora_on_cpu
            qlora_sharded_model_loading experimental_skip_move_to_device embeddings_skip_upcast
            peft_autocast_adapter_dtype
        """,
        "the hub's token comes from `hf auth login`": "hf_use_auth_token",
        "is a note of the program's own": "axolotl_config_path",
        "only reinforcement learning reads it": "max_prompt_len",
        "a merge is a command": "merge_lora",
    }
)

NOT_POSSIBLE = reasons(
    {
        "train.trackers names them; their settings come from their own variables (WANDB_PROJECT, ...)": """
            wandb_* mlflow_* hf_mlflow_log_artifacts use_comet comet_* use_trackio trackio_* swanlab_*
            use_otel_metrics otel_*
        """,
        "`lora eval RUN --metric NAME` and `--tasks` measure afterwards, the base beside it": """
            do_causal_lm_eval eval_causal_lm_metrics eval_max_new_tokens do_bench_eval bench_dataset
            bench_split
        """,
        "train.max_loss_jump stops at a step whose loss is so many times the last ones'": "loss_watchdog_*",
        "a sequence lies on one device; train.shard divides the base": """
            sequence_parallel_degree context_parallel_size tensor_parallel_size dp_replicate_size
            expert_parallel_size heads_k_stride ring_attn_func
        """,
        "`lora train --nproc N` or torchrun starts the processes": """
            use_ray ray_* resources_per_worker accelerator_config
        """,
        "activations are computed again, not moved away (train.activation_checkpointing)": "activation_offloading",
        "`lora eval RUN` shows answers": "gradio_*",
        "`lora export RUN --format gguf` quantises what was trained": "quantization",
    }
)

OTHER_TRAINING = reasons(
    {
        "the objective here is the next token of answers; preference pairs train on the chosen one, with "
        "data.format: prompt-completion and fields: {completion: chosen}": """
            rl rl_* trl vllm dpo_* orpo_* rpo_* simpo_* cpo_* kto_* kd_* reward_model process_reward_model
            num_labels use_dynamic_finetuning use_eaft eaft_* diffusion*
        """,
        "answers alone are trained; rows of the format text are trained whole": "train_on_inputs roles_to_train",
        "an adapter of linear layers is all that is trained, so that every runtime loads it": """
            lora_modules_to_save lora_target_parameters peft_trainable_token_indices peft_ensure_weight_tying
        """,
        "every layer that lora.target_modules names is adapted": """
            peft_layers_to_transform peft_layers_pattern peft_layer_replication
        """,
        "either an adapter is trained or all weights (lora.method: full)": """
            unfrozen_parameters lisa_* relora relora_* jagged_restart_*
        """,
        "training begins without an adapter: `lora merge ADAPTER --output DIR`, then model.path: DIR": """
            lora_model_dir
        """,
        "model and tokenizer stay as they are": """
            tokens added_tokens_overrides resize_token_embeddings_to_32x mean_resizing_embeddings
            shrink_embeddings fix_untrained_tokens tokenizer_config model_quantization_config
            model_quantization_config_kwargs overrides_of_model_config overrides_of_model_kwargs
            llama4_linearized_experts scaling_softmax use_pose pose_* s2_attention
        """,
        "model.quantization is nf4 or int8": "gptq bnb_config_kwargs peft fp8 fp8_* qat quantize_moe_experts",
        "there is one learning rate (and train.loraplus_ratio)": "embedding_lr embedding_lr_scale lr_groups",
        "schedules are cosine and linear to zero, and constant": """
            cosine_min_lr_ratio cosine_constant_lr_ratio lr_div_factor lr_quadratic_warmup
        """,
        "put it into the rows, as their system message": "default_system_message",
        "`lora check` counts duplicates; take them out of the file": "dataset_exact_deduplication",
        "rows are used as they are; take them out of the file": "min_sample_len dataset_shard_num dataset_shard_idx",
        "rows are shuffled": "curriculum_sampling",
        "name a file of rows under data.train (format: text trains them whole)": "pretraining_dataset",
        "rows that are tokens already are not read": "skip_prepare_dataset",
        "text alone is trained": "image_size image_resize_algorithm freeze_mm_modules unfreeze_*",
        "the program has no plug-ins": "plugins",
        "data.max_length is that of validation too": "eval_sequence_len",
        "a template takes no further settings; write a Jinja file": "chat_template_kwargs",
        "AdamW is what there is": "adam_beta3 adam_epsilon2 torchdistx_path dion_* muon_*",
    }
)

_END = Fixed(("turn",), "each answer's end is trained", "the end of each answer is trained, and no other")
ROW_FIXED = {
    "train_on_eos": _END,
    "train_on_eot": _END,
    "roles_to_train": Fixed(
        (["assistant"], ["gpt"], ["assistant", "gpt"], ["gpt", "assistant"]), "answers are", "answers alone are trained"
    ),
    "message_field_training": Fixed(("train",), "is read in the rows", "call it `train` in the rows"),
    "field_thinking": Fixed(("reasoning_content",), "is read in the rows", "call it reasoning_content in the rows"),
}
ROW_NOT_NEEDED = reasons(
    {
        "the kind of a file is known by its end": "ds_type",
        "tokens are made in several processes by themselves": "preprocess_shards",
        "no code that comes with data is run": "trust_remote_code",
        "the model's template writes it": "conversation split_thinking template_thinking_key",
    }
)
ROW_OTHER_TRAINING = reasons(
    {
        "rows are read whole: take out of the file what is not wanted": "shards shards_idx skip drop_system_message",
        "the newest revision of a data set is read": "revision",
        "whole messages can be left out, by `train: false` in the row": "message_field_training_detail",
        "the objective here is the next token of answers": "field_chosen field_rejected logprobs_field temperature",
        "rename the columns, or name them under data.fields": "field_human field_model input_transform input_format",
        "data.chat_template takes a Jinja file": "chat_template_jinja",
    }
)
