"""A swapped model trained under accelerate, on as many processes as it is started with.

    torchrun --nproc-per-node 2 examples/several_processes.py

On a CPU start it with torchrun: `accelerate launch --cpu` starts one process, whatever
--num_processes says. On GPUs `accelerate launch` does.
"""

from __future__ import annotations

import argparse
from typing import Any

import torch
from accelerate import Accelerator
from torch.utils.data import DataLoader, TensorDataset
from transformers import BertConfig, BertForSequenceClassification

import attnzoo

LENGTH, WORDS = 40, 50


def examples(count: int) -> TensorDataset:
    """Sequences of words; the label says whether the word 2 is among them."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, WORDS, (count, LENGTH), generator=generator)
    places = torch.randint(1, LENGTH, (count,), generator=generator)
    labels = torch.randint(2, (count,), generator=generator)
    rows = labels.nonzero().flatten()
    ids[rows, places[rows]] = 2
    return TensorDataset(ids, labels)


def main(arguments: list[str] | None = None) -> None:
    """Swap before `prepare`, train, and count right answers over all processes."""
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--attention", default="longformer", help="any bidirectional variant")
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--quick", action="store_true", help="one epoch of 64 sequences")
    given = parser.parse_args(arguments)
    count, epochs = (64, 1) if given.quick else (1024, given.epochs)
    torch.manual_seed(0)

    accelerator = Accelerator(cpu=not torch.cuda.is_available())
    model = BertForSequenceClassification(
        BertConfig(
            vocab_size=WORDS,
            hidden_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            intermediate_size=128,
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
        )
    )
    options: dict[str, Any] = {}
    if given.attention == "longformer":  # the first word sees all others
        options = {"window": 4, "global_tokens": 1}
    attnzoo.swap(model, given.attention, **options)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    data = DataLoader(examples(count), batch_size=32, shuffle=True)
    model, optimizer, data = accelerator.prepare(model, optimizer, data)

    for epoch in range(epochs):
        right = seen = 0
        for ids, labels in data:
            answer = model(input_ids=ids, labels=labels)
            accelerator.backward(answer.loss)
            optimizer.step()
            optimizer.zero_grad()
            hits, all_labels = accelerator.gather_for_metrics(
                (answer.logits.argmax(1) == labels, labels)
            )
            right, seen = right + int(hits.sum()), seen + len(all_labels)
        accelerator.print(
            f"epoch {epoch}: {right / seen:.1%} of {seen} right, "
            f"{accelerator.num_processes} process(es)"
        )
    accelerator.end_training()


if __name__ == "__main__":
    main()
