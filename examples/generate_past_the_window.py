"""SmolLM2 with a window and attention sinks, generating past its window from a bounded state.

Every layer sees the last `window` tokens and the first four. Nothing is trained: the sinks keep
what the model puts on its first token. The state stops growing where the window is full.
"""

from __future__ import annotations

import argparse
import time

import torch

import attnzoo
from attnzoo.fidelity.pretrained import load
from attnzoo.texts.plays import play


def perplexity(model, ids: torch.Tensor) -> float:
    """Of a text, (1, length)."""
    with torch.no_grad():
        return float(model(input_ids=ids, labels=ids, use_cache=False).loss.exp())


def main(arguments: list[str] | None = None) -> None:
    """Measure perplexity by windows with and without sinks, then generate."""
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--window", type=int, default=128)
    parser.add_argument("--tokens", type=int, default=40, help="new ones")
    parser.add_argument("--quick", action="store_true", help="a short text and few tokens")
    given = parser.parse_args(arguments)
    window, read, new = (16, 48, 4) if given.quick else (given.window, 512, given.tokens)
    torch.manual_seed(0)

    pretrained = load("SmolLM2-135M")
    model, tokenizer = pretrained.model, pretrained.tokenizer
    ids = tokenizer(play("hamlet")[:20_000], return_tensors="pt")["input_ids"][:, :read]
    print(f"exact attention: perplexity {perplexity(model, ids):.1f} of {read} tokens of Hamlet")
    for sinks in (0, 4):
        attnzoo.swap(model, "sliding_window", window=window, sinks=sinks)
        print(f"window of {window}, {sinks} sinks: perplexity {perplexity(model, ids):.1f}")
        if not sinks:
            attnzoo.unswap(model)

    prompt = ids[:, : read // 2]
    cache = attnzoo.state_cache(model)
    started = time.monotonic()
    tokens = model.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        max_new_tokens=new,
        do_sample=True,
        top_p=0.9,
        past_key_values=cache,
        pad_token_id=tokenizer.eos_token_id,
    )
    seconds = time.monotonic() - started
    core = next(one for one in model.modules() if isinstance(one, attnzoo.Attention))
    kept = core.cost(1, tokens.shape[1], is_causal=True).state_bytes / 2**10
    exact = attnzoo.build("standard", core.heads, core.head_dim).cost(
        1, tokens.shape[1], is_causal=True
    )
    print(
        f"{prompt.shape[1]} tokens read and {new} generated in {seconds:.1f} s; a layer's state is "
        f"{kept:.0f} KiB with as many key heads as heads, exact attention's "
        f"{exact.state_bytes / 2**10:.0f} KiB and growing"
    )
    print(tokenizer.decode(tokens[0, -new:]))


if __name__ == "__main__":
    main()
