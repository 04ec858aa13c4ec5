"""Writes text from a checkpoint of either architecture.

python generate.py runs/llama-58m/best.pt --prompt "Once upon a time" --tokens 100
"""

import argparse
import sys

import torch

from model import load_checkpoint
from tokenizer import Tokenizer
from training.device import choose_device
from training.io import UserError, run_program
from training.options import Parser


@torch.no_grad()
def generate(model, tokens, num_tokens, temperature=1.0, top_k=0, generator=None, excluded=()):
    """`tokens` (T,) int64 and `num_tokens` more: sampled, or the likeliest ones at temperature 0.

    `top_k` samples from the k likeliest tokens (0: from all), and never one of the ids `excluded`.
    The model reads the last `max_position_embeddings` tokens.
    """
    device = next(model.parameters()).device
    context = model.config.max_position_embeddings
    tokens = tokens.to(device)
    for _ in range(num_tokens):
        logits = model(tokens[None, -context:])[0, -1].float()  # (V,)
        logits[list(excluded)] = -torch.inf
        if top_k:
            threshold = logits.topk(min(top_k, len(logits))).values[-1]
            logits[logits < threshold] = -torch.inf
        if temperature == 0:
            sampled = logits.argmax()[None]
        else:
            # On the CPU, so that a seed gives the same text on every device.
            probabilities = torch.softmax(logits.cpu() / temperature, dim=-1)
            sampled = torch.multinomial(probabilities, 1, generator=generator).to(device)
        tokens = torch.cat((tokens, sampled))
    return tokens.cpu()


def complete(model, tokenizer, prompt, num_tokens, temperature=0.8, top_k=0, seed=0):
    """The prompt with the model's continuation, as text."""
    # Training text has no special tokens, and an imported model may have more logits than pieces.
    excluded = [*tokenizer.special_ids, *range(tokenizer.vocabulary_size, model.config.vocab_size)]
    # Every sentence of the training text follows a newline. It is removed at the end.
    tokens = generate(
        model,
        torch.tensor(tokenizer.encode("\n" + prompt)),
        num_tokens,
        temperature=temperature,
        top_k=top_k,
        generator=torch.Generator().manual_seed(seed),
        excluded=excluded,
    )
    return tokenizer.decode(tokens.tolist()).removeprefix("\n")


def main(argv=None):
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.reads_files = False  # a prompt may begin with @
    add = parser.add_argument
    add("checkpoint", metavar="CHECKPOINT")
    add("--prompt", required=True, metavar="TEXT", help="beginning of the text")
    add("--tokens", type=int, default=100, help="number of tokens to write (default: 100)")
    add("--temperature", type=float, default=0.8, help="0: always the likeliest token (default: 0.8)")
    add("--top-k", type=int, default=0, help="sample from the k likeliest tokens; 0: all (default: 0)")
    add("--seed", type=int, default=0, help="random seed (default: 0)")
    add("--device", default="auto", help="auto, cuda, mps or cpu (default: auto)")
    args = parser.parse_args(argv)
    if args.tokens < 0 or args.top_k < 0 or not 0 <= args.seed < 1 << 63:
        parser.error("--tokens, --top-k and --seed must be 0 or more, --seed less than 2^63")
    if not (args.temperature == 0 or 0.01 <= args.temperature <= 100):
        parser.error("--temperature must be 0, or between 0.01 and 100")
    if not args.prompt:
        raise UserError("--prompt is empty: give at least one character")
    try:
        args.prompt.encode()
    except UnicodeEncodeError as error:
        raise UserError("--prompt is not UTF-8: convert it first") from error
    model, checkpoint = load_checkpoint(args.checkpoint)
    model.to(choose_device(args.device))
    tokenizer = Tokenizer.of_checkpoint(checkpoint, args.checkpoint)
    print(complete(model, tokenizer, args.prompt, args.tokens, args.temperature, args.top_k, args.seed))


if __name__ == "__main__":
    sys.exit(run_program(main))
