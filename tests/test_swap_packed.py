"""Packed rows in swapped transformers models: loss and gradients are those of the pieces apart."""

from __future__ import annotations

from typing import Any

import pytest
import torch

pytest.importorskip("transformers")
from swap_models import make
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import DataCollatorWithFlattening

import attnzoo
from attnzoo import UnsupportedError

LENGTHS = (7, 1, 10, 6)
VARIANTS: dict[str, dict[str, Any]] = {
    "standard": {},
    "sliding_window": {"window": 4},
    "linear": {},
    "retention": {},
    "performer": {"num_features": 8},
    "bigbird": {"block_size": 2},
    "longformer": {"window": 4, "global_tokens": 1},
}
MIXED: Any = {0: ("sliding_window", {"window": 4}), 2: "linear"}


def pieces() -> list[Tensor]:
    generator = torch.Generator().manual_seed(3)
    return [torch.randint(3, 50, (length,), generator=generator) for length in LENGTHS]


def swapped(family: str, variant: Any, **options: Any) -> Any:
    """Two layers in float64, or three where they are mixed."""
    options = {"num_hidden_layers": 2 + isinstance(variant, dict), **options}
    model = make(family, **options).double()
    named = {} if isinstance(variant, dict) else VARIANTS[variant]
    return attnzoo.swap(model, variant, **named)


def collated(**kinds: bool) -> dict[str, Any]:
    rows = [{"input_ids": one.tolist()} for one in pieces()]
    return dict(DataCollatorWithFlattening(return_tensors="pt", **kinds)(rows))


def loss_and_gradients(model: Any, total: Tensor) -> tuple[Tensor, list[Tensor]]:
    model.zero_grad()
    total.backward()
    return total.detach(), [x.grad.clone() for x in model.parameters() if x.grad is not None]


def loss_of(logits: Tensor, labels: Tensor) -> Tensor:
    """As transformers' models count it, in float64: the sum over the tokens predicted."""
    return cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), reduction="sum")


def apart(model: Any) -> tuple[Tensor, list[Tensor]]:
    """Pieces that are run one by one."""
    losses = [loss_of(model(input_ids=one[None]).logits, one[None]) for one in pieces()]
    return loss_and_gradients(model, torch.stack(losses).sum())


def agree(found: Any, wanted: Any) -> None:
    torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-12)


def packed_is_apart(model: Any, inputs: dict[str, Any]) -> None:
    labels = inputs.pop("labels")
    agree(loss_and_gradients(model, loss_of(model(**inputs).logits, labels)), apart(model))


#: What is given beside the tokens and the positions that start again.
WAYS: dict[str, dict[str, Any]] = {
    "neither mask nor cache": {"use_cache": False},
    "a cache": {},
    "a mask of ones": {"attention_mask": torch.ones(1, sum(LENGTHS), dtype=torch.long)},
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("variant", [*VARIANTS, "mixed"])
def test_positions_that_start_again(variant: str, way: str) -> None:
    model = swapped("llama", MIXED if variant == "mixed" else variant)
    packed_is_apart(model, {**collated(), **WAYS[way]})


@pytest.mark.parametrize("variant", ["standard", "linear"])
@pytest.mark.parametrize("family", ["gpt2", "mistral", "qwen3", "qwen2"])
@pytest.mark.parametrize("way", WAYS)
def test_families(family: str, variant: str, way: str) -> None:
    packed_is_apart(swapped(family, variant), {**collated(), **WAYS[way]})


@pytest.mark.parametrize("variant", ["own", "swapped"])
@pytest.mark.parametrize("way", WAYS)
def test_a_window_of_the_models_own(variant: str, way: str) -> None:
    chosen = ("sliding_window", {"window": 4})
    model = swapped(
        "mistral",
        {1: chosen} if variant == "own" else dict.fromkeys(range(3), chosen),
        sliding_window=4,
    )
    packed_is_apart(model, {**collated(), **WAYS[way]})


@pytest.mark.parametrize("variant", ["standard", "performer", "mixed"])
@pytest.mark.parametrize("kind", ["return_flash_attn_kwargs", "return_seq_idx"])
@pytest.mark.parametrize("mask", [False, True])
def test_what_the_flattening_collator_tells(variant: str, kind: str, mask: bool) -> None:
    """Beside positions that go on over the pieces, in a model to which they say nothing."""
    model = swapped("gpt2", MIXED if variant == "mixed" else variant)
    torch.nn.init.zeros_(model.transformer.wpe.weight)
    inputs = collated(**{kind: True, "return_position_ids": False})
    inputs.pop("labels")
    if mask:
        inputs["attention_mask"] = torch.ones(1, sum(LENGTHS), dtype=torch.long)
    wanted = [model(input_ids=one[None]).logits for one in pieces()]
    agree(model(**inputs).logits, torch.cat(wanted, 1))


@pytest.mark.parametrize("variant", ["standard", "linear", "sliding_window"])
def test_a_state_reads_a_packed_row_and_goes_on_with_its_last_piece(variant: str) -> None:
    model = swapped("llama", variant)
    inputs, last = collated(), pieces()[-1]
    inputs.pop("labels")
    cache = attnzoo.state_cache(model)
    found = model(**inputs, past_key_values=cache).logits
    agree(found, torch.cat([model(input_ids=one[None]).logits for one in pieces()], 1))
    step = {"position_ids": torch.tensor([[len(last)]]), "past_key_values": cache}
    longer = model(input_ids=torch.cat([last, last[:1]])[None]).logits
    agree(model(input_ids=last[None, :1], **step).logits, longer[:, -1:])


@pytest.mark.parametrize("variant", ["standard", "sliding_window", "retention", "mixed"])
@pytest.mark.parametrize("positions", [0, 1])
def test_padding_behind_and_between(variant: str, positions: int) -> None:
    """Two rows as TRL packs them, filled up with padding whose positions are all one number."""
    model = swapped("llama", MIXED if variant == "mixed" else variant)
    first, _, second, third = pieces()
    pad = torch.zeros(2, dtype=torch.long)
    ids = torch.stack([torch.cat([first, second, pad]), torch.cat([third, pad, third[:4], first])])
    mask = ids != 0
    ranges = [torch.arange(n) for n in (7, 10, 6, 4, 7)]
    fill = torch.full((2,), positions)
    where = torch.stack([torch.cat([*ranges[:2], fill]), torch.cat([ranges[2], fill, *ranges[3:]])])
    out = model(input_ids=ids, attention_mask=mask.long(), position_ids=where).logits
    wanted = [
        model(input_ids=one[None]).logits[0] for one in (first, second, third, third[:4], first)
    ]
    agree(out[mask], torch.cat(wanted))


@pytest.mark.parametrize("variant", ["standard", "sliding_window", "linear", "mixed"])
@pytest.mark.parametrize("cache", ["own", "state"])
def test_ordinary_positions_are_no_packing(variant: str, cache: str) -> None:
    """Left-padded, whose positions repeat on the padding, read at once, in chunks and by steps."""
    model = swapped("llama", MIXED if variant == "mixed" else variant)
    ids = torch.stack([pieces()[2], pieces()[2].roll(2)])
    mask = torch.ones_like(ids)
    mask[1, :4] = 0
    for fill in (0, 1):
        positions = (mask.cumsum(-1) - 1).masked_fill(mask == 0, fill)
        whole = model(input_ids=ids, attention_mask=mask, position_ids=positions).logits
        past = attnzoo.state_cache(model) if cache == "state" else None
        found = []
        for begin, end in ((0, 5), (5, 8), (8, 9), (9, 10)):
            out = model(
                input_ids=ids[:, begin:end],
                attention_mask=mask[:, :end],
                position_ids=positions[:, begin:end],
                past_key_values=past,
                use_cache=True,
            )
            past = out.past_key_values
            found.append(out.logits)
        agree(torch.cat(found, 1)[mask.bool()], whole[mask.bool()])
        agree(whole[1, 4:], model(input_ids=ids[1:, 4:]).logits[0])


@pytest.mark.parametrize("variant", ["standard", "linear", "mixed"])
def test_a_packed_row_goes_into_no_cache_that_holds_tokens(variant: str) -> None:
    model = swapped("llama", MIXED if variant == "mixed" else variant)
    for cache in (None, attnzoo.state_cache(model)):
        past = model(input_ids=pieces()[0][None], past_key_values=cache).past_key_values
        with pytest.raises(UnsupportedError, match="must be read in one forward"):
            model(**collated(), past_key_values=past)


def gpt_bigcode() -> Any:
    """A model that does not tell its attention the positions."""
    import transformers as hf

    torch.manual_seed(0)
    sizes: dict[str, Any] = {
        "vocab_size": 50,
        "n_embd": 32,
        "n_layer": 2,
        "n_head": 4,
        "attn_pdrop": 0.0,
    }
    return hf.GPTBigCodeForCausalLM(hf.GPTBigCodeConfig(**sizes)).double().eval()


def test_a_model_that_hides_the_positions_from_its_attention() -> None:
    model = attnzoo.swap(gpt_bigcode(), {0: "linear"})
    packed_is_apart(model, {**collated(), "use_cache": False})
    for way in ("a cache", "a mask of ones"):
        with pytest.raises(UnsupportedError, match="GPTBigCodeForCausalLM does not hand them"):
            model(**{**collated(), **WAYS[way]})
    ids, mask = collated()["input_ids"], WAYS["a mask of ones"]["attention_mask"]
    for inputs in ({}, {"attention_mask": mask}, {"position_ids": torch.arange(24)[None]}):
        model(ids, **inputs)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"cu_seq_lens_k": None}, "cu_seq_lens_q came without its partner"),
        ({"cu_seq_lens_k": torch.tensor([0, 7, 8, 24, 24])}, "cu_seq_lens_k differ"),
        ({"input_ids": torch.ones(2, 24, dtype=torch.long)}, "one flattened row"),
        (
            {"cu_seq_lens_q": torch.tensor([0, 30]), "cu_seq_lens_k": torch.tensor([0, 30])},
            "ends at 30",
        ),
    ],
)
def test_ends_that_do_not_fit(wrong: dict[str, Any], message: str) -> None:
    inputs = {**collated(return_flash_attn_kwargs=True), **wrong}
    inputs.pop("labels")
    with pytest.raises(ValueError, match=message):
        swapped("llama", "linear")(**inputs)


def compiled(model: Any) -> Any:
    torch._dynamo.reset()
    return torch.compile(model, fullgraph=True, backend="aot_eager")


@pytest.mark.thorough
def test_one_graph() -> None:
    """Without a mask, packed or not; beside a mask, a graph cannot read the positions and refuses
    those that start again."""
    model = swapped("llama", "linear", num_hidden_layers=1)
    graph, inputs = compiled(model), {**collated(), "use_cache": False}
    inputs.pop("labels")
    ordinary = {**inputs, "position_ids": torch.arange(24)[None]}
    wanted = model(**inputs).logits
    agree(graph(**inputs).logits, wanted)
    agree(graph(**ordinary).logits, model(**ordinary).logits)
    mask = WAYS["a mask of ones"]
    agree(graph(**ordinary, **mask).logits, model(**ordinary).logits)
    with pytest.raises(RuntimeError, match="position_ids start again"):
        graph(**inputs, **mask)


@pytest.mark.thorough
def test_one_graph_of_ends_of_pieces() -> None:
    model = swapped("llama", "standard", num_hidden_layers=1)
    inputs = {**collated(return_flash_attn_kwargs=True), **WAYS["a mask of ones"]}
    inputs.pop("labels")
    agree(compiled(model)(**inputs, use_cache=False).logits, model(**inputs).logits)


@pytest.mark.thorough
def test_one_graph_with_a_window_of_the_models_own() -> None:
    own = {1: ("sliding_window", {"window": 4})}
    model = swapped("mistral", own, sliding_window=4, num_hidden_layers=2)
    inputs = {**collated(), "use_cache": False}
    inputs.pop("labels")
    agree(compiled(model)(**inputs).logits, model(**inputs).logits)


def test_others_are_refused_in_a_graph() -> None:
    model = swapped("llama", "bigbird", num_hidden_layers=1)
    with pytest.raises(Exception, match="unless it is given an attention_mask"):
        compiled(model)(collated()["input_ids"], use_cache=False)


def test_a_gradient_of_functional_calls() -> None:
    """torch.func, where a condition is read beneath what is wrapped."""
    model = swapped("llama", "standard")
    parameters = dict(model.named_parameters())
    for inputs in ({**collated(), "use_cache": False}, {**collated(), **WAYS["a mask of ones"]}):
        labels = inputs.pop("labels")

        def loss(values: Any, inputs: Any = inputs, labels: Tensor = labels) -> Tensor:
            return loss_of(torch.func.functional_call(model, values, (), inputs).logits, labels)

        found = torch.func.grad(loss)(parameters)
        agree([found[name] for name in parameters], apart(model)[1])


@pytest.mark.parametrize("variant", ["standard", "linear", "sliding_window", "longformer", "mixed"])
@pytest.mark.parametrize("kind", ["bool", "float"])
def test_masks_of_blocks(variant: str, kind: str) -> None:
    """A caller's own 4-D mask of causality and packing, and of causality and padding."""
    model = swapped("llama", MIXED if variant == "mixed" else variant)
    inputs = collated()
    labels, where = inputs.pop("labels"), inputs["position_ids"]
    ids = where.eq(0).cumsum(-1)
    visible = (ids[:, :, None] == ids[:, None]).tril()[:, None]

    def given(visible: Tensor) -> Tensor:
        low = torch.finfo(torch.float64).min
        added = torch.zeros(visible.shape, dtype=torch.float64).masked_fill(~visible, low)
        return visible if kind == "bool" else added

    out = model(**inputs, attention_mask=given(visible))
    agree(loss_and_gradients(model, loss_of(out.logits, labels)), apart(model))
    rows = inputs["input_ids"].expand(2, -1)
    mask = torch.ones_like(rows)
    mask[1, :5] = 0
    padded = (mask.bool()[:, None] & torch.ones(24, 24, dtype=torch.bool).tril())[:, None]
    found = model(rows, attention_mask=given(padded)).logits
    agree(found[mask.bool()], model(rows, attention_mask=mask).logits[mask.bool()])


def test_a_mask_that_was_read_and_changed_is_read_again() -> None:
    model = swapped("llama", "linear")
    ids = pieces()[2][None]
    mask = torch.ones(1, 1, 10, 10, dtype=torch.bool).tril()
    agree(model(ids, attention_mask=mask).logits, model(ids).logits)
    mask[..., 5:, :5] = False
    wanted = torch.cat(
        [model(ids[:, :5]).logits, model(ids, attention_mask=mask.clone()).logits[:, 5:]], 1
    )
    agree(model(ids, attention_mask=mask).logits, wanted)
    mask[..., 7, 2] = True
    with pytest.raises(UnsupportedError, match="more than causality, padding and packing"):
        model(ids, attention_mask=mask)


def test_a_mask_with_the_window_of_the_models_own() -> None:
    """It says what the attention knows already, over packed pieces."""
    chosen = ("sliding_window", {"window": 4})
    model = swapped("mistral", dict.fromkeys(range(3), chosen), sliding_window=4)
    inputs = collated()
    labels = inputs.pop("labels")
    ids, slots = inputs["position_ids"].eq(0).cumsum(-1), torch.arange(sum(LENGTHS))
    near = (slots[:, None] - slots) < 4
    visible = (ids[:, :, None] == ids[:, None]).tril()[:, None]
    for mask in (visible, visible & near):
        out = model(**inputs, attention_mask=mask)
        agree(loss_and_gradients(model, loss_of(out.logits, labels)), apart(model))
    with pytest.raises(UnsupportedError, match="more than causality, padding and packing"):
        model(**inputs, attention_mask=visible & ((slots[:, None] - slots) < 3))
