"""Keys of LLaMA-Factory that set nothing here, and why.

Read in hiyouga/LLaMA-Factory, src/llamafactory/hparams: model_args.py, data_args.py, finetuning_args.py,
training_args.py, generating_args.py, and in data/README.md.
"""

from lora_cli.conversion import Fixed, reasons
from lora_cli.peers.trainer_keys import OPTIMIZER

_OBJECTIVE = (
    "the objective here is the next token of answers; preference pairs can train on the chosen one, with "
    "data.format: alpaca and data.fields: {output: chosen}"
)

FIXED = {
    "optim": OPTIMIZER,
    "stage": Fixed(("sft", "pt"), "supervised training is what there is; text is trained whole", _OBJECTIVE),
    "mix_strategy": Fixed(
        ("concat",), "sources are put together", "data.train takes {path, weight} for each source: give weights"
    ),
    "freeze_vision_tower": Fixed((True,), "text alone is trained", "text alone is trained"),
    "freeze_multi_modal_projector": Fixed((True,), "text alone is trained", "text alone is trained"),
    "ignore_pad_token_for_loss": Fixed((True,), "padding is never trained", "padding is never trained"),
    "use_fast_tokenizer": Fixed((True,), "fast tokenizers are what is read", "slow tokenizers are not read"),
    "do_train": Fixed((True,), "`lora train` trains", "`lora train` trains"),
}

NOT_NEEDED = reasons(
    {
        "sequences are packed by themselves, where a trial gives the same logits": "packing neat_packing",
        "attention and kernels are chosen by a trial": """
            flash_attn enable_liger_kernel use_unsloth use_v1_kernels use_reentrant_gc upcast_layernorm
            upcast_lmhead_output use_kv_cache use_cce
        """,
        "tokens are made once, in several processes, and kept by content": """
            preprocessing_* overwrite_cache tokenized_path buffer_size streaming data_shared_file_system
        """,
        "an output_dir with another run in it is refused": "overwrite_output_dir",
        "a run's folder has every number; `lora report` draws them": "plot_loss",
        "shown by `lora check` and written while training": """
            include_effective_tokens_per_second print_param_status compute_accuracy include_tokens_per_second
        """,
        "validation is measured wherever rows are held out": "do_eval eval_on_each_dataset",
        "checkpoints hold what a run needs to go on": "save_only_model",
        "an adapter is new where nothing else is said": "create_new_adapter",
        "the hub's token comes from `hf auth login`": "hf_hub_token ms_hub_token om_hub_token hub_token",
        "model.device says where": "low_cpu_mem_usage offload_folder quantization_device_map device_map use_cpu",
        "the hub's own cache is used (HF_HOME)": "cache_dir",
        "only answering reads it": """
            infer_backend infer_dtype vllm_* sglang_* do_sample temperature top_p top_k num_beams
            max_new_tokens repetition_penalty length_penalty skip_special_tokens eval_num_beams
        """,
        "`lora merge` and `lora export` write what others load": "export_*",
        "there is no picture, film or sound": "image_* video_* audio_* media_dir crop_to_patches use_audio_in_video",
    }
)

NOT_POSSIBLE = reasons(
    {
        "every number is in the run's metrics.jsonl": "use_swanlab swanlab_* trackio_* project",
        "`lora eval RUN` measures afterwards, the base beside it": "do_predict predict_with_generate",
        "`lora train --nproc N` or torchrun starts the processes": "ray_* resources_per_worker placement_strategy",
    }
)

OTHER_TRAINING = reasons(
    {
        _OBJECTIVE: """
            pref_* dpo_* kto_* simpo_* ppo_* ref_model* reward_model* ld_alpha use_dft_loss use_asft_loss
            asft_* use_eaft_loss eaft_*
        """,
        "answers alone are trained; rows of the format text are trained whole": "train_on_prompt",
        "every answer is trained; mark those that are not, by `train: false` in the row": "mask_history",
        "rows are used as they are: cut the file": "max_samples eval_num_samples",
        "data.train takes {path, weight} for each source: give weights": "interleave_probs",
        "rows are shuffled": "disable_shuffling",
        "an adapter of linear layers is all that is trained, so that every runtime loads it": "additional_target",
        "either an adapter is trained or all weights (finetuning_type: full)": """
            freeze_trainable_layers freeze_trainable_modules freeze_extra_modules freeze_language_model
            use_llama_pro
        """,
        "training begins without an adapter: `lora merge ADAPTER --output DIR`, then model.path: DIR": """
            adapter_name_or_path adapter_folder
        """,
        "lora, rslora, dora and full are there": "oft_* module_dropout",
        "model and tokenizer stay as they are": """
            add_tokens add_special_tokens new_special_tokens_config init_special_tokens resize_vocab
            split_special_tokens rope_scaling shift_attn mixture_of_depths moe_aux_loss_coef
            train_from_scratch model_max_length
        """,
        "AdamW is what there is": "use_galore galore_* use_apollo apollo_* use_badam badam_* use_adam_mini use_muon",
        "put it into the rows, as their system message": "default_system",
        "the model's own template is used; data.chat_template takes a Jinja file": """
            tool_format enable_thinking preserve_thinking
        """,
        "model.quantization is nf4 or int8": "fp8 fp8_* use_qat",
        "one process, or several of torchrun": "use_mca use_kt kt_* cpu_infer chunk_size mode use_megatron*",
        "training reads no code of the user's": "plugins",
    }
)
