"""The original's objective on Hugging Face's models: the reference of tests and benchmarks."""

import tempfile
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

import export_hf
from model import architecture


def hugging_face_model(model, weights=True, device="cpu"):
    """Returns transformers' model of the same shape, in eval mode, with the same weights if `weights`.

    Its attention is eager on a CPU, as in the version that the original ran with. On CUDA it is
    PyTorch's fused one, which is the default of transformers today.
    """
    import transformers  # here, because it takes seconds and few tests need it

    kind, device = architecture(model.config), torch.device(device)
    fields = export_hf.hf_config(model, kind)
    for key in ("architectures", "torch_dtype", "dtype"):
        del fields[key]
    config = transformers.AutoConfig.for_model(**fields)
    attention = "sdpa" if device.type == "cuda" else "eager"
    with device:
        reference = transformers.AutoModelForCausalLM.from_config(config, attn_implementation=attention)
    if weights:
        tensors = export_hf.hf_weights(kind, model.state_dict())
        missing, unexpected = reference.load_state_dict(tensors, strict=False)
        assert not unexpected and set(missing) <= {"lm_head.weight"}
        assert not missing or reference.lm_head.weight is reference.get_input_embeddings().weight
    return reference.to(device).eval()


@torch.no_grad()
def hugging_face_class_logits(path, texts, max_length):
    """Returns the logits (N, classes) of a classifier's checkpoint, exported and read by transformers.

    `texts` has N tuples of one or two texts.
    """
    import transformers

    with tempfile.TemporaryDirectory() as folder:
        exported = Path(folder) / "hf"
        export_hf.export(path, exported)
        tokenizer = transformers.AutoTokenizer.from_pretrained(exported)
        model = transformers.AutoModelForSequenceClassification.from_pretrained(exported).eval()
    options = {"truncation": True, "max_length": max_length, "padding": True, "return_tensors": "pt"}
    return model(**tokenizer(*map(list, zip(*texts)), **options)).logits


def original_loss(student, teachers, ids, alpha=0.5, temperature=2.0):
    """Returns the original's loss of token ids (B, T): its labels are shifted inside of the student.

    The teachers' logits are averaged, and `batchmean` sums the KL over positions. Models are those of
    transformers.
    """
    output = student(ids, labels=ids)
    with torch.no_grad():
        teacher_logits = torch.stack([teacher(ids).logits for teacher in teachers]).mean(dim=0)  # (B, T, V)
    kl = nn.KLDivLoss(reduction="batchmean")(
        F.log_softmax(output.logits / temperature, dim=-1),
        F.softmax(teacher_logits / temperature, dim=-1),
    )
    return alpha * output.loss + (1 - alpha) * temperature**2 * kl


def original_step(model, loss, compiled):
    """Returns `step(batch)`: a training step of transformers' model on `loss(ids)`, as its Trainer takes it.

    On CUDA fp16 with loss scaling, elsewhere float32. If `compiled`, bfloat16 and fused AdamW.
    """
    device = next(model.parameters()).device
    cuda = device.type == "cuda"
    optimizer = torch.optim.AdamW(model.parameters(), 1e-4, fused=True if compiled else None)
    scaler = torch.amp.GradScaler(enabled=cuda and not compiled)
    half = torch.bfloat16 if compiled else torch.float16

    def step(batch):
        with torch.autocast(device.type, half, enabled=compiled or cuda):
            value = loss(batch.tokens)
        scaler.scale(value).backward()
        scaler.unscale_(optimizer)
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()

    return step
