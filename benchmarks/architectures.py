"""Every text architecture of transformers that a tiny random model can be built for: does it serve, does LoRA, is its kernel exact?

.venv/bin/python benchmarks/architectures.py                # all; writes results/benchmarks/architectures.json
.venv/bin/python benchmarks/architectures.py bert opt fnet  # some; prints their rows

Each model has about two layers and random weights, is saved as a hub would have it, and is loaded, described, adapted and measured.
The kernel is compared with plain autograd in float64, one example and one class at a time. What cannot be built small, or is
made for images or sound as well, is listed as not tried.
"""

import inspect
import json
import logging
import os
import signal
import sys
import tempfile
import warnings
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"
ROOT = Path(__file__).resolve().parents[1]
TABLE = ROOT / "results" / "benchmarks" / "architectures.json"
LARGEST, SECONDS, KERNEL_PARAMETERS = 30e6, 120, 400_000
LENGTHS = (3, 9, 14)  # tokens of the three examples of a kernel

SPECIAL = dict(pad_token_id=1, bos_token_id=0, eos_token_id=2)
WIDTHS = dict.fromkeys(
    "hidden_size d_model n_embd dim emb_dim embedding_size embed_dim word_embed_proj_dim".split(),
    32,
)
LAYERS = dict.fromkeys(
    "num_hidden_layers num_layers n_layer n_layers encoder_layers decoder_layers num_decoder_layers num_encoder_layers".split(),
    2,
)
HEADS = dict.fromkeys(
    "num_attention_heads n_head n_heads num_heads encoder_attention_heads decoder_attention_heads num_key_value_heads".split(),
    4,
)
INNER = dict.fromkeys(
    "intermediate_size d_ff encoder_ffn_dim decoder_ffn_dim ffn_dim hidden_dim n_inner d_inner".split(),
    64,
)
PARTS = dict.fromkeys(
    "d_kv head_dim d_head rotary_dim qk_rope_head_dim qk_nope_head_dim v_head_dim".split(), 8
)
POSITIONS = dict.fromkeys("max_position_embeddings n_positions n_ctx max_seq_len".split(), 64)
EXPERTS = dict(
    num_experts=4,
    num_local_experts=4,
    n_routed_experts=4,
    n_group=1,
    topk_group=1,
    num_experts_per_tok=2,
    moe_intermediate_size=32,
    shared_expert_intermediate_size=32,
    kv_lora_rank=16,
    q_lora_rank=16,
)
SMALL = (
    dict(vocab_size=100) | SPECIAL | WIDTHS | LAYERS | HEADS | INNER | PARTS | POSITIONS | EXPERTS
)
OWN = {  # what the rule above gets wrong
    "gpt_neo": dict(attention_types=[[["global"], 2]], num_layers=2),
    "mamba2": dict(num_heads=8, head_dim=8, expand=2, n_groups=1, state_size=8),
    "bamba": dict(mamba_n_heads=8, mamba_d_head=8, mamba_n_groups=1, mamba_d_state=8),
    "granitemoehybrid": dict(mamba_n_heads=8, mamba_d_head=8, mamba_n_groups=1, mamba_d_state=8),
    "gptj": dict(n_positions=160),  # these four keep no table that can be looked at
    "codegen": dict(n_positions=160),
    "ctrl": dict(n_positions=160),
    "mpt": dict(max_seq_len=160),
    "reformer": dict(
        max_position_embeddings=160,
        axial_pos_embds_dim=[16, 16],
        axial_pos_shape=[16, 10],
        attn_layers=["local", "lsh"],
    ),
    "xlnet": dict(d_head=8),
    "zaya": dict(num_experts_per_tok=1),
}


def text_architectures() -> list[str]:
    """Model types with a plain backbone and a text task: language model, masked or not, or classifier."""
    from transformers.models.auto import modeling_auto as auto

    tasks = (
        auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
        auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES,
        auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
        auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
    )
    return sorted(name for name in auto.MODEL_MAPPING_NAMES if any(name in task for task in tasks))


def tiny_config(name: str):
    """A configuration with two narrow layers; raises whatever the architecture's own checks raise."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    kind = CONFIG_MAPPING[name]
    default = kind()
    if name != default.model_type:
        raise ValueError(f"another name of {default.model_type}")
    if hasattr(default, "text_config"):
        raise ValueError("made for more than text")
    known, other_names = default.to_dict(), getattr(kind, "attribute_map", {})
    given = {
        other_names.get(key, key): value
        for key, value in SMALL.items()
        if key in known or key in other_names
    }
    return kind(**(given | OWN.get(name, {})))


def save_tiny(name: str, folder: str) -> None:
    """A folder with a tiny random backbone, weights away from their symmetric start; raises ValueError for one too large."""
    import torch
    from transformers import AutoModel

    config = tiny_config(name)
    with torch.device("meta"):
        size = sum(one.numel() for one in AutoModel.from_config(config).parameters())
    if size > LARGEST:
        raise ValueError(f"{size / 1e6:.0f} million parameters however small the layers")
    from lpft_nb.models.backbones import backbone_class

    torch.manual_seed(0)
    try:
        kind = backbone_class(config)
    except ValueError:  # refused by name: saved as it is, and refused again when it is loaded
        kind = type(AutoModel.from_config(config))
    backbone = kind._from_config(config).float()
    with torch.no_grad():
        for parameter in backbone.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
        if kind.main_input_name == "input_ids" and not config.is_encoder_decoder:
            # what transformers cannot run says nothing of us
            backbone.eval()(torch.full((1, 8), 3), **backbone_inputs_of(backbone))
    backbone.save_pretrained(folder)


def backbone_inputs_of(backbone) -> dict:
    """No cache of keys and values: a backbone that reads whole texts needs none, and some small ones cannot make it."""
    return (
        {"use_cache": False}
        if "use_cache" in inspect.signature(backbone.forward).parameters
        else {}
    )


def kernel_error(model) -> float | None:
    """Largest relative error of P and F against autograd in float64; None for a model too large to hold its gradients."""
    import torch

    from lpft_nb.models.encoding import pad_encoded
    from lpft_nb.models.trials import trial_examples
    from lpft_nb.tangent_kernel import tangent_kernel

    if sum(one.numel() for one in model.parameters()) > KERNEL_PARAMETERS:
        return None
    model = model.double()
    examples = trial_examples(model.backbone, LENGTHS)
    found = tangent_kernel(model, pad_encoded(examples), quiet=True)
    rows: tuple[list, list] = ([], [])
    for example in examples:
        logits = model(**pad_encoded([example])).logits[0]
        for logit in logits:
            for part, side in zip((model.head, model.backbone), rows):
                weights = [one for one in part.parameters() if one.requires_grad]
                gradients = torch.autograd.grad(
                    logit, weights, retain_graph=True, allow_unused=True
                )
                flat = [torch.zeros_like(w) if g is None else g for g, w in zip(gradients, weights)]
                side.append(torch.cat([one.flatten() for one in flat]))
    errors = []
    for side, kernel in zip(rows, (found.pretrain_effective, found.ft_effective)):
        jacobian = torch.stack(side)
        truth = (jacobian @ jacobian.T).reshape(kernel.shape)
        errors.append(float((kernel - truth).norm() / truth.norm()))
    return max(errors)


def attempt(action) -> str:
    """Empty where it works, else the first line of what went wrong."""
    try:
        action()
    except Exception as error:
        return f"{type(error).__name__}: {error}".split("\n")[0][:200]
    return ""


def try_one(name: str) -> dict:
    """One row of the table: status, and what follows from it."""
    from lpft_nb.classifier import Classifier, ClassifierError, describe_model
    from lpft_nb.models.lora import add_lora

    row: dict = {"name": name}
    with tempfile.TemporaryDirectory() as folder:
        if reason := attempt(lambda: save_tiny(name, folder)):
            return row | {"status": "not tried", "reason": reason}
        try:
            model = Classifier.from_pretrained(folder, num_labels=2, head_dropout=0.0)
            said = describe_model(folder, num_labels=2)
        except ClassifierError as error:
            return row | {"status": "refused", "reason": str(error)}
        assert said["pooling"] == model.config.pooling and said["max_length"] == model.max_length
        adapted = Classifier.from_pretrained(folder, num_labels=2)
        lora = attempt(lambda: add_lora(adapted, r=2, alpha=2))
    try:
        error, why = kernel_error(model), ""
    except Exception as failure:
        error, why = None, f"{type(failure).__name__}: {failure}".split("\n")[0][:200]
    return row | {
        "status": "works",
        "parameters": said["parameters"],
        "pooling": said["pooling"],
        "positions": model.inputs.position_limit,
        "lora": lora or "works",
        "kernel_error": error,
        "kernel_refused": why,
    }


class TooLong(BaseException):
    """An attempt takes more than SECONDS; nothing on the way may take it for a fault of the model."""


def too_long(*_) -> None:
    """Ends an attempt."""
    raise TooLong(f"more than {SECONDS} s")


def main(names: list[str]) -> None:
    """Try the named architectures, or all of them, and write the table where it is all of them."""
    import torch
    import transformers

    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    signal.signal(signal.SIGALRM, too_long)
    rows = []
    for name in names or text_architectures():
        signal.alarm(SECONDS)
        try:
            rows.append(try_one(name))
        except TooLong as error:
            rows.append({"name": name, "status": "not tried", "reason": str(error)})
        signal.alarm(0)
        print(json.dumps(rows[-1]), flush=True)
    if not names:
        versions = {"transformers": transformers.__version__, "torch": torch.__version__}
        TABLE.write_text(json.dumps({"versions": versions, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main(sys.argv[1:])
