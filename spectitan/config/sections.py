"""Every configuration key: one dataclass per TOML table. The manager reads these fields; --help prints them.

A field is `key(default, help, ...)`. "Work it out" is -1 for numbers; where "none" is a choice it is spelt.
A speculator family's own keys are in its Config dataclass, in its own file.
"""

import dataclasses
from dataclasses import dataclass


def key(default, help: str, choices: tuple = (), minimum: float | None = None, above: float | None = None, maximum: float | None = None):
    """A configuration key. `minimum`, `maximum` (inclusive) and `above` (exclusive) bound numbers, or each number of a list."""
    metadata = {"help": help, "choices": choices, "minimum": minimum, "above": above, "maximum": maximum}
    if isinstance(default, list):
        return dataclasses.field(default_factory=lambda: list(default), metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


@dataclass
class Job:
    config_file: str = key("", "TOML file with these tables; command-line flags win over it")
    dump_folder: str = key("outputs", "the run's folder: config.toml, metrics.jsonl, evaluations.jsonl, checkpoints/, export/, report.json")
    run_name: str = key(
        "",
        "name of the run in metrics.loggers (TensorBoard: a sub-folder), with placeholders: {time}, {utc_time}, {speculator}, {base}, "
        "{seed}, {rank}, {local_rank}; empty: none in TensorBoard, elsewhere the dump_folder's",
    )
    seed: int = key(42, "seed of initialisation, sample order and sampling", minimum=0)
    deterministic: bool = key(False, "use deterministic kernels only: the same run gives the same bits")
    threads: int = key(-1, "CPU threads of this process; -1 leaves PyTorch's choice", minimum=-1)
    plan: bool = key(False, "print what the run asks of the cluster in [plan], memory, work and traffic, without any GPU, and stop")
    init_only: bool = key(False, "build the speculator, initialise and export it, and stop before training")
    timeout: float = key(
        120.0,
        "seconds after which a rank that hangs ends the job: in an optimizer step, but for the first, from the step's start; elsewhere "
        "(preparing, saving, evaluating) from the last sign of life of any rank; 0: never",
        minimum=0,
    )
    traceback: bool = key(False, "show the traceback of a user's mistake as well")


@dataclass
class Base:
    arch: str = key(
        "auto",
        "architecture of the base model; auto: by config.json's model_type. embedllama: Llama, Qwen2, Qwen3, Mistral; embedmixtral: Mixtral; "
        "embedgptbigcode: StarCoder, Granite code 20b and 34b; hf: any other decoder that transformers loads, frozen, without tensor "
        'parallelism and compilation (pip install "spectitan[hf]")',
        choices=("auto", "embedllama", "embedmixtral", "embedgptbigcode", "hf"),
    )
    variant: str = key("auto", "a registered variant (7b, 8b, 70b, ...); auto reads config.json in base.path")
    path: str = key(
        "",
        "folder in Hugging Face layout: config.json, safetensors, tokenizer; or a model of its hub, organisation/name (needs "
        "huggingface_hub); spectitan:NAME is one that ships",
    )
    init: str = key(
        "pretrained", "weights from base.path, or random (only config.json and tokenizer are read)", choices=("pretrained", "random")
    )
    freeze: bool = key(True, "keep the base as it is; false trains it, with the speculator from one forward, or alone")
    allow_other: bool = key(False, "use a speculator with another base than the one it was trained for, if the shapes are the same")
    activation_checkpointing: bool = key(False, "trained base: keep each block's input only and run it again in the backward")


@dataclass
class Parallelism:
    sharding_strategy: str = key(
        "none",
        "none: one process; fsdp: parameters sharded over all processes; hsdp: sharded within groups of them, copied between groups; "
        "tp: the base's layers split over tp_size processes, copied between such groups",
        choices=("none", "fsdp", "hsdp", "tp"),
    )
    tp_size: int = key(
        1, "processes that each layer of the base is split over; with fsdp and hsdp each of these parts is sharded", minimum=1
    )
    dp_replicate: int = key(-1, "hsdp: copies of the parameters; -1: one a machine", minimum=-1)
    shard_speculator: bool = key(True, "false: each process holds the whole speculator and its optimizer state")


@dataclass
class Plan:
    """The cluster that job.plan plans for."""

    world_size: int = key(-1, "GPUs; -1: the processes that were started", minimum=-1)
    gpus_per_node: int = key(8, "GPUs of a node", minimum=1)
    gpu_memory: float = key(79.0, "GiB of a GPU; an 80 GB card has 79", above=0)
    headroom: float = key(0.08, "share of it left to CUDA, its libraries and fragmentation", minimum=0, maximum=0.9)
    gpu_flops: float = key(989.0, "a GPU's peak in 10^12 operations/s, dense, in the compute dtype", above=0)
    node_bandwidth: float = key(450.0, "10^9 bytes/s that a GPU sends to others of its node", above=0)
    network_bandwidth: float = key(50.0, "10^9 bytes/s that a GPU sends to other nodes", above=0)


@dataclass
class Data:
    path: str = key(
        "",
        "file or folder of data; or a dataset of Hugging Face's hub, organisation/name or organisation/name/folder (needs huggingface_hub); "
        "python:stdlib is the running Python's standard library source",
    )
    format: str = key(
        "auto",
        "text: each file is a document; jsonl: one JSON object a line, also packed (.gz, .zst); parquet and arrow: one row a document (need "
        "pyarrow); pt: speculators' files of tensors, with their input_ids and loss_mask; auto: by suffix, all but pt",
        choices=("auto", "text", "jsonl", "parquet", "arrow", "pt"),
    )
    suffixes: list[str] = key([".txt", ".md", ".py"], "suffixes of the files that format text reads; python:stdlib reads .py")
    text_column: str = key("text", "column (JSONL: key) that holds a text, supervised throughout; empty: none")
    prompt_key: str = key(
        "question", "column of prompts; with data.response_key. Their token ids are in columns input and output; empty: none"
    )
    prompt_dict_keys: list[str] = key([], "keys that lead from that column's value to the prompt, the outermost first")
    response_key: str = key("answer", "column of responses; only they are supervised")
    response_dict_keys: list[str] = key([], "keys that lead from that column's value to the response")
    messages_key: str = key(
        "messages",
        "column of chats, each a list of {role, content} (or ShareGPT's {from, value}); what the assistant says is supervised; empty: none",
    )
    tools_key: str = key(
        "tools", "column beside data.messages_key: the tools that a chat may call, JSON schemas or their text; empty: none"
    )
    tokens_column: str = key("tokens", "column of the token ids of texts, supervised throughout, as fms-fsdp has them; empty: none")
    input_ids_column: str = key("input_ids", "column of token ids whose mask is in data.loss_mask_column; empty: none")
    loss_mask_column: str = key("loss_mask", "column of masks: 1 where the token of the same place is supervised, else 0")
    datasets: list[str] = key([], "sub-folders of data.path to use, each one dataset; empty: all of data.path as one dataset")
    weights: list[float] = key(
        [], "share of tokens of each of data.datasets, any positive numbers, 0 leaves one out; empty: by size", minimum=0
    )
    seq_length: int = key(2048, "tokens in a sample", minimum=2)
    packing: str = key(
        "concat",
        "how samples are filled. concat: documents joined, and cut at each sample's end; best_fit: whole documents, as many as fit, then "
        "padding; document: one document, then padding",
        choices=("concat", "best_fit", "document"),
    )
    overlong: str = key(
        "split",
        "best_fit and document: of a document longer than a sample, split: every seq_length tokens become a document; truncate: the "
        "first are kept",
        choices=("split", "truncate"),
    )
    holdout: float = key(
        0.0, "share of files (text) or rows (all other formats) held out for evaluation, chosen by hash", minimum=0, maximum=0.5
    )
    val_path: str = key(
        "", "evaluation text: what data.path may be, in any of the formats; empty: the held-out share, which is never trained on"
    )
    on_invalid: str = key("error", "what cannot be read: stop, or skip it, name it and count it", choices=("error", "skip"))
    drop_overlap: str = key(
        "", "prompts file (as eval.prompts): documents that contain 64 consecutive tokens of a prompt are dropped, counted"
    )
    verify: str = key(
        "content",
        "how a start finds out that files, or what was tokenised of them, have changed: content: reads all of them; stat: by sizes and "
        "time stamps, for huge corpora",
        choices=("content", "stat"),
    )
    cache_dir: str = key("", "folder of tokenised shards; empty: ~/.cache/spectitan (or $SPECTITAN_CACHE)")
    tokenizer_threads: int = key(-1, "threads that tokenise; -1: one a core", minimum=-1)
    loader_workers: int = key(0, "processes that read samples during training; 0: the trainer itself", minimum=0)
    prefetch_factor: int = key(2, "micro-batches that each of these processes reads ahead", minimum=1)


@dataclass
class Training:
    num_steps: int = key(-1, "optimizer steps of the whole run; -1: from training.epochs", minimum=-1)
    epochs: float = key(-1.0, "passes over the data, if num_steps is -1", minimum=-1)
    global_batch_size: int = key(-1, "samples in an optimizer step, over all ranks; -1: micro_batch_size times ranks", minimum=-1)
    micro_batch_size: int = key(8, "samples in one forward of one rank", minimum=1)
    compute_dtype: str = key(
        "auto",
        "auto: bfloat16 where the hardware is fast at it, else float32; masters stay float32",
        choices=("auto", "bfloat16", "float32", "float64"),
    )
    max_grad_norm: float = key(1.0, "gradients of base and of speculator are each scaled down to this norm; 0: no clipping", minimum=0)
    speculator_loss_coeff: float = key(1.0, "base.freeze = false: total loss = base loss + this * speculator loss", minimum=0)
    detach_states: bool = key(True, "base.freeze = false: the speculator's loss does not reach the base; false: the base learns from it")


@dataclass
class Stage2:
    start_step: int = key(
        -1, "optimizer step from which on the speculator is trained on text that the base itself samples; -1: never", minimum=-1
    )
    batch_size: int = key(
        -1, "prompts in an optimizer step, over all ranks, a multiple of training.global_batch_size; -1: one a sample", minimum=-1
    )
    prompt_length: int = key(64, "tokens in a prompt; prompts are cut from the samples, from one document where they can be", minimum=1)
    seq_length: int = key(256, "tokens sampled after each prompt; the end-of-text token ends nothing", minimum=2)
    temperature: float = key(1.0, "of the base's sampling; 0: greedy", minimum=0)
    top_k: int = key(10, "sample from the k most likely tokens; 0: all", minimum=0)


@dataclass
class States:
    source: str = key(
        "online",
        "where the base's hidden states come from. online: the base in this job; offline: files, and of the base its embedding, norm and "
        "head alone are held; hybrid: files, and what is missing there from the base",
        choices=("online", "offline", "hybrid"),
    )
    on_missing: str = key(
        "auto",
        "samples without states. generate: by the base (hybrid, its auto); offline: skip them, skip and warn, or raise (its auto). "
        "Skipped samples keep their places in the batches, unsupervised, and are counted",
        choices=("auto", "generate", "skip", "warn", "raise"),
    )
    on_generate: str = key(
        "cache",
        "hybrid: states that the base has computed: cache them for later epochs and runs, or delete them",
        choices=("cache", "delete"),
    )
    hidden_states_path: str = key("", "folder of the files; empty: dump_folder/hidden_states")
    format: str = key(
        "auto",
        "of the files. cache: our own; hs: hs_<row>.safetensors of vLLM's speculators; 1 and 0: its older .pt files; auto: by what is there",
        choices=("auto", "cache", "hs", "1", "0"),
    )
    final: str = key(
        "auto",
        "what the last state of a token is in files of other systems: before the base's final norm, or after it; auto: before it in hs and "
        "1, after it in 0",
        choices=("auto", "pre_norm", "post_norm"),
    )
    dtype: str = key(
        "bfloat16",
        "of a cache that is filled; int8 has a scale for each token and layer, and half the size of bfloat16",
        choices=("float32", "bfloat16", "float16", "int8"),
    )
    noise_std: float = key(
        0.0, "in training each number of a drafter's layers is moved by at most this, uniformly; not the final state", minimum=0
    )


@dataclass
class Objective:
    loss: str = key(
        "ce",
        "ce: cross-entropy against the text. Or of the drafter's q against the base's p, where alpha is the sum of min(p, q): kl_div: "
        "KL(p, q); rkl: KL(q, p); jsd: Jensen-Shannon; tv: 1 - alpha; nla: -log alpha; lk_hybrid: kl_div, and the more tv the larger "
        "alpha is; ce_argmax: cross-entropy against p's likeliest token. Or weights of several: "
        '{"ce": 0.1, "tv": 0.9}',
    )
    chunk_rows: int = key(-1, "rows of logits alive at once; -1: worked out (CPU: at most 512, 32 MB)", minimum=-1)


@dataclass
class Optimizer:
    name: str = key(
        "adamw",
        "adamw; muon: Muon for the speculator's matrices, AdamW for its embeddings, heads, norms and biases and for a trained base",
        choices=("adamw", "muon"),
    )
    lr: float = key(1e-3, "peak learning rate, of AdamW", above=0)
    base_lr: float = key(-1.0, "peak learning rate of a trained base; -1: optimizer.lr", minimum=-1)
    betas: list[float] = key([0.9, 0.95], "AdamW's decay rates of the first and second moment", minimum=0, maximum=1)
    eps: float = key(1e-8, "AdamW's epsilon", above=0)
    weight_decay: float = key(0.1, "AdamW's decoupled weight decay, of matrices only", minimum=0)
    muon_lr: float = key(0.02, "Muon's peak learning rate", above=0)
    muon_momentum: float = key(0.95, "Muon's (Nesterov) momentum", minimum=0, maximum=1)
    muon_weight_decay: float = key(0.1, "Muon's decoupled weight decay", minimum=0)
    muon_ns_steps: int = key(5, "Muon's Newton-Schulz iterations, in bfloat16", minimum=1, maximum=99)
    muon_adjust_lr_fn: str = key(
        "match_rms_adamw",
        "how Muon's rate depends on a matrix's shape [rows, columns]. match_rms_adamw: times 0.2 sqrt(max(rows, columns)), so that updates "
        "are as large as AdamW's; original: times sqrt(max(1, rows / columns))",
        choices=("original", "match_rms_adamw"),
    )


@dataclass
class LRScheduler:
    type: str = key(
        "cosine",
        "linear, cosine and constant after a linear warm-up; two_stage: fms-fsdp's speculator schedule, with stage2.start_step",
        choices=("linear", "cosine", "constant", "two_stage"),
    )
    warmup_steps: int = key(
        -1, "linear, cosine and constant: steps of linear warm-up; -1: 5% of the run (or of total_steps), at most 2000", minimum=-1
    )
    total_steps: int = key(
        -1, "linear and cosine: step at which the rate reaches its last value, which it keeps; -1: the last of the run", minimum=-1
    )
    decay_ratio: float = key(
        1.0, "linear and cosine: share of these steps, at their end, in which the rate decays; before it is constant", above=0, maximum=1
    )
    min_lr_ratio: float = key(0.0, "linear and cosine: last learning rate over the peak", minimum=0, maximum=1)
    num_cosine_cycles: float = key(0.5, "cosine: number of waves; 0.5 falls once from the peak to the minimum", above=0)


@dataclass
class Checkpoint:
    interval: int = key(1000, "steps between checkpoints; one is always written before an evaluation and at the end", minimum=1)
    interval_epochs: float = key(
        -1.0, "passes over the data between checkpoints, or parts of one (0.5), instead of checkpoint.interval; -1: by steps", minimum=-1
    )
    folder: str = key(
        "", "where they lie, also a URL that fsspec knows (s3://bucket/run; see docs/training.md); empty: dump_folder/checkpoints"
    )
    load_path: str = key("", "checkpoint, or folder of checkpoints, to start from if this run has none of its own")
    resume: str = key(
        "auto",
        "auto: go on from this run's newest valid checkpoint; never: move the old folder aside and start anew",
        choices=("auto", "never"),
    )
    keep_latest_k: int = key(2, "checkpoints kept; 0: all", minimum=0)
    async_mode: str = key(
        "auto",
        "async: training goes on while a checkpoint is written from a copy in host memory (12 bytes a trained parameter, over all "
        "processes); disabled: it waits; auto: async on GPUs, disabled on CPUs, whose cores the writing needs too",
        choices=("auto", "async", "disabled"),
    )
    save_best: str = key(
        "none",
        "keep the best of the evaluated checkpoints too; checkpoints/best leads to it. acceptance: by acceptance_length, really drafted and "
        "verified; loss: by the held-out loss of all heads",
        choices=("none", "acceptance", "loss"),
    )


@dataclass
class Metrics:
    report_interval: int = key(10, "steps between reports", minimum=1)
    loggers: list[str] = key(
        ["tensorboard"],
        "beside the console and metrics.jsonl; all but tensorboard need their package (pip install spectitan[wandb])",
        choices=("tensorboard", "wandb", "trackio", "mlflow"),
    )
    dir: str = key(
        "",
        "folder of the loggers' files (trackio has its own, TRACKIO_DIR; mlflow writes none where MLFLOW_TRACKING_URI says a place); empty: "
        "dump_folder, for tensorboard tensorboard/ in it",
    )
    project: str = key("spectitan", "wandb and trackio: project; mlflow: experiment")


@dataclass
class Compile:
    enabled: str = key(
        "auto",
        "torch.compile of base, speculator and losses: auto where a GPU is found, or a C++ compiler: on a CPU not the speculator's layers",
        choices=("auto", "true", "false"),
    )


@dataclass
class Eval:
    interval: int = key(0, "steps between evaluations; 0: only at the end", minimum=0)
    interval_epochs: float = key(
        -1.0, "passes over the data between evaluations, or parts of one, instead of eval.interval; -1: by steps", minimum=-1
    )
    at_end: bool = key(True, "measure acceptance and speed after the last step and write report.json")
    prompts: str = key(
        "spectitan:pystdlib",
        'prompts file: JSON lines {"tokens": [ids]} or {"text": ...}; spectitan:NAME ships; none: held-out loss only',
    )
    num_prompts: int = key(-1, "prompts used of the file; -1: all", minimum=-1)
    max_new_tokens: int = key(128, "tokens generated for each prompt", minimum=1)
    temperature: float = key(0.0, "0: greedy", minimum=0)
    batch_size: int = key(8, "prompts decoded together when acceptance is measured; speed is measured at batch 1", minimum=1)
    speed_prompts: int = key(20, "prompts, of those, on which speed is measured; -1: all", minimum=-1)
    loss_samples: int = key(64, "held-out samples for loss and accuracy per head; 0: none", minimum=0)
    num_draft_tokens: int = key(-1, "tokens drafted in a round; -1: as many as the speculator was trained for", minimum=-1)
    top_k_tokens_per_head: list[int] = key(
        [], "measure a tree of candidates too: likeliest tokens that each draft step continues with; empty: the chain alone", minimum=1
    )
    n_candidates: int = key(-1, "chains of that tree that are verified, the likeliest; -1: 5, or all if they are fewer", minimum=-1)


@dataclass
class Export:
    format: str = key(
        "auto",
        "mlp_speculator: IBM's layout; arctic: ArcticInference's; verl: VERL's checkpoints; speculators: vLLM's; auto: of these the first that holds the "
        "speculator (a base alone: hf; one trained with its speculator: hf, in <export.path>_base); hf: the base in Hugging Face layout; none",
        choices=("auto", "mlp_speculator", "arctic", "verl", "speculators", "hf", "none"),
    )
    path: str = key("", "folder to write; empty: dump_folder/export")
    base_name: str = key("", "name of the base that the folder carries; empty: _name_or_path of its config, else its folder's name")


@dataclass
class Generate:
    prompt: str = key("", "text to continue")
    prompt_file: str = key("", "file with one prompt a line")
    max_new_tokens: int = key(128, "tokens to generate", minimum=1)
    temperature: float = key(0.0, "0: greedy", minimum=0)
    top_k: int = key(0, "sample from the k most likely tokens; 0: all", minimum=0)
    batch_size: int = key(1, "prompts decoded together", minimum=1)


@dataclass
class Prepare:
    show: int = key(1, "samples printed, with the tokens that are supervised marked", minimum=0)
    tokenizer_vocab_size: int = key(
        0, "train a byte-level BPE tokenizer of this size on the data and write it into base.path; 0: use the one there", minimum=0
    )
    num_prompts: int = key(0, "cut this many evaluation prompts from the held-out text and write them to eval.prompts; 0: none", minimum=0)
    token_freq: str = key(
        "", "file to write, ending in .pt: how often each token is a target, {token id: count}, as speculators' token_freq.pt; empty: none"
    )
    generate: str = key(
        "",
        "JSONL file to write: prompts cut from the text and what the base samples after them, by the keys of [stage2]; what is there of "
        "it is continued; empty: none",
    )
    generate_samples: int = key(-1, "samples of the text, of data.seq_length tokens, that prompts are cut from; -1: all, once", minimum=-1)
    generate_start: int = key(0, "place in the order of samples to begin at: so processes write files of their own", minimum=0)
    states: bool = key(
        False,
        "fill states.hidden_states_path with hidden states for all samples of a run with these keys; torchrun and [parallelism] count",
    )


@dataclass
class SpeculatorSelection:
    """The two speculator keys that every family has; the manager merges them with the chosen family's Config."""

    type: str = key("mlp", "family of the drafter; none trains the base alone")
    path: str = key(
        "",
        "trained speculator: an exported folder (or organisation/name of one on Hugging Face's hub), a checkpoint, or a dump_folder. train "
        "starts from its weights, with its keys and a new optimizer (checkpoint.load_path goes on with the old one)",
    )
